"""`mbnorm train`: what it leaves, and that a training stopped in any way comes to the same end."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from matplotlib.figure import Figure
from test_cli import INTERRUPTIBLE, ends_within, mbnorm_says

from mbnorm.experiments import progress
from mbnorm.experiments.curves import draw
from mbnorm.experiments.diagnose import net
from mbnorm.experiments.plan import RECIPES
from mbnorm.experiments.records import read
from mbnorm.experiments.resumable import Training

SHORT = ["--batch-size", "8", "--epochs", "2", "--drops", "0.5", "--lr", "0.01"]
STEPS = 250
LONG = [*SHORT[:2], "--epochs", "1000", "--lr", "0.01"]


def train(out, *options):
    return mbnorm_says("train", *SHORT, *options, "--out", out)


def train_to_the_end(out, *options):
    status, _, err = train(out, *options)
    assert (status, err) == (0, "")


def state(out):
    """Everything in a checkpoint, as a flat dict."""
    found = {}

    def walk(name, value):
        if isinstance(value, dict):
            for key, part in value.items():
                walk(f"{name}.{key}", part)
        elif isinstance(value, list | tuple):
            walk(name, dict(enumerate(value)))
        else:
            found[name] = value

    walk("", torch.load(out / "checkpoint.pt"))
    return found


def assert_same(first, second):
    first, second = state(first), state(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        same = torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        assert same, name


@pytest.fixture
def stop_after(monkeypatch):
    """Let the training raise before a step, without a word: what is there then is the last checkpoint."""

    def arrange(step, error):
        advance = Training.advance

        def limited(self, batches):
            if self.step == step:
                raise error
            advance(self, batches)

        monkeypatch.setattr(Training, "advance", limited)
        return lambda: monkeypatch.setattr(Training, "advance", advance)

    return arrange


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    train_to_the_end(out)
    return out


def test_each_epoch_is_a_line_of_json(trained):
    records = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [(r["epoch"], r["step"], r["lr"]) for r in records] == [
        (1, 125, 0.01),
        (2, 250, pytest.approx(0.001)),
    ]
    assert records[-1]["test_accuracy"] > 90
    assert records[-1]["train_loss"] < records[0]["train_loss"]


def test_the_curves_are_those_of_the_log(trained, tmp_path, monkeypatch):
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    epochs = read(trained / "log.jsonl", dict)
    draw([*epochs, {**epochs[-1], "epoch": 3, "test_loss": None}], tmp_path / "curves.png")
    loss, accuracy = drawn[0].axes
    assert [line.get_label() for line in loss.lines] == ["train", "test"]
    assert list(loss.lines[1].get_ydata())[:2] == [epoch["test_loss"] for epoch in epochs]
    # where the loss was not finite
    assert math.isnan(loss.lines[1].get_ydata()[2])
    assert list(accuracy.lines[0].get_ydata())[:2] == [epoch["train_accuracy"] for epoch in epochs]


def test_each_epoch_is_in_tensorboard(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("test_accuracy")] == [125, 250]


def test_the_checkpoint_holds_the_net(trained):
    model = net("mlp", "matched", 8, trained / "checkpoint.pt")
    saved = torch.load(trained / "checkpoint.pt")["model"]
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_the_same_command_again_trains_nothing(trained):
    status, out, err = train(trained)
    assert (status, err) == (0, "")
    assert "step 250 of 250" in out
    assert len((trained / "log.jsonl").read_text().splitlines()) == 2


def test_the_test_accuracy_is_that_of_the_net_in_eval_mode(trained):
    from mbnorm.experiments.data import digits

    model = net("mlp", "matched", 8, trained / "checkpoint.pt").eval()
    right = model(digits().test_inputs).argmax(1) == digits().test_targets
    record = json.loads((trained / "log.jsonl").read_text().splitlines()[-1])
    assert record["test_accuracy"] == pytest.approx(100 * right.float().mean().item(), rel=1e-6)


@pytest.mark.contract("ST-3")
@pytest.mark.parametrize(
    ("method", "accumulate", "stop"),
    [("memorized+df", 1, 1), ("memorized+df", 1, 125), ("momentum", 2, 70), ("renorm", 1, 130)],
)
def test_a_training_that_fails_goes_on_to_the_same_end(method, accumulate, stop, tmp_path, stop_after):
    options = ["--method", method, "--accumulate", accumulate]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_to_the_end(whole, *options)
    relent = stop_after(stop, RuntimeError("the device is lost"))
    status, _, err = train(stopped, *options, "--checkpoint-every", "0")
    assert status == 1
    assert err.startswith(f"mbnorm: the device is lost: step {stop} of ")
    assert err.count("\n") == 1
    relent()
    train_to_the_end(stopped, *options, "--checkpoint-every", "0")
    assert_same(whole, stopped)


@pytest.mark.contract("ST-3")
def test_steps_after_the_last_checkpoint_are_done_again(tmp_path, stop_after, trained):
    relent = stop_after(200, RuntimeError("the device is lost"))
    _, _, err = train(tmp_path, "--checkpoint-every", "1000")
    assert "step 125 of 250 is in" in err
    relent()
    train_to_the_end(tmp_path)
    assert_same(trained, tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_an_image_that_cannot_be_read_loses_no_step(tmp_path, monkeypatch, trained):
    batches = Training.batches

    def damaged(self):
        for found in batches(self):
            if self.step == 130:
                raise ValueError("/data/3.png: cannot be decoded as an image")
            yield found

    with monkeypatch.context() as patch:
        patch.setattr(Training, "batches", damaged)
        status, _, err = train(tmp_path, "--checkpoint-every", "1000")
    assert status == 1
    assert err.startswith("mbnorm: /data/3.png: cannot be decoded as an image: step 130 of 250 is in")
    train_to_the_end(tmp_path)
    assert_same(trained, tmp_path)


def test_an_epoch_that_is_repeated_is_logged_once(tmp_path, monkeypatch):
    """The process dies between the line of an epoch and its checkpoint."""
    with monkeypatch.context() as patch:
        patch.setattr(Training, "save", lambda self: (_ for _ in ()).throw(OSError("no space left")))
        assert train(tmp_path)[2] == "mbnorm: no space left: nothing is saved yet\n"
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1
    train_to_the_end(tmp_path)
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("unfinished", ["", '{"epoch": 2, "st'])
def test_the_log_goes_on_where_the_checkpoint_is(tmp_path, trained, unfinished):
    for name in ("checkpoint.pt", "log.jsonl"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    epochs = read(tmp_path / "log.jsonl", dict)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(json.dumps(epochs[-1] | {"step": STEPS + 1}) + "\n" + unfinished)
    train_to_the_end(tmp_path)
    assert read(tmp_path / "log.jsonl", dict) == epochs


def test_a_log_that_is_none_gives_one_line_that_names_it(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"epoch": 1}\n')
    status, _, err = train(tmp_path)
    assert status == 1
    assert err.startswith(f"mbnorm: {tmp_path / 'log.jsonl'}, line 1 is not a result: no 'step'")
    assert err.count("\n") == 1


def test_a_loss_that_is_not_finite_is_null_in_the_log(tmp_path):
    train_to_the_end(tmp_path, "--method", "none", "--lr", "1e30", "--epochs", "1")
    (epoch,) = read(tmp_path / "log.jsonl", dict)
    assert epoch["train_loss"] is None


def start(out, *options, launcher=(sys.executable, "-c", INTERRUPTIBLE)):
    """Start a training in a process group of its own and wait for its 20th step."""
    command = [*launcher, "train", *options, "--checkpoint-every", "0", "--out", str(out)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if torch.load(out / "checkpoint.pt")["step"] >= 20:
                return process
        time.sleep(0.02)
    kill(process)
    raise AssertionError(f"no 20 steps: {process.communicate()[1]}")


def kill(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


@pytest.mark.contract("ST-3")
def test_a_training_that_is_killed_goes_on_to_the_same_end(tmp_path):
    options = ["--method", "memorized+df", "--epochs", "3"]
    process = start(tmp_path / "killed", *SHORT, *options)
    kill(process)
    process.communicate()
    train_to_the_end(tmp_path / "killed", *options)
    train_to_the_end(tmp_path / "whole", *options)
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_ctrl_c_gives_one_line_loses_no_step_and_leaves_no_process(tmp_path):
    process = start(tmp_path, *LONG)
    try:
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        kill(process)
    assert process.returncode == 130
    step = torch.load(tmp_path / "checkpoint.pt")["step"]
    assert err.startswith(f"interrupted: step {step} of 125000 is in {tmp_path}")
    assert err.count("\n") == 1
    assert ends_within(60, process.pid)


TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "mbnorm",
]


def train_on_two_ranks(out, *options):
    process = subprocess.Popen(
        [*TORCHRUN, "train", *SHORT, *options, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    try:
        said, _ = process.communicate(timeout=240)
    finally:
        kill(process)
    assert process.returncode == 0, said
    return said


def children_of(process):
    table = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    pairs = [line.split() for line in table.splitlines()]
    return [int(child) for child, parent in pairs if int(parent) == process.pid]


def test_two_ranks_train_as_one_that_accumulates(tmp_path):
    """GroupNorm knows no batch: the steps are of the same images."""
    said = train_on_two_ranks(tmp_path / "two", "--method", "group")
    assert said.count("epoch 1:") == said.count("written:") == 1
    train_to_the_end(tmp_path / "one", "--method", "group", "--accumulate", "2")
    one, two = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-3, atol=1e-5)
    logs = [
        json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0]) for name in ("one", "two")
    ]
    for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-3)


@pytest.mark.contract("ST-3")
def test_two_ranks_that_are_killed_go_on_to_the_same_end(tmp_path):
    options = ["--method", "matched+df", "--epochs", "4"]
    process = start(tmp_path / "killed", *SHORT, *options, launcher=TORCHRUN)
    ranks = children_of(process)
    kill(process)
    process.communicate()
    # torchrun has given each a group of its own
    assert len(ranks) == 2
    assert all(ends_within(60, rank) for rank in ranks)
    train_on_two_ranks(tmp_path / "killed", *options)
    train_on_two_ranks(tmp_path / "whole", *options)
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_the_recipe_of_the_paper_is_what_its_page_says():
    recipe = RECIPES["eccv2020-cifar"]
    assert recipe.epochs == 200
    assert [share * recipe.epochs for share in recipe.drops] == [60, 120, 180]


def test_the_recipe_gives_epochs_drops_and_the_rate(tmp_path, stop_after):
    stop_after(0, RuntimeError("enough"))
    _, out, _ = mbnorm_says("train", "--recipe", "eccv2020-cifar", "--batch-size", "4", "--out", tmp_path)
    assert "lr 0.00625, 200 epochs, seed 0: step 0 of 50000" in out


def test_a_net_learns_images_of_a_folder(tmp_path):
    from PIL import Image

    for shade, name in ((0, "dark"), (200, "light")):
        for i in range(10):
            path = tmp_path / "data" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (shade + i,) * 3).save(path)
    options = [
        "--data",
        f"folder:{tmp_path / 'data'}",
        "--model",
        "cnn",
        "--batch-size",
        "4",
        "--epochs",
        "8",
    ]
    assert mbnorm_says("train", *options, "--out", tmp_path / "out")[0] == 0
    last = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1])
    assert last["test_accuracy"] == 100


@pytest.mark.parametrize(("model", "data"), [("segment", "segments"), ("vgg-small", "textures")])
def test_other_data_train_too(model, data, tmp_path, stop_after):
    relent = stop_after(2, RuntimeError("enough"))
    _, _, err = mbnorm_says(
        "train", "--model", model, "--data", data, "--checkpoint-every", "0", "--out", tmp_path
    )
    relent()
    assert err.startswith("mbnorm: enough: step 2 of")


def test_half_precision_trains(tmp_path):
    train_to_the_end(tmp_path, "--precision", "bf16-mixed", "--epochs", "1")
    assert json.loads((tmp_path / "log.jsonl").read_text())["test_accuracy"] > 80


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--model", "vit"], "--model: expected mlp, cnn,"),
        (["--data", "faces"], "expected digits, textures,"),
        (["--data", "segments"], "mlp gives a class per image, and these data have one per pixel"),
        (["--data", "folder:/none"], "/none: no such folder"),
        (["--method", "evonorm"], "--method: expected none, batch,"),
        (["--recipe", "imagenet"], "--recipe: expected eccv2020-cifar; got 'imagenet'"),
        (["--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["--batch-size", "2000"], "digits: 1000 images do not fill a step of 1 x 1 batches of 2000"),
        (["--accumulate", "0"], "--accumulate: expected at least 1, got 0"),
        (["--drops", "0.5,1.5"], "--drops: expected numbers below 1, got 1.5"),
        (["--lr", "-1"], "--lr: expected a number above 0, got -1"),
        (["--epochs", "0"], "--epochs: expected at least 1, got 0"),
        (["--precision", "8"], "--precision: expected 32-true,"),
        (["--accelerator", "abacus"], "--accelerator: expected cpu, cuda, mps"),
        (["--checkpoint-every", "-1"], "--checkpoint-every"),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_gives_one_line(options, complaint, tmp_path):
    status, out, err = mbnorm_says("train", *options, "--out", tmp_path)
    assert (status, out) == (2, "")
    assert complaint in err
    assert err.count("\n") == 1


def test_another_training_does_not_go_on_from_this_checkpoint(trained):
    status, _, err = train(trained, "--seed", "3")
    assert status == 2
    assert "checkpoint.pt is of another training: seed 0, not 3; give another --out" in err


def test_a_damaged_checkpoint_gives_one_line_that_names_it(tmp_path, trained):
    content = (trained / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    status, _, err = train(tmp_path)
    assert status == 2
    assert err.startswith(f"mbnorm: {tmp_path / 'checkpoint.pt'} is no checkpoint of mbnorm train")
    assert err.count("\n") == 1


def test_batches_of_one_that_torch_refuses_give_one_line(tmp_path):
    status, _, err = train(tmp_path, "--method", "batch", "--batch-size", "1")
    assert status == 1
    assert err.startswith("mbnorm: Expected more than 1 value per channel when training")
    assert err.endswith(": nothing is saved yet\n")


def test_batches_of_one_train_with_a_memory(tmp_path, stop_after):
    relent = stop_after(5, RuntimeError("enough"))
    assert "enough: step 5" in train(tmp_path, "--batch-size", "1", "--checkpoint-every", "0")[2]
    relent()


@pytest.mark.parametrize(("methods", "asked"), [(["batch", "group"], 0), (["batch", "matched"], 1)])
def test_kernels_are_compiled_for_methods_that_run_on_them_alone(methods, asked, monkeypatch):
    calls = []
    monkeypatch.setattr(progress.cpu, "missing", lambda: calls.append("asked"))
    progress.prepare_kernels(methods)
    assert len(calls) == asked
