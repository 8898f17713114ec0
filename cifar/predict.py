"""What is in a picture, by a network that comes trained or one of yours: its five likeliest classes.

    python cifar/predict.py cat.jpg FOLDER --network resnet20_if_cifar10
    python cifar/predict.py cat.jpg --network checkpoint/imagefolder/preresnet.resnet18_lif.pth

With the spikes that this picture makes and an estimate of their energy, beside that of the ANN of the same
shape (utils/report.py says what is counted). Pictures may have any size: the largest square in the middle is
shown to the network at 32x32; to one that you have trained on an imagefolder all of it, squeezed, as there.
The networks that come trained were so on a JPEG copy of CIFAR-10 (checkpoint/README.md).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS

from cifar.program import get_parser as training_parser
from models import create_model
from models.registry import NETWORKS
from utils import checkpoint, foreign
from utils.cli import Parser, require, run_program
from utils.data import SQUEEZED, read_image
from utils.pretrained import SEE
from utils.program import build_model
from utils.report import Measurement


def load_network(content, source, classes, **settings):
    """The network of a checkpoint's `content`, read from `source`, on the CPU; `settings` replace its own."""
    args = training_parser().parse([])
    vars(args).update(content["args"], compile=False, sync_bn=False, engine="auto", **settings)
    model = build_model(args, classes, "cpu", create_model)
    checkpoint.load_weights(model, content["state_dict"], source)
    return model.eval()


def pictures(names):
    """The files among `names`, and those of the folders among them."""
    for name in map(Path, names):
        if not name.is_dir():
            yield name
            continue
        found = sorted(f for f in name.rglob("*") if f.suffix.lower() in IMG_EXTENSIONS and f.is_file())
        require(found, f"no pictures in {name}; known are {', '.join(IMG_EXTENSIONS)}")
        yield from found


@torch.no_grad()
def predict(model, classes, file, see):
    """Print what the model sees in the picture `file` through the transform `see`, and what that costs."""
    image = see(ImageOps.exif_transpose(read_image(file)))[None]  # upright, as viewers show it
    likeliest = model(image).softmax(1)[0].topk(min(5, len(classes)))
    found = zip(likeliest.values.tolist(), likeliest.indices.tolist())
    print(f"{file}: " + ", ".join(f"{classes[label]} {100 * p:.1f} %" for p, label in found))
    m = Measurement(model, [(image, likeliest.indices[:1])], timed=False)
    spikes = f"{m.spikes:.0f} spikes, {100 * m.overall:.1f} % of what could fire"
    print(f"    {spikes}; {m.energy:.2f} µJ, the ANN of the same shape {m.dense_energy:.1f} µJ (estimates)")


def get_parser():
    parser = Parser({}, description=__doc__)
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="image files, or folders of them")
    text = "one that comes trained, or the checkpoint of an SNN that cifar/main_single_gpu.py has trained"
    parser.add_argument("--network", metavar="NAME", default="resnet20_lif_cifar10", help=text)
    return parser


def main(argv=None):
    args = get_parser().parse_args(argv)
    names = sorted(file.stem for file in checkpoint.PRETRAINED.glob("*.pth"))
    unknown = f"no network {args.network!r} comes trained, and no file is called so; choose a file or one of"
    require(args.network in names or Path(args.network).is_file(), f"{unknown}: {', '.join(names) or '-'}")
    source = checkpoint.find(args.network, checkpoint.PRETRAINED)
    content = foreign.load_run(source, "acc")
    classes, made = content.get("classes"), content["args"]
    entry, images = NETWORKS.get(str(made.get("model"))), made.get("dataset") in ("cifar10", "imagefolder")
    fit = f"{source} is not of an SNN trained on images (cifar10 or imagefolder); choose one that is"
    require(entry and entry.kind != "ann" and images, fit)
    named = isinstance(classes, list) and all(map(foreign.is_plain, classes))
    require(named, f"{source} does not name its classes; train it with this version, an epoch is enough")
    model = load_network(content, source, len(classes), backward="unrolled")
    trained_on = made.get("trained_on", f"{made['dataset']} from {made.get('path')}")
    about = f"{made['model']}, T={model.timesteps}, trained on {trained_on}"
    right = f"{foreign.number(content.get('acc')):.2f} % right there"
    print(f"{source.stem}: {about}, {'stopped within an epoch' if content['iteration'] else right}")
    own = made["dataset"] == "imagefolder" and "trained_on" not in made  # which its test saw squeezed
    for file in pictures(args.pictures):
        predict(model, classes, file, SQUEEZED if own else SEE)


if __name__ == "__main__":
    run_program(main)
