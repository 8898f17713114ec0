"""Event recordings: from hand-made bytes to frames, the cache, and one line for every bad file."""

import hashlib
import multiprocessing
import struct
import subprocess
import sys
import time
import zipfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from urllib.error import URLError

import matplotlib.image
import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from cifar.program import main
from utils.cli import UserError, run_program
from utils.data import DATASETS, load_data, train_loader
from utils.events import draw, integrate, spikingjelly_parts
from utils.recorder import HEADER, record, write_aedat
from utils.recorder import main as recorder

ROOT = Path(__file__).parents[2]
# (x, y, polarity) as published; the corners of a picture, one of them twice, and a pixel of no symmetry.
EVENTS = [(0, 0, 1), (127, 0, 0), (0, 127, 1), (127, 127, 0), (5, 90, 1), (5, 90, 1), (5, 90, 0)]


def pack(events):
    """AEDAT 2.0, written bit by bit: raw x = 127 - x in bits 1-7, raw y = y in 8-14, 1 - polarity in 0."""
    words = [((127 - x) << 1 | y << 8 | (1 - p), 10 * t) for t, (x, y, p) in enumerate(events)]
    return b"#!AER-DAT2.0\r\n# made by hand\r\n" + b"".join(struct.pack(">II", *pair) for pair in words)


def write(root, name="cat/cifar10_cat_0", content=None):
    path = root / "events" / f"{name}.aedat"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pack(EVENTS) if content is None else content)
    return path


@pytest.fixture
def root(tmp_path):
    """Two classes; in the order of strings, 1000 would stand before 9, and 95 after 900."""
    for label, name in enumerate(("cat", "ship")):
        for number in (9, 95, 899, 900, 1000):
            write(tmp_path, f"{name}/cifar10_{name}_{number}", pack([(label, number % 100, 1)] * 4))
    return tmp_path


def test_known_bytes_give_known_frames(tmp_path):
    frames = integrate(write(tmp_path), 3)
    expected = torch.zeros(3, 2, 128, 128, dtype=torch.float64)
    for index, (x, y, polarity) in enumerate(EVENTS):  # 7 events in 3 frames: 2, 2 and the other 3
        expected[min(index // 2, 2), polarity, y, x] += 1
    assert torch.equal(frames, expected) and frames.sum() == 7


def test_frames_are_resized_exactly(tmp_path):
    """Output pixel i lies at (16i + 5)/6 of the input: at 5/6 between 0 and 1, at 1/2 between 3 and 4."""
    events = [(1, 1, 1), (0, 1, 1), (4, 3, 0)] + [(1, 1, 0)] * 3000
    for number in (0, 900):
        write(tmp_path, f"cat/cifar10_cat_{number}", pack(events))
    data = load_data("CIFAR10DVS", tmp_path, 1)
    frame = data.test[0][0]
    assert (
        frame.shape == (1, *DATASETS["CIFAR10DVS"].shape) == (1, 2, 48, 48) and frame.dtype == torch.float32
    )
    assert DATASETS["CIFAR10DVS"].inputs == "event frames"
    assert frame[0, 1, 0, 0].item() == pytest.approx(25 / 36 + 5 / 36, rel=1e-6)
    assert frame[0, 0, 1, 1].item() == 0.25
    assert frame[0, 0, 0, 0].item() == pytest.approx(3000 * 25 / 36, rel=1e-6)  # more than 16 bits of 36ths
    assert frame.count_nonzero() == 3


def test_the_split_goes_by_number(root, capsys):
    data = load_data("CIFAR10DVS", root, 2)
    assert (len(data.train), len(data.test), data.classes) == (6, 4, 2)
    assert sorted(int(path.split("_")[-1][:-4]) for path, _ in data.test.samples) == [900, 900, 1000, 1000]
    assert data.train.classes == ["cat", "ship"] and data.train.targets == [0, 0, 0, 1, 1, 1]
    (root / "frames" / "T2" / "cat" / ".DS_Store").touch()  # as file managers leave them
    assert len(load_data("CIFAR10DVS", root, 2).train) == 6
    assert "10 recordings, 2 each" in capsys.readouterr().out


def test_a_folder_of_someone_else_is_read(root, monkeypatch):
    load_data("CIFAR10DVS", root, 2)
    monkeypatch.setattr("utils.events.make_folder", lambda folder, flag: pytest.fail(f"wrote to {folder}"))
    assert len(load_data("CIFAR10DVS", root, 2).train) == 6


def test_building_leaves_the_global_generator_alone(root):
    state = torch.get_rng_state()
    load_data("CIFAR10DVS", root, 2)
    assert torch.equal(state, torch.get_rng_state())


def test_a_killed_build_is_finished(root, capsys):
    load_data("CIFAR10DVS", root, 2)
    cache = root / "frames" / "T2" / "ship"
    cut = cache / "cifar10_ship_95.npy"
    cut.rename(cut.with_name(cut.name + ".tmp"))  # killed while it was written
    (cache / "cifar10_ship_9.npy").unlink()  # and before this one
    whole = (cache / "cifar10_ship_899.npy").stat()
    capsys.readouterr()
    data = load_data("CIFAR10DVS", root, 2)
    assert "2 recordings" in capsys.readouterr().out and len(data.train) == 6
    assert (cache / "cifar10_ship_899.npy").stat() == whole
    path = write(root, "cat/cifar10_cat_9")  # another recording under an old name
    assert load_data("CIFAR10DVS", root, 2).train.loader(str(cache.parent / "cat" / f"{path.stem}.npy")).any()
    assert "1 recordings" in capsys.readouterr().out
    load_data("CIFAR10DVS", root, 2)
    assert not capsys.readouterr().out
    load_data("CIFAR10DVS", root, 3)  # another T
    assert "10 recordings, 3 each" in capsys.readouterr().out


def test_two_processes_build_once(root):
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()

    def start():
        with redirect_stdout(StringIO()) as printed:
            data = load_data("CIFAR10DVS", root, 2)
        results.put((printed.getvalue(), float(data.test[0][0].sum())))

    with FileLock(root / ".lock"):  # until both wait
        processes = [fork.Process(target=start) for _ in range(2)]
        for process in processes:
            process.start()
        time.sleep(0.5)
    (first, one), (second, other) = sorted(results.get(timeout=60) for _ in processes)
    assert first == "" and "10 recordings" in second and one == other > 0


def test_one_crop_for_all_frames(tmp_path):
    """Seven frames of the same events stay the same; where they lie depends on seed, epoch and sample."""
    block = [(x, y, 1) for x in range(50, 60) for y in range(50, 60)]
    for number in (0, 1, 900):
        write(tmp_path, f"cat/cifar10_cat_{number}", pack(block * 7))
    data = load_data("CIFAR10DVS", tmp_path, 7)
    seen = []
    for seed, workers in ((1, 0), (1, 2)):
        loader = train_loader(data.train, batch_size=1, workers=workers, seed=seed, pin_memory=False)
        for epoch in range(6):
            loader.sampler.set_epoch(epoch)
            seen += [frames[0] for frames, _ in loader]
    assert all(torch.equal(frames, frames[:1].expand_as(frames)) for frames in seen)
    assert all(torch.equal(a, b) for a, b in zip(seen[:12], seen[12:]))
    assert len({tuple(frames[0, 1].nonzero()[0].tolist()) for frames in seen}) > 6
    assert torch.equal(data.test[0][0], data.test[0][0])  # not cropped


WHOLE = pack(EVENTS)
BAD = {"empty": b"", "cut in 3": WHOLE[:-3], "cut in 4": WHOLE[:-4], "headless": WHOLE[WHOLE.index(b"\0") :]}
BAD |= {"few": pack(EVENTS[:3]), "only a header": pack([])}
REASONS = {"empty": "empty", "headless": "header", "few": "3 events", "only a header": "0 events"}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_recording_is_named(kind, root):
    path = write(root, "cat/cifar10_cat_7", BAD[kind])
    with pytest.raises(UserError) as error:
        load_data("CIFAR10DVS", root, 4)
    assert str(path) in str(error.value) and REASONS.get(kind, "cut in the middle") in str(error.value)
    path.unlink()
    assert len(load_data("CIFAR10DVS", root, 4).train) == 6  # the lock is free again


def test_bad_frames_are_named(root):
    data = load_data("CIFAR10DVS", root, 2)
    path = Path(data.test.samples[0][0])
    np.save(path, np.load(path)[:1])
    with pytest.raises(UserError, match=f"{path.name}.*in place of 2 frames"):
        data.test[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=path.name):
        data.test[0]


@pytest.mark.parametrize(
    "names", [[], ["cat/cifar10_cat_5"], ["cat/cifar10_cat_900"], ["cat/cat", "cat/c_900"]]
)
def test_recordings_that_make_no_data_set(names, tmp_path):
    (tmp_path / "events").mkdir()
    for name in names:
        write(tmp_path, name)
    with pytest.raises(UserError, match="must hold <class>/<name>_<number>.aedat"):
        load_data("CIFAR10DVS", tmp_path, 2)


@pytest.fixture
def zips(tmp_path, monkeypatch):
    """Two classes in place of ten, zipped, and no network."""
    sources = []
    for name in ("cat", "ship"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for number in (0, 900):
                archive.writestr(f"{name}/cifar10_{name}_{number}.aedat", WHOLE)
        md5 = hashlib.md5((tmp_path / f"{name}.zip").read_bytes()).hexdigest()
        sources.append((f"{name}.zip", f"https://nowhere.invalid/{name}", md5))
    dataset = spikingjelly_parts()[0]
    monkeypatch.setattr(dataset, "resource_url_md5", lambda: sources)

    def refuse(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    return tmp_path


def test_zips_are_used_in_place(zips):
    partial = zips / "events.part" / "cat" / "cifar10_cat_1.aedat"  # of an interrupted start
    partial.parent.mkdir(parents=True)
    partial.write_bytes(WHOLE[:50])
    data = load_data("CIFAR10DVS", zips, 2)
    assert (len(data.train), len(data.test), data.classes) == (2, 2, 2)
    assert not (zips / "events.part").exists()


def test_bad_zips_are_named(zips):
    whole = (zips / "ship.zip").read_bytes()
    (zips / "ship.zip").write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"ship.zip fails \(wrong checksum\)"):
        load_data("CIFAR10DVS", zips, 2)
    (zips / "ship.zip").unlink()
    with pytest.raises(
        UserError, match=f"ship.zip fails .*no network.* put whole cat.zip, ship.zip into {zips}"
    ):
        load_data("CIFAR10DVS", zips, 2)
    assert not (zips / "events").exists()
    (zips / "ship.zip").write_bytes(whole)
    assert len(load_data("CIFAR10DVS", zips, 2).train) == 2


def test_a_picture_of_the_frames(tmp_path):
    picture = tmp_path / "strip.png"
    draw([str(write(tmp_path)), str(picture), "--timesteps", "4"])
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[:2] == (150, 4 * 150)
    assert (pixels[..., 0] > pixels[..., 2]).any() and (pixels[..., 0] < pixels[..., 2]).any()


def test_a_picture_of_events_that_the_resize_does_not_see(tmp_path):
    """Output pixels lie between inputs 0 and 1, 3 and 4, 5 and 6, ...: never at 2."""
    path = write(tmp_path, content=pack([(2, 2, 1)] * 4))
    draw([str(path), str(tmp_path / "strip.png"), "--timesteps", "2"])
    pixels = matplotlib.image.imread(tmp_path / "strip.png")
    assert pixels[3:147, 3:147, :3].min() == 1  # white, within a frame of 3 pixels


def test_the_recorder_refuses_a_picture_of_one_gray(images, tmp_path):
    Image.new("RGB", (32, 32), "white").save(images / "test" / "red" / "0.png")
    with pytest.raises(UserError, match="red/0.png makes no events"):
        recorder([str(images), str(tmp_path / "out"), "--train", "1", "--test", "1"])


def test_recorder_makes_upright_events(tmp_path):
    """A bright square at the top left that moves: about as many ON as OFF, all of them at the top left."""
    pixels = np.full((32, 32), 50, np.uint8)
    pixels[4:12, 4:12] = 200
    events = record(Image.fromarray(pixels))
    assert (np.diff(events[0]) >= 0).all() and events.shape[1] > 1000
    path = tmp_path / "square.aedat"
    write_aedat(path, *events)
    assert path.read_bytes().startswith(HEADER)
    frames = integrate(path, 5)
    assert frames.sum() == events.shape[1] and frames[..., :64, :64].sum() == frames.sum()
    assert frames[:, 0].sum().item() == pytest.approx(frames[:, 1].sum().item(), rel=0.05)


def test_the_recorder_as_a_command(images, tmp_path, capsys):
    run_program(recorder, [str(images), str(tmp_path / "events_of"), "--train", "2", "--test", "1"])
    names = {path.name for path in (tmp_path / "events_of").rglob("*.aedat")}
    assert names == {f"cifar10_{c}_{n}.aedat" for c in ("red", "blue") for n in (0, 1, 900)}
    assert "test/red: 1 recordings" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        run_program(recorder, [str(images), str(tmp_path / "events_of"), "--train", "1"])
    assert "is there already" in end.value.code
    with pytest.raises(SystemExit) as end:
        run_program(recorder, [str(tmp_path / "nowhere"), str(tmp_path / "out")])
    assert end.value.code.startswith("error: cannot record") and "\n" not in end.value.code
    assert not (tmp_path / "out").exists()
    for stray in ("test/red/Thumbs.db", "test/.DS_Store"):  # as file managers leave them
        (images / stray).write_bytes(b"no image")
    (images / "test" / "red" / "bad.png").write_bytes(b"no image")
    argv = [str(images), str(tmp_path / "out"), "--train", "1", "--test", "4"]
    with pytest.raises(SystemExit) as end:
        run_program(recorder, argv)
    assert "bad.png" in end.value.code
    assert not (tmp_path / "out" / "events").exists()  # half a data set would pass for a whole one
    (images / "test" / "red" / "bad.png").unlink()
    run_program(recorder, argv)
    assert len(list((tmp_path / "out").rglob("*.aedat"))) == 2 + 6


def test_the_program_reads_recordings(root, tmp_path, capsys):
    flags = f"--dataset CIFAR10DVS --path {root} --model vgg.vgg11_lif --timesteps 2 --evaluate --workers 0"
    main(f"{flags} --device cpu --checkpoint {tmp_path / 'out'}".split(), "test", 0.05)
    printed = capsys.readouterr().out
    assert "data: CIFAR10DVS, 6 training, 4 test, 2 classes" in printed and "test: loss" in printed


def test_image_users_never_import_spikingjelly(images):
    code = f"import sys, cifar.program, utils.data; utils.data.load_data('imagefolder', {str(images)!r})\n"
    code += "assert not {'spikingjelly', 'torchaudio', 'utils.events'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=100)


def test_the_stand_in_for_torchaudio_is_gone():
    spikingjelly_parts()
    assert getattr(sys.modules.get("torchaudio"), "__name__", "torchaudio") == "torchaudio"
