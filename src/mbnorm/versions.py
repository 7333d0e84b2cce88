"""What `mbnorm --version` prints."""

import platform

import torch

import mbnorm
from mbnorm import trial
from mbnorm.backends import cpu


def describe() -> str:
    """Return a line for each version and each backend, with the reason where one cannot be used here.

    To know it of the backend "cpu" is to build it, and of "triton" to try it on the current device, which
    takes some seconds, once.
    """
    backends = {"cpu": cpu.missing(), "aten": None, "triton": _triton_missing()}
    return "\n".join(
        [
            f"mbnorm {mbnorm.__version__}",
            f"torch {torch.__version__}",
            f"python {platform.python_version()}",
            *(f"backend {name}: {_verdict(reason)}" for name, reason in backends.items()),
        ]
    )


def _verdict(reason: str | None) -> str:
    return "available" if reason is None else f"not available, {reason}"


def _triton_missing() -> str | None:
    # whether there is a device is asked first: triton itself imports without one
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device"
    return trial.failure_on(torch.device("cuda", torch.cuda.current_device()))
