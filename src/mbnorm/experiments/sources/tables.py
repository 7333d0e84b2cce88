"""parquet:PATH and hub:NAME, tables with a column of images, read through Hugging Face `datasets`."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbnorm.experiments.dataset import Parts
from mbnorm.experiments.sources import images
from mbnorm.experiments.sources.findings import Findings, in_threads
from mbnorm.experiments.sources.images import Images, Picture, any_skipped, decoded, first_line, square_like
from mbnorm.experiments.sources.splits import TEST_SPLITS, check_enough, held_out

LABELS = ("label", "labels", "fine_label", "target", "class")
COLUMN = re.compile(r"(.*):(\w+)=([^:]+)")


def read(kind: str, place: str) -> Parts:
    """Open parquet files or a data set on the hub.

    After ``place`` may follow :image=COLUMN and :label=COLUMN. Where nothing is there to test on, it is
    every fifth image of a class. All images are brought to the shape of the first.

    Args:
        kind: "parquet" or "hub".
        place: the file, the folder of files whose names begin with their part, or the name on the hub.

    Raises:
        ValueError: the source is missing, empty or not what it should be; the line names the file.
    """
    try:
        # takes seconds, and most data come without it
        import datasets
    except ImportError as error:
        raise ValueError(f"{kind}:{place} needs the package datasets: pip install 'mbnorm[data]'") from error
    place, wanted = _columns_wanted(place)
    splits = _parquet(Path(place)) if kind == "parquet" else _hub(place)
    if "train" not in splits:
        raise ValueError(f"{place}: no part named train, only {', '.join(splits)}")
    train = splits["train"]
    column, label = _columns(train, wanted, place)
    test = _test(splits, label)
    for part in (train, test):
        if part is not None and len(part) == 0:
            raise ValueError(f"{place}: no images in it")
    train = train.cast_column(column, datasets.Image(decode=False))
    names = _names(train, label, place)
    train_targets = _targets(train, label, names, place)
    _check_present(train_targets, train.features[label], names, place)
    if test is not None:
        if {column, label} - set(test.column_names):
            raise ValueError(f"{place}: the part to test on has no columns {column!r} and {label!r}")
        test = test.cast_column(column, datasets.Image(decode=False))
        test_targets = _targets(test, label, names, place)
    _check_decodable([rows for rows in (train, test) if rows is not None], column, place)
    count = len(train) + (0 if test is None else len(test))
    shape = square_like(_picture(train, column, place, 0))
    if test is None:
        chosen = held_out(train_targets)
        rows = torch.arange(len(train_targets))
        test, test_targets = train.select(rows[chosen].tolist()), train_targets[chosen]
        train, train_targets = train.select(rows[~chosen].tolist()), train_targets[~chosen]
    check_enough(place, len(names), len(train_targets), len(test_targets))
    train, test = (
        any_skipped(Images(partial(_picture, rows, column, place), targets, shape), count)
        for rows, targets in ((train, train_targets), (test, test_targets))
    )
    return Parts(train, test, train_targets, shape, len(names), per_pixel=False)


def _columns_wanted(place: str) -> tuple[str, dict[str, str]]:
    """Return the place without the columns that it names, and these."""
    wanted: dict[str, str] = {}
    while (match := COLUMN.fullmatch(place)) is not None:
        place, key, name = match.groups()
        if key not in ("image", "label"):
            raise ValueError(f"{place}: expected :image=COLUMN or :label=COLUMN, got :{key}={name}")
        wanted[key] = name
    return place, wanted


def _picture(rows: Any, column: str, place: str, index: int) -> Picture:
    cell, where = rows[index][column], f"{place}, row {index}"
    if not isinstance(cell, dict) or (cell.get("bytes") is None and cell.get("path") is None):
        raise ValueError(f"{where}: no image in it")
    if cell.get("bytes") is not None:
        return decoded(cell["bytes"], where)
    path = Path(str(cell["path"]))
    return decoded(path, str(path))


def _check_decodable(parts: list[Any], column: str, place: str) -> None:
    """Decode all images, unless this was done or there are too many."""
    if sum(map(len, parts)) > images.MOST_DECODED:
        return
    findings = Findings(place, f"decoded rows of {column}")
    for rows in parts:
        # where the rows are kept on disk; what is made in memory has none
        files = [Path(file["filename"]) for file in rows.cache_files]
        if findings.get(files) is None:
            in_threads(partial(_picture, rows, column, place), range(len(rows)))
            findings.add(files, True)
    findings.save()


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
                reason = first_line(error.__cause__ or error)
                raise ValueError(f"{part}: cannot be read as parquet ({reason})") from error
        read[split] = datasets.concatenate_datasets(tables)
    return read


def _hub(name: str) -> dict[str, Any]:
    import datasets

    try:
        return dict(datasets.load_dataset(name))
    except Exception as error:
        raise ValueError(f"{name}: cannot be had from the hub ({first_line(error)})") from error


def _test(splits: dict[str, Any], label: str) -> Any | None:
    for name in TEST_SPLITS:
        test = splits.get(name)
        if test is None:
            continue
        # contests keep the labels of their test part
        if label not in test.column_names or len(test) == 0 or set(test[label][:100]) != {-1}:
            return test
    return None


def _columns(rows: Any, wanted: dict[str, str], place: str) -> tuple[str, str]:
    import datasets

    features = rows.features
    for name in wanted.values():
        if name not in features:
            raise ValueError(f"{place}: no column {name!r}, only {', '.join(features)}")
    pictures = [c for c, f in features.items() if isinstance(f, datasets.Image) or _holds_bytes(f)]
    labels = [name for name in LABELS if name in features]
    image, label = wanted.get("image", *pictures[:1]), wanted.get("label", *labels[:1])
    if image is None or label is None:
        what = "images" if image is None else f"labels (named {', '.join(LABELS)})"
        raise ValueError(f"{place}: no column of {what}, only {', '.join(features)}")
    if image not in pictures:
        raise ValueError(f"{place}: expected images in the column {image!r}, got {features[image]}")
    return image, label


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


def _check_present(targets: Tensor, feature: Any, names: Sequence[Any], place: str) -> None:
    missing = sorted(set(range(len(names))) - set(targets.tolist()))
    if missing:
        # only named classes can be empty: others are those that are there
        raise ValueError(f"{place}: no image to train on of the class {feature.int2str(missing[0])!r}")
