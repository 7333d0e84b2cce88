import ast
import subprocess
import sys
from graphlib import TopologicalSorter
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
        "backends.library",
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


def module_of(path):
    """Return the name of a file of the package, without "mbnorm." in front."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {module_of(path): path for path in sorted(SOURCE.rglob("*.py"))}
BACKENDS = ("aten", "cpu", "traceable", "triton")
LAYERS_OF_THE_HOUSE = [
    {"blend", "measures", "values", "optimizer_steps", "conversion", "feeders", "leaves"},
    {"backends", "memories", "gradient", "centered", "per_image"},
    {"averages"},
    {"trial"},
    {"functional"},
    {"distributed"},
    {"recompute"},
    {"tracing"},
    {"layers"},
    {"state"},
    {"replay"},
    {"observe"},
    {
        "centering",
        "checkpoint",
        "convert",
        "diagnose",
        "diagnosis",
        "double_forward",
        "noise",
        "noise_cost",
        "recalibrate",
        "schedule",
    },
    {""},
    {"integrations", "versions"},
    {"experiments"},
    {"cli"},
    {"__main__"},
]
"""From low to high, files and folders; "" is the package itself, whose names all others have."""
HEIGHT = {name: height for height, names in enumerate(LAYERS_OF_THE_HOUSE) for name in names}


def modules_imported(node):
    """Return what is imported below a node of a syntax tree, in functions too, for more than types."""
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        return set().union(*map(modules_imported, node.orelse))
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {f"{node.module}.{alias.name}" for alias in node.names}
    return set().union(*map(modules_imported, ast.iter_child_nodes(node)))


def imports_of(path):
    """Return the files of the package that a file imports by name."""
    names = modules_imported(ast.parse(path.read_text(encoding="utf-8")))
    ours = {
        name.removeprefix("mbnorm").removeprefix(".") for name in names if f"{name}.".startswith("mbnorm.")
    }
    # what is no file is a name in one
    return {name if name in FILES else name.rpartition(".")[0] for name in ours}


ARROWS = [(module, imported) for module, path in FILES.items() for imported in imports_of(path)]


def folder(module):
    return module.partition(".")[0]


def arrows_from(name, *, except_to):
    """Return the arrows that leave a file or folder, but for those to some others."""
    return [
        arrow for arrow in ARROWS if folder(arrow[0]) == name and folder(arrow[1]) not in {name, *except_to}
    ]


def test_every_arrow_ends_at_a_file():
    assert [arrow for arrow in ARROWS if arrow[1] not in FILES] == []


def test_no_file_imports_itself_by_way_of_others():
    graph = {}
    for module, imported in ARROWS:
        graph.setdefault(module, set()).add(imported)
    TopologicalSorter(graph).prepare()


def test_every_file_has_its_place():
    assert {folder(module) for module in FILES} == HEIGHT.keys()


def test_arrows_point_down():
    assert [(a, b) for a, b in ARROWS if HEIGHT[folder(b)] > HEIGHT[folder(a)]] == []


def test_backends_know_the_mixing_law_and_constants_alone():
    assert arrows_from("backends", except_to={"blend", "measures"}) == []


def test_backends_do_not_know_one_another():
    # a backend may be in several files
    family = {m: m.split(".")[1].partition("_")[0] for m in FILES if m.startswith("backends.")}
    both = [(a, b) for a, b in ARROWS if a in family and family.get(b) in BACKENDS]
    assert [(a, b) for a, b in both if family[a] != family[b]] == []


def test_memories_know_neither_layers_nor_backends():
    assert arrows_from("memories", except_to={"blend", "measures", "values"}) == []


def test_the_library_does_not_know_the_application():
    application = {"experiments", "cli", "__main__"}
    assert [(a, b) for a, b in ARROWS if folder(b) in application and folder(a) not in application] == []


def test_the_reference_stands_alone():
    assert imports_of(Path(__file__).with_name("reference.py")) == set()


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
@pytest.mark.parametrize(
    "layer",
    ["MatchedBatchNorm1d(3)", "MemorizedBatchNorm1d(3)", "MomentumBatchNorm1d(3, history_weight=0.5)"],
)
def test_the_first_call_in_a_process_may_ask_for_the_compiled_kernels(layer):
    build = layer.replace(")", ", backend='cpu')")
    code = f"import torch, mbnorm; layer = mbnorm.{build}; [layer(torch.randn(4, 3)) for _ in range(2)]"
    assert run(code).stderr == ""


@pytest.mark.parametrize("kind", ["Matched", "Memorized", "Momentum"])
def test_a_layer_says_what_its_compiled_kernels_lack(kind, monkeypatch):
    monkeypatch.setattr(cpu, "missing", lambda: "no C++ compiler: c++ was not found")
    layer = getattr(mbnorm, f"{kind}BatchNorm1d")(3, backend="cpu")
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot be used: no C"), torch.no_grad():
        layer(torch.randn(4, 3))
