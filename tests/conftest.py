import os

import numpy as np
import pytest
import torch
from PIL import Image

if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each of the processes that run tests side by side
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """The same numbers whichever tests ran before in this process."""
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Double precision as the default of this test: a spike cannot flip by rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def write_images(folder, seed=0):
    """A folder of 2 classes, red-ish and blue-ish noise: 10 training and 6 test images, of odd sizes."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", 5), ("test", 3)):
        for channel, name in ((0, "red"), (2, "blue")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (36, 30, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images")


def pytest_terminal_summary(terminalreporter):
    """Say in a line each that nothing was tried on a GPU, or by the event engine, and why."""
    reports = terminalreporter.stats.get("skipped", [])
    reports = [(report, report.longrepr[2]) for report in reports if isinstance(report.longrepr, tuple)]
    gpu = [why for report, why in reports if "gpu" in getattr(report, "keywords", ()) and "no CUDA" in why]
    events = [why.split("no event engine: ")[1] for _, why in reports if "no event engine: " in why]
    if gpu:
        line = f"skipped: {len(gpu)} tests marked gpu, as there is no CUDA device here"
        terminalreporter.write_line(line)
    if events:
        terminalreporter.write_line(f"skipped: {len(events)} tests of the event engine: {events[0]}")
