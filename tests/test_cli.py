import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import mbnorm
from mbnorm import cli, versions
from mbnorm.backends import cpu
from mbnorm.experiments import compare
from mbnorm.experiments.commands import app
from mbnorm.experiments.commands import compare as compare_command
from mbnorm.experiments.commands import diagnose as diagnose_command

TINY = ["--epochs", "1", "--methods", "batch,matched", "--seeds", "1", "--batch-sizes", "32", "--jobs", "1"]


def mbnorm_says(*arguments):
    """Run a command in this process and return (status, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([str(a) for a in arguments])
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with the results of a tiny comparison, and what the command printed."""
    out = tmp_path_factory.mktemp("tiny")
    status, stdout, stderr = mbnorm_says("compare", *TINY, "--out", out)
    assert (status, stderr) == (0, "")
    return out, stdout


@pytest.fixture
def results(tiny, tmp_path):
    """A copy of the tiny results, to spoil."""
    path = tmp_path / "results.jsonl"
    path.write_bytes((tiny[0] / "results.jsonl").read_bytes())
    return path


@pytest.fixture
def no_training(monkeypatch):
    def fail(runs, *_):
        raise AssertionError(f"trains {len(runs)} runs")

    monkeypatch.setattr(compare, "train_all", fail)


def test_versions_and_backends_are_printed():
    status, out, err = mbnorm_says("--version")
    assert (status, err) == (0, "")
    assert out == f"{versions.describe()}\n"
    assert out.splitlines()[:2] == [f"mbnorm {mbnorm.__version__}", f"torch {torch.__version__}"]


def test_a_backend_that_cannot_be_used_says_why(monkeypatch):
    monkeypatch.setattr(cpu, "missing", lambda: "no C++ compiler: c++ was not found")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert versions.describe().splitlines()[3:] == [
        "backend cpu: not available, no C++ compiler: c++ was not found",
        "backend aten: available",
        "backend triton: not available, no CUDA or ROCm device",
    ]


def test_the_version_needs_no_extra(monkeypatch):
    monkeypatch.setattr(cli, "NEEDED", ("no_such_package",))
    assert mbnorm_says("--version")[0] == 0


def test_python_m_mbnorm_is_the_command():
    result = subprocess.run([sys.executable, "-m", "mbnorm", "--version"], capture_output=True, text=True)
    assert result.stdout.startswith(f"mbnorm {mbnorm.__version__}\n")


def test_the_shell_completes_commands():
    request = {"_MBNORM_COMPLETE": "complete_bash", "COMP_WORDS": "mbnorm dia", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "mbnorm"]
    result = subprocess.run(command, env=os.environ | request, capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["diagnose"]


def test_without_a_command_the_help_is_printed():
    status, out, _ = mbnorm_says()
    assert status == 0
    assert "compare" in out


def test_help_explains_every_option():
    status, out, _ = mbnorm_says("compare", "--help")
    options = "suite methods seeds batch-sizes sampling model data baseline epochs lr out jobs scheduler"
    assert status == 0
    assert all(f"--{option} " in out for option in options.split())


def test_the_help_begins_with_the_first_steps_in_their_order():
    _, out, _ = mbnorm_says("--help")
    words = ("1. mbnorm --version", "2. mbnorm compare", "3. mbnorm diagnose", "4. mbnorm train")
    places = [out.index(word) for word in (*words, "mbnorm.convert(model)", "Options")]
    assert places == sorted(places)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_default_can_be_read_and_no_word_is_cut(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = mbnorm_says(command, "--help")
    options = re.findall(r"^│ --([\w-]+)", out, re.MULTILINE)
    assert len(options) > 7
    assert out.count("[default:") == len(options) - 1  # --help has none
    assert "…" not in out


def test_a_paragraph_of_the_help_has_no_line_ends_of_its_own():
    (train,) = (command for command in app.registered_commands if command.callback.__name__ == "train")
    first, second = train.help.split("\n\n")
    assert first.endswith("after each epoch.")
    assert "\n" not in second


def test_ctrl_c_in_a_command_that_does_not_expect_it_gives_one_line(monkeypatch, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(diagnose_command, "write_diagnosis", interrupt)
    assert mbnorm_says("diagnose", "--out", tmp_path) == (130, "", "mbnorm: interrupted\n")


@pytest.mark.parametrize(("name", "package"), [("dask", "distributed"), ("ray", "ray")])
def test_a_missing_scheduler_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path, name, package):
    monkeypatch.setattr(compare_command, "find_spec", lambda _: None)
    status, out, err = mbnorm_says("compare", "--scheduler", name, "--out", tmp_path)
    assert (status, out) == (2, "")
    assert f"{name} needs {package}: pip install {package}" in err
    assert err.count("\n") == 1


def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(cli, "NEEDED", ("rich", "no_such_package"))
    assert mbnorm_says("train", "--help") == (
        1,
        "",
        "mbnorm: compare, train and diagnose need no_such_package: "
        "pip install '.[experiments]' in a clone of mbnorm\n",
    )


def test_the_commands_that_need_the_extra_are_all_commands_but_build():
    names = [command.callback.__name__ for command in app.registered_commands]
    assert names == [*cli.COMMANDS, "build"]


def test_kernels_are_built_ahead_of_time(capsys, monkeypatch):
    assert cli.main(["build"]) == (cpu.missing() is not None)
    monkeypatch.setattr(cpu, "missing", lambda: "no C++ compiler: c++ was not found")
    capsys.readouterr()
    assert cli.main(["build"]) == 1
    assert capsys.readouterr().err == "mbnorm: no C++ compiler: c++ was not found\n"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--suite", "all"], "--suite: expected quick, full; got 'all'"),
        (["--methods", "batch,spectral"], "--methods: expected none, batch,"),
        (["--methods", ""], "--methods: expected none, batch,"),
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--seeds", "two"], "--seeds"),
        (["--batch-sizes", "2,0"], "--batch-sizes: expected whole numbers of at least 1"),
        (["--batch-sizes", "2.5"], "got '2.5'"),
        (["--batch-sizes", "1001"], "--batch-sizes: shuffled batches have at most 1000 images, got 1001"),
        (["--batch-sizes", "128", "--sampling", "one-class"], "one-class batches have at most"),
        (
            ["--sampling", "sorted"],
            "--sampling: expected shuffled, one-class, drifting, long-tailed; got 'sorted'",
        ),
        (["--model", "vit"], "unet3d or timm:NAME; got 'vit'"),
        (
            ["--model", "segment"],
            "--model: segment gives a class per pixel, and these data have one",
        ),
        (["--data", "segments"], "--model: mlp gives a class per image, and these data have one per pixel"),
        (
            ["--data", "faces"],
            "--data: expected digits, textures, photos, segments, volumes, folder:PATH",
        ),
        (["--epochs", "0"], "--epochs: expected at least 1, got 0"),
        (["--lr", "0.1,-1"], "--lr: expected numbers above 0, comma-separated; got '-1'"),
        (["--lr", "nan"], "--lr: expected numbers above 0"),
        (["--lr", "fast"], "got 'fast'"),
        (["--baseline", "bath"], "--baseline: expected none, batch,"),
        (["--scheduler", "slurm"], "--scheduler: expected local, dask, ray; got 'slurm'"),
        (["--scheduler", "local:here"], "--scheduler: local takes no address, got 'here'"),
        (["--jobs", "0"], "--jobs: expected at least 1, got 0"),
        (["--accelerator", "abacus"], "--accelerator: expected cpu, cuda, mps; got 'abacus'"),
        (["--frobnicate"], "--frobnicate"),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_gives_one_line_and_status_2(options, complaint, tmp_path):
    status, out, err = mbnorm_says("compare", *options, "--out", tmp_path)
    assert (status, out) == (2, "")
    assert complaint in err
    assert err.count("\n") == 1


def test_a_folder_that_cannot_be_made_gives_one_line(tmp_path):
    (tmp_path / "file").touch()
    status, _, err = mbnorm_says("compare", "--out", tmp_path / "file")
    assert status == 2
    assert "--out" in err
    assert err.count("\n") == 1


def test_a_corrupt_line_gives_one_line_that_names_it(results):
    results.write_text("nonsense\n" + results.read_text())
    status, _, err = mbnorm_says("compare", *TINY, "--out", results.parent)
    assert status == 2
    assert f"{results}, line 1" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("package", ["torch", "mbnorm"])
def test_results_of_an_unknown_version_give_one_line_and_are_kept(package, results, no_training):
    records = [json.loads(line) for line in results.read_text().splitlines()]
    for record in records:
        del record[package]
    before = "".join(json.dumps(record) + "\n" for record in records)
    results.write_text(before)
    status, _, err = mbnorm_says("compare", *TINY, "--out", results.parent)
    assert status == 2
    assert f"--out: {results} has rows of" in err
    assert f"an unknown {package}" in err
    assert err.count("\n") == 1
    assert results.read_text() == before


def test_every_run_is_in_the_results(tiny):
    records = [json.loads(line) for line in (tiny[0] / "results.jsonl").read_text().splitlines()]
    assert sorted(r["method"] for r in records) == ["batch", "matched"]
    assert {(r["batch_size"], r["epochs"], r["lr"], r["status"]) for r in records} == {(32, 1, 0.05, "ok")}


def test_the_table_is_printed_and_written(tiny):
    out, stdout = tiny
    assert "mlp, batches of 32, lr 0.05, 1 epoch" in stdout
    written = (out / "table.md").read_text()
    assert "| matched " in written
    assert "In italics" not in written


def test_the_report_is_written_with_the_command_that_writes_it(tiny):
    text = (tiny[0] / "report.html").read_text()
    assert (
        f"mbnorm compare --batch-sizes 32 --epochs 1 --methods batch,matched --seeds 1 --baseline batch "
        f"--out {tiny[0]}"
    ) in text


def test_the_figure_is_written(tiny):
    assert (tiny[0] / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_again_trains_nothing(results, no_training):
    status, out, _ = mbnorm_says("compare", *TINY, "--out", results.parent)
    assert status == 0
    assert "2 runs, 2 of them already in" in out


def test_a_command_that_shares_runs_shows_only_its_own(results, no_training):
    mbnorm_says("compare", *TINY, "--methods", "matched", "--out", results.parent)
    assert "| batch " not in (results.parent / "table.md").read_text()


def test_a_truncated_last_line_is_trained_again_and_comes_out_the_same(results):
    whole = results.read_text()
    results.write_text(whole[:-40])
    status, _, _ = mbnorm_says("compare", *TINY, "--out", results.parent)
    before, after = (json.loads(text.splitlines()[1]) for text in (whole, results.read_text()))
    assert status == 0
    assert after | {"seconds": 0} == before | {"seconds": 0}


def test_a_crashed_run_is_reported_and_does_not_lose_the_others(results, monkeypatch):
    first, _ = results.read_text().splitlines(keepends=True)
    results.write_text(first)

    def crash(runs, *_):
        for run in runs:
            yield run, "MemoryError: no room"

    monkeypatch.setattr(compare, "train_all", crash)
    status, out, err = mbnorm_says("compare", *TINY, "--out", results.parent)
    assert status == 1
    assert err.startswith("crashed, to be repeated by the same command: ")
    assert err.endswith("seed 0: MemoryError: no room\n")
    assert json.loads(first)["method"] in out
    assert results.read_text() == first


# a suite that runs in the background ignores Ctrl-C, and so would what it starts
INTERRUPTIBLE = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "import sys; from mbnorm.cli import main; sys.exit(main())"
)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ctrl_c_gives_one_line_and_leaves_no_process(tmp_path, jobs):
    command = [sys.executable, "-c", INTERRUPTIBLE, "compare", "--batch-sizes", "1", "--epochs", "1000"]
    process = subprocess.Popen(
        [*command, "--jobs", jobs, "--out", tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        process.stdout.readline()
        # the workers are started right after that line
        time.sleep(3)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 130
        assert err.startswith(f"interrupted: 0 of 30 runs are in {tmp_path}")
        assert err.count("\n") == 1
        assert ends_within(60, process.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def ends_within(seconds, group):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False
