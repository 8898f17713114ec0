"""Data sets against the raw data that they read, and the rule that randomness belongs to the sample."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset
from torchvision import datasets

from cifar import program
from models.layers import SpikingNetwork, spiking_layer
from models.registry import NETWORKS, Entry
from utils.cli import UserError
from utils.data import DATASETS, Source, load_data, mix_seed, train_loader

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def test_digits_are_all_there_once_and_stratified():
    data = load_data("digits", "nowhere")
    assert (len(data.train), len(data.test), data.classes) == (1437, 360, 10)
    totals = np.bincount(load_digits().target)
    for split, share in ((data.train, 0.8), (data.test, 0.2)):
        assert abs(np.bincount(split.labels) - share * totals).max() < 1
    image, label = data.test[0]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and 0 <= label < 10
    # Unnormalised, the mean brightness is that of the source, 8x8 pixels of 0 to 16.
    stacked = torch.stack([data.test[i][0] for i in range(360)]) * 0.376 + 0.305
    assert stacked.mean().item() == pytest.approx(load_digits().data.mean() / 16, abs=0.01)


@pytest.mark.parametrize("name", ["digits", "imagefolder", "imagenet"])
def test_the_registry_says_what_a_sample_is(name, images):
    (images / "val").symlink_to(images / "test")
    source, data = DATASETS[name], load_data(name, images, image_size=224)
    assert source.inputs == "images" and source.classes in (None, data.classes)
    assert all(split[0][0].shape == source.shape for split in (data.train, data.test))


def write_cifar10(folder, monkeypatch):
    """CIFAR-10's file format, four images a file, with the checksums that the loader verifies."""
    folder = folder / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    contents = {"batches.meta": {"label_names": [str(i) for i in range(10)]}}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        pixels = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        contents[name] = {"data": pixels, "labels": [1, 2, 3, 4]}
    sums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[n, sums[n]] for n in contents if "data" in n])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return contents


def test_a_data_set_of_ones_own(tmp_path, monkeypatch, capsys):
    """Vectors without a transform, thresholds fitted to them; a set that names no classes is refused."""

    class Perceptron(SpikingNetwork):
        def __init__(self, activation, num_classes):
            super().__init__()
            self.linear, self.bn, self.relu = (
                nn.Linear(6, num_classes),
                nn.BatchNorm1d(num_classes),
                activation(),
            )

        def spike(self, train):
            return spiking_layer([(self.linear, train)], self.bn, self.relu)

    def load(path, **_):
        return [TensorDataset(torch.randn(n, 6), torch.randint(0, 3, (n,))) for n in (32, 9)]

    def build(activation, num_classes, dropout):
        return Perceptron(activation, num_classes)

    monkeypatch.setitem(NETWORKS, "own.mlp_if", Entry(build, "if", inputs="vectors", shape=(6,)))
    monkeypatch.setattr(program, "MODELS", [*program.MODELS, "own.mlp_if"])
    monkeypatch.setitem(DATASETS, "own", Source(load, "vectors", (6,), 3))
    flags = "--dataset own --model own.mlp_if --timesteps 4 --Vth auto --epochs 1 --train-batch 8 --workers 0"
    program.main(f"{flags} --device cpu --checkpoint {tmp_path}".split())
    printed = capsys.readouterr().out
    assert (
        "data: own, 32 training, 9 test, 3 classes" in printed and "fitted to 32 training images" in printed
    )
    monkeypatch.setitem(DATASETS, "own", Source(load, "vectors", (6,)))
    with pytest.raises(UserError, match="classes"):
        load_data("own", ".")


def test_cifar10_is_read_and_normalised(tmp_path, monkeypatch):
    contents = write_cifar10(tmp_path, monkeypatch)
    data = load_data("cifar10", tmp_path)
    assert (len(data.train), len(data.test), data.classes) == (20, 4, 10)
    image, label = data.test[2]
    assert label == 3
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR10_MEAN, CIFAR10_STD))
    pixels = torch.from_numpy(contents["test_batch"]["data"][2]).view(3, 32, 32)
    torch.testing.assert_close(image, (pixels / 255 - mean) / std)


def test_one_process_downloads_cifar10(tmp_path, monkeypatch):
    def download(_):
        with pytest.raises(Timeout):
            FileLock(tmp_path / ".lock", timeout=0).acquire()
        write_cifar10(tmp_path, monkeypatch)

    monkeypatch.setattr(datasets.CIFAR10, "download", download)
    assert len(load_data("cifar10", tmp_path).train) == 20
    with FileLock(tmp_path / ".lock"):  # to read what is there takes no lock: its folder may be another's
        assert len(load_data("cifar10", tmp_path).train) == 20


def test_training_images_are_cropped_and_mirrored(tmp_path, monkeypatch):
    contents = write_cifar10(tmp_path, monkeypatch)
    data = load_data("cifar10", tmp_path)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CIFAR10_MEAN, CIFAR10_STD))
    padded = torch.zeros(3, 40, 40)
    padded[:, 4:36, 4:36] = torch.from_numpy(contents["data_batch_1"]["data"][0]).view(3, 32, 32) / 255
    seen = set()
    for _ in range(60):
        image = data.train[0][0] * std + mean
        crops = {(y, x, flip) for y in range(9) for x in range(9) for flip in (False, True)}
        match = [
            (y, x, flip)
            for y, x, flip in crops
            if torch.allclose(image.flip(2) if flip else image, padded[:, y : y + 32, x : x + 32], atol=1e-5)
        ]
        assert match
        seen.update(match)
    assert {flip for _, _, flip in seen} == {False, True} and len(seen) > 30


def test_cifar100_is_read_and_normalised(tmp_path, monkeypatch):
    folder, sums = tmp_path / "cifar-100-python", {}
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    contents = {name: {"data": pixels, "fine_labels": [1, 2, 99, 4]} for name in ("train", "test")}
    for name, content in (contents | {"meta": {"fine_label_names": [str(i) for i in range(100)]}}).items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", sums["test"]]])
    meta = {"filename": "meta", "key": "fine_label_names", "md5": sums["meta"]}
    monkeypatch.setattr(datasets.CIFAR100, "meta", meta)
    data = load_data("cifar100", tmp_path)
    image, label = data.test[2]
    assert (label, data.classes) == (99, 100)
    mean = torch.tensor([0.5071, 0.4867, 0.4408]).view(3, 1, 1)
    std = torch.tensor([0.2675, 0.2565, 0.2761]).view(3, 1, 1)
    torch.testing.assert_close(image, (torch.from_numpy(pixels[2]).view(3, 32, 32) / 255 - mean) / std)


def test_imagenet_images_are_cut_out_and_normalised(tmp_path):
    """A ramp from left to right tells which part of it a crop is, how wide, and whether it is mirrored."""
    ramp = np.broadcast_to(np.linspace(0, 255, 256).round(), (256, 256)).astype(np.uint8)
    pixels = np.stack([ramp, np.full_like(ramp, 100), np.full_like(ramp, 200)], -1)
    for split in ("train", "val"):
        (tmp_path / split / "ramp").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / split / "ramp" / "image.png")
    data = load_data("imagenet", tmp_path, image_size=224)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    image = data.test[0][0] * std + mean
    expected = torch.from_numpy(pixels[16:240, 16:240] / 255).float().movedim(-1, 0)  # the centre
    torch.testing.assert_close(image, expected)
    widths, mirrored = [], set()
    for _ in range(40):
        crop = data.train[0][0] * std + mean
        assert crop.shape == (3, 224, 224)
        torch.testing.assert_close(crop[1:], expected[1:])
        widths.append((crop[0, 0, -1] - crop[0, 0, 0]).abs().item())
        mirrored.add((crop[0, 0, -1] < crop[0, 0, 0]).item())
    assert min(widths) < 0.6 and max(widths) > 0.8 and mirrored == {False, True}


def test_imagefolder_reads_any_size_and_val(images):
    (images / "test").rename(images / "val")
    data = load_data("imagefolder", images)
    assert (len(data.train), len(data.test), data.classes) == (10, 6, 2)
    image, label = data.test[0]
    assert image.shape == (3, 32, 32)
    assert data.test.classes[label] == "blue" and image[2].mean() > image[0].mean()


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "1"])
def test_images_in_other_colour_modes_work(mode, images):
    from PIL import Image

    path = images / "test" / "blue" / "0.jpg"
    Image.open(images / "test" / "blue" / "0.png").convert("L" if mode == "RGBA" else mode).save(path)
    assert load_data("imagefolder", images).test[0][0].shape == (3, 32, 32)


@pytest.mark.parametrize("deep", [np.uint16, np.int32, np.float32])
def test_an_image_of_more_than_8_bits_is_refused(deep, images):
    """Pillow's RGB of it is white above 255: 12 and 16 bit pictures would all look alike."""
    path = images / "train" / "red" / "deep.tif"
    Image.fromarray(np.full((32, 32), 40000, deep)).save(path)
    data = load_data("imagefolder", images).train
    with pytest.raises(UserError, match="red/deep.tif: it has more than 8 bits"):
        [image for image, _ in data]


def test_a_path_may_begin_at_home(images, monkeypatch):
    monkeypatch.setenv("HOME", str(images.parent))
    assert len(load_data("imagefolder", f"~/{images.name}").train) == 10


def test_a_truncated_image_is_named(images):
    path = images / "train" / "red" / "4.png"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match="red/4.png"):
        load_data("imagefolder", images).train[9]


def epoch_of(images, epoch, **settings):
    loader = train_loader(load_data("imagefolder", images).train, batch_size=4, pin_memory=False, **settings)
    loader.sampler.set_epoch(epoch)
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_samples_depend_on_seed_epoch_and_index_alone(images):
    torch.manual_seed(1)
    first, labels = epoch_of(images, 3, workers=0, seed=7)
    assert sorted(labels.tolist()) == [0] * 5 + [1] * 5
    state = torch.get_rng_state()
    torch.manual_seed(2)
    torch.rand(5)
    again, _ = epoch_of(images, 3, workers=2, seed=7)
    assert torch.equal(first, again)
    torch.set_rng_state(state)
    epoch_of(images, 3, workers=0, seed=7)
    for other in (epoch_of(images, 4, workers=0, seed=7), epoch_of(images, 3, workers=0, seed=8)):
        assert not torch.equal(first, other[0])


def test_loading_leaves_the_global_generator_alone(images):
    data = load_data("imagefolder", images)
    loader = train_loader(data.train, batch_size=4, workers=0, seed=7, pin_memory=False)
    iterator = iter(loader)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    next(iterator)
    assert torch.equal(torch.rand(3), expected)


def test_neighbouring_seeds_do_not_collide():
    assert (
        len({mix_seed(seed, epoch, i) for seed in range(5) for epoch in range(20) for i in range(50)}) == 5000
    )
