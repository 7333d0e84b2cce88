import json

import pytest
import torch
from PIL import Image
from test_cli import mbnorm_says

from mbnorm import convert
from mbnorm.experiments.data import digits
from mbnorm.experiments.diagnose import SYNTHETIC, batches_of, net
from mbnorm.experiments.models import build

FEW = ["--batches", "20"]


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(net("mlp", "batch", 2, None).state_dict(), path)
    return path


def test_a_table_a_plot_and_json_are_written_and_shown(tmp_path):
    status, out, err = mbnorm_says("diagnose", *FEW, "--model", "cnn", "--batch-size", 4, "--out", tmp_path)
    assert (status, err) == (0, "")
    table = (tmp_path / "table.txt").read_text()
    assert table.strip() in out
    assert table.startswith("cnn with batch layers, untrained; digits, shuffled, 20 batches of 4")
    record = json.loads((tmp_path / "diagnose.json").read_text())
    assert len(record["layers"]) == 9
    assert record["layers"][0]["noise"]["values"] == 4 * 64
    assert record["reason"] in table
    assert (tmp_path / "diagnose.png").read_bytes().startswith(b"\x89PNG")


def test_synthetic_fields_have_their_effective_values_in_the_first_layer(tmp_path):
    arguments = ["--model", "cnn", "--data", "synthetic", "--batch-size", 2, "--batches", 400]
    assert mbnorm_says("diagnose", *arguments, "--out", tmp_path)[0] == 0
    record = json.loads((tmp_path / "diagnose.json").read_text())
    # a convolution keeps the field's lengths, so about its noise, but for the padded border
    assert record["layers"][0]["noise"]["effective_values"] == pytest.approx(
        SYNTHETIC.effective_values(2), rel=0.5
    )
    assert record["recommendation"] == "matched"


def test_the_method_says_what_the_layers_are(tmp_path):
    assert mbnorm_says("diagnose", *FEW, "--method", "matched", "--out", tmp_path)[0] == 0
    record = json.loads((tmp_path / "diagnose.json").read_text())
    assert {layer["kind"] for layer in record["layers"]} == {"MatchedBatchNorm1d"}
    assert record["recommendation"] == "none"


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_a_checkpoint_is_what_is_diagnosed(weights, tmp_path, key):
    state = torch.load(weights, weights_only=True)
    state["2.running_mean"] += 100
    torch.save(state if key is None else {key: state, "epoch": 3}, weights)
    assert mbnorm_says("diagnose", *FEW, "--checkpoint", weights, "--out", tmp_path)[0] == 0
    first, second = json.loads((tmp_path / "diagnose.json").read_text())["layers"]
    assert first["noise"]["running_mean_error"] > 10
    assert second["noise"]["running_mean_error"] is None


def test_a_checkpoint_of_converted_layers_loads_with_their_method(tmp_path):
    model = build("mlp", digits())
    convert(model, "matched")
    torch.save(model.state_dict(), tmp_path / "ours.pt")
    arguments = ["--checkpoint", tmp_path / "ours.pt", "--out", tmp_path]
    assert mbnorm_says("diagnose", *FEW, "--method", "matched", *arguments)[0] == 0
    status, _, err = mbnorm_says("diagnose", *FEW, *arguments)
    assert status == 2
    assert "ours.pt does not fit mlp with batch layers: " in err
    assert err.endswith("give the --method that it was trained with\n")


class Evil:
    def __reduce__(self):
        return print, ("this code was run",)


def broken_files(folder):
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("not a checkpoint")
    (folder / "cut.pt").write_bytes((folder / "weights.pt").read_bytes()[:500])
    torch.save([1, 2], folder / "list.pt")
    torch.save({"epoch": 3}, folder / "other.pt")
    torch.save({"weight": Evil()}, folder / "evil.pt")
    torch.save(net("cnn", "batch", 2, None).state_dict(), folder / "cnn.pt")
    state = net("mlp", "batch", 2, None).state_dict()
    torch.save(state | {"1.weight": torch.zeros(3, 64)}, folder / "wide.pt")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", ": no such file or directory"),
        ("empty", ": expected a file of torch.save that holds tensors alone (EOFError)"),
        ("text", ": expected a file of torch.save"),
        ("cut", ": expected a file of torch.save"),
        ("list", ": expected a state_dict of tensors"),
        ("other", ": expected a state_dict of tensors"),
        ("evil", ": expected a file of torch.save"),
        ("cnn", " does not fit mlp with batch layers: 14 keys are missing and 54 are not known"),
        ("wide", " does not fit mlp with batch layers: size mismatch for 1.weight"),
    ],
)
def test_a_file_that_is_no_checkpoint_of_the_net_gives_one_line_that_names_it(weights, name, words):
    broken_files(weights.parent)
    path = weights.parent / f"{name}.pt"
    status, out, err = mbnorm_says("diagnose", *FEW, "--checkpoint", path, "--out", weights.parent)
    assert (status, out) == (2, "")
    assert f"{path}{words}" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vgg"], "unet3d or timm:NAME; got 'vgg'"),
        (["--data", "cifar"], "expected digits, textures, photos, segments, volumes, folder:PATH"),
        (["--data", "folder:/none"], "--data: /none: no such folder"),
        (["--data", "segments"], "mlp gives a class per image, and these data have one per pixel: segments"),
        (["--method", "group"], "'group' leaves no batch norm to look at"),
        (["--batches", "1"], "expected at least 2, got 1"),
        (["--batch-size", "0"], "expected at least 1, got 0"),
        (["--data", "synthetic", "--loss"], "--loss: synthetic data have no classes"),
        (["--batch-size", "500", "--sampling", "one-class"], "one-class batches have at most"),
    ],
)
def test_a_wrong_option_gives_one_line(arguments, message, tmp_path):
    status, _, err = mbnorm_says("diagnose", *arguments, "--out", tmp_path)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("count", [3, 700])
def test_as_many_batches_are_drawn_as_asked_for_over_epochs(count):
    batches = list(batches_of("digits", "one-class", 2, count))
    assert [x.shape for x, _ in batches] == [(2, 1, 8, 8)] * count
    assert all(len(classes.unique()) == 1 and classes.shape == (2,) for _, classes in batches)


@pytest.mark.parametrize(("model", "data"), [("mlp", "digits"), ("segment", "segments")])
def test_with_a_loss_the_table_says_what_noise_adds(model, data, tmp_path):
    arguments = ["--model", model, "--data", data, "--batches", "4", "--loss", "--out", tmp_path]
    status, out, err = mbnorm_says("diagnose", *arguments)
    assert (status, err) == (0, "")
    assert "without noise the loss is" in out
    record = json.loads((tmp_path / "diagnose.json").read_text())
    assert all(layer["cost"]["error"] >= 0 for layer in record["layers"])


def test_without_a_loss_nothing_is_said_of_it(tmp_path):
    status, out, _ = mbnorm_says("diagnose", "--batches", "4", "--out", tmp_path)
    assert status == 0
    assert "the loss" not in out
    assert json.loads((tmp_path / "diagnose.json").read_text())["loss"] is None


@pytest.mark.parametrize(
    ("model", "data", "layers"),
    [
        ("vgg-small", "textures", 6),
        ("segment", "segments", 7),
        ("unet3d", "volumes", 10),
        ("mlp6", "synthetic", 6),
    ],
)
def test_every_net_is_diagnosed_on_its_data(model, data, layers, tmp_path):
    arguments = ["--model", model, "--data", data, "--batches", "3", "--out", tmp_path]
    assert mbnorm_says("diagnose", *arguments)[0] == 0
    assert len(json.loads((tmp_path / "diagnose.json").read_text())["layers"]) == layers


def test_the_user_s_own_images_are_looked_at_and_a_damaged_one_is_named(tmp_path):
    for shade, name in ((0, "dark"), (200, "light")):
        for i in range(10):
            path = tmp_path / "data" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (shade + i,) * 3).save(path)
    arguments = ["--model", "cnn", "--data", f"folder:{tmp_path / 'data'}", "--out", tmp_path]
    status, out, _ = mbnorm_says("diagnose", *FEW, *arguments)
    assert status == 0
    assert f"folder:{tmp_path / 'data'}, shuffled" in out
    damaged = tmp_path / "data" / "light" / "3.png"
    damaged.write_bytes(b"nonsense")
    status, _, err = mbnorm_says("diagnose", *FEW, *arguments)
    assert status == 1
    assert err.startswith(f"mbnorm: {damaged}: cannot be decoded as an image")
    assert err.count("\n") == 1
