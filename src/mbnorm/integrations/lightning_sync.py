"""Lightning: ``sync_batchnorm=True`` for layers with a memory."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mbnorm.distributed import Sync
from mbnorm.layers import HistoryBatchNorm

try:
    from lightning.pytorch.plugins import TorchSyncBatchNorm
except ImportError as error:
    raise ImportError("mbnorm.integrations.lightning_sync needs Lightning: pip install lightning") from error


class MemorySyncBatchNorm(TorchSyncBatchNorm):
    """Let our layers share their memories with all ranks while a `lightning.Trainer` fits.

    ``Trainer(sync_batchnorm=True, plugins=[MemorySyncBatchNorm()])``, where Lightning alone would replace
    them. Layers that have a ``process_group`` keep it, and other batch norms become
    `torch.nn.SyncBatchNorm`, as without the plugin.

    Args:
        sync: as in `mbnorm.MatchedBatchNorm2d`. "late" takes layers with gradient="exact" alone, as
            ``mbnorm.convert(model, gradient="exact")`` makes them.
    """

    def __init__(self, sync: Sync = True) -> None:
        self.sync: Sync = sync
        self._shared: list[HistoryBatchNorm] = []

    def apply(self, model: nn.Module) -> nn.Module:
        """Give the layers in ``model`` the world as process group."""
        if isinstance(model, HistoryBatchNorm):
            if model.has_memory and model.process_group is None:
                model.share_with("world", self.sync)
                self._shared.append(model)
        elif isinstance(model, _BatchNorm):
            return super().apply(model)
        else:
            for name, child in model.named_children():
                model.add_module(name, self.apply(child))
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Take the process group away again."""
        if model in self._shared:
            self._shared.remove(model)
            model.share_with(None)
        return super().revert(model)
