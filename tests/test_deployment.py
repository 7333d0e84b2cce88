"""From a trained net to what runs elsewhere."""

import copy
import warnings

import pytest
import torch
from torch import nn

from mbnorm import convert, revert

METHODS = {"momentum": {"batch_size": 2}, "matched": {}, "memorized": {"memory_size": 6}}
on_every_method = pytest.mark.parametrize("method", METHODS)


def stock_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        # nothing in front of it to fold it into
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def batch(m=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, 2, 8, 8, generator=generator) * 3 + 1


def trained(method):
    model = stock_net()
    convert(model, method, **METHODS[method])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(8):
        optimizer.zero_grad()
        model(batch(seed=seed)).square().mean().backward()
        optimizer.step()
    return model


def reverted(method):
    model = trained(method).eval()
    want = model(batch(3, seed=99)).detach()
    revert(model)
    return model, want


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.fixture
def quiet():
    """For the warnings of torch's exporters about themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.contract("EX-3")
@pytest.mark.parametrize(("method", "strict"), [*((method, False) for method in METHODS), ("matched", True)])
def test_the_layers_themselves_are_exported_and_change_no_buffer(method, strict):
    model = trained(method).eval()
    before = copy.deepcopy(model.state_dict())
    shapes = ({0: torch.export.Dim("m")},)
    program = torch.export.export(model, (batch(),), dynamic_shapes=shapes, strict=strict)
    assert program.graph_signature.buffers_to_mutate == {}
    x = batch(5, seed=99)
    assert torch.equal(program.module()(x), model(x))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.contract("EX-4")
@on_every_method
def test_torchscript_traces_the_layers_themselves(method, quiet):
    model = trained(method).eval()
    traced = torch.jit.trace(model, batch())
    x = batch(5, seed=99)
    assert torch.equal(traced(x), model(x))


@pytest.mark.contract("EX-4")
@pytest.mark.parametrize("mode", [True, False])
@on_every_method
def test_fx_takes_the_layers_as_leaves_in_both_modes(method, mode):
    model = trained(method).train(mode)
    twin = copy.deepcopy(model)
    graph = torch.fx.symbolic_trace(model)
    leaves = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert leaves == [name for name, _ in model.named_children()]
    for seed in range(3):
        assert torch.equal(graph(batch(seed=seed)), twin(batch(seed=seed)))
    assert all(torch.equal(t, twin.state_dict()[name]) for name, t in graph.state_dict().items())


@pytest.mark.contract("EX-4")
def test_fx_takes_layers_that_share_statistics():
    model = stock_net()
    convert(model, "matched", process_group="world")
    assert len([n for n in torch.fx.symbolic_trace(model).graph.nodes if n.op == "call_module"]) == len(model)


@pytest.mark.contract("EX-5")
@on_every_method
def test_exporting_train_mode_is_refused(method, quiet):
    model = trained(method)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        RuntimeError, match=r"BatchNorm2d is exported in eval mode only: .* Call model\.eval\(\)"
    ):
        torch.export.export(model, (batch(),), strict=False)
    with pytest.raises(
        RuntimeError, match=r"BatchNorm2d is exported in eval mode only: .* Call model\.eval\(\)"
    ):
        torch.jit.trace(model, batch())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.contract("EX-2")
@on_every_method
def test_a_reverted_net_is_exported_as_a_stock_one(method):
    model, want = reverted(method)
    stock = stock_net().eval()
    stock.load_state_dict(model.state_dict())
    shapes = ({0: torch.export.Dim("m")},)
    programs = [torch.export.export(m, (batch(),), dynamic_shapes=shapes) for m in (model, stock)]
    assert programs[0].graph_module.code == programs[1].graph_module.code
    assert torch.equal(programs[0].module()(batch(3, seed=99)), want)


@pytest.mark.contract("EX-2")
@pytest.mark.parametrize("how", ["trace", "script"])
@on_every_method
def test_a_reverted_net_becomes_torchscript(method, how, quiet):
    model, want = reverted(method)
    scripted = torch.jit.script(model) if how == "script" else torch.jit.trace(model, batch())
    assert torch.equal(scripted(batch(3, seed=99)), want)


@pytest.mark.contract("EX-2")
@on_every_method
def test_the_convolutions_of_a_reverted_net_absorb_its_norms(method, quiet):
    from torch.fx.experimental.optimization import fuse

    model, want = reverted(method)
    one = nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])
    x = batch(3, seed=99)
    torch.testing.assert_close(one(x), model[1](model[0](x)))
    fused = fuse(model)
    assert len(norms(fused)) == 1
    torch.testing.assert_close(fused(x), want)


@pytest.mark.contract("EX-2")
@pytest.mark.parametrize(
    ("method", "first_revert"), [*((method, True) for method in METHODS), ("matched", False)]
)
def test_onnx_gives_the_same_output_with_one_node_a_norm_or_none(method, first_revert, tmp_path, quiet):
    needed = "needs onnx, onnxscript and onnxruntime: pip install onnx onnxscript onnxruntime"
    onnx, _, runtime = (pytest.importorskip(n, reason=needed) for n in ("onnx", "onnxscript", "onnxruntime"))
    model, want = reverted(method) if first_revert else (trained(method).eval(), None)
    x = batch(3, seed=99)
    want = model(x).detach() if want is None else want
    path = tmp_path / "net.onnx"
    shapes = ({0: torch.export.Dim("m")},)
    torch.onnx.export(model, (batch(),), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    # those behind a convolution are folded into it
    assert (kinds.count("Conv"), kinds.count("BatchNormalization")) == (2, 1)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-5, atol=1e-6)


@pytest.mark.contract("EX-2")
def test_pt2e_quantizes_a_reverted_net_as_a_stock_one(quiet):
    pytest.importorskip("torchao", reason="needs torchao: pip install torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    model, want = reverted("matched")
    stock = stock_net().eval()
    stock.load_state_dict(model.state_dict())
    outputs = []
    for net in (model, stock):
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(torch.export.export(net, (batch(3),)).module(), quantizer)
        for seed in range(8):
            prepared(batch(3, seed=seed))
        quantized = convert_pt2e(prepared)
        assert "quantize_per_tensor" in quantized.code
        outputs.append(quantized(batch(3, seed=99)))
    assert torch.equal(outputs[0], outputs[1])
    # eight bits
    torch.testing.assert_close(outputs[0], want, rtol=0.1, atol=0.05 * float(want.abs().max()))
