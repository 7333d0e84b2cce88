import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from mbnorm.backends import build, cpu, library

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


def libraries(folder):
    return sorted(folder.glob("*.so"))


def compiler_that(tmp_path, body):
    """A compiler that says which version it is, and does what the shell makes of ``body``."""
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\nfor last; do :; done\n[ "$last" = --version ] && exit\n{body}\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.contract("KB-2")
def test_a_build_is_kept_and_used_again(source, folder, monkeypatch):
    library.load("small", [source])
    (kept,) = libraries(folder)
    monkeypatch.setattr(library, "compile_library", None)
    library.load("small", [source])
    assert libraries(folder) == [kept]


@pytest.mark.contract("KB-2")
def test_a_build_is_announced_and_its_end_is_told(source, folder, capfd):
    library.load("small", [source])
    first, last = capfd.readouterr().err.splitlines()
    assert first == "mbnorm: compiling its CPU kernels, once for this machine; this takes some 20 seconds"
    assert last.startswith("mbnorm: compiled them in ")
    library.load("small", [source])
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("change", ["source", "flags", "torch", "processor", "compiler"])
def test_a_build_is_not_used_for_anything_else(source, folder, change, monkeypatch):
    library.load("small", [source])
    if change == "source":
        source.write_text("int answer() { return 43; }\n")
    elif change == "flags":
        monkeypatch.setattr(library, "FLAGS", (*build.FLAGS, "-g"))
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99")
    elif change == "compiler":
        monkeypatch.setenv("CXX", "c++ -g")
    else:
        monkeypatch.setattr(library, "_processor", lambda: "flags: mmx")
    library.load("small", [source])
    assert len(libraries(folder)) == 2


@pytest.mark.contract("KB-4")
def test_a_build_outlives_its_compiler(source, folder, monkeypatch):
    library.load("small", [source])
    monkeypatch.setenv("CXX", "/nowhere/c++")
    library.load("small", [source])
    source.write_text("int answer() { return 43; }\n")
    with pytest.raises(build.NoCompilerError):
        library.load("small", [source])


def test_a_damaged_file_is_built_again(source, folder, tmp_path, monkeypatch):
    library.load("small", [source])
    (kept,) = libraries(folder)
    # in another folder, for the system knows this one by its path
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setenv("MBNORM_CACHE", str(other))
    damaged = other / kept.name
    damaged.write_text("not a library")
    library.load("small", [source])
    assert damaged.read_bytes() != b"not a library"


@pytest.mark.contract("KB-4")
def test_a_folder_that_cannot_be_written_does_not_matter(source, tmp_path, monkeypatch, capfd):
    blocked = tmp_path / "file"
    blocked.write_text("")
    private = tmp_path / "private"
    private.mkdir()
    monkeypatch.setenv("MBNORM_CACHE", str(blocked / "cache"))
    monkeypatch.setattr(library.tempfile, "tempdir", str(private))
    library.load("small", [source])
    assert list(private.iterdir()) == []
    first = capfd.readouterr().err.splitlines()[0]
    assert first.startswith("mbnorm: its CPU kernels cannot be kept (")
    assert first.endswith("set MBNORM_CACHE")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind root")
def test_a_read_only_folder_does_not_matter(source, folder):
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    library.load("small", [source])
    assert not list(folder.iterdir())


@pytest.mark.contract("KB-2")
def test_of_two_processes_one_compiles_and_the_other_waits(source, folder, tmp_path):
    program = (
        "import sys; from pathlib import Path; from mbnorm.backends import library; "
        "library.load('small', [Path(sys.argv[1])])"
    )
    slow = os.environ | {"CXX": compiler_that(tmp_path, 'sleep 4; exec c++ "$@"')}
    command = [sys.executable, "-c", program, str(source)]
    processes = [subprocess.Popen(command, env=slow, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = sorted(line for p in processes for line in p.communicate()[1].splitlines())
    assert [p.returncode for p in processes] == [0, 0]
    starts = ["mbnorm: compiled them in", "mbnorm: compiling its", "mbnorm: waiting for another process"]
    assert [line[: len(start)] for line, start in zip(told, starts, strict=True)] == starts
    assert len(libraries(folder)) == 1


@pytest.mark.contract("KB-1")
def test_what_a_wheel_has_inside_is_not_compiled(source, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "SHIPPED", tmp_path)
    build.compile_library([source], tmp_path / library.file_name("small", build.instructions()))
    monkeypatch.setattr(library, "compile_library", None)
    library.load("small", [source])
    assert not folder.exists()


def test_what_a_wheel_has_inside_may_be_for_another_system(source, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "SHIPPED", tmp_path)
    (tmp_path / library.file_name("small", build.instructions())).write_text("not a library")
    library.load("small", [source])
    assert len(libraries(folder)) == 1


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("DEFAULT", "default"), ("AVX2", "avx2"), ("AVX512", "avx2"), ("SVE", "default")],
)
def test_instructions_are_chosen_as_torch_chooses_its_own(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert build.instructions() == expected


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


@pytest.mark.parametrize("name", ["c++", "g++", "clang++"])
def test_a_compiler_is_found_under_each_of_its_names(name, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / name).write_text("#!/bin/sh\n")
    (tmp_path / name).chmod(0o755)
    assert build.compiler() == [name]


def test_a_compiler_that_fails_is_quoted(source, folder):
    source.write_text("int answer() { return forty_two; }\n")
    with pytest.raises(build.BuildError, match=r"compiler failed: .*small.cpp:1.*forty_two") as error:
        library.load("small", [source])
    assert "\n" not in str(error.value)
    assert libraries(folder) == []


@pytest.mark.contract("KB-3")
def test_a_failure_is_remembered(source, folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CXX", compiler_that(tmp_path, "echo error: out of luck; exit 1"))
    with pytest.raises(build.BuildError, match=r"out of luck$"):
        library.load("small", [source])
    capfd.readouterr()
    with pytest.raises(build.BuildError, match=r"out of luck \(remembered; `mbnorm build` tries again\)$"):
        library.load("small", [source])
    assert capfd.readouterr().err == ""


@pytest.mark.contract("KB-3")
@pytest.mark.parametrize("change", ["compiler", "asked"])
def test_a_failure_is_forgotten(source, folder, tmp_path, change, monkeypatch):
    luck = tmp_path / "luck"
    monkeypatch.setenv("CXX", compiler_that(tmp_path, f'[ -f {luck} ] && exec c++ "$@"; exit 1'))
    with pytest.raises(build.BuildError):
        library.load("small", [source])
    luck.touch()
    if change == "asked":
        library.forget_failures()
    else:
        monkeypatch.delenv("CXX")
    library.load("small", [source])
    assert len(libraries(folder)) == 1


def test_a_compiler_whose_output_does_not_load(source, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler_that(tmp_path, 'echo broken > "$last"'))
    with pytest.raises(build.BuildError, match="do not load"):
        library.load("small", [source])
    assert libraries(folder) == []


def test_where_builds_are_kept(monkeypatch):
    monkeypatch.setenv("MBNORM_CACHE", "/a")
    assert library.cache_folder() == Path("/a")
    monkeypatch.delenv("MBNORM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert library.cache_folder() == Path("/b/mbnorm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert library.cache_folder() == Path.home() / ".cache" / "mbnorm"


@pytest.fixture
def no_home(monkeypatch, tmp_path):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("MBNORM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)


@pytest.mark.contract("SH-21")
def test_a_user_without_a_home_builds_in_a_temporary_folder_of_its_own(no_home, tmp_path):
    folder = library.cache_folder()
    assert folder == tmp_path / f"mbnorm-{os.getuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_another_users_temporary_folder_is_not_taken(no_home, tmp_path, monkeypatch, source):
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    with pytest.raises(PermissionError, match="another user's"):
        library.cache_folder()
    library.load("small", [source])
    assert libraries(tmp_path / f"mbnorm-{user + 1}") == []


def test_importing_compiles_nothing(folder):
    program = "import sys; import mbnorm.backends.cpu; sys.exit('mbnorm.backends.library' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert not folder.exists()
