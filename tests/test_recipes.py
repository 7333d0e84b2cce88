"""The blocks of the pages whose code needs other packages, run where these are installed."""

import re
import warnings
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
# their weights are downloaded, or they cannot be imported beside torch's build for the CPU
ELSEWHERE = ("timm", "torchvision", "segmentation_models_pytorch", "detectron2", "ultralytics")


def blocks(page):
    return BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


def names_of(code):
    return re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE)


def first_package(code):
    return next(name for name in names_of(code) if name not in ("torch", "mbnorm", "functools"))


RECIPES = {first_package(c): c for c in blocks("recipes.md") if "integrations.mmengine" not in c}
RECIPES["mmengine"] = next(c for c in blocks("recipes.md") if "integrations.mmengine" in c)


def run(code, page, names):
    missing = [name for name in names_of(code) if not installed(name)]
    if missing:
        pytest.skip(f"needs {missing[0]}")
    with warnings.catch_warnings():
        # of the packages themselves
        warnings.simplefilter("ignore")
        exec(compile(code, page, "exec"), names)


def installed(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            __import__(name)
        except ImportError:
            return False
    return True


@pytest.mark.parametrize("package", RECIPES)
def test_a_recipe_runs_as_it_stands(package, tmp_path, monkeypatch):
    if package in ELSEWHERE:
        compile(RECIPES[package], package, "exec")
        return
    if package == "mmengine" and not installed("mmengine"):
        pytest.skip("needs mmengine")
    monkeypatch.chdir(tmp_path)
    run(RECIPES[package], "recipes.md", {"__name__": "recipe"})


def test_the_way_to_onnx_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "deployment"}
    for code in blocks("deployment.md"):
        run(code, "deployment.md", names)
    assert (tmp_path / "net.onnx").exists()
