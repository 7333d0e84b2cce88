"""npz:FILE, NumPy arrays in a file."""

import zipfile
from pathlib import Path

import numpy as np

from mbnorm.experiments.dataset import Data
from mbnorm.experiments.sources.arrays import Named, data_of
from mbnorm.experiments.sources.images import first_line

INPUTS = {"images": 2, "volumes": 3}
"""Keys of the samples, and the axes of each."""
TARGETS = ("labels", "masks")
TEST = "test_"


def read(place: str) -> Data:
    """Read images or volumes, and labels or masks, from a file of `numpy.savez`.

    ``images`` has the shape (N, H, W) or (N, H, W, C), ``volumes`` (N, D, H, W) or (N, D, H, W, C);
    ``labels`` has a class for each sample, ``masks`` one for each pixel. ``test_images`` and so on are what
    to test on; without them it is every fifth sample, with labels every fifth of a class.

    Raises:
        ValueError: the file is missing, damaged, or has other keys or shapes.
    """
    path = Path(place)
    if not path.is_file():
        raise ValueError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    with path.open("rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: cannot be read as npz ({first_line(error)})") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError(f"{path}: expected several arrays, got one: save them with numpy.savez")
        inputs, targets = _one_of(tuple(INPUTS), archive, path), _one_of(TARGETS, archive, path)
        tested = [TEST + key in archive.files for key in (inputs, targets)]
        if tested[0] != tested[1]:
            there, missing = (TEST + key for key in ((inputs, targets) if tested[0] else (targets, inputs)))
            raise ValueError(f"{path}: {there} without {missing}")
        train = _array(inputs, archive, path), _array(targets, archive, path)
        test = None
        if all(tested):
            test = _array(TEST + inputs, archive, path), _array(TEST + targets, archive, path)
    return data_of(str(path), *train, test, INPUTS[inputs], per_pixel=targets == "masks")


def _one_of(keys: tuple[str, ...], archive: np.lib.npyio.NpzFile, path: Path) -> str:
    found = [key for key in keys if key in archive.files]
    if len(found) != 1:
        raise ValueError(
            f"{path}: expected one array named {' or '.join(keys)}, got {', '.join(archive.files) or 'none'}"
        )
    return found[0]


def _array(key: str, archive: np.lib.npyio.NpzFile, path: Path) -> Named:
    try:
        return Named(key, archive[key])
    # damaged files raise nearly anything
    except Exception as error:
        raise ValueError(f"{path}: {key} cannot be read ({first_line(error)})") from error
