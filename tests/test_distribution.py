"""What is published: a wheel and an sdist, built offline, and used where torch alone is installed."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mbnorm
from mbnorm.backends import build, cpu

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "mbnorm"


def build_into(out, *options, **variables):
    command = [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", out, ROOT]
    subprocess.run(command, env=os.environ | {"PIP_NO_INDEX": "1"} | variables, check=True, timeout=300)
    return out


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with an sdist, and the wheel that was built from it without a network."""
    return build_into(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as file:
        yield file


@pytest.fixture(scope="module")
def beside_torch(wheel, tmp_path_factory):
    return where_torch_is(wheel, tmp_path_factory.mktemp("site"))


def where_torch_is(wheel, folder):
    """A function that runs Python where the wheel, torch and what torch requires are all there is."""
    wheel.extractall(folder)
    wanted, seen = ["torch"], set()
    while wanted:
        distribution = metadata.distribution(wanted.pop())
        if distribution.name in seen:
            continue
        seen.add(distribution.name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            # packages may share a folder
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
        for requirement in map(Requirement, distribution.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted.append(requirement.name)

    def run(*arguments, **variables):
        # torch itself warns that there is no numpy
        quiet = ["-W", "error", "-W", "ignore:Failed to initialize NumPy"]
        command = [sys.executable, "-S", *quiet, *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(folder), "NO_COLOR": "1"} | variables
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)

    return run


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    source = {p.relative_to(SOURCE.parent).as_posix() for p in SOURCE.rglob("*") if p.is_file()}
    assert packed == {name for name in source if "__pycache__" not in name}


def test_the_wheel_holds_the_kernels_sources_and_the_mark_of_typing(wheel):
    needed = [f"mbnorm/backends/{path.name}" for path in cpu.SOURCES] + ["mbnorm/py.typed"]
    assert set(needed) <= set(wheel.namelist())


def test_the_sdist_holds_what_a_build_a_test_and_a_reader_need(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    files = ["pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "CITATION.cff", "CONTRIBUTING.md"]
    files += ["evidence/cli.py", "benchmarks/rows.py", ".ci/run", ".github/workflows/ci.yml"]
    assert set(files) <= names
    for page in ("README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))):
        assert page in names


def test_torch_is_all_that_is_required(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    requirements = re.findall(r"^Requires-Dist: (.*)$", wheel.read(name).decode(), re.MULTILINE)
    assert [text for text in requirements if "extra ==" not in text] == ["torch>=2.10"]


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {mbnorm.__version__}\n" in text


def test_the_newest_heading_of_the_changelog_is_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == mbnorm.__version__


def test_the_workflow_runs_on_the_oldest_and_the_newest_torch():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    (versions,) = re.findall(r"^ +torch: \[(.*)\]$", workflow, re.MULTILINE)
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (newest,) = re.findall(r"^torch==(\S+)$", constraints, re.MULTILINE)
    (oldest,) = re.findall(r'"torch>=(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert versions == f'"{oldest}.0", "{newest}"'
    assert "run: .ci/run" in workflow


def test_kernels_are_compiled_for_the_oldest_torch_that_is_allowed():
    (requirement,) = [Requirement(r) for r in metadata.requires("mbnorm") if r.startswith("torch")]
    (specifier,) = requirement.specifier
    major, minor = map(int, specifier.version.split("."))
    assert f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}{0:012x}" in build.FLAGS


def test_the_wheel_trains_beside_torch_alone(beside_torch):
    result = beside_torch(ROOT / "tests" / "first_step.py")
    assert result.stderr == ""
    assert "3 steps in" in result.stdout
    assert str(ROOT) not in result.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The wheel with compiled kernels."""
    out = build_into(tmp_path_factory.mktemp("compiled"), "--wheel", MBNORM_KERNELS="1")
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as file:
        yield file


@pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))
@pytest.mark.contract("KB-1")
@pytest.mark.parametrize("capability", ["default", ""])
def test_the_compiled_wheel_needs_no_compiler(capability, compiled, tmp_path):
    nothing = {"PATH": "", "CXX": "none", "MBNORM_CACHE": str(tmp_path / "cache")}
    # by which torch, too, takes its kernels for any processor
    nothing |= {"ATEN_CPU_CAPABILITY": capability} if capability else {}
    result = where_torch_is(compiled, tmp_path / "site")(ROOT / "tests" / "first_step.py", **nothing)
    assert result.stderr == ""
    assert result.stdout.endswith("backend cpu\n")
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))
def test_the_compiled_wheel_says_that_it_is_for_one_system(compiled):
    tags = [text for text in compiled.namelist() if text.endswith("/WHEEL")]
    text = compiled.read(tags[0]).decode()
    assert "Root-Is-Purelib: false" in text
    assert "Tag: py3-none-any" not in text
    assert re.search(r"^Tag: py3-none-\w+$", text, re.MULTILINE)


def test_the_version_is_told_beside_torch_alone(beside_torch):
    assert beside_torch("-m", "mbnorm", "--version").stdout.startswith("mbnorm ")


def test_what_needs_an_extra_says_how_to_get_it(beside_torch):
    result = beside_torch("-m", "mbnorm", "compare")
    assert result.returncode == 1
    assert result.stderr.endswith("pip install '.[experiments]' in a clone of mbnorm\n")
    assert result.stderr.count("\n") == 1
