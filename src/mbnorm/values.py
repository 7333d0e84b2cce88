"""Questions about the values of tensors, for those that may have none."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_values(tensor: Tensor) -> bool:
    """Return whether a tensor can be asked for its values: meta and fake tensors have none.

    Nor have any while a fake mode runs, for what is computed from them is fake.
    """
    fake_mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return fake_mode is None and not (tensor.is_meta or isinstance(tensor, FakeTensor))


def known_finite(*tensors: Tensor) -> bool:
    """Return whether no value is NaN or infinite, as far as can be seen."""
    return all(not has_values(t) or bool(torch.isfinite(t).all()) for t in tensors)


def is_trained(running_mean: Tensor, running_var: Tensor) -> bool:
    """Return whether running statistics are those of data: any differs from the initial 0 and 1.

    Counters do not decide it: many checkpoints carry none, or a wrong one.
    """
    if not (has_values(running_mean) and has_values(running_var)):
        return False
    return bool((running_mean != 0).any()) or bool((running_var != 1).any())
