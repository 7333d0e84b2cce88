"""Whether an optimizer step that has just ended changed anything."""

import torch


def was_skipped(optimizer: torch.optim.Optimizer, scaler: "torch.amp.GradScaler | None") -> bool:
    """Return, in a step hook, whether GradScaler left the parameters as they were."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        # of these GradScaler leaves out the whole step, and with it the hook
        return False
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is None and scaler is not None and scaler.is_enabled():
        found_inf = sum(scaler._found_inf_per_device(optimizer).values())
    return found_inf is not None and bool(found_inf)
