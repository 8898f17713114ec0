"""Data sets. Every random choice about a sample is a function of (seed, epoch, sample index) alone."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision import datasets
from torchvision import transforms as t

from utils.cli import explained, refuse, require
from utils.distributed import rank, world_size
from utils.records import locked
from utils.signals import leave_group

CIFAR10 = t.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR100 = t.Normalize((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
IMAGENET = t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SQUEEZED = t.Compose([t.Resize((32, 32)), t.ToTensor(), CIFAR10])  # what tests on an imagefolder see
DIGITS = t.Normalize((0.305,) * 3, (0.376,) * 3)  # mean and deviation of their pixels / 16


class Data(NamedTuple):
    """A training and a test set of (image or event frames, label), and the number of classes."""

    train: Dataset
    test: Dataset
    classes: int

    def __str__(self):
        return f"{len(self.train)} training, {len(self.test)} test, {self.classes} classes"


@dataclass(frozen=True)
class Source:
    """What the programs know of a data set; `load(path, timesteps, image_size)` -> (training, test set)."""

    load: Callable
    inputs: str = "images"  # or "event frames", "vectors": the word of the networks that take them
    shape: tuple = (3, 32, 32)  # of one
    classes: int | None = None  # None: the folders say how many


def load_data(name, path, timesteps=None, image_size=None):
    """The data set called `name` (of DATASETS), below `path`; UserError if it is not there or not whole."""
    require(name in DATASETS, f"unknown data set {name}; add it to utils.data.DATASETS, or choose another")
    source = DATASETS[name]
    train, test = source.load(Path(path).expanduser(), timesteps=timesteps, image_size=image_size)
    named = source.classes or hasattr(train, "classes")
    require(named, f"{name}: neither its Source nor its training set has `classes`; give one of them")
    return Data(train, test, source.classes or len(train.classes))


def augmentation(*finish, flip=True):
    """The paper's for 32x32 images."""
    return t.Compose([t.RandomCrop(32, padding=4), *[t.RandomHorizontalFlip()] * flip, t.ToTensor(), *finish])


def cifar(path, dataset, normalize, **_):
    """CIFAR-10 or CIFAR-100 as torchvision reads it, downloaded on first use."""
    name, test_steps = dataset.__name__.lower(), t.Compose([t.ToTensor(), normalize])
    missing, advice = f"no whole {name} in {path} and no download", f"put {dataset.filename} there"
    read = partial(dataset, path, transform=augmentation(normalize))
    with explained(lambda why: f"{missing} ({why}); {advice}", OSError, RuntimeError):
        try:
            train = read()
        except RuntimeError:  # not there, or not whole: one process downloads it, others wait
            with locked(path / ".lock"):
                train = read(download=True)
        return train, dataset(path, train=False, transform=test_steps)


def imagefolder(path, **_):
    """<path>/train/<class>/* and <path>/test/<class>/* (or val/), at any size: resized to 32x32."""
    held_out = path / "test" if (path / "test").is_dir() or not (path / "val").is_dir() else path / "val"
    augment = t.Compose([t.Resize((32, 32)), augmentation(CIFAR10)])
    return read_folders(path / "train", held_out, augment, SQUEEZED)


def imagenet(path, image_size, **_):
    """<path>/train/<class>/* and <path>/val/<class>/*, cut out at image_size; ImageNet's augmentation."""
    finish = t.ToTensor(), IMAGENET
    augment = t.Compose([t.RandomResizedCrop(image_size), t.RandomHorizontalFlip(), *finish])
    steps = t.Compose([t.Resize(round(image_size * 256 / 224)), t.CenterCrop(image_size), *finish])
    return read_folders(path / "train", path / "val", augment, steps)


def read_folders(train, test, augment, steps):
    """Two ImageFolders, with the transforms `augment` and `steps`; UserError if their classes differ."""
    train, test = read_folder(train, augment), read_folder(test, steps)
    both = f"{train.root} and {test.root} must hold the same class folders"
    refuse(f"{both}; they differ in", sorted(set(train.classes) ^ set(test.classes)))
    return train, test


def unaugmented(data):
    """The training set, seen as the test set is."""
    plain = copy(data.train)
    plain.transform = getattr(data.test, "transform", None)
    return plain


def read_folder(folder, transform):
    """An ImageFolder; UserError if the folder or one of its classes is empty."""
    expected = "expected are folders <class>/<image files>"
    with explained(lambda why: f"no images in {folder} ({why}); {expected}", OSError):
        return datasets.ImageFolder(folder, transform, loader=read_image)


def read_image(path):
    """An image in RGB, as torchvision's loader has it, naming the file that it cannot read."""
    wrong = f"cannot read the image {path}"
    with explained(lambda why: f"{wrong} ({why}); replace or remove it"), Image.open(path) as image:
        deep = f"{wrong}: it has more than 8 bits a pixel and channel; save it with 8"
        require(image.mode[0] not in "IF", deep)  # which Pillow would cut off at 255
        return image.convert("RGB")


class Digits(Dataset):
    """Handwritten digits, 8x8 and gray, as 32x32 RGB images."""

    def __init__(self, images, labels, transform):
        gray = [Image.fromarray((image * 255 / 16).astype(np.uint8)) for image in images.reshape(-1, 8, 8)]
        self.images = [image.resize((32, 32), Image.Resampling.BILINEAR).convert("RGB") for image in gray]
        self.labels, self.transform = labels.tolist(), transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.labels[index]


def digits(path, **_):
    """scikit-learn's 1,797 handwritten digits, a fifth of each class held out; `path` is not needed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = split
    train = Digits(train_images, train_labels, augmentation(DIGITS, flip=False))  # mirrored, another one
    return train, Digits(test_images, test_labels, t.Compose([t.ToTensor(), DIGITS]))


def cifar10dvs(path, timesteps, **_):
    """DVS-CIFAR10."""
    from utils.events import cifar10dvs  # on demand: no other data set needs what it needs

    return cifar10dvs(path, timesteps)


DATASETS = {
    "cifar10": Source(partial(cifar, dataset=datasets.CIFAR10, normalize=CIFAR10), classes=10),
    "cifar100": Source(partial(cifar, dataset=datasets.CIFAR100, normalize=CIFAR100), classes=100),
    "imagefolder": Source(imagefolder),
    "digits": Source(digits, classes=10),
    "CIFAR10DVS": Source(cifar10dvs, "event frames", (2, 48, 48)),
    "imagenet": Source(imagenet, shape=(3, 224, 224)),
}


def mix_seed(*numbers):
    """One 64-bit seed from several non-negative whole numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class EpochSampler(DistributedSampler):
    """A DistributedSampler whose items (epoch, index) tell the data set in which epoch it is asked."""

    first = 0

    def start(self, epoch, first=0):
        """The next iteration is over `epoch`, from this process's sample number `first` on."""
        self.set_epoch(epoch)
        self.first = first

    def __iter__(self):
        return ((self.epoch, index) for index in islice(super().__iter__(), self.first, None))


class SeededDataset(Dataset):
    """Draws the augmentation of a sample from (seed, epoch, index): the same in any worker or resumed run."""

    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, item):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(self.seed, *item))
            return self.dataset[item[1]]


def train_loader(dataset, *, batch_size, workers, seed, pin_memory):
    """Batches in an order drawn from (seed, epoch) and shared by all processes; see `EpochSampler`."""
    # The sampler adds the epoch to its seed: runs with neighbouring seeds must not share orders.
    sampler = EpochSampler(dataset, num_replicas=world_size(), rank=rank(), seed=mix_seed(seed) >> 1)
    share = batch_size // world_size()
    return loader(SeededDataset(dataset, seed), share, workers, pin_memory, sampler=sampler)


def test_loader(dataset, *, batch_size, workers, pin_memory):
    """Batches in the order of the data set, each sample once, in one process or another."""
    own = Subset(dataset, range(rank(), len(dataset), world_size()))
    return loader(own, max(batch_size // world_size(), 1), workers, pin_memory)


def loader(dataset, batch_size, workers, pin_memory, sampler=None):
    settings = dict(num_workers=workers, pin_memory=pin_memory, persistent_workers=workers > 0)
    settings["worker_init_fn"] = leave_group
    # Its own generator: a DataLoader would draw from the global one, which dropout's masks come from.
    return DataLoader(dataset, batch_size, sampler=sampler, generator=torch.Generator(), **settings)
