"""folder:PATH, a folder of images for each class."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mbnorm.experiments.dataset import Parts
from mbnorm.experiments.sources import images
from mbnorm.experiments.sources.findings import found_in
from mbnorm.experiments.sources.images import Images, Picture, any_skipped, decoded, files_in, square_like
from mbnorm.experiments.sources.splits import TEST_SPLITS, check_enough, held_out


def read(place: str) -> Parts:
    """Open a folder that has a folder for each class, or two of such folders, train and test.

    Where nothing is there to test on, it is every fifth image of a class. All images are brought to the
    shape of the first.

    Raises:
        ValueError: there is no such folder, a class is empty, an image cannot be decoded.
    """
    path = Path(place)
    if not path.is_dir():
        raise ValueError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}")
    tests = [path / name for name in TEST_SPLITS if (path / name).is_dir()]
    if (path / "train").is_dir() and tests:
        files, names = _class_folders(path / "train")
        test_files, test_names = _class_folders(tests[0])
        unknown = sorted(set(test_names) - set(names))
        if unknown:
            raise ValueError(f"{tests[0] / unknown[0]}: no class of that name in {path / 'train'}")
        classes = sorted(set(names))
        targets, test_targets = _classes(names, classes), _classes(test_names, classes)
    else:
        files, names = _class_folders(path)
        classes = sorted(set(names))
        every = _classes(names, classes)
        chosen = held_out(every)
        test_files = [file for file, test in zip(files, chosen.tolist(), strict=True) if test]
        files = [file for file, test in zip(files, chosen.tolist(), strict=True) if not test]
        targets, test_targets = every[~chosen], every[chosen]
    check_enough(place, len(classes), len(files), len(test_files))
    count = len(files) + len(test_files)
    check_decodable([*files, *test_files], path)
    shape = square_like(_picture(files, 0))
    train = any_skipped(Images(partial(_picture, files), targets, shape), count)
    test = any_skipped(Images(partial(_picture, test_files), test_targets, shape), count)
    return Parts(train, test, targets, shape, len(classes), per_pixel=False)


def check_decodable(files: list[Path], place: Path) -> list[list[int]]:
    """Return width and height of each image; up to 20,000 are decoded, of more the headers are read.

    Raises:
        ValueError: one cannot be decoded; the line names the file.
    """
    if len(files) > images.MOST_DECODED:
        return found_in(files, images.size_in_header, place, "headers")
    return found_in(files, images.decoded_size, place, "decoded images")


def _picture(files: list[Path], index: int) -> Picture:
    return decoded(files[index], str(files[index]))


def _classes(names: list[str], classes: list[str]) -> Tensor:
    number = {name: c for c, name in enumerate(classes)}
    return torch.tensor([number[name] for name in names])


def _class_folders(path: Path) -> tuple[list[Path], list[str]]:
    """Return the images in the folders of a folder, and the name of the folder of each."""
    stray = files_in(path)
    if stray:
        raise ValueError(f"{stray[0]}: expected a folder per class, and this image is in none")
    files: list[Path] = []
    names: list[str] = []
    for folder in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
        found = files_in(folder)
        if not found:
            raise ValueError(f"{folder}: no images in it")
        files += found
        names += [folder.name] * len(found)
    if not files:
        raise ValueError(f"{path}: expected a folder per class, and there is none")
    return files, names
