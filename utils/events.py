"""DVS-CIFAR10: event recordings as frames. `python -m utils.events RECORDING.aedat strip.png` draws one."""

import shutil
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from matplotlib.image import imsave
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import DatasetFolder
from torchvision.datasets.utils import check_integrity, download_url, extract_archive
from torchvision.transforms.functional import resize
from tqdm import tqdm

from utils.checkpoint import make_folder, save
from utils.cli import Parser, UserError, explained, number, require, run_program
from utils.records import locked

FIRST_TEST = 900  # the number of the first recording of a class that is for testing
GRAIN = 36  # the weights of a bilinear resize from 128 to 48 are sixths: resized counts are whole 36ths


def cifar10dvs(root, timesteps):
    """(training set, test set) from <root>/events/<class>/*.aedat, or <root>/*.zip.

    Frames are cached in <root>/frames/T<timesteps>; those that lack there, or are older than their recording,
    are built. Raises UserError for files that are missing or damaged.
    """
    events, folder = root / "events", root / "frames" / f"T{timesteps}"

    def look():
        """Cache file -> its recording; and the pairs of which the frames lack or are older."""
        cached = {folder / file.parent.name / f"{file.stem}.npy": file for file in events.glob("*/*.aedat")}
        age = {frames: frames.stat().st_mtime_ns if frames.exists() else 0 for frames in cached}
        return cached, [pair for pair in cached.items() if age[pair[0]] < pair[1].stat().st_mtime_ns]

    if not events.is_dir() or look()[1]:  # else nothing is to be written
        make_folder(root, "--path")
        with locked(root / ".lock"):  # a killed process leaves no lock behind
            if not events.is_dir():
                unpack(root, events)
            build_frames(look()[1], timesteps)
    cached, _ = look()

    def split(held_out, transform=None):
        def belongs(path):
            path = Path(path)
            return path in cached and (int(path.stem.rpartition("_")[2]) >= FIRST_TEST) == held_out

        return DatasetFolder(folder, partial(read_frames, timesteps), None, transform, None, belongs)

    expected = f"<class>/<name>_<number>.aedat, numbers from {FIRST_TEST} on for testing"
    with explained(lambda why: f"{events} must hold {expected} ({why})", OSError, ValueError):
        return split(False, transforms.RandomCrop(48, padding=4)), split(True)  # one crop for all frames


def read_frames(timesteps, path):
    """A cache file -> event counts (T, 2, 48, 48), float32, channel 0 OFF and 1 ON."""
    with explained(lambda why: f"cannot use the frames in {path} ({why}); remove that file"):
        frames = np.load(path)
        if frames.shape != (timesteps, 2, 48, 48):
            raise ValueError(f"shape {frames.shape} in place of {timesteps} frames")
        return torch.from_numpy(frames.astype(np.float32)) / GRAIN


def unpack(root, events):
    """Unpack the ten zips in `root`, downloaded where they lack, to `events`: all of them or nothing."""
    sources, draft = spikingjelly_parts()[0].resource_url_md5(), root / "events.part"
    shutil.rmtree(draft, ignore_errors=True)
    advice = f"put whole {', '.join(name for name, _, _ in sources)} into {root}"
    with explained(lambda why: f"no {events}, and {name} fails ({why}); {advice}"):
        for name, url, md5 in sources:
            if not (root / name).exists():
                download_url(url, root, f"{name}.part", md5)
                (root / f"{name}.part").rename(root / name)
            elif not check_integrity(root / name, md5):
                raise RuntimeError("wrong checksum")
        for name, _, _ in tqdm(sources, desc="unpacking", disable=None, leave=False):
            extract_archive(root / name, draft)
        draft.rename(events)


def build_frames(pairs, timesteps):
    """Build the frames of (cache file, recording) pairs, in as many processes as torch would use threads."""
    if not pairs:
        return
    print(f"building the frames of {len(pairs)} recordings, {timesteps} each", flush=True)
    # A DataLoader's workers end with their parent and hand on their errors. A generator of its own: what
    # there is to build must not show in the state of the global one.
    settings = dict(num_workers=torch.get_num_threads(), generator=torch.Generator())
    build = partial(build_one, timesteps)
    loader = DataLoader(pairs, batch_size=None, collate_fn=build, **settings)
    for _ in tqdm(loader, "frames", disable=None, leave=False):
        pass


def build_one(timesteps, pair):
    """Write the frames of a recording in whole 36ths."""
    cached, recording = pair
    counts = torch.round(GRAIN * shrink(integrate(recording, timesteps))).numpy()
    counts = counts.astype(np.min_scalar_type(int(counts.max())))  # 8, 16 or, for long frames, 32 bits
    cached.parent.mkdir(parents=True, exist_ok=True)
    save(counts, cached, write=lambda counts, file: np.save(file, counts))


def integrate(recording, timesteps):
    """An AEDAT 2.0 file -> event counts (T, 2, 128, 128): floor(N/T) events a frame, the rest in the last.

    x = 127 - raw x, y = raw y, polarity = 1 - raw polarity, as published. Raises UserError for a file that is
    damaged or holds fewer than T events.
    """
    _, read, integrate_events = spikingjelly_parts()
    what = f"cannot use the recording {recording}"
    with explained(lambda why: f"{what} ({why}); replace or remove it", OSError, UserError):
        require(recording.read_bytes().startswith(b"#"), "it is empty or has no header")
        with explained(lambda _: "it is cut in the middle of an event", ValueError):
            events = read(recording)
        few = f"{len(events['t'])} events are too few for {timesteps} frames"
        require(len(events["t"]) >= timesteps, few)
    frames = integrate_events(events, "number", timesteps, 128, 128)
    return torch.from_numpy(np.rot90(frames, 1, (-2, -1)).copy())  # spikingjelly's lie on their side


def shrink(frames):
    """(T, 2, 128, 128) -> (T, 2, 48, 48), bilinear and without antialiasing, as tensors were in 2022."""
    return resize(frames, [48, 48], antialias=False)


def spikingjelly_parts():
    """What we take of spikingjelly: its CIFAR10DVS, reader of recordings and integrator, at first use."""
    # Its speech data alone need torchaudio, which refuses to load beside a torch built for another CUDA.
    torchaudio = sys.modules.setdefault("torchaudio", ModuleType("stub"))
    try:
        from spikingjelly import datasets
        from spikingjelly.datasets import cifar10_dvs
    finally:
        if torchaudio.__name__ == "stub":
            del sys.modules["torchaudio"]
    source = cifar10_dvs.CIFAR10DVS
    if hasattr(source, "load_origin_data"):  # of version 0.0.0.0.14, the last one for Python 3.10
        return source, source.load_origin_data, datasets.integrate_events_by_fixed_frames_number
    return source, cifar10_dvs._load_origin_data, datasets.utils.integrate_events_by_fixed_frames_number


def draw(argv=None):
    """Write the frames of a recording side by side, as the network sees them: ON red, OFF blue."""
    parser = Parser({}, prog="python -m utils.events", description=draw.__doc__)
    parser.add_argument("recording", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--timesteps", type=number(int, 1), default=20)
    args = parser.parse_args(argv)
    frames = shrink(integrate(args.recording, args.timesteps)).numpy()
    frames = np.minimum(frames / np.quantile(frames[frames > 0], 0.95), 1) if frames.any() else frames
    off, on = np.pad(frames, [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=0.5).swapaxes(0, 1)
    colours = 1 - np.stack([off, np.maximum(on, off), on], axis=-1)  # (T, 50, 50, RGB) on white
    with explained(lambda why: f"cannot write {args.picture} ({why}); give a name that ends in .png"):
        imsave(args.picture, np.hstack(colours).repeat(3, 0).repeat(3, 1))


if __name__ == "__main__":
    run_program(draw)
