"""What torch.compile needs while it traces our layers; imported only then, since it imports the compiler."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from mbnorm.functional import differentiated_in_other_ways
from mbnorm.recompute import SAVES_WHAT_WAS_READ, callers, in_torch_checkpoint

Result = TypeVar("Result")


@torch.compiler.disable(reason="mbnorm does this in eager mode")  # type: ignore[untyped-decorator, no-untyped-call]
def in_eager_mode(function: Callable[..., Result], *args: Any) -> Result:
    """Call ``function`` without tracing it; fullgraph=True refuses that."""
    return function(*args)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def exports() -> bool:
    """Return whether what traces is torch.export; to traced code torch 2.10 and 2.11 always say yes."""
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def traces_derivatives() -> bool:
    """Return whether what is traced is inside a function transform or forward-mode differentiation."""
    return differentiated_in_other_ways()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def unsafe_to_compile() -> str | None:
    """Return, while torch.compile traces, why its backward would not read what the forward had read."""
    if _in_compiled_checkpoint_without_ours():
        return "pass context_fn=mbnorm.checkpoint_context_fn(model) to checkpoint"
    if in_torch_checkpoint(("checkpoint", "forward", "backward", "unpack_hook")):
        return "compile the function that calls checkpoint, not the one that checkpoint calls"
    from torch._functorch import config

    if config.aggressive_recomputation or config.activation_memory_budget < 1:
        return "set neither aggressive_recomputation nor activation_memory_budget of torch._functorch.config"
    return None


def _in_compiled_checkpoint_without_ours() -> bool:
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        tracer: Any = InstructionTranslator.current_tx().output.current_tracer
    except (ImportError, AttributeError):
        return False
    while tracer is not None and "checkpoint" not in str(getattr(tracer, "source_target", "")):
        tracer = tracer.parent
    if tracer is None:
        return False
    # the tracing of the block is called from where torch.compile holds the context function
    return not any(
        hasattr(frame.f_locals.get("context_fn"), SAVES_WHAT_WAS_READ)
        for frame in callers()
        if frame.f_code.co_name == "_call_function"
    )
