"""Networks that come trained: weights, how they were made, and test images to check both by."""

import io
import json
import random
import tarfile
from pathlib import Path

import torch
from PIL import Image
from torchvision import transforms as t

from utils import checkpoint
from utils.cli import explained, require
from utils.data import CIFAR10
from utils.statistics import hits

ARCHIVE, PER_CLASS = "test_images.tar.xz", 20
# What a network of CIFAR-10 sees of a picture: the largest square in its middle, at 32x32.
SEE = t.Compose([t.Resize(32), t.CenterCrop(32), t.ToTensor(), CIFAR10])


def publish(name, folder, content, sessions, *, trained_on, test, model):
    """Write `<folder>/<name>.pth` and `.json`, of a finished run; test images if there are none yet.

    content: the run's last checkpoint; of it the optimizer is left out. sessions: from the run's .run.json.
    trained_on: the data, in words for every label. test: an ImageFolder. model: the network.
    """
    args, made = content["args"] | dict(trained_on=trained_on), dict(network=name, trained_on=trained_on)
    kept = {key: content[key] for key in ("epoch", "iteration", "acc", "best_acc", "state_dict", "log")}
    checkpoint.make_folder(folder, "--out")
    archive, weights = folder / ARCHIVE, folder / f"{name}.pth"
    if not archive.exists():  # else all networks there are checked by the same images
        checkpoint.save(test, archive, write=write_images)
    checkpoint.save(kept | dict(args=args, classes=test.classes), weights)
    made |= {key: args[key] for key in ("model", "dataset", "path", "manualSeed")}
    made |= dict(epochs=content["epoch"], accuracy_after_last_epoch=round(float(content["acc"]), 4))
    made |= dict(best_accuracy_chosen_by_test_set=round(content["best_acc"], 4), test_images=len(test))
    for what in ("command", "commit", "hardware", "torch"):
        made[what] = sorted({session[what] for session in sessions})
    start = folder / f"{args.get('pre_train')}.json"  # of another such network, or of this one before
    before = json.loads(start.read_text()) if start.exists() else None
    if before and all(before[key] == value for key, value in made.items()):  # published again
        before = before.get("started_from")
    made |= dict(started_from=before) if before else {}
    made |= dict(images=ARCHIVE, images_correct=count_correct(model, archive))
    checkpoint.save_text(json.dumps(made, indent=2) + "\n", folder / f"{name}.json")


def write_images(test, file):
    """Write PER_CLASS files of each class of an ImageFolder, drawn by a fixed seed: the same bytes always."""
    drawn = random.Random(0)
    with tarfile.open(fileobj=file, mode="w:xz") as archive:
        for label, name in enumerate(test.classes):
            own = sorted(path for path, target in test.samples if target == label)
            for path in sorted(drawn.sample(own, min(PER_CLASS, len(own)))):
                content, entry = Path(path).read_bytes(), tarfile.TarInfo(f"{name}/{Path(path).name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


def read_images(archive):
    """The archive's images (N, 3, 32, 32) and their labels (N,), classes numbered by name."""
    with explained(lambda why: f"{archive} is damaged ({why}); take it from the repository again"):
        with tarfile.open(archive) as tar:
            files = {entry.name: tar.extractfile(entry).read() for entry in tar if entry.isfile()}
        images = [SEE(Image.open(io.BytesIO(content)).convert("RGB")) for content in files.values()]
    names = [name.partition("/")[0] for name in files]
    require(names, f"{archive} holds no images; take it from the repository again")
    classes = sorted(set(names))
    return torch.stack(images), torch.tensor([classes.index(name) for name in names])


@torch.no_grad()
def count_correct(model, archive):
    """How many of the archive's images `model` gets right; in double precision, so on any machine as many."""
    images, labels = read_images(archive)
    model = model.double().eval()
    logits = torch.cat([model(part.double()) for part in images.split(50)])
    return int(hits(logits, labels)[:, 0].sum())
