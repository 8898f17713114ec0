"""Data sets. Every random choice about a sample is a function of (seed, epoch, sample index) alone."""

from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision import datasets, transforms
from torchvision.datasets.folder import default_loader

from utils.cli import UserError
from utils.distributed import rank, world_size
from utils.signals import leave_group

NORMALIZE = {
    "cifar10": transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": transforms.Normalize((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "digits": transforms.Normalize((0.305,) * 3, (0.376,) * 3),  # mean and deviation of its pixels / 16
}


class Data(NamedTuple):
    """A training and a test set of (image or event frames, label), and the number of classes."""

    train: Dataset
    test: Dataset
    classes: int


def load_data(name, path, timesteps=None):
    """The data set called `name` (of DATASETS), below `path`; UserError if it is not there or not whole.

    Of event recordings there are `timesteps` frames each.
    """
    return DATASETS[name](Path(path), *([timesteps] if name in EVENT_DATASETS else []))


def cifar(path, dataset):
    """CIFAR-10 or CIFAR-100 as torchvision reads it, downloaded on first use; the paper's augmentation."""
    name = dataset.__name__.lower()
    crop, to_tensor = transforms.RandomCrop(32, padding=4), transforms.ToTensor()
    augment = [crop, transforms.RandomHorizontalFlip(), to_tensor, NORMALIZE[name]]
    try:
        train = dataset(path, train=True, download=True, transform=transforms.Compose(augment))
        test = dataset(path, train=False, transform=transforms.Compose([to_tensor, NORMALIZE[name]]))
    except (OSError, RuntimeError) as error:  # no network, a broken download, a path that cannot be written
        reason = str(error).splitlines()[0]
        raise UserError(
            f"no {name} in {path} and no download ({reason}); put {dataset.filename} there"
        ) from None
    return Data(train, test, len(train.classes))


def imagefolder(path):
    """<path>/train/<class>/* and <path>/test/<class>/* (or val/), at any size: resized to 32x32."""
    held_out = path / "test" if (path / "test").is_dir() or not (path / "val").is_dir() else path / "val"
    finish = [transforms.ToTensor(), NORMALIZE["cifar10"]]
    resize = transforms.Resize((32, 32))
    augment = [resize, transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *finish]
    return read_folders(path / "train", held_out, augment, [resize, *finish])


def imagenet(path, size=224):
    """<path>/train/<class>/* and <path>/val/<class>/*, as images of size x size; ImageNet's augmentation."""
    finish = [transforms.ToTensor(), NORMALIZE["imagenet"]]
    augment = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *finish]
    whole = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size), *finish]
    return read_folders(path / "train", path / "val", augment, whole)


def unaugmented(data):
    """The training images of image folders, seen as the test images are."""
    return datasets.ImageFolder(data.train.root, data.test.transform, loader=read_image)


def read_folders(train, test, augment, steps):
    """Data from two folders, with the transforms `augment` and `steps`, if they hold the same classes."""
    train, test = read_folder(train, augment), read_folder(test, steps)
    if train.classes != test.classes:
        differing = ", ".join(sorted(set(train.classes) ^ set(test.classes))[:5])
        raise UserError(
            f"{train.root} and {test.root} must hold the same class folders; they differ in: {differing}"
        )
    return Data(train, test, len(train.classes))


def read_folder(folder, steps):
    """An ImageFolder with the transforms `steps`; UserError if the folder or one of its classes is empty."""
    try:
        return datasets.ImageFolder(folder, transforms.Compose(steps), loader=read_image)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"no images in {folder} ({reason}); expected are folders <class>/<image files>"
        ) from None


def read_image(path):
    """torchvision's loader (RGB, whatever the colour mode), naming the file that it cannot read."""
    try:
        return default_loader(path)
    except Exception as error:  # a damaged file can fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read the image {path} ({reason}); replace or remove it") from None


class Digits(Dataset):
    """Handwritten digits, 8x8 and gray, as 32x32 RGB images."""

    def __init__(self, images, labels, steps):
        gray = [Image.fromarray((image * 255 / 16).astype(np.uint8)) for image in images]
        self.images = [image.resize((32, 32), Image.Resampling.BILINEAR).convert("RGB") for image in gray]
        self.labels, self.transform = labels.tolist(), transforms.Compose(steps)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.labels[index]


def digits(path):
    """scikit-learn's 1,797 handwritten digits, a fifth of each class held out; `path` is not needed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8)
    split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = split
    finish = [transforms.ToTensor(), NORMALIZE["digits"]]
    augment = [transforms.RandomCrop(32, padding=4), *finish]  # no flip: that makes another character
    return Data(Digits(train_images, train_labels, augment), Digits(test_images, test_labels, finish), 10)


def cifar10dvs(path, timesteps):
    """DVS-CIFAR10. Imported on demand: no other data set needs what it needs."""
    from utils import events

    return Data(*events.cifar10dvs(path, timesteps))


EVENT_DATASETS = {"CIFAR10DVS": cifar10dvs}
DATASETS = {
    "cifar10": lambda path: cifar(path, datasets.CIFAR10),
    "cifar100": lambda path: cifar(path, datasets.CIFAR100),
    "imagefolder": imagefolder,
    "digits": digits,
    **EVENT_DATASETS,
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
    """Batches in an order drawn from (seed, epoch); `loader.sampler.start(epoch)` starts an epoch.

    Of each `batch_size` samples in this order every process gets its share.
    """
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
