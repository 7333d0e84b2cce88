"""idx:PATH, the files of MNIST and its family."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from mbnorm.experiments.dataset import Data
from mbnorm.experiments.sources.arrays import Array, Named, data_of
from mbnorm.experiments.sources.images import first_line

IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
UNSIGNED_BYTES = 0x08


def read(place: str) -> Data:
    """Read train-images-idx3-ubyte, train-labels-idx1-ubyte and the t10k files, as they are or gzipped.

    Raises:
        ValueError: a file is missing or damaged, or its length or shape is another than it should be.
    """
    folder = Path(place)
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    train, test = (_part(folder, prefix) for prefix in ("train", "t10k"))
    return data_of(str(folder), *train, test, spatial=2, per_pixel=False)


def _part(folder: Path, prefix: str) -> tuple[Named, Named]:
    return _array(folder, f"{prefix}-{IMAGES}", 3), _array(folder, f"{prefix}-{LABELS}", 1)


def _array(folder: Path, name: str, axes: int) -> Named:
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise ValueError(f"{folder / name}: no such file, and none with .gz")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({first_line(error)})") from error
    return Named(name, _parsed(path, content, axes))


def _parsed(path: Path, content: bytes, axes: int) -> Array:
    """Return the array after the magic number (0, 0, dtype, axes) and a big-endian length for each axis."""
    start = 4 + 4 * axes
    magic = bytes((0, 0, UNSIGNED_BYTES, axes))
    if content[:4] != magic or len(content) < start:
        raise ValueError(
            f"{path}: expected an IDX file that begins with {magic.hex()}, got {content[:4].hex()}"
        )
    shape = struct.unpack(f">{axes}I", content[4:start])
    values = np.frombuffer(content, np.uint8, offset=start)
    if values.size != int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"{path}: expected values of shape {shape}, got {values.size} bytes")
    return values.reshape(shape)
