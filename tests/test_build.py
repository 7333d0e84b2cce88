import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from mbnorm.backends import build, cpu

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "small.cpp"
    path.write_text("int answer() { return 42; }\n")
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    monkeypatch.setenv("MBNORM_CACHE", str(path))
    return path


def test_a_build_is_kept_and_used_again(source, folder, monkeypatch):
    build.load("small", [source])
    (library,) = folder.iterdir()
    monkeypatch.setattr(build, "_build", None)
    build.load("small", [source])
    assert list(folder.iterdir()) == [library]


@pytest.mark.parametrize("change", ["source", "flags", "torch", "processor"])
def test_a_build_is_not_used_for_anything_else(source, change, monkeypatch):
    before = build.fingerprint(build.compiler(), [source])
    assert build.fingerprint(build.compiler(), [source]) == before
    if change == "source":
        source.write_text("int answer() { return 43; }\n")
    elif change == "flags":
        monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99")
    else:
        monkeypatch.setattr(build, "_processor", lambda: "flags: mmx")
    assert build.fingerprint(build.compiler(), [source]) != before


def test_a_damaged_file_is_built_again(source, folder):
    library = folder / f"small-{build.fingerprint(build.compiler(), [source])}.so"
    folder.mkdir()
    library.write_text("not a library")
    build.load("small", [source])
    assert library.read_bytes() != b"not a library"


def test_a_folder_that_cannot_be_written_does_not_matter(source, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    private = tmp_path / "private"
    private.mkdir()
    monkeypatch.setenv("MBNORM_CACHE", str(blocked / "cache"))
    monkeypatch.setattr(build.tempfile, "tempdir", str(private))
    build.load("small", [source])
    assert [p.suffix for p in private.glob("mbnorm-*/*")] == [".so"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind root")
def test_a_read_only_folder_does_not_matter(source, folder):
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    build.load("small", [source])
    assert not list(folder.iterdir())


def test_two_processes_may_build_at_once(source, folder):
    program = (
        "import sys; from pathlib import Path; from mbnorm.backends import build; "
        "build.load('small', [Path(sys.argv[1])])"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program, str(source)]) for _ in range(2)]
    assert [p.wait() for p in processes] == [0, 0]
    assert [p.suffix for p in folder.iterdir()] == [".so"]


def missing_with(monkeypatch):
    try:
        return cpu.missing.__wrapped__()
    finally:
        monkeypatch.undo()


@pytest.mark.parametrize("variable", ["PATH", "CXX"])
def test_no_compiler_is_said_in_one_line(variable, folder, monkeypatch):
    monkeypatch.setenv(variable, "/nowhere/c++")
    reason = missing_with(monkeypatch)
    assert "no C++ compiler" in reason
    assert "set CXX" in reason
    assert "\n" not in reason


def test_a_compiler_that_fails_is_quoted(source, folder):
    source.write_text("int answer() { return forty_two; }\n")
    with pytest.raises(build.BuildError, match=r"compiler failed: .*small.cpp:1.*forty_two") as error:
        build.load("small", [source])
    assert "\n" not in str(error.value)
    assert not list(folder.iterdir())


def test_a_compiler_whose_output_does_not_load(source, folder, tmp_path, monkeypatch):
    script = tmp_path / "c++"
    # like a compiler, it writes what its last argument names; asked for its version it says something
    script.write_text('#!/bin/sh\nfor last; do :; done\n[ "$last" = --version ] || echo broken > "$last"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(build.BuildError, match="do not load"):
        build.load("small", [source])


def test_where_builds_are_kept(monkeypatch):
    monkeypatch.setenv("MBNORM_CACHE", "/a")
    assert build.cache_folder() == Path("/a")
    monkeypatch.delenv("MBNORM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert build.cache_folder() == Path("/b/mbnorm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_folder() == Path.home() / ".cache" / "mbnorm"


@pytest.mark.contract("SH-21")
def test_a_user_without_a_home_builds_in_a_temporary_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("MBNORM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    folder = build.cache_folder()
    assert folder == tmp_path / f"mbnorm-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_importing_compiles_nothing(folder):
    program = "import sys; import mbnorm.backends.cpu; sys.exit('mbnorm.backends.build' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert not folder.exists()
