"""Images from outside, read through Hugging Face `datasets`: folders, parquet files, names on the hub."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

EVERY_FIFTH = 5
"""What is tested on where a source says nothing."""
LARGEST_SIDE = 224
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
TEST_SPLITS = ("test", "validation", "valid", "val")
LABELS = ("label", "labels", "fine_label", "target", "class")


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images with a class each, decoded when they are asked for.

    Args:
        rows: a dataset of `datasets` with undecoded images.
        column: where ``rows`` has the images.
        targets: a class per row.
        shape: channels, 1 or 3, height and width; images are scaled to cover it and cropped at the centre.
        place: the file or name that messages give.

    Raises:
        ValueError: when an image is asked for that cannot be decoded; the line names it.
    """

    def __init__(self, rows: Any, column: str, targets: Tensor, shape: torch.Size, place: str) -> None:
        self.rows, self.column, self.targets = rows, column, targets
        self.shape, self.place = shape, place

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from PIL import ImageOps

        picture = decoded(self.rows[int(index)][self.column], f"{self.place}, row {int(index)}")
        channels, height, width = self.shape
        picture = ImageOps.fit(picture.convert("RGB" if channels == 3 else "L"), (width, height))
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        image = pixels.view(height, width, channels).movedim(2, 0).float() / 127.5 - 1
        return image, self.targets[index]


class Source(NamedTuple):
    """What to train on, what to test on, and the number of classes."""

    train: Images
    test: Images
    classes: int


def read(name: str) -> Source:
    """Open the source that ``name`` says: folder:PATH, parquet:PATH or hub:NAME.

    A folder has a folder per class, or two of such folders, train and test; parquet files and data sets
    on the hub have a column of images and one of labels. Where nothing is there to test on, it is every
    fifth image of a class.

    Raises:
        ValueError: the source is missing, empty or not what it should be, in a line that names the file.
    """
    try:
        # takes seconds, and most data come without it
        import datasets
    except ImportError as error:
        raise ValueError(f"{name} needs the package datasets: pip install 'mbnorm[data]'") from error
    kind, _, place = name.partition(":")
    if kind == "folder":
        train, test = _folder(Path(place))
    else:
        splits = _parquet(Path(place)) if kind == "parquet" else _hub(place)
        train, test = _train_and_test(splits, place)
    for part in (train, test):
        if part is not None and len(part) == 0:
            raise ValueError(f"{place}: no images in it")
    column, label = _columns(train, place)
    train = train.cast_column(column, datasets.Image(decode=False))
    names = _names(train, label, place)
    train_targets = _targets(train, label, names, place)
    if test is None:
        held_out = _every_fifth(train_targets)
        rows = torch.arange(len(train_targets))
        test, test_targets = train.select(rows[held_out].tolist()), train_targets[held_out]
        train, train_targets = train.select(rows[~held_out].tolist()), train_targets[~held_out]
    else:
        if {column, label} - set(test.column_names):
            raise ValueError(f"{place}: the part to test on has no columns {column!r} and {label!r}")
        test = test.cast_column(column, datasets.Image(decode=False))
        test_targets = _targets(test, label, names, place)
    if len(names) < 2 or len(test_targets) == 0:
        raise ValueError(
            f"{place}: expected at least 2 classes and {EVERY_FIFTH} images of one, "
            f"got {len(names)} classes and {len(train_targets)} images"
        )
    shape = _shape(decoded(train[0][column], f"{place}, row 0"))
    return Source(
        Images(train, column, train_targets, shape, place),
        Images(test, column, test_targets, shape, place),
        len(names),
    )


def decoded(cell: Any, place: str) -> Any:
    """Return the picture in a cell of an image column; messages name its file, or ``place``."""
    from PIL import Image

    if not isinstance(cell, dict) or (cell.get("bytes") is None and cell.get("path") is None):
        raise ValueError(f"{place}: no image in it")
    content, path = cell.get("bytes"), str(cell.get("path"))
    try:
        picture = Image.open(io.BytesIO(Path(path).read_bytes() if content is None else content))
        picture.load()
    # damaged files raise nearly anything
    except Exception as error:
        where = path if content is None else place
        raise ValueError(f"{where}: cannot be decoded as an image ({_first_line(error)})") from error
    return picture


def _folder(path: Path) -> tuple[Any, Any | None]:
    if not path.is_dir():
        raise ValueError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}")
    tests = [path / name for name in TEST_SPLITS if (path / name).is_dir()]
    if not (path / "train").is_dir() or not tests:
        return _class_folders(path), None
    train, test = _class_folders(path / "train"), _class_folders(tests[0])
    unknown = sorted(set(test["label"]) - set(train["label"]))
    if unknown:
        raise ValueError(f"{tests[0] / unknown[0]}: no class of that name in {path / 'train'}")
    return train, test


def _class_folders(path: Path) -> Any:
    import datasets

    stray = next(_images(path), None)
    if stray is not None:
        raise ValueError(f"{stray}: expected a folder per class, and this image is in none")
    files: list[str] = []
    labels: list[str] = []
    for folder in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
        found = [str(file) for file in _images(folder)]
        if not found:
            raise ValueError(f"{folder}: no images in it")
        files += found
        labels += [folder.name] * len(found)
    if not files:
        raise ValueError(f"{path}: expected a folder per class, and there is none")
    return datasets.Dataset.from_dict({"image": files, "label": labels}).cast_column(
        "image", datasets.Image(decode=False)
    )


def _images(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.iterdir()) if file.suffix.lower() in SUFFIXES)


def _parquet(path: Path) -> dict[str, Any]:
    import datasets

    # it logs what is raised here
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    files = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if not files:
        raise ValueError(f"{path}: no parquet files in it")
    splits: dict[str, list[str]] = {}
    for file in files:
        split = next((name for name in TEST_SPLITS if file.name.startswith(name)), "train")
        splits.setdefault("train" if len(files) == 1 else split, []).append(str(file))
    read: dict[str, Any] = {}
    for split, parts in splits.items():
        tables = []
        for part in parts:
            try:
                tables.append(datasets.load_dataset("parquet", data_files=part, split="train"))
            except Exception as error:
                reason = _first_line(error.__cause__ or error)
                raise ValueError(f"{part}: cannot be read as parquet ({reason})") from error
        read[split] = datasets.concatenate_datasets(tables)
    return read


def _hub(name: str) -> dict[str, Any]:
    import datasets

    try:
        return dict(datasets.load_dataset(name))
    except Exception as error:
        raise ValueError(f"{name}: cannot be had from the hub ({_first_line(error)})") from error


def _train_and_test(splits: dict[str, Any], place: str) -> tuple[Any, Any | None]:
    if "train" not in splits:
        raise ValueError(f"{place}: no part named train, only {', '.join(splits)}")
    for name in TEST_SPLITS:
        test = splits.get(name)
        if test is None:
            continue
        label = next((c for c in LABELS if c in test.column_names), None)
        # contests keep the labels of their test part
        if label is None or len(test) == 0 or set(test[label][:100]) != {-1}:
            return splits["train"], test
    return splits["train"], None


def _columns(rows: Any, place: str) -> tuple[str, str]:
    import datasets

    features = rows.features
    images = [c for c, f in features.items() if isinstance(f, datasets.Image) or _holds_bytes(f)]
    labels = [name for name in LABELS if name in features]
    if not images or not labels:
        what = "images" if not images else f"labels (named {', '.join(LABELS)})"
        raise ValueError(f"{place}: no column of {what}, only {', '.join(features)}")
    return images[0], labels[0]


def _holds_bytes(feature: Any) -> bool:
    return (isinstance(feature, dict) and "bytes" in feature) or getattr(feature, "dtype", None) == "binary"


def _names(rows: Any, label: str, place: str) -> Sequence[Any]:
    """Return the labels in the order of their classes."""
    feature = rows.features[label]
    if getattr(feature, "num_classes", None):
        return range(int(feature.num_classes))
    values = rows[label][:]
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | str) or type(value) is not type(values[0]):
            raise ValueError(
                f"{place}, row {row}: expected a label as in the other rows, text or a whole number, "
                f"got {value!r}"
            )
    return sorted(set(values))


def _targets(rows: Any, label: str, names: Sequence[Any], place: str) -> Tensor:
    class_of = {name: number for number, name in enumerate(names)}
    targets = []
    for row, value in enumerate(rows[label][:]):
        if value not in class_of:
            raise ValueError(f"{place}, row {row}: the label {value!r} is none of the {len(names)} known")
        targets.append(class_of[value])
    return torch.tensor(targets)


def _every_fifth(targets: Tensor) -> Tensor:
    held_out = torch.zeros(len(targets), dtype=torch.bool)
    for c in torch.unique(targets):
        held_out[(targets == c).nonzero()[:, 0][EVERY_FIFTH - 1 :: EVERY_FIFTH]] = True
    return held_out


def _shape(picture: Any) -> torch.Size:
    """Return the shape that all images are brought to: that of the first, made square and 224 at most."""
    side = min(*picture.size, LARGEST_SIDE)
    return torch.Size((1 if picture.mode in ("1", "L", "I", "I;16", "F") else 3, side, side))


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
