"""What a memory is after a load, by whichever loader: that of the loaded weights, or started from them."""

import copy
import itertools
import random

import pytest
import torch
from hands import (
    CHANNELS,
    METHODS,
    assert_memory,
    data_of_a,
    data_of_b,
    memory_of,
    on_every_method,
    ours,
    package,
    seed_of,
    seeded,
    stock,
    trained,
)
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

# writing without a process group is said to be that
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def states(method):
    """A net that was trained on other data before, and what it loads: by name, checkpoint and memory."""
    before, plain, own = (
        trained(net, data)
        for net, data in ((ours(method), data_of_a), (stock(), data_of_b), (ours(method), data_of_b))
    )
    return before, {
        "stock": (plain.state_dict(), seed_of(method, plain)),
        "own": (own.state_dict(), memory_of(own)),
    }


on_each_kind = pytest.mark.parametrize("kind", ["stock", "own"])


def train_on(model):
    """What came out of the loader can be trained: all finite, and saved and loaded it stays."""
    for _ in range(2):
        model(data_of_b(2)).sum().backward()
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    before = memory_of(model)
    model.load_state_dict(model.state_dict())
    assert_memory(model, before)


@pytest.mark.contract("SH-5")
@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}])
@pytest.mark.parametrize("start", ["new", "trained", "trained on since", "compiled"])
@on_each_kind
@on_every_method
def test_load_state_dict(method, states, kind, start, options):
    before, checkpoints = states
    saved, expected = checkpoints[kind]
    model = ours(method) if start == "new" else before
    if start == "trained on since":
        model(data_of_a(2))
    if start == "compiled":
        torch.compile(model, backend="eager")(data_of_a(2))
    model.load_state_dict(copy.deepcopy(saved), **options)
    assert_memory(model, expected)
    train_on(model)


def without_memory(saved):
    return {name: t for name, t in saved.items() if "running" in name or "tracked" in name}


@pytest.mark.contract("SH-5")
@on_each_kind
@on_every_method
def test_what_to_empty_leaves_is_never_read(method, states, kind):
    saved, expected = states[1][kind]
    with torch.device("meta"):
        model = ours(method)
    model.to_empty(device="cpu")
    model.load_state_dict(saved)
    assert_memory(model, expected)
    with torch.device("meta"):
        assigned = ours(method)
    assigned.load_state_dict(copy.deepcopy(saved), assign=True)
    assert_memory(assigned, expected)
    train_on(assigned)


@pytest.mark.contract("SH-5")
@on_each_kind
@on_every_method
def test_what_to_empty_leaves_is_never_read_where_the_running_statistics_alone_are_loaded(
    method, states, kind
):
    saved = without_memory(states[1][kind][0])
    with torch.device("meta"):
        model = ours(method)
    model.to_empty(device="cpu")
    model[0].weight.data.fill_(1.0)
    model[0].bias.data.zero_()
    model.load_state_dict(saved, strict=False)
    assert_memory(model, seeded(method, saved["0.running_mean"], saved["0.running_var"]))
    train_on(model)


@pytest.mark.contract("SH-5")
@on_each_kind
@on_every_method
def test_skip_init(method, states, kind):
    saved, expected = states[1][kind]
    layer = nn.utils.skip_init(type(ours(method)[0]), CHANNELS, **METHODS[method][1])
    model = nn.Sequential(layer)
    model.load_state_dict(saved)
    assert_memory(model, expected)


@pytest.mark.contract("SH-5")
@on_each_kind
@on_every_method
def test_safetensors(method, states, kind, tmp_path):
    safetensors = package("safetensors.torch")
    before, checkpoints = states
    saved, expected = checkpoints[kind]
    safetensors.save_file(dict(saved), tmp_path / "model.safetensors")
    before(data_of_a(2))
    assert safetensors.load_model(before, tmp_path / "model.safetensors") == (set(), [])
    assert_memory(before, expected)
    train_on(before)


def garbage_of(kind, tensors):
    """What `torch.empty_like` may find in the memory that it is given."""
    real = torch.empty_like
    generator = random.Random(0)

    def fake(like, *args, **kwargs):
        found = real(like, *args, **kwargs)
        if found.is_meta:
            return found
        if kind == "recycled":
            fitting = [t for t in tensors if (t.shape, t.dtype) == (found.shape, found.dtype)]
            return generator.choice(fitting).clone() if fitting else found.zero_()
        if found.is_floating_point():
            return found.fill_({"zeros": 0.0, "ones": 1.0, "nan": float("nan")}[kind])
        return found.fill_({"zeros": 0, "ones": 1, "nan": 1 << 62}[kind])

    return fake


def transformers_net(transformers, method):
    class Config(transformers.PretrainedConfig):
        model_type = "net-of-a-norm"

    class Net(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config, net=None):
            super().__init__(config)
            self.net = net or ours(method)
            self.post_init()

        def forward(self, x):
            return self.net(x)

    return Config, Net


def load_pretrained(Net, folder, **options):
    logging = package("transformers").logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return Net.from_pretrained(folder, **options).net


@pytest.mark.contract("SH-5")
@pytest.mark.parametrize("found", ["zeros", "ones", "nan", "recycled"])
@on_every_method
def test_from_pretrained_of_transformers(method, states, found, tmp_path, monkeypatch):
    transformers = package("transformers")
    Config, Net = transformers_net(transformers, method)
    before, checkpoints = states
    own = checkpoints["own"][0]
    plain = {name: t for name, t in own.items() if name in stock().state_dict()}
    # the very running statistics of the own checkpoint: the memory's part of the seal tells them apart
    reverted = seeded(method, own["0.running_mean"], own["0.running_var"])
    nets = {"stock": stock(), "own": ours(method), "reverted": stock()}
    for name, state in (*((k, v[0]) for k, v in checkpoints.items()), ("reverted", plain)):
        saved = Net(Config(), nets[name])
        saved.net.load_state_dict(state)
        saved.save_pretrained(tmp_path / name)
    expected = {name: memory for name, (_, memory) in checkpoints.items()} | {"reverted": reverted}
    tensors = [t.detach() for t in (*before.state_dict().values(), *own.values())]
    monkeypatch.setattr(torch, "empty_like", garbage_of(found, tensors))
    for name, memory in expected.items():
        assert_memory(load_pretrained(Net, tmp_path / name), memory)
    monkeypatch.undo()
    assert_memory(load_pretrained(Net, tmp_path / "own", dtype=torch.bfloat16), expected["own"], rtol=1e-2)
    train_on(load_pretrained(Net, tmp_path / "stock").train())


@pytest.mark.contract("SH-5")
@pytest.mark.parametrize("include_buffers", [False, True])
@on_each_kind
@on_every_method
def test_empty_init_and_dispatch_of_accelerate(method, states, kind, include_buffers, tmp_path):
    accelerate, safetensors = package("accelerate"), package("safetensors.torch")
    saved, expected = states[1][kind]
    safetensors.save_file(dict(saved), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        model = ours(method)
    model = accelerate.load_checkpoint_and_dispatch(
        model, str(tmp_path / "model.safetensors"), device_map={"": "cpu"}
    )
    assert_memory(model, expected)
    train_on(model)


@pytest.mark.contract("SH-5", "SH-7")
@on_each_kind
@on_every_method
def test_buffers_that_are_set_one_by_one(method, states, kind):
    before, checkpoints = states
    saved, expected = checkpoints[kind]
    before(data_of_a(2))
    for name, value in saved.items():
        if name in dict(before.named_buffers()):
            before[0]._buffers[name.removeprefix("0.")] = value.clone()
    if kind == "own":
        # what a checkpoint has is set with its seal
        assert "0.memory_seal" in saved
    assert_memory(before, expected)
    train_on(before)


# torch 2.10 itself reads the storage it has deprecated
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.contract("SH-5")
@pytest.mark.parametrize("then", ["load_state_dict", "set_model_state_dict"])
@on_each_kind
@on_every_method
def test_distributed_checkpoints_also_partial_ones(method, states, kind, then, tmp_path):
    before, checkpoints = states
    saved, expected = checkpoints[kind]
    dcp.save(dict(saved), checkpoint_id=tmp_path, no_dist=True)
    before(data_of_a(2))
    own = before.state_dict() if then == "load_state_dict" else get_model_state_dict(before)
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(own, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    if then == "load_state_dict":
        before.load_state_dict(own)
    else:
        set_model_state_dict(before, own)
    assert_memory(before, expected)
    train_on(before)


@pytest.mark.contract("SH-6")
@pytest.mark.parametrize("start", ["new", "trained"])
@on_every_method
def test_a_dictionary_that_carries_the_layers_own_memory_along(method, states, start):
    before, checkpoints = states
    saved, expected = checkpoints["stock"]
    model = before if start == "trained" else ours(method)
    own = model.state_dict()
    own.update(saved)
    model.load_state_dict(own)
    assert_memory(model, expected)
    train_on(model)


@pytest.mark.contract("SH-6")
@on_every_method
def test_the_memory_of_an_earlier_self_with_other_statistics(method, states):
    before, checkpoints = states
    own = copy.deepcopy(before.state_dict())
    trained(before, data_of_a, steps=9)
    before.load_state_dict({**own, **checkpoints["stock"][0]})
    assert_memory(before, checkpoints["stock"][1])


RUNNING = ("running_mean", "running_var")


@pytest.mark.contract("SH-6")
@pytest.mark.parametrize("parts", ["running", "memory", "memory and seal", "a part of each", "a mixture"])
@on_every_method
def test_parts_of_an_own_checkpoint(method, states, parts):
    before, checkpoints = states
    saved = checkpoints["own"][0]
    own = [name for name in before[0].memory.buffers if f"0.{name}" in saved]
    mean, var = before[0].running_mean.clone(), before[0].running_var.clone()
    names = {
        "running": RUNNING,
        "memory": own,
        "memory and seal": [*own, "memory_seal"],
        "a part of each": [*RUNNING, own[0]],
        "a mixture": [RUNNING[0], own[-1]],
    }[parts]
    mean = saved["0.running_mean"] if RUNNING[0] in names else mean
    var = saved["0.running_var"] if RUNNING[1] in names else var
    before.load_state_dict({f"0.{name}": saved[f"0.{name}"] for name in names}, strict=False)
    assert_memory(before, seeded(method, mean, var))


@pytest.mark.contract("SH-8")
@pytest.mark.parametrize("names", [(), ("weight", "bias"), ("num_batches_tracked",)])
@pytest.mark.parametrize("compiled", [False, True])
@on_every_method
def test_a_load_that_replaces_no_statistics_keeps_the_memory(method, states, names, compiled):
    before, checkpoints = states
    run = torch.compile(before, backend="eager") if compiled else before
    run(data_of_a(2))
    expected = memory_of(before)
    saved = checkpoints["stock"][0]
    before.load_state_dict({f"0.{name}": saved[f"0.{name}"] for name in names}, strict=False)
    assert_memory(before, expected)


@pytest.mark.contract("SH-8")
@pytest.mark.parametrize("compiled", [False, True])
@on_every_method
def test_a_state_dict_that_was_taken_earlier_and_holds_the_very_tensors(method, states, compiled):
    before, _ = states
    saved = before.state_dict()
    run = torch.compile(before, backend="eager") if compiled else before
    for _ in range(3):
        run(data_of_a(2))
    expected = memory_of(before)
    before.load_state_dict(saved)
    assert_memory(before, expected)


@pytest.mark.contract("SH-8")
@on_every_method
def test_buffers_that_a_profiler_adds_are_not_the_layers(method, states):
    before, _ = states
    before(data_of_a(2))
    expected = memory_of(before)
    before[0].register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
    before.eval()(data_of_a(2))
    assert_memory(before, expected)
    before(data_of_a(2))
    expected = memory_of(before)
    del before[0]._buffers["total_ops"]
    assert_memory(before, expected)


@pytest.mark.contract("SH-8")
@on_every_method
def test_statistics_that_were_changed_in_place_keep_the_memory_they_are_saved_with(method, states):
    # recalibrate, update_bn, timm's distribute_bn
    before, _ = states
    before[0].running_mean.mul_(0.9)
    expected = memory_of(before)
    other = ours(method)
    other.load_state_dict(before.state_dict())
    assert_memory(other, expected)
    assert_memory(before, expected)


@pytest.mark.contract("SH-7")
@pytest.mark.parametrize("by", ["attribute", "register_buffer"])
@on_every_method
def test_running_statistics_that_are_replaced_restart_the_memory(method, states, by):
    before, checkpoints = states
    saved, expected = checkpoints["stock"]
    before(data_of_a(2))
    for name in RUNNING:
        value = saved[f"0.{name}"].clone()
        if by == "attribute":
            setattr(before[0], name, value)
        else:
            before[0].register_buffer(name, value)
    torch.testing.assert_close(before[0].running_mean, saved["0.running_mean"])
    assert_memory(before, expected)


@pytest.mark.contract("SH-7")
@on_every_method
def test_a_mode_switch_of_a_compiled_net_looks_at_replaced_statistics(method, states):
    before, checkpoints = states
    saved, expected = checkpoints["stock"]
    run = torch.compile(before, backend="eager")
    run(data_of_a(2))
    for name in RUNNING:
        setattr(before[0], name, saved[f"0.{name}"].clone())
    before.train()
    twin = ours(method)
    twin.load_state_dict(saved)
    x = data_of_b(2)
    torch.testing.assert_close(run(x), twin(x))
    assert expected.keys() == memory_of(twin).keys()


@pytest.mark.contract("SH-6")
@on_every_method
def test_loaders_that_call_the_modules_themselves(method, states):
    # as mmengine's load_checkpoint does
    before, checkpoints = states
    saved, expected = checkpoints["stock"]
    missing, unexpected, errors = [], [], []
    before(data_of_a(2))
    before[0]._load_from_state_dict(dict(saved), "0.", {}, True, missing, unexpected, errors)
    assert (missing, unexpected, errors) == ([], [], [])
    assert_memory(before, expected)


@pytest.mark.contract("SH-6")
@on_each_kind
@on_every_method
def test_the_checkpoint_of_a_compiled_net(method, states, kind):
    before, checkpoints = states
    saved, expected = checkpoints[kind]
    compiled = torch.compile(before, backend="eager")
    compiled(data_of_a(2))
    compiled.load_state_dict({f"_orig_mod.{name}": value for name, value in saved.items()})
    assert_memory(before, expected)


@pytest.mark.contract("SH-25")
@pytest.mark.parametrize("assign", [False, True])
@on_each_kind
@on_every_method
def test_what_was_converted_or_loaded_in_inference_mode_can_be_trained(method, states, kind, assign):
    before, checkpoints = states
    saved, expected = checkpoints[kind]
    plain = stock()
    with torch.inference_mode():
        ours(method, plain)
        before.load_state_dict({name: t.clone() for name, t in saved.items()}, assign=assign)
        # torch's own parameters are those of the checkpoint
        before[0].weight = nn.Parameter(plain[0].weight)
    before[0].weight, before[0].bias = plain[0].weight, plain[0].bias
    plain(data_of_b()).sum().backward()
    assert_memory(before, expected)
    train_on(before)


@pytest.mark.contract("SH-5")
@on_every_method
def test_offloading_between_forwards_is_the_run_without(method):
    accelerate = package("accelerate")
    model = trained(ours(method), data_of_b)
    model(x := data_of_b(2))
    stays = copy.deepcopy(model)
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    assert model[0].running_mean.is_meta
    for x in itertools.repeat(data_of_b(2), 3):
        torch.testing.assert_close(model(x), stays(x))
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_memory(model, memory_of(stays))


@pytest.mark.contract("SH-8")
@on_every_method
def test_a_net_that_is_moved_buffer_by_buffer_keeps_its_memory(method):
    # as accelerate's dispatch_model does
    model = trained(ours(method), data_of_b)
    expected = memory_of(model)
    for name, tensor in list(model[0]._buffers.items()):
        model[0]._buffers[name] = tensor.clone()
    assert_memory(model, expected)


@pytest.mark.contract("SH-6")
@on_every_method
def test_other_statistics_are_told_apart_where_the_first_channels_are_dead(method):
    def partly_dead(net):
        for tensor in (net[0].running_mean, net[0].running_var):
            tensor[:8].zero_()
        return net

    channels = 64
    own, other = (nn.Sequential(nn.BatchNorm2d(channels)) for _ in range(2))
    own[0].running_mean.fill_(3.0)
    other[0].running_mean.fill_(-6.0)
    model = ours(method, partly_dead(own))
    merged = model.state_dict()
    merged.update(partly_dead(other).state_dict())
    model.load_state_dict(merged)
    assert_memory(model, memory_of(ours(method, other)))
