"""Small image folders in the layout of ImageNet."""

import numpy as np
from PIL import Image


def make_images(folder, train, val, classes=("n01", "n02", "n03")):
    """Noise with a class's own brightness, odd sizes, in turn RGB, gray and CMYK JPEGs."""
    rng = np.random.default_rng(0)
    counts = {"train": [train] * len(classes), "val": val}
    for split in counts:
        for label, (name, count) in enumerate(zip(classes, counts[split])):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (40 + i, 36, 3), dtype=np.uint8) + np.uint8(70 * label)
                image = Image.fromarray(pixels).convert(("RGB", "L", "CMYK")[i % 3])
                image.save(folder / split / name / f"{i}.JPEG")
