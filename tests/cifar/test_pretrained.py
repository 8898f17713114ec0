"""Networks that come trained, and a tiny one made here: they load, and get right what they are said to."""

import json
import os
import shlex
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as t

import hubconf
import reproduce
from cifar import main_single_gpu, predict
from tests.conftest import write_images
from tests.forks import ended, fork
from utils import checkpoint
from utils.cli import UserError, run_program
from utils.data import CIFAR10
from utils.pretrained import count_correct

SHIPPED = sorted(checkpoint.PRETRAINED.glob("*.json"))
RUN = "--model preresnet.resnet20_lif --timesteps 2 --Vth auto --delta_t 0.2 --epochs 1 --lr 0.01"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of one network, tiny_lif, trained for an epoch on ../images and published; see ../out."""
    above = tmp_path_factory.mktemp("tiny")
    folder, images = above / "pretrained", write_images(above / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "PRETRAINED", folder)
        patch.setattr(hubconf, "PRETRAINED", folder)
        reproduce.main(
            ["run", "depth-lif-20", *shlex.split(f"{RUN} --warmup 0"), *where(images, above / "out")]
        )
        (log,) = (above / "out" / "imagefolder").glob("*.txt")
        publish = ["publish", str(log.with_suffix(".pth")), "tiny_lif", "--trained_on", "red and blue noise"]
        reproduce.main([*publish, "--out", str(folder)])
        archive = (folder / "test_images.tar.xz").read_bytes()
        reproduce.main([*publish, "--out", str(folder)])
        assert archive == (folder / "test_images.tar.xz").read_bytes()
        others = write_images(above / "others", seed=1)
        reproduce.main([*publish, "--out", str(folder), "--path", str(others)])  # what others are checked by
        assert archive == (folder / "test_images.tar.xz").read_bytes()
        yield folder


def where(images, out):
    flags = (
        f"--dataset imagefolder --path {images} --checkpoint {out} --train-batch 5 --workers 0 --device cpu"
    )
    return shlex.split(flags)


def test_every_network_gets_right_what_its_json_says(tiny):
    for file in [tiny / "tiny_lif.json", *SHIPPED]:
        made = json.loads(file.read_text())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hubconf, "PRETRAINED", file.parent)
            model = hubconf._network(made["network"], pretrained=True)
        assert count_correct(model, file.parent / made["images"]) == made["images_correct"]
        assert "JPEG" in made["trained_on"] or file.parent == tiny
        assert made.keys() >= {"command", "commit", "hardware", "torch", "manualSeed", "epochs"}


def test_a_published_network_is_its_run(tiny):
    (log,) = (tiny.parent / "out" / "imagefolder").glob("*.txt")
    made = json.loads((tiny / "tiny_lif.json").read_text())
    last = float(log.read_text().split()[-1])
    assert made["accuracy_after_last_epoch"] == pytest.approx(last, abs=1e-4) and made["test_images"] == 6
    test = tiny.parent / "images" / "test"
    weights = torch.load(tiny / "tiny_lif.pth", weights_only=True)
    assert "optimizer" not in weights and weights["classes"] == ["blue", "red"]
    with tarfile.open(tiny / "test_images.tar.xz") as tar:  # all there are: fewer than 20 of a class
        shipped = {entry.name: tar.extractfile(entry).read() for entry in tar}
    files = {f"{f.parent.name}/{f.name}": f.read_bytes() for f in test.rglob("*.png")}
    assert shipped == files
    see = t.Compose([t.Resize(32), t.CenterCrop(32), t.ToTensor(), CIFAR10])
    model, right = hubconf._network("tiny_lif", pretrained=True).double().eval(), 0
    for file in test.rglob("*.png"):
        logits = model(see(Image.open(file))[None].double())
        right += weights["classes"][logits.argmax()] == file.parent.name
    assert made["images_correct"] == right


def test_resume_evaluates_and_fine_tunes(tiny, tmp_path, capsys):
    accuracy = json.loads((tiny / "tiny_lif.json").read_text())["accuracy_after_last_epoch"]
    argv = [
        *shlex.split(f"--preset depth-lif-20 {RUN} --resume tiny_lif"),
        *where(tiny.parent / "images", tmp_path),
    ]
    main_single_gpu.main([*argv, "--evaluate"])
    said = capsys.readouterr().out
    assert f"top-1 {accuracy:.2f} %" in said and "trained on red and blue noise" in said
    main_single_gpu.main([*argv, "--epochs", "2"])  # the second one
    epochs = (tmp_path / "imagefolder" / "preresnet.resnet20_lif.txt").read_text().splitlines()[1:]
    assert len(epochs) == 2 and float(epochs[0].split()[-1]) == pytest.approx(accuracy, abs=1e-4)


def test_the_json_of_a_network_that_went_on_holds_that_of_its_start(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "pretrained")
    before = json.loads((folder / "tiny_lif.json").read_text())
    images = where(tiny.parent / "images", tmp_path / "out")
    reproduce.main(["run", "depth-lif-20", *shlex.split(f"{RUN} --warmup 0 --pre_train tiny_lif"), *images])
    (log,) = (tmp_path / "out" / "imagefolder").glob("*.txt")
    for _ in range(2):  # in the place of its start; again, it is not its own start
        publish = ["publish", str(log.with_suffix(".pth")), "tiny_lif", "--trained_on", "noise"]
        reproduce.main([*publish, "--out", str(folder)])
        after = json.loads((folder / "tiny_lif.json").read_text())
        assert after["started_from"] == before and after["command"] != before["command"]


def test_predict(tiny, capsys):
    images = tiny.parent / "images"
    picture = images / "test" / "red" / "0.png"
    predict.main(["--network", "tiny_lif", str(picture), str(images / "test" / "blue")])
    first, *lines = capsys.readouterr().out.splitlines()
    assert "trained on red and blue noise" in first and "T=2" in first
    assert [line.partition(":")[0] for line in lines[::2]] == [
        str(picture),
        *(str(images / "test" / "blue" / f"{i}.png") for i in range(3)),
    ]
    for line in lines[::2]:
        shares = line.partition(": ")[2].replace(",", "").split()
        assert sorted(shares[::3]) == ["blue", "red"]
        assert sum(map(float, shares[1::3])) == pytest.approx(100, abs=0.11)
    # ResNet-20 has somewhat less than 41 million multiply-accumulates, of 4.6 pJ.
    assert all(170 < float(line.split("the same shape ")[1].split()[0]) < 188 for line in lines[1::2])


def test_predict_sees_photographs_upright(tmp_path, capsys):
    """Cameras leave a turned picture as it was taken and note how to turn it: Exif 274, 3 for 180 degrees."""
    (network,) = (str(file.with_suffix(".pth")) for file in SHIPPED if file.stem == "resnet20_lif_cifar10")
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
    turned = picture.transpose(Image.Transpose.ROTATE_180)
    turned.getexif()[274] = 3
    (tmp_path / "no picture.png").mkdir()
    picture.save(tmp_path / "a.png")
    turned.save(tmp_path / "b.png", exif=turned.getexif())
    predict.main([str(tmp_path), "--network", network])
    _, first, _, second, _ = capsys.readouterr().out.splitlines()
    assert first.partition(": ")[2] == second.partition(": ")[2]
    turned.save(tmp_path / "b.png")
    predict.main([str(tmp_path), "--network", network])
    assert capsys.readouterr().out.splitlines()[3].partition(": ")[2] != first.partition(": ")[2]


def test_predict_by_a_run_of_ones_own(tiny, capsys):
    (log,) = (tiny.parent / "out" / "imagefolder").glob("*.txt")
    picture = str(tiny.parent / "square.png")  # of which both see the whole
    Image.open(tiny.parent / "images" / "test" / "red" / "0.png").resize((30, 30)).save(picture)
    for network in ("tiny_lif", str(log.with_suffix(".pth"))):
        predict.main(["--network", network, picture])
    published, _, _, own, *same = capsys.readouterr().out.splitlines()
    assert own.startswith(log.stem) and f"trained on imagefolder from {tiny.parent / 'images'}" in own
    predict.main(["--network", "tiny_lif", picture])
    assert capsys.readouterr().out.splitlines() == [published, *same]


def test_predict_by_a_run_that_is_under_way(tiny, tmp_path, capsys):
    (log,) = (tiny.parent / "out" / "imagefolder").glob("*.txt")
    content = torch.load(log.with_suffix(".pth"), weights_only=True)
    torch.save(content | dict(iteration=1, acc=-1.0, epoch=0), tmp_path / "early.pth")
    predict.main(["--network", str(tmp_path / "early.pth"), str(tiny.parent / "images/test/red/0.png")])
    assert capsys.readouterr().out.splitlines()[0].endswith("stopped within an epoch")


def test_predict_a_picture_whose_name_is_no_text(tiny, tmp_path):
    """As an archive from a machine with another encoding leaves it."""
    picture = tmp_path / os.fsdecode(b"caf\xe9.png")
    shutil.copy(tiny.parent / "images" / "test" / "red" / "0.png", picture)
    pid = fork(lambda: run_program(predict.main, ["--network", "tiny_lif", str(picture)]), tmp_path / "said")
    assert ended(pid) == 0
    assert "caf\\udce9.png: " in (tmp_path / "said").read_text()


def test_a_run_of_ones_own_sees_what_its_test_saw(tiny, tmp_path, capsys):
    """The whole of a wide picture, squeezed; a network that comes trained sees the square in its middle."""
    for name, sides in (("one", "red"), ("two", "blue")):
        picture = Image.new("RGB", (120, 40), "red")
        for x in (0, 100):
            picture.paste(sides, (x, 0, x + 20, 40))
        picture.save(tmp_path / f"{name}.png")
    (log,) = (tiny.parent / "out" / "imagefolder").glob("*.txt")
    said = []
    for network in ("tiny_lif", str(log.with_suffix(".pth"))):
        predict.main(["--network", network, str(tmp_path)])
        _, one, spikes_of_one, two, spikes_of_two = capsys.readouterr().out.splitlines()
        said.append((one.partition(": ")[2], spikes_of_one) == (two.partition(": ")[2], spikes_of_two))
    assert said == [True, False]


def test_a_network_learns_other_classes(tiny, tmp_path, capsys):
    """With --pre_train all weights stay but those of the classes; and their number must fit to be tested."""
    images = write_images(tmp_path / "images")
    for split in ("train", "test"):
        shutil.copytree(images / split / "red", images / split / "white")
    argv = [
        *shlex.split(f"{RUN} --lr 1e-30 --warmup 0 --pre_train tiny_lif"),
        *where(images, tmp_path / "out"),
    ]
    main_single_gpu.main(argv)
    told = "another number of classes, not 3: bn2, linear start afresh"
    assert told in capsys.readouterr().err
    (file,) = (tmp_path / "out" / "imagefolder").glob("*lif.pth")
    before, after = (torch.load(f, weights_only=True)["state_dict"] for f in (tiny / "tiny_lif.pth", file))
    assert before.keys() == after.keys()
    learned = [key for key in before if key.endswith(("weight", "bias"))]
    other = {key for key in learned if before[key].shape != after[key].shape}
    assert other == {"linear.weight", "linear.bias", "bn2.weight", "bn2.bias"}
    assert all(torch.allclose(before[key], after[key], atol=1e-20) for key in set(learned) - other)
    with pytest.raises(UserError, match="does not fit this model and number of classes"):
        main_single_gpu.main([*argv, "--evaluate"])


def test_mistakes(tiny, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (log,) = (tiny.parent / "out" / "imagefolder").glob("*.txt")
    ann, nameless = torch.load(log.with_suffix(".pth"), weights_only=True), tmp_path / "nameless.pth"
    torch.save({key: value for key, value in ann.items() if key != "classes"}, nameless)
    ann["args"]["model"] = "preresnet.resnet20_ann"
    torch.save(ann, tmp_path / "ann.pth")
    unknown, found = str(shutil.copy(log.with_suffix(".pth"), tmp_path)), []  # without its .run.json
    for main, argv in (
        (predict.main, ["x.png", "--network", "tiny_if"]),
        (predict.main, ["x.png", "--network", str(tmp_path / "ann.pth")]),
        (predict.main, ["x.png", "--network", str(nameless)]),
        (predict.main, [str(tmp_path / "text.png"), "--network", "tiny_lif"]),
        (predict.main, [str(tiny), "--network", "tiny_lif"]),
        (reproduce.main, ["publish", unknown, "x", "--trained_on", "y"]),
    ):
        with pytest.raises(UserError) as error:
            main(argv)
        found.append(str(error.value))
    said = [
        "no network 'tiny_if'",
        "not of an SNN",
        "does not name its classes",
        "cannot read the image",
        "no pictures in",
        "not the last checkpoint",
    ]
    assert all(words in text for words, text in zip(said, found, strict=True))
