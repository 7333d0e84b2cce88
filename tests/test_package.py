import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import mbnorm
from mbnorm.backends import cpu

SOURCE = Path(mbnorm.__file__).parent


def run(code):
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)


def test_import_takes_torch_alone_and_warns_of_nothing():
    code = (
        "import torch, sys; before = set(sys.modules); import mbnorm; "
        "print([m for m in set(sys.modules) - before if m.partition('.')[0] != 'mbnorm'])"
    )
    result = run(code)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_import_leaves_what_few_need_for_later():
    # it takes 15 ms beyond torch's import, and each of these would add to it
    later = (
        "experiments",
        "cli",
        "versions",
        "tracing",
        "backends.build",
        "backends.triton_launch",
    )
    code = "import mbnorm, sys; print([m for m in sys.modules if m.startswith('mbnorm.')])"
    imported = ast.literal_eval(run(code).stdout)
    assert "mbnorm.convert" in imported
    assert [m for m in imported if m.removeprefix("mbnorm.").startswith(later)] == []


def test_import_probes_no_hardware():
    code = (
        "import torch\n"
        "def probe(*a): raise AssertionError('probed')\n"
        "torch.cuda.is_available = torch.cuda.device_count = torch.accelerator.is_available = probe\n"
        "import mbnorm"
    )
    assert run(code).stderr == ""


def test_public_names_exist_and_are_typed():
    assert all(hasattr(mbnorm, name) for name in mbnorm.__all__)
    assert (SOURCE / "py.typed").exists()


def imports_of(path):
    return set(re.findall(r"^\s*(?:from|import) (mbnorm[\w.]*)", path.read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", sorted((SOURCE / "backends").glob("*.py")), ids=lambda p: p.name)
def test_backends_import_no_other_part_of_the_house(path):
    allowed = {"mbnorm.blend", "mbnorm.measures", "mbnorm.backends"}
    if path.name.startswith("triton_"):
        # one backend in several files
        allowed |= {f"mbnorm.backends.{part.stem}" for part in path.parent.glob("triton_*.py")}
    assert imports_of(path) <= allowed
    peers = r"from mbnorm\.backends(\.(aten|cpu|traceable|triton))? import (?!build|triton_)"
    assert not re.search(peers, path.read_text())


def test_the_reference_stands_alone():
    assert imports_of(Path(__file__).with_name("reference.py")) == set()


def test_arrows_point_down():
    order = [
        {"mbnorm.blend", "mbnorm.measures", "mbnorm.backends", "mbnorm.optimizer_steps"},
        {"mbnorm.memory"},
        {"mbnorm.averages"},
        {"mbnorm.trial"},
        {"mbnorm.functional", "mbnorm.distributed"},
        {"mbnorm.recompute"},
        {"mbnorm.tracing"},
        {"mbnorm.layers"},
        {"mbnorm.state"},
        {"mbnorm.replay", "mbnorm.observe"},
        {
            "mbnorm.checkpoint",
            "mbnorm.convert",
            "mbnorm.diagnose",
            "mbnorm.diagnosis",
            "mbnorm.double_forward",
            "mbnorm.noise",
            "mbnorm.recalibrate",
            "mbnorm.schedule",
        },
    ]
    level = {name: height for height, names in enumerate(order) for name in names}

    def height_of(module):
        parts = module.split(".")
        return level.get(".".join(parts[:2]))

    for path in SOURCE.rglob("*.py"):
        own = height_of(".".join(("mbnorm", *path.relative_to(SOURCE).with_suffix("").parts)))
        if own is None:
            continue
        for imported in imports_of(path):
            assert height_of(imported) is not None, (path, imported)
            assert height_of(imported) <= own, (path, imported)


def test_layers_work_where_torch_has_no_bias_keyword(monkeypatch):
    batch_norm = nn.modules.batchnorm._BatchNorm.__init__

    def old_batch_norm(
        self,
        num_features,
        eps=1e-5,
        momentum=0.1,
        affine=True,
        track_running_stats=True,
        device=None,
        dtype=None,
    ):
        batch_norm(self, num_features, eps, momentum, affine, track_running_stats, device, dtype)

    monkeypatch.setattr(nn.modules.batchnorm._BatchNorm, "__init__", old_batch_norm)
    with pytest.raises(TypeError):
        nn.BatchNorm2d(3, bias=False)
    layer = mbnorm.MomentumBatchNorm2d(3, bias=False, history_weight=0.5)
    assert layer.bias is None
    assert layer(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)


@pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))
@pytest.mark.parametrize("layer", ["MemorizedBatchNorm1d(3)", "MomentumBatchNorm1d(3, history_weight=0.5)"])
def test_the_first_call_in_a_process_may_ask_for_the_compiled_kernels(layer):
    build = layer.replace(")", ", backend='cpu')")
    code = f"import torch, mbnorm; layer = mbnorm.{build}; [layer(torch.randn(4, 3)) for _ in range(2)]"
    assert run(code).stderr == ""


@pytest.mark.parametrize("kind", ["Memorized", "Momentum"])
def test_a_layer_says_what_its_compiled_kernels_lack(kind, monkeypatch):
    monkeypatch.setattr(cpu, "missing", lambda: "no C++ compiler: c++ was not found")
    layer = getattr(mbnorm, f"{kind}BatchNorm1d")(3, backend="cpu")
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot be used: no C"):
        layer(torch.randn(4, 3))
