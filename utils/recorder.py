"""Event recordings of still images, in the form of DVS-CIFAR10. They are SYNTHETIC: no camera was involved.

    python -m utils.recorder IMAGES OUT --train 60 --test 15

turns IMAGES/train/<class>/* and IMAGES/test/<class>/* into OUT/events/<class>/cifar10_<class>_<number>.aedat,
so many a class, numbered from 0 (training) and from 900 (test). Each image moves along a closed path, as the
real ones did on their screen, and a pixel emits an event whenever its log intensity has changed by THRESHOLD.
"""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.cli import Parser, explained, number, require, run_program
from utils.data import read_image

SIZE = 128  # pixels of the camera
FINE = 4  # positions a pixel: the image moves by quarters of one
REACH = 6  # pixels from the middle of the path to its corners
LOOPS = 2
THRESHOLD = 0.12
STEP = 2000  # microseconds from one position to the next
HEADER = b"#!AER-DAT2.0\r\n# synthetic recording of a moved image\r\n# Timestamps tick is 1 us\r\n"


def closed_path():
    """(steps, 2) offsets in fine pixels: a diamond, LOOPS times around, back to where it began."""
    reach = REACH * FINE
    corners = [(0, reach), (reach, 2 * reach), (2 * reach, reach), (reach, 0)]  # (y, x)
    sides = zip(corners, corners[1:] + corners[:1])
    loop = np.concatenate([np.linspace(a, b, reach, endpoint=False) for a, b in sides]).round().astype(int)
    return np.concatenate([loop] * LOOPS + [loop[:1]])


def record(image, seed=0):
    """The events of a PIL image that moves: rows t (microseconds, ascending), x, y (down), on (0 or 1)."""
    rng = np.random.default_rng(seed)
    side = (SIZE + 2 * REACH) * FINE
    canvas = image.convert("L").resize((side, side), Image.Resampling.BILINEAR)
    canvas = np.log(np.asarray(canvas, np.float32) + 20)  # a pixel never sees perfect darkness
    events, last = [], None
    for step, (y, x) in enumerate(closed_path()):
        seen = canvas[y : y + SIZE * FINE : FINE, x : x + SIZE * FINE : FINE]
        last = seen.copy() if last is None else last
        changes = np.trunc((seen - last) / THRESHOLD)  # the number of events, signed by their polarity
        last += changes * THRESHOLD
        rows, columns = np.nonzero(changes)
        found = changes[rows, columns]
        order = rng.permutation(np.repeat(np.arange(len(found)), np.abs(found).astype(int)))
        times = np.sort(rng.integers(0, STEP, len(order))) + step * STEP
        events.append(np.stack([times, columns[order], rows[order], found[order] > 0]))
    return np.concatenate(events, axis=1)


def write_aedat(path, t, x, y, on, header=HEADER):
    """AEDAT 2.0 as DVS-CIFAR10 has it: pairs of address and time, big-endian; x mirrored, ON as 0."""
    address = (SIZE - 1 - np.asarray(x)) << 1 | np.asarray(y) << 8 | 1 - np.asarray(on)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + np.stack([address, t], axis=1).astype(">u4").tobytes())


def main(argv=None):
    parser = Parser({}, prog="python -m utils.recorder", description=__doc__)
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=number(int, 1, high=900), default=60)
    parser.add_argument("--test", type=number(int, 1, high=100), default=15)
    args = parser.parse_args(argv)
    events, draft, written = args.out / "events", args.out / "events.part", 0
    require(not events.exists(), f"{events} is there already; remove it or choose another folder")
    expected = "expected are train/<class>/ and test/<class>/ with images"
    with explained(lambda why: f"cannot record {args.images} ({why}); {expected}", OSError):
        shutil.rmtree(draft, ignore_errors=True)
        for split, first, count in (("train", 0, args.train), ("test", 900, args.test)):
            for folder in sorted(filter(Path.is_dir, (args.images / split).iterdir())):
                files = [file for file in folder.iterdir() if file.suffix.lower() in IMG_EXTENSIONS]
                files = sorted(files)[:count]
                require(files, f"no pictures in {folder}; known are {', '.join(IMG_EXTENSIONS)}")
                for index, file in enumerate(files, start=first):
                    path = draft / folder.name / f"cifar10_{folder.name}_{index}.aedat"
                    found = record(read_image(file), seed=index)
                    require(found.size, f"{file} makes no events, as it is of one gray; remove it")
                    write_aedat(path, *found)
                    written += path.stat().st_size
                so_far = f"{written / 1e6:.0f} MB so far"
                print(f"{split}/{folder.name}: {len(files)} recordings, {so_far}", flush=True)
        draft.rename(events)  # all of them or nothing


if __name__ == "__main__":
    run_program(main)
