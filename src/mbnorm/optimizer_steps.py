"""Whether an optimizer tells of its steps, and whether one that has just ended changed anything."""

import torch


def check_hooks(optimizer: torch.optim.Optimizer) -> None:
    """Refuse what has no step hooks, or inherits those that it never runs.

    Raises:
        TypeError: ``optimizer`` is such.
    """
    if not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise TypeError(
            f"expected a torch optimizer with step hooks, got {type(optimizer).__name__}: give the one "
            "inside, as optimizer.optimizer for Accelerate's, or step by hand"
        )


def was_skipped(optimizer: torch.optim.Optimizer, scaler: "torch.amp.GradScaler | None") -> bool:
    """Return, in a step hook, whether GradScaler left the parameters as they were."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        # of these GradScaler leaves out the whole step, and with it the hook
        return False
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is None and scaler is not None and scaler.is_enabled():
        found_inf = sum(scaler._found_inf_per_device(optimizer).values())
    return found_inf is not None and bool(found_inf)
