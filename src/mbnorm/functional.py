"""The operator: batch normalization with a blend of the batch's own statistics and past ones."""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from mbnorm.backends import aten, cpu, traceable, triton
from mbnorm.blend import VARIANCE_RULES, VarianceRule, statistics_dtype
from mbnorm.gradient import RememberedGradient, stacked, write
from mbnorm.trial import triton_works_for

Backend: TypeAlias = Literal["auto", "traceable", "aten", "cpu", "triton"]
Chosen: TypeAlias = Literal["traceable", "aten", "cpu", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
KERNELS: dict[str, ModuleType] = {"aten": aten, "cpu": cpu, "triton": triton, "traceable": traceable}
"""The backends by name; the last needs its backward only where a gradient is remembered."""

SLOWER_WITH_ATEN = 2
"""How many times as long as torch's own a layer takes with ATen's kernels on the CPU, roughly."""


class BlendedBatchNorm(NamedTuple):
    """What `blended_batch_norm` returns: the output, and statistics detached from the graph."""

    y: Tensor
    batch_mean: Tensor
    batch_var: Tensor
    mean: Tensor
    var: Tensor


Rows: TypeAlias = Tensor | tuple[Tensor, ...]
"""A `Record` as backends return it: one tensor of shape (7, C), or seven."""


class Record(NamedTuple):
    """What a forward leaves behind: ``Record(*rows)``, shape (C,) each.

    The batch's statistics, those that normalized it, and what it was blended with; the weight of the batch is
    0-dim, or the same in all C places.
    """

    batch_mean: Tensor
    batch_var: Tensor
    mean: Tensor
    var: Tensor
    past_mean: Tensor
    past_var: Tensor
    batch_weight: Tensor

    @property
    def one_weight(self) -> Tensor:
        """The weight of the batch, 0-dim."""
        return self.batch_weight if self.batch_weight.dim() == 0 else self.batch_weight[0]


def transforms_run() -> bool:
    """Return whether this call comes from inside a function transform, as `torch.func.vmap`."""
    return bool(torch._C._are_functorch_transforms_active())


def differentiated_in_other_ways() -> bool:
    """Return whether a function transform or forward-mode differentiation runs."""
    return transforms_run() or forward_ad._current_level >= 0


def backend_for(x: Tensor) -> Chosen:
    """Return the name of the backend that ``backend="auto"`` runs for ``x``, here and now.

    On the CPU it is "cpu", the kernels of this package, which the first call compiles in some seconds if the
    wheel has none inside, or, with a warning, "aten" where there is no C++ compiler. On CUDA and ROCm it is
    "triton", whose kernels the first call compiles and tries on that device in some seconds, or "aten" where
    they fail or cannot be tried. Under torch.compile, function transforms and forward-mode differentiation
    it is "traceable".

    >>> backend_for(torch.empty(2, 3, device="meta"))
    'traceable'
    """
    if torch.compiler.is_compiling() or x.device.type not in aten.DEVICES or differentiated_in_other_ways():
        return "traceable"
    if x.device.type in cpu.DEVICES and x.dtype in cpu.DTYPES:
        reason = cpu.missing()
        if reason is None:
            return "cpu"
        _warn_of_slow_kernels(reason)
    if x.device.type in triton.DEVICES and x.dtype in triton.DTYPES and triton_works_for(x):
        return "triton"
    return "aten"


@cache
def _warn_of_slow_kernels(reason: str) -> None:
    warnings.warn(
        "mbnorm has no CPU kernels of its own here and runs on torch's, with which a layer takes about "
        f"{SLOWER_WITH_ATEN} times as long as torch.nn.BatchNorm2d: {reason}",
        stacklevel=2,
    )


def choose(x: Tensor, backend: Backend) -> Chosen:
    """Return the backend that runs for ``x``: the one asked for, or what "auto" means.

    Raises:
        ValueError: the backend asked for cannot take ``x``.
        RuntimeError: the backend "cpu" cannot be built, or the package triton is not installed.
    """
    if backend == "auto":
        return backend_for(x)
    if backend == "aten" and x.device.type not in aten.DEVICES:
        raise ValueError(f"backend 'aten' runs on {' and '.join(aten.DEVICES)}, got {x.device}")
    if backend == "cpu":
        if x.device.type not in cpu.DEVICES or x.dtype not in cpu.DTYPES:
            raise ValueError(
                f"backend 'cpu' takes {', '.join(map(str, cpu.DTYPES))} on the CPU, "
                f"got {x.dtype} on {x.device}"
            )
        if reason := cpu.missing():
            raise RuntimeError(f"backend 'cpu' cannot be used: {reason}")
    if backend == "triton":
        if x.device.type not in triton.DEVICES or x.dtype not in triton.DTYPES:
            raise ValueError(
                f"backend 'triton' takes {', '.join(map(str, triton.DTYPES))} on CUDA and ROCm, "
                f"got {x.dtype} on {x.device}"
            )
        if reason := triton.missing():
            raise RuntimeError(f"backend 'triton' cannot be used: {reason}")
    return backend


def blended_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    past_mean: Tensor,
    past_var: Tensor,
    batch_weight: Tensor | float,
    *,
    variance_rule: VarianceRule,
    eps: float,
    backend: Backend = "auto",
) -> BlendedBatchNorm:
    r"""Normalize ``x`` with its batch statistics blended with past ones.

    .. math::
        \mathrm{mean} = a\,m_B + (1-a)\,M, \qquad
        \mathrm{var} = a\,v_B + (1-a)\,V \;[\,+\; a(1-a)(m_B-M)^2\,], \qquad
        y = w\,\frac{x-\mathrm{mean}}{\sqrt{\mathrm{var}+\epsilon}} + b

    The bracket belongs to ``variance_rule="pooled"``. Gradients flow through :math:`m_B` and :math:`v_B`;
    :math:`M`, :math:`V` and :math:`a` are constants. With :math:`a=1` this is batch normalization.

    Args:
        x: input of shape (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W), any floating dtype. An
            empty ``x`` gives an empty ``y`` and NaN statistics.
        weight: scale :math:`w`, shape (C,), or None for ones.
        bias: shift :math:`b`, shape (C,), or None for zeros.
        past_mean: past mean :math:`M`, shape (C,).
        past_var: past biased variance :math:`V`, shape (C,).
        batch_weight: weight :math:`a` of the batch in (0, 1], a number or a 0-dim tensor.
        variance_rule: "averaged" (Yong et al., ECCV 2020), "pooled" (law of total variance), or "uncentered":
            as "averaged", with :math:`m_B = 0` and :math:`v_B = \mathrm{E}[x^2]`.
        eps: added to the variance.
        backend: "auto", or one of "traceable", "aten", "cpu", "triton", which then never falls back.

    Returns:
        ``(y, batch_mean, batch_var, mean, var)``: ``y`` like ``x``, the others of shape (C,) in
        float32 (float64 for a float64 ``x``); both variances are biased.

    Raises:
        ValueError: a shape, ``variance_rule`` or ``backend`` is not one of the above, or the backend cannot
            take ``x``.
        RuntimeError: the backend "cpu" cannot be built, or the package triton is not installed.
        TypeError: ``x`` is not floating point.

    Example:
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> y, *_, mean, var = blended_batch_norm(
        ...     x, None, None, torch.tensor([3.0]), torch.tensor([1.0]), 0.5, variance_rule="pooled", eps=0.0)
        >>> mean, var
        (tensor([2.]), tensor([2.]))
    """
    _check(x, weight, bias, past_mean, past_var, variance_rule, backend)
    past = past_mean, past_var, batch_weight
    y, rows = normalize(x, weight, bias, *past, variance_rule, eps, choose(x, backend))
    return BlendedBatchNorm(y, *Record(*rows)[:4])


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    past_mean: Tensor,
    past_var: Tensor,
    batch_weight: Tensor | float,
    variance_rule: VarianceRule,
    eps: float,
    backend: Chosen,
    gradient: RememberedGradient | None = None,
) -> tuple[Tensor, Rows]:
    """Do as `blended_batch_norm` with arguments that are known to be right; return ``y`` and a record.

    Without ``gradient`` the gradient is the exact one.
    """
    dtype = statistics_dtype(x.dtype)
    weight, bias = in_dtype(weight, dtype), in_dtype(bias, dtype)
    past = _constants(x, past_mean, past_var, batch_weight)
    if torch.compiler.is_compiling():
        past = traceable.saved(*past)
    if x.numel() == 0:
        y = F.batch_norm(x, *past[:2], weight, bias, False, 0.0, eps)
        return y, (*torch.full((4, x.shape[1]), torch.nan, dtype=dtype, device=x.device), *past)
    if backend == "traceable" and gradient is None:
        return traceable.forward(x, weight, bias, *past, variance_rule, eps)
    run = KernelRun(KERNELS[backend], *past, variance_rule, eps, gradient)
    return run_differentiably(run, x, weight, bias), run.rows


def compiled_record(
    x: Tensor, past_mean: Tensor, past_var: Tensor, batch_weight: Tensor | float, variance_rule: VarianceRule
) -> Record:
    """Return the record of a forward that `normalize_compiled` has still to do."""
    return Record(*traceable.statistics(x, *_constants(x, past_mean, past_var, batch_weight), variance_rule))


def normalize_compiled(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    record: Record,
    variance_rule: VarianceRule,
    eps: float,
    gradient: RememberedGradient,
) -> Tensor:
    """Return what `normalize` does, as torch.compile can trace it."""
    dtype = statistics_dtype(x.dtype)
    parameters = in_dtype(weight, dtype), in_dtype(bias, dtype)
    mean, var, batch_weight = traceable.saved(record.mean, record.var, record.batch_weight)
    record = record._replace(mean=mean, var=var, batch_weight=batch_weight)
    how = *gradient.buffers, gradient.stores, variance_rule, eps
    y: Tensor = _CompiledNormalization.apply(x, *parameters, *record, *how)  # type: ignore[no-untyped-call]
    return y


class Run(Protocol):
    """The operator run once, forward and backward: what the one node of autograd is made of."""

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return ``y``."""
        ...

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Return the gradients of ``x``, ``weight`` and ``bias``, as far as they are needed."""
        ...


class KernelRun:
    """The operator run once by a backend's kernels, and what it leaves behind: ``rows``, after `forward`."""

    __slots__ = ("_past", "eps", "gradient", "kernels", "rows", "variance_rule")
    rows: Rows

    def __init__(
        self,
        kernels: ModuleType,
        past_mean: Tensor,
        past_var: Tensor,
        batch_weight: Tensor,
        variance_rule: VarianceRule,
        eps: float,
        gradient: RememberedGradient | None = None,
    ) -> None:
        self.kernels = kernels
        self._past = past_mean, past_var, batch_weight
        self.variance_rule = variance_rule
        self.eps = eps
        self.gradient = gradient

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return ``y``, and set the rows."""
        y: Tensor
        y, self.rows = self.kernels.forward(x, weight, bias, *self._past, self.variance_rule, self.eps)
        return y

    def backward(
        self, dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """Return the gradients of ``x``, ``weight`` and ``bias``, as far as they are needed."""
        if not torch.is_grad_enabled():
            rules = self.variance_rule, self.eps
            # what differentiates many gradients at once, or a gradient, has no state
            batched = torch._C._functorch.is_legacy_batchedtensor(dy) or differentiated_in_other_ways()
            gradient = None if batched else self.gradient
            if gradient is None:
                found: tuple[Tensor | None, ...] = self.kernels.backward(
                    dy, x, weight, self.rows, *rules, needs[0]
                )
                return found
            if self._reads_in_kernels(gradient):
                how = *rules, needs[0], gradient.stores
                *found, past = self.kernels.remembering_backward(
                    dy, x, weight, self.rows, gradient.buffers, *how
                )
                gradient.was_read(past)
                return found
            read = gradient.read(self.rows[-1])
            dx, dw, db = self.kernels.backward(dy, x, weight, self.rows, *rules, needs[0], read)
            gradient.commit((db, dw), x.numel() // x.shape[1], Record(*self.rows)[:4])
            return dx, dw, db
        # create_graph: the gradient must be differentiable itself, so it is exact, and so are later ones
        self.gradient = None
        record = Record(*self.rows)
        past = record.past_mean, record.past_var, record.one_weight
        wanted = iter(
            traceable.differentiable_gradients(
                dy, x, weight, bias, *past, self.variance_rule, self.eps, needs
            )
        )
        return [next(wanted) if need else None for need in needs]

    def _reads_in_kernels(self, gradient: RememberedGradient) -> bool:
        rows = self.rows if isinstance(self.rows, Tensor) else self.rows[0]
        mean, scale = gradient.buffers
        return (
            gradient.is_unread
            and hasattr(self.kernels, "remembering_backward")
            and mean.dtype == scale.dtype == rows.dtype
            and mean.is_contiguous()
            and scale.is_contiguous()
        )


class FusedRun(KernelRun):
    """A run of an operator that reads a memory, normalizes and stores.

    See `mbnorm.backends.cpu.forward_with_average`; ``arguments`` follow the input, weight and bias.
    """

    __slots__ = ("arguments", "operator")

    def __init__(
        self,
        kernels: ModuleType,
        operator: Callable[..., tuple[Tensor, Rows]],
        arguments: tuple[Any, ...],
        variance_rule: VarianceRule,
        eps: float,
        gradient: RememberedGradient | None = None,
    ) -> None:
        self.kernels = kernels
        self.operator = operator
        self.arguments = arguments
        self.variance_rule = variance_rule
        self.eps = eps
        self.gradient = gradient

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return ``y``, and set the rows."""
        y, self.rows = self.operator(x, weight, bias, *self.arguments)
        return y


def run_differentiably(run: Run, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return what ``run`` gives, with a node of autograd where gradients are wanted.

    The parameters are in the dtype of statistics.
    """
    differentiable = torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    )
    if not differentiable:
        return run.forward(x, weight, bias)
    y: Tensor = _BlendedBatchNorm.apply(run, x, weight, bias)  # type: ignore[no-untyped-call]
    return y


class _BlendedBatchNorm(torch.autograd.Function):
    """A run as one differentiable step that saves ``x`` alone."""

    @staticmethod
    def forward(ctx: Any, run: Run, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if any(t is not None and t.is_inference() for t in (x, weight, bias)):
            # torch would refuse it after the run, which may have stored the forward
            raise RuntimeError("Inference tensors cannot be saved for backward: give the layer a clone of it")
        ctx.save_for_backward(x, weight, bias)
        ctx.run = run
        ctx.on_backward = None
        return run.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.on_backward is not None:
            ctx.on_backward()
        _, *needs = ctx.needs_input_grad
        dx, dw, db = ctx.run.backward(dy, *ctx.saved_tensors, needs)
        return None, dx, dw if needs[1] else None, db if needs[2] else None


class _CompiledNormalization(torch.autograd.Function):
    """The second half of a forward with a remembered gradient, as torch.compile can trace it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *others: Any,
    ) -> Tensor:
        *rows, gradient_mean, gradient_scale, stores, variance_rule, eps = others
        ctx.save_for_backward(x, weight, *rows)
        # saved tensors must not change, and these do
        ctx.gradient = gradient_mean, gradient_scale
        ctx.rules = stores, variance_rule, eps
        record = Record(*rows)
        # torch 2.11 hands no gradient to an output that is an intermediate result as well
        return traceable.normalized(x, weight, bias, record.mean, record.var, eps).clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *rows = ctx.saved_tensors
        stores, variance_rule, eps = ctx.rules
        mean, scale = ctx.gradient
        read = stacked(mean, scale, rows[-1])
        dx, dw, db = traceable.backward(
            dy, x, weight, tuple(rows), variance_rule, eps, ctx.needs_input_grad[0], read
        )
        if stores:
            write(mean, scale, read, (db, dw), x.numel() // x.shape[1], rows[:4])
        _, needs_weight, needs_bias, *others = ctx.needs_input_grad
        return dx, dw if needs_weight else None, db if needs_bias else None, *([None] * len(others))


def in_dtype(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a parameter in the dtype of statistics, itself if it has it."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _constants(
    x: Tensor, past_mean: Tensor, past_var: Tensor, batch_weight: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return past statistics and the batch's weight as no graph knows them, in the dtype of statistics."""
    dtype = statistics_dtype(x.dtype)
    if not isinstance(batch_weight, Tensor):
        # a fill: a copy from the host would wait for the device
        batch_weight = torch.full((), batch_weight, device=x.device, dtype=dtype)
    return _constant(past_mean, dtype), _constant(past_var, dtype), _constant(batch_weight, dtype)


def _constant(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach() if tensor.requires_grad else tensor
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    past_mean: Tensor,
    past_var: Tensor,
    variance_rule: str,
    backend: str,
) -> None:
    if not 2 <= x.dim() <= 5:
        raise ValueError(f"expected an input of 2 to 5 dimensions, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"expected a floating point input, got {x.dtype}")
    channels = x.shape[1:2]
    for name, tensor in (
        ("weight", weight),
        ("bias", bias),
        ("past_mean", past_mean),
        ("past_var", past_var),
    ):
        if tensor is not None and tensor.shape != channels:
            raise ValueError(
                f"expected {name} of shape {tuple(channels)} for an input of shape {tuple(x.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
    if variance_rule not in VARIANCE_RULES:
        raise ValueError(f"variance_rule must be one of {VARIANCE_RULES}, got {variance_rule!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
