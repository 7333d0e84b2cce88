"""The operator: batch normalization with a blend of the batch's own statistics and past ones."""

from collections.abc import Callable, Iterable
from functools import partial
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeAlias, cast, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from mbnorm.backends import aten, cpu, traceable, triton
from mbnorm.blend import VARIANCES, Variance, statistics_dtype
from mbnorm.trial import triton_works_for

Backend: TypeAlias = Literal["auto", "traceable", "aten", "cpu", "triton"]
Chosen: TypeAlias = Literal["traceable", "aten", "cpu", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

cpu.differentiable_gradients = traceable.differentiable_gradients


class BlendedBatchNorm(NamedTuple):
    """What `blended_batch_norm` returns: the output, and statistics detached from the graph."""

    y: Tensor
    batch_mean: Tensor
    batch_var: Tensor
    mean: Tensor
    var: Tensor


def backend_for(x: Tensor) -> Chosen:
    """Return the name of the backend that ``backend="auto"`` runs for ``x``, here and now.

    On the CPU it is "cpu", the kernels of this package, which the first call compiles in some seconds,
    or "aten" where there is no C++ compiler. On CUDA and ROCm it is "triton", whose kernels the first call
    compiles and tries on that device in some seconds, or "aten" where they fail or cannot be tried.
    Under torch.compile, function transforms and forward-mode differentiation it is "traceable".

    >>> backend_for(torch.empty(2, 3, device="meta"))
    'traceable'
    """
    if (
        torch.compiler.is_compiling()
        or x.device.type not in aten.DEVICES
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return "traceable"
    if x.device.type in cpu.DEVICES and x.dtype in cpu.DTYPES and cpu.missing() is None:
        return "cpu"
    if x.device.type in triton.DEVICES and x.dtype in triton.DTYPES and triton_works_for(x):
        return "triton"
    return "aten"


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
    variance: Variance,
    eps: float,
    backend: Backend = "auto",
) -> BlendedBatchNorm:
    r"""Normalize ``x`` with its batch statistics blended with past ones.

    .. math::
        \mathrm{mean} = a\,m_B + (1-a)\,M, \qquad
        \mathrm{var} = a\,v_B + (1-a)\,V \;[\,+\; a(1-a)(m_B-M)^2\,], \qquad
        y = w\,\frac{x-\mathrm{mean}}{\sqrt{\mathrm{var}+\epsilon}} + b

    The bracket belongs to ``variance="pooled"``. Gradients flow through :math:`m_B` and :math:`v_B`;
    :math:`M`, :math:`V` and :math:`a` are constants. With :math:`a=1` this is batch normalization.

    Args:
        x: input of shape (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W), any floating dtype. An
            empty ``x`` gives an empty ``y`` and NaN statistics.
        weight: scale :math:`w`, shape (C,), or None for ones.
        bias: shift :math:`b`, shape (C,), or None for zeros.
        past_mean: past mean :math:`M`, shape (C,).
        past_var: past biased variance :math:`V`, shape (C,).
        batch_weight: weight :math:`a` of the batch in (0, 1], a number or a 0-dim tensor.
        variance: "averaged" (Yong et al., ECCV 2020) or "pooled" (law of total variance).
        eps: added to the variance.
        backend: "auto", or one of "traceable", "aten", "cpu", "triton", which then never falls back.

    Returns:
        ``(y, batch_mean, batch_var, mean, var)``: ``y`` like ``x``, the others of shape (C,) in
        float32 (float64 for a float64 ``x``); both variances are biased.

    Raises:
        ValueError: a shape, ``variance`` or ``backend`` is not one of the above, or the backend cannot
            take ``x``.
        RuntimeError: the backend "cpu" cannot be built, or the package triton is not installed.
        TypeError: ``x`` is not floating point.

    Example:
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> y, *_, mean, var = blended_batch_norm(
        ...     x, None, None, torch.tensor([3.0]), torch.tensor([1.0]), 0.5, variance="pooled", eps=0.0)
        >>> mean, var
        (tensor([2.]), tensor([2.]))
    """
    _check(x, weight, bias, past_mean, past_var, variance, backend)
    dtype = statistics_dtype(x.dtype)
    if not isinstance(batch_weight, Tensor):
        # a fill: a copy from the host would wait for the device
        batch_weight = torch.full((), batch_weight, device=x.device, dtype=dtype)
    weight, bias = in_dtype(weight, dtype), in_dtype(bias, dtype)
    past_mean, past_var = _constant(past_mean, dtype), _constant(past_var, dtype)
    if x.numel() == 0:
        y = F.batch_norm(x, past_mean, past_var, weight, bias, False, 0.0, eps)
        return BlendedBatchNorm(y, *torch.full((4, x.shape[1]), torch.nan, dtype=dtype, device=x.device))
    arguments = (
        x,
        weight,
        bias,
        past_mean,
        past_var,
        _constant(batch_weight, dtype),
        variance,
        eps,
    )
    match choose(x, backend):
        case "aten":
            return _by_kernels(aten, *arguments)
        case "cpu":
            return _by_kernels(cpu, *arguments)
        case "triton":
            return _by_kernels(triton, *arguments)
        case "traceable":
            y, *statistics = traceable.blended_batch_norm(*arguments)
            return BlendedBatchNorm(y, *(s.detach() for s in statistics))


def _by_kernels(
    kernels: ModuleType,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    past_mean: Tensor,
    past_var: Tensor,
    batch_weight: Tensor,
    variance: Variance,
    eps: float,
) -> BlendedBatchNorm:
    forward = KernelForward(kernels, variance, eps)
    forward.past, forward.batch_weight = (past_mean, past_var), batch_weight
    y = normalize_by_kernels(forward, x, weight, bias)
    return BlendedBatchNorm(y, *forward.statistics)


class KernelForward:
    """The operator run once by a backend's kernels, and what it leaves behind for the backward.

    ``past`` has the mean and the variance to blend with, ``batch_weight`` what the batch weighs;
    ``statistics`` will have the batch's and the blended ones.
    """

    __slots__ = ("batch_weight", "eps", "kernels", "past", "statistics", "variance")
    past: tuple[Tensor, Tensor]
    batch_weight: Tensor | None
    statistics: Tensor | tuple[Tensor, ...]

    def __init__(self, kernels: ModuleType, variance: Variance, eps: float) -> None:
        self.kernels = kernels
        self.variance = variance
        self.eps = eps

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the past mean and variance and the weight of the batch."""
        return *self.past, cast(Tensor, self.batch_weight)

    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return ``y``, and set the statistics."""
        y: Tensor
        y, self.statistics = self.kernels.forward(
            x, weight, bias, *self.past, self.batch_weight, self.variance, self.eps
        )
        return y


class RecordedForward(KernelForward):
    """A forward by an operator that reads a memory, normalizes and stores, and returns a record of it.

    See `mbnorm.backends.cpu.forward_with_average`; ``arguments`` follow the input, weight and bias.
    """

    __slots__ = ("arguments", "operator")
    statistics: Tensor

    def __init__(
        self,
        kernels: ModuleType,
        variance: Variance,
        eps: float,
        operator: Callable[..., tuple[Tensor, Tensor]],
        arguments: tuple[Any, ...],
    ) -> None:
        super().__init__(kernels, variance, eps)
        self.operator = operator
        self.arguments = arguments
        # the record has it
        self.batch_weight = None

    def run(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Return ``y``, and set the record."""
        y, self.statistics = self.operator(x, weight, bias, *self.arguments)
        return y

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the past mean and variance and the weight of the batch."""
        mean, var, weight = self.statistics[4:].unbind()
        return mean, var, weight[0]


def normalize_by_kernels(
    forward: KernelForward, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Run ``forward``, differentiably where gradients are wanted; parameters in the dtype of statistics."""
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    )
    run: Any = partial(_KernelBatchNorm.apply, forward) if differentiable else forward.run
    y: Tensor = run(x, weight, bias)
    return y


class _KernelBatchNorm(torch.autograd.Function):
    """A backend's forward and backward kernels as one differentiable step that saves ``x`` alone."""

    @staticmethod
    def forward(
        ctx: Any, forward: KernelForward, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.of = forward
        ctx.on_backward = None
        return forward.run(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.on_backward is not None:
            ctx.on_backward()
        of: KernelForward = ctx.of
        x, weight, bias = ctx.saved_tensors
        _, *needs = ctx.needs_input_grad
        gradients: Iterable[Tensor | None]
        if torch.is_grad_enabled():
            # create_graph: the gradient must be differentiable itself
            found = iter(
                traceable.differentiable_gradients(
                    dy, x, weight, bias, *of.read(), of.variance, of.eps, needs
                )
            )
            gradients = [next(found) if need else None for need in needs]
        else:
            gradients = of.kernels.backward(
                dy, x, weight, of.batch_weight, of.statistics, of.variance, of.eps, needs[0]
            )
        dx, dw, db = gradients
        return None, dx, dw if needs[1] else None, db if needs[2] else None


def in_dtype(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a parameter in the dtype of statistics, itself if it has it."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _constant(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach() if tensor.requires_grad else tensor
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    past_mean: Tensor,
    past_var: Tensor,
    variance: str,
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
    if variance not in VARIANCES:
        raise ValueError(f"variance must be one of {VARIANCES}, got {variance!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
