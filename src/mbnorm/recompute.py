"""Tells a forward from its repetition by activation checkpointing."""

import torch


def in_recompute() -> bool:
    """Return whether this call repeats an earlier forward from inside a backward pass.

    torch has no public test; this is the one its own module tracker uses. Compiled code never repeats
    a forward with side effects, so there the answer is no.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1
