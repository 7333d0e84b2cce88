"""Make the npz file of hippocampus MRI: python data/hippocampus.py Task04_Hippocampus hippocampus.npz.

The folder is that of the Medical Segmentation Decathlon, task 04 (CC-BY-SA 4.0), with imagesTr and labelsTr.
Needs nibabel.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHAPE = (40, 56, 40)
BRIGHTEST = 99.5
"""The percentile of a volume that becomes 255."""

Array = NDArray[Any]


def read(folder: Path) -> dict[str, Array]:
    """Return volumes and masks: 0 is background, 1 the anterior part and 2 the posterior one.

    Raises:
        ValueError: the folder has no volumes, one has no mask, or its shape or classes are others.
    """
    files = sorted(file for file in (folder / "imagesTr").glob("*.nii*") if not file.name.startswith("."))
    if not files:
        raise ValueError(f"{folder / 'imagesTr'}: no volumes in it")
    volumes, masks = [], []
    for file in files:
        label = folder / "labelsTr" / file.name
        if not label.exists():
            raise ValueError(f"{label}: no such file")
        volume, mask = _values(file), _values(label)
        if volume.shape != mask.shape:
            raise ValueError(f"{label}: shape {mask.shape}, and its volume has {volume.shape}")
        if not np.isin(mask, (0, 1, 2)).all():
            raise ValueError(f"{label}: expected the classes 0, 1 and 2, got {np.unique(mask)}")
        volumes.append(centred(brightened(volume)))
        masks.append(centred(mask.astype(np.uint8)))
    return {"volumes": np.stack(volumes), "masks": np.stack(masks)}


def brightened(volume: Array) -> Array:
    """Return a volume as bytes, its 99.5th percentile and all above as 255."""
    scale = 255 / max(np.percentile(volume, BRIGHTEST), np.finfo(np.float64).tiny)
    return np.clip(np.round(volume * scale), 0, 255).astype(np.uint8)


def centred(volume: Array) -> Array:
    """Return the middle of a volume, with zeros around it where it is smaller."""
    out = np.zeros(SHAPE, volume.dtype)
    taken, placed = [], []
    for side, wanted in zip(volume.shape, SHAPE, strict=True):
        length = min(side, wanted)
        taken.append(slice((side - length) // 2, (side - length) // 2 + length))
        placed.append(slice((wanted - length) // 2, (wanted - length) // 2 + length))
    out[tuple(placed)] = volume[tuple(taken)]
    return out


def main(folder: Path, out: Path) -> None:
    """Write the file."""
    arrays = read(folder)
    np.savez_compressed(out, **arrays)
    shares = np.bincount(arrays["masks"].ravel(), minlength=3) / arrays["masks"].size
    print(f"written: {out}: volumes {arrays['volumes'].shape}, shares of the classes {np.round(shares, 3)}")


def _values(file: Path) -> Array:
    import nibabel

    return np.asarray(nibabel.load(file).dataobj, dtype=np.float64)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
