import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    CONTIGUOUS,
    DTYPES,
    budget,
    gradients,
    layout_id,
    make_input,
    make_parameters,
    native_errors,
    near_statistics,
    relative_error,
)
from torch.library import opcheck

from mbnorm import reference
from mbnorm.backends import aten, build, cpu
from mbnorm.functional import _KernelBatchNorm
from mbnorm.memory import InferenceAverages, InferenceUpdate, MovingAverage, RecentBatches, commit

EPS = 1e-3
YES = torch.tensor(True)
LAST, LAST_3D = torch.channels_last, torch.channels_last_3d
SHAPES = [
    ((6, 5), CONTIGUOUS),
    ((9, 17), CONTIGUOUS),
    ((70, 40), CONTIGUOUS),
    ((12, 1), CONTIGUOUS),
    ((4, 3, 5), CONTIGUOUS),
    ((3, 17, 130), CONTIGUOUS),
    ((5, 9, 1), CONTIGUOUS),
    ((2, 17, 7, 7), CONTIGUOUS),
    ((2, 17, 7, 7), LAST),
    ((3, 3, 4, 6), CONTIGUOUS),
    ((3, 3, 4, 6), LAST),
    ((2, 1, 9, 9), LAST),
    ((4, 40, 1, 1), LAST),
    ((2, 33, 27, 31), CONTIGUOUS),
    ((2, 33, 27, 31), LAST),
    ((2, 24, 37, 41), LAST),
    ((2, 5, 3, 4, 3), CONTIGUOUS),
    ((2, 11, 3, 4, 3), LAST_3D),
]
on_every_shape = pytest.mark.parametrize(("shape", "layout"), SHAPES, ids=layout_id)
with_both_rules = pytest.mark.parametrize("variance", ["averaged", "pooled"])

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=str(cpu.missing()))


def operate(kernels, x, weight, bias, past, a, variance):
    dtype = cpu.statistics_dtype(x.dtype)
    past_mean, past_var = (p.to(dtype) for p in past)
    a = torch.tensor(a, dtype=dtype)
    return _KernelBatchNorm.apply(kernels, x, weight, bias, past_mean, past_var, a, variance, EPS)


def state_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def unaligned(x):
    """The same values in the same strides, one value further from an aligned address."""
    storage = torch.empty(x.numel() + 1, dtype=x.dtype)
    return storage.as_strided(x.shape, x.stride(), 1).copy_(x)


@with_both_rules
@pytest.mark.parametrize("a", [1.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
@on_every_shape
def test_everything_matches_the_reference(shape, layout, dtype, a, variance):
    x = make_input(shape, dtype, layout)
    parameters = make_parameters(shape[1], state_dtype(dtype))
    past = near_statistics(x)
    cotangent = make_input(shape, dtype, layout, seed=5)
    leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
    exact = [t.double().requires_grad_() for t in (x, *parameters)]

    want, *wanted_statistics = reference.blended_batch_norm(*exact, *past, a, variance, EPS)
    wanted = [w.detach() for w in (want, *gradients(want, tuple(exact), cotangent.double()))]
    y, *statistics = operate(cpu, *leaves, past, a, variance)
    got = (y, *gradients(y, tuple(leaves), cotangent))
    peer = operate(aten, *leaves, past, a, variance)[0]
    peers = (peer, *gradients(peer, tuple(leaves), cotangent))

    # dw of blended statistics is worse off than native's by the rounding of the saved mean
    native = native_errors(x, *parameters, cotangent, EPS)
    composed = (relative_error(p.detach(), w) for p, w in zip(peers, wanted, strict=True))
    allowed = [budget(dtype, max(pair)) for pair in zip(native, composed, strict=True)]
    if dtype == torch.float64:
        allowed = [most + 2 * error for most, error in zip(allowed, native, strict=True)]
    errors = [relative_error(g.detach(), w) for g, w in zip(got, wanted, strict=True)]
    assert all(e <= most for e, most in zip(errors, allowed, strict=True)), (errors, allowed)
    tolerance = 1e-14 if dtype == torch.float64 else 2e-7
    pairs = zip(statistics, wanted_statistics, strict=True)
    assert max(relative_error(g, w.detach()) for g, w in pairs) < tolerance
    assert y.stride() == got[1].stride() == x.stride()
    assert (y.dtype, got[1].dtype) == (dtype, dtype)
    assert {t.dtype for t in statistics} == {state_dtype(dtype)}


@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
@on_every_shape
def test_unaligned_tensors_give_the_same_bits(shape, layout, dtype):
    x, dy = make_input(shape, dtype, layout), make_input(shape, dtype, layout, seed=5)
    assert_same_bits(run(x, dy), run(unaligned(x), unaligned(dy)))


def run(x, dy, variance="averaged"):
    dtype = state_dtype(x.dtype)
    weight, bias = make_parameters(x.shape[1], dtype)
    past = [t.to(dtype) for t in near_statistics(x)]
    a = torch.tensor(0.3, dtype=dtype)
    y, batch_mean, batch_var, mean, var = cpu.forward(x, weight, bias, *past, a, variance, EPS)
    gradient = cpu.backward(dy, x, weight, a, batch_mean, mean, var, variance, EPS, True)
    return (y, batch_mean, batch_var, mean, var, *gradient)


def assert_same_bits(got, wanted):
    for g, w in zip(got, wanted, strict=True):
        assert torch.equal(g, w)


@on_every_shape
def test_cotangents_of_any_strides_give_the_same_bits(shape, layout):
    x, dy = make_input(shape, torch.float32, layout), make_input(shape, torch.float32, seed=4)
    wide = torch.zeros(*shape[:-1], 2 * shape[-1])[..., ::2].copy_(dy)
    wanted = run(x, dy.contiguous(memory_format=layout))
    assert_same_bits(run(x, wide), wanted)
    assert_same_bits(run(x, dy), wanted)
    one = torch.tensor(0.7)
    assert_same_bits(run(x, one.expand(shape)), run(x, torch.full_like(x, 0.7)))


@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
def test_inputs_of_other_strides(dtype):
    base = make_input((4, 20, 6, 5), dtype)
    for x in (base.mT, base.mT[:, ::2], make_input((4, 6, 20, 6), dtype).transpose(1, 2)[..., 1:]):
        dy = make_input(tuple(x.shape), dtype, seed=3)
        got = run(x, dy)
        assert_same_bits(got, run(x.contiguous(), dy))
        assert got[0].stride() == got[5].stride() == torch.empty_like(x).stride()


@with_both_rules
@pytest.mark.parametrize("affine", [True, False])
def test_no_gradient_of_the_input(affine, variance):
    x, dy = make_input((3, 12, 5, 4), torch.float32), make_input((3, 12, 5, 4), torch.float32, seed=2)
    weight = make_parameters(12, torch.float32)[0] if affine else None
    a, zeros, ones = torch.tensor(0.4), torch.zeros(12), torch.ones(12)
    _, batch_mean, _, mean, var = cpu.forward(x, weight, None, zeros, ones, a, variance, EPS)
    arguments = dy, x, weight, a, batch_mean, mean, var, variance, EPS
    dx, *without = cpu.backward(*arguments, False)
    assert dx is None
    assert_same_bits(without, cpu.backward(*arguments, True)[1:])


ADVERSARIES = {
    "far off centre": lambda noise: 1e4 + noise,
    "huge": lambda noise: 1e18 * noise,
    "an outlier first": lambda noise: noise.index_fill(-1, torch.tensor(0), 1e5),
    "two halves": lambda noise: noise + 1e3 * (torch.arange(noise.shape[-1]) % 64 < 32),
    "a ramp": lambda noise: noise + torch.arange(float(noise.shape[-1])),
}


@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST], ids=layout_id)
def test_statistics_are_as_accurate_as_native(name, layout):
    noise = make_input((2, 24, 3, 900), torch.float64)
    x = ADVERSARIES[name](noise).float().contiguous(memory_format=layout)
    exact_mean, exact_var, _ = reference.batch_statistics(x.double())
    mean, var = cpu.forward(x, None, None, torch.zeros(24), torch.ones(24), torch.tensor(1.0), "pooled", EPS)[
        1:3
    ]
    native_mean, native_var = torch.batch_norm_update_stats(x, None, None, 0.0)
    one_rounding = torch.finfo(torch.float32).eps
    for got, native, exact in ((mean, native_mean, exact_mean), (var, native_var, exact_var)):
        error = (got.double() - exact).abs() / exact.abs()
        allowed = 2 * ((native.double() - exact).abs() / exact.abs()).max() + one_rounding
        assert error.max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
@on_every_shape
def test_equal_values_have_no_variance(shape, layout, dtype):
    for value in (0.1, -3e4, 1e-3):
        x = torch.full(shape, value, dtype=dtype).contiguous(memory_format=layout)
        batch_mean, batch_var = run(x, x)[1:3]
        assert torch.equal(batch_var, torch.zeros_like(batch_var))
        assert torch.equal(batch_mean, x.flatten()[0].to(batch_mean.dtype).expand_as(batch_mean))


@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST], ids=layout_id)
def test_half_values_near_the_end_of_their_range(layout):
    signs = torch.tensor([1.0, -1.0]).repeat(32).view(1, 1, 8, 8).expand(2, 16, 8, 8)
    x = (6.5e4 * signs).half().contiguous(memory_format=layout)
    zeros, ones, a = torch.zeros(16), torch.ones(16), torch.tensor(1.0)
    y, mean, var, *_ = cpu.forward(x, None, None, zeros, ones, a, "pooled", 1e-5)
    assert torch.equal(y.float(), signs)
    assert torch.equal(mean, zeros)
    torch.testing.assert_close(var, ones * x.float()[0, 0, 0, 0] ** 2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
@on_every_shape
def test_what_is_not_finite_stays_in_its_channel(shape, layout, dtype, bad):
    clean, dy = make_input(shape, dtype, layout), make_input(shape, dtype, layout, seed=6)
    wanted = run(clean, dy)
    channel = shape[1] // 2
    x = clean.clone()
    x.select(1, channel).flatten()[-1:] = bad
    x.select(1, channel)[(-1,) * (len(shape) - 1)] = bad
    weight, bias = make_parameters(shape[1], state_dtype(dtype))
    past = [t.to(state_dtype(dtype)) for t in near_statistics(clean)]
    a = torch.tensor(0.3, dtype=state_dtype(dtype))
    y, *statistics = cpu.forward(x, weight, bias, *past, a, "averaged", EPS)
    gradient = cpu.backward(dy, x, weight, a, *(statistics[i] for i in (0, 2, 3)), "averaged", EPS, True)
    others = torch.arange(shape[1]) != channel
    for got, want in zip((y, *statistics, *gradient), wanted, strict=True):
        along = 1 if got.dim() > 1 else 0
        assert torch.equal(got.movedim(along, 0)[others], want.movedim(along, 0)[others])
    assert not torch.isfinite(statistics[1][channel])
    assert torch.isnan(y.select(1, channel)).all()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
@pytest.mark.parametrize("layout", [CONTIGUOUS, LAST], ids=layout_id)
@pytest.mark.parametrize("shape", [(2, 67, 60, 50), (3, 300, 14, 14)])
def test_any_number_of_threads_gives_the_same_bits(shape, layout, dtype, threads):
    x, dy = make_input(shape, dtype, layout), make_input(shape, dtype, layout, seed=7)
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append(run(x, dy))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=layout_id)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((6, 5), CONTIGUOUS), ((3, 9, 4, 5), CONTIGUOUS), ((3, 9, 4, 5), LAST)],
    ids=layout_id,
)
def test_the_operators_are_well_formed(shape, layout, dtype):
    x = make_input(shape, dtype, layout)
    weight, bias = make_parameters(shape[1], state_dtype(dtype))
    past = [t.to(state_dtype(dtype)) for t in near_statistics(x)]
    a = torch.tensor(0.3, dtype=state_dtype(dtype))
    operators = torch.ops.mbnorm_cpu
    opcheck(operators.forward.default, (x, weight, bias, *past, a, True, EPS))
    opcheck(operators.forward.default, (x, None, None, *past, a, False, EPS))
    for need_dx in (True, False):
        opcheck(operators.backward.default, (x, x, weight, a, *past, past[1], True, EPS, need_dx))


def test_sizes_that_do_not_fit_are_refused():
    x = make_input((3, 9), torch.float32)
    past, a = [t.float() for t in near_statistics(x)], torch.tensor(1.0)
    with pytest.raises(RuntimeError, match="parameters of 9 values"):
        cpu.forward(x, torch.ones(8), None, *past, a, "pooled", EPS)
    with pytest.raises(RuntimeError, match="shape of x"):
        cpu.backward(x[:2], x, None, a, *past, past[1], "pooled", EPS, True)


def test_statistics_of_another_precision_are_refused():
    x = make_input((3, 9), torch.float32)
    with pytest.raises(RuntimeError, match="float64 for a float64 input"):
        cpu.forward(x, None, None, *near_statistics(x), torch.tensor(1.0), "pooled", EPS)
    with pytest.raises(RuntimeError, match="expected a float32"):
        cpu.forward(x.int(), None, None, *near_statistics(x), torch.tensor(1.0), "pooled", EPS)


# ---- the memories ----


def rings(k, channels, dtype):
    memory = RecentBatches(
        torch.empty(k, channels, dtype=dtype),
        torch.empty(k, channels, dtype=dtype),
        torch.empty(k, dtype=dtype),
        torch.empty((), dtype=torch.int64),
    )
    memory.clear()
    averages = InferenceAverages(
        torch.zeros(channels, dtype=dtype),
        torch.ones(channels, dtype=dtype),
        torch.tensor(0),
        torch.tensor(0),
    )
    return memory, averages


def copy_of(state):
    return type(state)(*(t.clone() for t in state))


def statistics(channels, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(channels, generator=generator, dtype=torch.float64).to(dtype),
        torch.rand(channels, generator=generator, dtype=torch.float64).to(dtype),
    ]


def assert_close_states(*pairs):
    for got, wanted in pairs:
        for g, w in zip(got, wanted, strict=True):
            tolerance = 1e-14 if g.dtype == torch.float64 else 1e-6
            torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance)


in_both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=layout_id)


@in_both_precisions
@with_both_rules
@pytest.mark.parametrize("decay", [1.0, 0.7])
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("channels", [3, 300])
def test_ring_read_does_as_the_memory(channels, seeded, decay, variance, dtype):
    memory, _ = rings(5, channels, dtype)
    if seeded:
        memory.seed(*statistics(channels, dtype, seed=99))
    for step in range(12):
        n = 6 + step % 3
        for limit in (4, 2, 0):
            want = memory.read(n, limit, decay, variance)
            assert_close_states((cpu.ring_read(*memory, n, limit, decay, variance == "pooled"), want))
        batch = statistics(channels, dtype, step)
        memory.commit(YES, batch, batch, n)


BAD = (torch.nan, torch.inf, -torch.inf)


def commit_both(ours, theirs, batch, blended, n, update):
    """Commit by the operators to ``ours`` and by the classes to ``theirs``, (memory, averages) each."""
    before = [copy_of(state) for state in ours]
    commit(*theirs, batch, blended, n, update)
    arguments = (update.mean, update.var, update.weight, update.variance == "pooled", *ours[1])
    if isinstance(ours[0], RecentBatches):
        cpu.ring_commit(*batch, n, *blended, *ours[0], *arguments)
    else:
        cpu.average_commit(*blended, *ours[0], *arguments)
    assert_close_states(*zip(ours, theirs, strict=True))
    if ours[1].skipped != before[1].skipped:
        assert_same_bits((*ours[0], *ours[1][:3]), (*before[0], *before[1][:3]))


@in_both_precisions
@with_both_rules
@pytest.mark.parametrize("weight", [None, 1.0, 0.2])
@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("kind", ["ring", "average"])
@pytest.mark.parametrize("channels", [3, 300])
def test_commits_do_as_the_memories(channels, kind, seeded, weight, variance, dtype):
    memory, averages = rings(5, channels, dtype)
    if kind == "average":
        memory = MovingAverage(*statistics(channels, dtype, 98), torch.tensor(0))
    if seeded:
        memory.seed(*statistics(channels, dtype, seed=99))
    ours = copy_of(memory), copy_of(averages)
    for step in range(14):
        batch, blended, new = (statistics(channels, dtype, 10 * step + i) for i in range(3))
        if step % 2 == 0 and step < 12:
            spoilt = blended if step < 6 else new
            spoilt[step // 2 % 2][-1 - step // 4] = BAD[step // 2 % 3]
        update = InferenceUpdate(*new, weight, variance)
        commit_both(ours, (memory, averages), batch, blended, 6 + step % 3, update)
    assert (int(ours[1].batches), int(ours[1].skipped)) == (8, 6)


def test_statistics_of_another_precision_are_stored_in_the_states():
    memory, averages = rings(2, 3, torch.float32)
    batch = statistics(3, torch.float64, 0)
    cpu.ring_commit(*batch, 4, *batch, *memory, *batch, 1.0, False, *averages)
    assert_same_bits((memory.mean[0], averages.var), (batch[0].float(), batch[1].float()))
    huge = [torch.full((3,), 1e300, dtype=torch.float64)] * 2
    cpu.ring_commit(*batch, 4, *huge, *memory, *batch, 1.0, False, *averages)
    assert (int(memory.position), int(averages.skipped)) == (1, 1)


def test_states_that_do_not_fit_are_refused():
    memory, averages = rings(2, 3, torch.float32)
    batch = statistics(3, torch.float32, 0)
    with pytest.raises(RuntimeError, match="one dtype"):
        cpu.ring_read(memory.mean.double(), *memory[1:], 4, 1, 1.0, True)
    with pytest.raises(RuntimeError, match="int64 counters"):
        cpu.ring_commit(*batch, 4, *batch, *memory, *batch, 1.0, False, *averages[:3], averages.mean)
    with pytest.raises(RuntimeError, match="of 3 channels"):
        cpu.ring_commit(*batch, 4, *batch, *memory, batch[0][:2], batch[1], 1.0, False, *averages)


@in_both_precisions
def test_the_memory_operators_are_well_formed(dtype):
    memory, averages = rings(4, 9, dtype)
    batch, new = statistics(9, dtype, 0), statistics(9, dtype, 1)
    moving = (*statistics(9, dtype, 2), torch.tensor(0))
    operators = torch.ops.mbnorm_cpu
    opcheck(operators.ring_read.default, (*memory, 5, 3, 0.9, True))
    opcheck(operators.ring_commit.default, (*batch, 5, *batch, *memory, *new, None, True, *averages))
    opcheck(operators.average_commit.default, (*batch, *moving, *new, 0.1, True, *averages))


# ---- compiling ----


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


def test_importing_compiles_nothing(folder):
    program = "import sys; import mbnorm.backends.cpu; sys.exit('mbnorm.backends.build' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert not folder.exists()
