"""Train on ImageNet in three stages: an ANN, its activations to thresholds, an SNN that starts from both.

    python imagenet/main.py --arch preresnet_ann.resnet18 --data ./data/imagenet --name model_ann
        --optimizer SGD --wd 1e-4 --batch-size 256 --lr 0.1
    python imagenet/main.py --arch preresnet_cal_Vth.resnet18 --data ./data/imagenet --pre_train model_ann.pth
        --calculate_Vth resnet18_Vth
    python imagenet/main.py --dist-url tcp://127.0.0.1:20500 --dist-backend nccl --multiprocessing-distributed
        --world-size 1 --rank 0 --arch preresnet_snn.resnet18_if --data ./data/imagenet
        --pre_train model_ann.pth --load_Vth resnet18_Vth.dict

Also under torchrun. Several machines: --world-size M --rank 0 to M-1, with one --dist-url tcp://HOST:PORT.
"""

import math
import os
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch.utils.data import Subset  # noqa: E402

from imagenet.presets import PRESETS  # noqa: E402
from models import create_model, list_models  # noqa: E402
from models.engines import ENGINES  # noqa: E402
from models.layers import BACKWARDS  # noqa: E402
from models.registry import IMAGENET_SETTINGS  # noqa: E402
from utils import checkpoint, distributed  # noqa: E402
from utils.calibration import calibrate, load_thresholds  # noqa: E402
from utils.cli import Parser, UserError, choose_device, number, run_program  # noqa: E402
from utils.data import imagenet, loader, unaugmented  # noqa: E402
from utils.program import LAUNCHING, add_flags, count, natural, run  # noqa: E402
from utils.records import RunFiles  # noqa: E402


def get_parser():
    """The published flags with their defaults, and ours."""
    parser = Parser(PRESETS, description=__doc__)
    add = parser.add_argument
    add("--data", dest="path", default="./data/imagenet", help="folder with train/<class>/ and val/<class>/")
    models = [name for name in list_models() if name.startswith("preresnet_")]
    text = "one of: " + ", ".join(models)
    add(
        "-a",
        "--arch",
        dest="model",
        choices=models,
        metavar="NAME",
        default="preresnet_snn.resnet18_if",
        help=text,
    )
    add("-b", "--batch-size", dest="train_batch", type=count, default=144, help="of all processes together")
    add("-p", "--print-freq", type=natural, help="iterations between two lines of progress")
    seed = number(int, 0, high=2**63 - 1)
    add("--seed", dest="manualSeed", type=seed, help="of everything random; drawn and recorded if not given")
    add("--image_size", type=number(int, 32), default=224, help="images are cut out at this size")
    add("--pre_train", default="", metavar="FILE", help="weights to start from")
    add("--calculate_Vth", default="", metavar="NAME", help="write thresholds from --pre_train to NAME.dict")
    add("--load_Vth", default="", metavar="FILE", help="thresholds to start from")
    add("--calibrate_batches", type=count, default=5, help="batches that --calculate_Vth looks at")
    text = "images that --calculate_Vth looks at (the official code: val)"
    add("--calibrate_split", choices=("train", "val"), default="train", help=text)
    add("--world-size", type=int, default=-1, help="number of machines")
    add("--rank", type=int, default=-1, help="number of this machine, from 0")
    add(
        "--dist-url",
        default="tcp://224.66.41.62:23456",
        help="where the processes meet: tcp://HOST:PORT or env://",
    )
    add("--dist-backend", choices=("nccl", "gloo"), default="nccl", help="without GPUs always gloo")
    add("--gpu", type=natural, help="use this GPU alone")
    text = "start the processes of this machine: one for each GPU, or --cpu_processes without one"
    add("--multiprocessing-distributed", action="store_true", help=text)
    add("--local_rank", "--local-rank", type=int, help="set by torch.distributed.launch")
    add("--cpu_processes", type=count, default=2, help="processes on a machine without GPUs")
    neurons = {name: value for name, value in IMAGENET_SETTINGS.items() if name != "num_classes"}
    training = dict(epochs=90, lr=0.001, warmup=5000, weight_decay=0.0, optimizer="adam", save_every=1000)
    training.update(print_freq=1000, warmup_within_first_epoch=True)
    add_flags(parser, BACKWARDS, ENGINES, **neurons, **training)
    return parser


def main(argv):
    """Train, evaluate or calibrate as the flags say. Raises UserError."""
    args = get_parser().parse(argv)
    found = torch.cuda.device_count()
    if args.gpu is not None and args.gpu >= found:
        raise UserError(f"--gpu {args.gpu}: this machine has {found} CUDA devices; leave it out")
    device = choose_device(args.device if args.gpu is None else f"cuda:{args.gpu}")
    several = (args.multiprocessing_distributed or args.world_size > 1) and not args.calculate_Vth
    if several and "LOCAL_RANK" not in os.environ:
        launch(sys.argv[1:] if argv is None else argv, args, device)
        return
    device = distributed.join(device, args.dist_backend)
    for name in LAUNCHING:
        delattr(args, name)
    args.test_batch = args.train_batch
    files = RunFiles(Path(args.checkpoint, "imagenet"), args.name or args.model, accuracy="acc1")
    data = partial(imagenet, Path(args.path), args.image_size)
    if args.calculate_Vth:
        calculate_thresholds(args, files.folder, device, data())
        return

    def prepare(model):
        if args.pre_train:
            path = checkpoint.find(args.pre_train, files.folder)
            checkpoint.load_weights(model, checkpoint.load(path)["state_dict"], path, optional=("Vth",))
        if args.load_Vth:
            load_thresholds(model, checkpoint.find(args.load_Vth, files.folder))
        return bool(args.pre_train)

    run(args, files, device, data, create_model, prepare)


def launch(argv, args, device):
    """Start this machine's processes, each with these flags, through torchrun's engine."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    machines, machine, url = args.world_size, args.rank, args.dist_url
    if url == "env://":
        env = os.environ
        machines, machine = int(env.get("WORLD_SIZE", machines)), int(env.get("RANK", machine))
        url = f"tcp://{env.get('MASTER_ADDR', '127.0.0.1')}:{env.get('MASTER_PORT', 29500)}"
    given = "--dist-url" in " ".join(argv)
    host, _, port = url.removeprefix("tcp://").rpartition(":")
    if not (url.startswith("tcp://") and host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"--dist-url {args.dist_url} must be tcp://HOST:PORT or env://")
    if machines > 1 and not (0 <= machine < machines and given):
        raise UserError(
            f"--world-size {machines} needs --rank 0 to {machines - 1} and --dist-url tcp://HOST:PORT"
        )
    if machines <= 1 and machine > 0:
        raise UserError(f"--rank {machine} needs a --world-size above it")
    processes = 1
    if args.multiprocessing_distributed:
        processes = torch.cuda.device_count() if device.type == "cuda" else args.cpu_processes
    where = ["--standalone"]
    if given:
        where = ["--nnodes", str(max(machines, 1)), "--node_rank", str(max(machine, 0))]
        where += ["--master_addr", host, "--master_port", port]
    try:
        torchrun([*where, "--nproc_per_node", str(processes), str(Path(__file__).resolve()), *argv])
    except ChildFailedError as error:
        sys.exit(error.get_first_failure()[1].exitcode)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the processes cannot meet at {url} ({reason}); try another --dist-url") from None
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)


def calculate_thresholds(args, folder, device, data):
    """Write the thresholds of an ANN's activations, and print them."""
    if not args.pre_train:
        raise UserError("--calculate_Vth needs the weights of an ANN: --pre_train FILE")
    if args.model.startswith("preresnet_snn"):
        raise UserError(f"--calculate_Vth needs an ANN: --arch preresnet_cal_Vth.*, not {args.model}")
    if "/" in args.calculate_Vth:
        raise UserError(f"--calculate_Vth {args.calculate_Vth} must not contain a slash")
    print(f"data: imagenet, {len(data.train)} training, {len(data.test)} test, {data.classes} classes")
    checkpoint.make_folder(folder)
    path = checkpoint.find(args.pre_train, folder)
    model = create_model(args.model, num_classes=data.classes).to(device)
    checkpoint.load_weights(model, checkpoint.load(path)["state_dict"], path)
    images = unaugmented(data) if args.calibrate_split == "train" else data.test
    generator = torch.Generator().manual_seed(args.manualSeed or 0)
    order = (
        torch.arange(len(images))
        if args.calibrate_split == "val"
        else torch.randperm(len(images), generator=generator)
    )
    chosen = order[: args.calibrate_batches * args.train_batch].tolist()
    batches = loader(Subset(images, chosen), args.train_batch, args.workers, False)
    thresholds = calibrate(model, (batch.to(device) for batch, _ in batches), len(chosen))
    for name, value in thresholds.items():
        print(f"{name:24} {value:10.4f}")
    dead = [name for name, value in thresholds.items() if not 0 < value < math.inf]
    if dead:
        raise UserError(f"no threshold file: {path} gives no positive number for {', '.join(dead)}")
    file = folder / f"{args.calculate_Vth.removesuffix('.dict')}.dict"
    if distributed.rank() == 0:
        checkpoint.save(thresholds, file)
    print(f"thresholds of {len(chosen)} images of {args.calibrate_split}: {file}")


if __name__ == "__main__":
    run_program(main)
