"""Switches on what the layers of a model store."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mbnorm.layers.layer import HistoryBatchNorm


def memorizing_layers(model: nn.Module) -> list[HistoryBatchNorm]:
    """Return the layers of ``model`` that have a memory, each once."""
    return [m for m in model.modules() if isinstance(m, HistoryBatchNorm) and m.has_memory]


def why_none(model: nn.Module, method: str) -> str:
    """Return why a model that should have layers with a memory may have none, and what helps."""
    if any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        return (
            "its norms are SyncBatchNorm; torch.nn.SyncBatchNorm.convert_sync_batchnorm and Lightning's "
            "sync_batchnorm=True replace every batch norm, ours too: leave them out"
        )
    return f'mbnorm.convert(model, "{method}") makes them of its batch norms'


@contextmanager
def no_update(model: nn.Module) -> Iterator[None]:
    """Let forwards inside use the memories of ``model``'s layers and store nothing; may be nested.

    Args:
        model: contains the layers.

    >>> import torch
    >>> from mbnorm import MemorizedBatchNorm1d
    >>> layer = MemorizedBatchNorm1d(4)
    >>> with no_update(layer):
    ...     _ = layer(torch.randn(2, 4))
    >>> layer.num_batches_tracked
    tensor(0)
    """
    layers = memorizing_layers(model)
    for layer in layers:
        layer._frozen += 1
    try:
        yield
    finally:
        for layer in layers:
            # a layer may have been reverted meanwhile
            if isinstance(layer, HistoryBatchNorm):
                layer._frozen -= 1
