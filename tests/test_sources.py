"""Images from folders, parquet files and the hub: what is read, and what is wrong in one line."""

import shutil
import sys

import datasets
import pytest
import torch
from PIL import Image
from test_cli import mbnorm_says

from mbnorm.experiments.data import load, parts
from mbnorm.experiments.sources import findings, images, tables

CLASSES = ("cat", "dog")


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        folder = tmp_path_factory.mktemp("findings")
        patch.setattr(findings, "cache_folder", lambda: folder)
        yield


def draw(path, shade, mode="RGB", size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, shade if mode == "L" else (shade, 0, 255 - shade)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes, with ten images each to train on and two to test on."""
    for part, count in (("train", 10), ("test", 2)):
        for c, name in enumerate(CLASSES):
            for i in range(count):
                draw(tmp_path / part / name / f"{i}.png", 100 * c + i)
    return tmp_path


def rows(folder, part="train", labels=CLASSES):
    """What a parquet file of the same images holds."""
    files = [(c, file) for c, name in enumerate(CLASSES) for file in sorted((folder / part / name).iterdir())]
    return [{"image": {"bytes": file.read_bytes(), "path": None}, "label": labels[c]} for c, file in files]


def write_parquet(path, content):
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(content).to_parquet(str(path))
    return path


def test_a_folder_is_read_with_its_classes(folder):
    data = load(f"folder:{folder}")
    assert data.train_inputs.shape == (20, 3, 10, 10)
    assert data.train_targets.tolist() == [0] * 10 + [1] * 10
    assert data.test_targets.tolist() == [0, 0, 1, 1]
    assert data.classes == 2


def test_pixels_come_as_they_are_in_the_file(folder):
    image, target = parts(f"folder:{folder}").train[12]
    assert target == 1
    expected = torch.tensor([102, 0, 153]) / 127.5 - 1
    torch.testing.assert_close(image, expected.view(3, 1, 1).expand(3, 10, 10))


def test_without_a_part_to_test_on_it_is_every_fifth_image_of_a_class(folder):
    shutil.rmtree(folder / "test")
    data = parts(f"folder:{folder / 'train'}")
    assert (len(data.train), data.test.targets.tolist()) == (16, [0, 0, 1, 1])


def test_images_are_brought_to_the_shape_of_the_first(folder):
    draw(folder / "train" / "dog" / "large.png", 7, "L", (64, 32))
    assert load(f"folder:{folder}").train_inputs.shape == (21, 3, 10, 10)


def test_gray_images_have_one_channel(tmp_path):
    for c, name in enumerate(CLASSES):
        for i in range(5):
            draw(tmp_path / name / f"{i}.png", 50 * c + i, "L")
    assert load(f"folder:{tmp_path}").train_inputs.shape == (8, 1, 10, 10)


@pytest.mark.parametrize("labels", [CLASSES, (0, 1)], ids=str)
def test_a_parquet_file_is_read_as_the_folder_it_was_made_of(folder, labels):
    for part in ("train", "test"):
        write_parquet(folder / f"{part}.parquet", rows(folder, part, labels))
    expected, found = load(f"folder:{folder}"), load(f"parquet:{folder}")
    assert all(torch.equal(a, b) for a, b in zip(expected[:4], found[:4], strict=True))


def test_one_parquet_file_is_split(folder):
    path = write_parquet(folder / "all.parquet", rows(folder))
    data = load(f"parquet:{path}")
    assert (len(data.train_inputs), len(data.test_inputs)) == (16, 4)


@pytest.fixture
def hub(monkeypatch, folder):
    """A hub with one data set, which names its columns as CIFAR-100 does; there is no internet in tests."""

    def part(name):
        content = [{"img": r["image"], "fine_label": r["label"]} for r in rows(folder, name, (0, 1))]
        features = datasets.Features(
            {"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=CLASSES)}
        )
        return datasets.Dataset.from_list(content, features=features)

    def load_dataset(name):
        if name != "pets":
            raise ConnectionError(f"Couldn't reach {name!r} on the Hub\nmore")
        return datasets.DatasetDict({"train": part("train"), "test": part("test")})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_a_name_on_the_hub_is_read_with_its_columns(hub):
    data = parts("hub:pets")
    assert (len(data.train), len(data.test), data.classes) == (20, 4, 2)


def test_a_class_on_the_hub_without_an_image_is_named(monkeypatch, folder):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", *CLASSES])}
    )
    part = datasets.Dataset.from_list(rows(folder, labels=(1, 2)), features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict({"train": part}))
    with pytest.raises(ValueError, match=r"^birds: no image to train on of the class 'a'$"):
        parts("hub:birds")


def test_a_name_that_the_hub_does_not_have_gives_one_line(hub):
    with pytest.raises(ValueError, match=r"^dogs: cannot be had from the hub .*'dogs' on the Hub\)$"):
        parts("hub:dogs")


def test_without_datasets_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match=r"parquet:x needs the package datasets: pip install 'mbnorm\[data\]'"
    ):
        parts("parquet:x")


def test_a_folder_needs_no_package_beyond_those_of_the_experiments(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(parts(f"folder:{folder}").train) == 20


@pytest.fixture
def odd_columns(folder):
    """A parquet file with two columns of images and two of whole numbers, none named as usual."""
    content = [
        {"thumb": {"bytes": b"x", "path": None}, "img": row["image"], "size": 3, "cls": row["label"]}
        for row in rows(folder)
    ]
    return write_parquet(folder / "odd.parquet", content)


def test_columns_may_be_named(folder, odd_columns):
    found = load(f"parquet:{odd_columns}:image=img:label=cls")
    expected = load(f"parquet:{write_parquet(folder / 'x.parquet', rows(folder))}")
    assert all(torch.equal(a, b) for a, b in zip(found[:4], expected[:4], strict=True))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (":image=img", r"no column of labels \(named label, labels, fine_label, target, class\)"),
        (":image=picture:label=cls", "no column 'picture', only thumb, img, size, cls"),
        (":image=size:label=cls", "expected images in the column 'size', got Value"),
        (":imgae=img:label=cls", "expected :image=COLUMN or :label=COLUMN, got :imgae=img"),
    ],
)
def test_a_wrong_column_gives_one_line(odd_columns, columns, message):
    with pytest.raises(ValueError, match=f"^{odd_columns}: {message}"):
        parts(f"parquet:{odd_columns}{columns}")


def test_what_was_decoded_is_not_decoded_again_while_it_stays_as_it_is(folder, monkeypatch):
    name, looked_at = f"folder:{folder}", []
    decoded_size = images.decoded_size
    monkeypatch.setattr(images, "decoded_size", lambda file: looked_at.append(file) or decoded_size(file))
    changed = folder / "train" / "dog" / "4.png"
    parts.__wrapped__(name)
    assert len(looked_at) == 24
    draw(changed, 99, size=(40, 30))
    parts.__wrapped__(name)
    assert looked_at[24:] == [changed]


def test_what_was_sound_is_not_decoded_again_after_a_damaged_image(folder, monkeypatch):
    damaged = folder / "test" / "dog" / "1.png"
    whole, looked_at = damaged.read_bytes(), []
    damaged.write_bytes(whole[:50])
    with pytest.raises(ValueError, match="cannot be decoded"):
        parts.__wrapped__(f"folder:{folder}")
    damaged.write_bytes(whole)
    decoded_size = images.decoded_size
    monkeypatch.setattr(images, "decoded_size", lambda file: looked_at.append(file) or decoded_size(file))
    parts.__wrapped__(f"folder:{folder}")
    assert looked_at == [damaged]


def test_what_was_decoded_in_a_column_of_a_file_is_not_decoded_again(odd_columns, monkeypatch):
    places, decoded = [], tables.decoded
    monkeypatch.setattr(
        tables, "decoded", lambda content, place: places.append(place) or decoded(content, place)
    )
    name = f"parquet:{odd_columns}:label=cls"
    parts.__wrapped__(f"{name}:image=img")
    assert len(places) == 20 + 1
    places.clear()
    parts.__wrapped__(f"{name}:image=img")
    assert places == [f"{odd_columns}, row 0"]
    with pytest.raises(ValueError, match=f"^{odd_columns}, row 0: cannot be decoded as an image"):
        parts.__wrapped__(f"{name}:image=thumb")


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff"])
def test_a_damaged_cache_is_an_empty_one(folder, content):
    parts.__wrapped__(f"folder:{folder}")
    for file in findings.cache_folder().rglob("*.json"):
        file.write_bytes(content)
    assert len(parts.__wrapped__(f"folder:{folder}").train) == 20


def no_home():
    raise RuntimeError("Could not determine home directory.")


def no_folder():
    return images.Path("/dev/null/cache")


@pytest.mark.parametrize("cache_folder", [no_home, no_folder])
def test_data_are_read_where_no_cache_can_be_written(folder, monkeypatch, cache_folder):
    monkeypatch.setattr(findings, "cache_folder", cache_folder)
    assert len(parts.__wrapped__(f"folder:{folder}").train) == 20


@pytest.fixture
def many(folder, monkeypatch):
    """More images than are decoded before training."""
    monkeypatch.setattr(images, "MOST_DECODED", 10)
    return folder


def test_of_many_images_the_headers_are_read(many):
    path = many / "train" / "cat" / "3.png"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=f"{path}: cannot be decoded as an image"):
        parts(f"folder:{many}")


def test_of_many_images_a_damaged_one_is_told_counted_and_passed_over(many, caplog):
    for name in ("3", "4"):
        path = many / "train" / "cat" / f"{name}.png"
        path.write_bytes(path.read_bytes()[:50])
    train = parts(f"folder:{many}").train
    for _ in range(2):
        torch.testing.assert_close(train[3][0], train[5][0])
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"{many / 'train' / 'cat' / '3.png'}: cannot be decoded as an image")
    assert first.endswith("; 1 skipped so far")
    assert second.endswith("; 2 skipped so far")
    assert len(train.skipped) == 2


def test_many_images_none_of_which_can_be_read_are_refused(many):
    train = parts(f"folder:{many}").train
    for path in (many / "train").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="none of 20 images can be read"):
        train[7]


def missing(folder):
    shutil.rmtree(folder)
    return f"folder:{folder}", f"{folder}: no such folder"


def a_file(folder):
    draw(folder / "cat.png", 0)
    return f"folder:{folder / 'cat.png'}", f"{folder / 'cat.png'}: not a folder"


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    return f"folder:{folder}", f"{folder}: expected a folder per class, and there is none"


def empty_class(folder):
    (folder / "train" / "cow").mkdir()
    return f"folder:{folder}", f"{folder / 'train' / 'cow'}: no images in it"


def corrupt(folder):
    path = folder / "train" / "cat" / "3.png"
    path.write_bytes(path.read_bytes()[:50])
    return f"folder:{folder}", f"{path}: cannot be decoded as an image"


def mislabelled(folder):
    draw(folder / "test" / "cow" / "0.png", 0)
    return f"folder:{folder}", f"{folder / 'test' / 'cow'}: no class of that name in {folder / 'train'}"


def unlabelled(folder):
    draw(folder / "train" / "stray.png", 0)
    return f"folder:{folder}", f"{folder / 'train' / 'stray.png'}: expected a folder per class"


def one_class(folder):
    shutil.rmtree(folder / "train" / "dog")
    shutil.rmtree(folder / "test" / "dog")
    return f"folder:{folder}", f"{folder}: expected at least 2 classes"


def missing_parquet(folder):
    return f"parquet:{folder / 'none'}", f"{folder / 'none'}: no such file or folder"


def no_parquet(folder):
    return f"parquet:{folder}", f"{folder}: no parquet files in it"


def corrupt_parquet(folder):
    path = folder / "x.parquet"
    path.write_bytes(b"PAR1 and nonsense")
    return f"parquet:{path}", f"{path}: cannot be read as parquet"


def corrupt_image_in_parquet(folder):
    content = rows(folder)
    content[2]["image"]["bytes"] = b"nonsense"
    path = write_parquet(folder / "x.parquet", content)
    return f"parquet:{path}", f"{path}, row 2: cannot be decoded as an image"


def no_image_in_parquet(folder):
    content = rows(folder)
    content[2]["image"] = None
    path = write_parquet(folder / "x.parquet", content)
    return f"parquet:{path}", f"{path}, row 2: no image in it"


def no_label_in_parquet(folder):
    content = rows(folder)
    content[3]["label"] = None
    path = write_parquet(folder / "x.parquet", content)
    return f"parquet:{path}", f"{path}, row 3: expected a label as in the other rows, text or a whole number"


def unknown_label_in_parquet(folder):
    write_parquet(folder / "train.parquet", rows(folder))
    write_parquet(folder / "test.parquet", rows(folder, "test", ("cat", "cow")))
    return f"parquet:{folder}", f"{folder}, row 2: the label 'cow' is none of the 2 known"


def no_column_of_images(folder):
    path = write_parquet(folder / "x.parquet", [{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    return f"parquet:{path}", f"{path}: no column of images, only text, label"


def no_column_of_labels(folder):
    path = write_parquet(folder / "x.parquet", [{"image": row["image"]} for row in rows(folder)])
    return f"parquet:{path}", f"{path}: no column of labels"


def truncated(folder):
    path = folder / "train" / "dog" / "x.jpg"
    Image.effect_noise((64, 64), 80).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    return f"folder:{folder}", f"{path}: cannot be decoded as an image"


DAMAGES = [
    *(missing, a_file, empty, empty_class, corrupt, truncated, mislabelled, unlabelled, one_class),
    *(missing_parquet, no_parquet, corrupt_parquet, corrupt_image_in_parquet, no_image_in_parquet),
    *(no_label_in_parquet, unknown_label_in_parquet, no_column_of_images, no_column_of_labels),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_source_gives_one_line_that_names_the_file(folder, damage):
    name, message = damage(folder)
    status, out, err = mbnorm_says("compare", "--data", name, "--out", folder / "out")
    assert (status, out) == (2, "")
    assert f"--data: {message}" in err
    assert err.count("\n") == 1


def test_data_that_do_not_fit_into_memory_are_refused_before_they_are_decoded(folder, monkeypatch):
    monkeypatch.setattr("mbnorm.experiments.dataset.MOST_VALUES", 1000)
    with pytest.raises(ValueError, match="24 images of 300 values do not fit into memory"):
        load.__wrapped__(f"folder:{folder}")
