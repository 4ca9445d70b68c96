"""What tells training from eval mode in a graph: normalizations whose statistics are frozen, and constants by mode."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class ByMode(nn.Module):
    """Gives one of two constants, which the user's forward chose by `self.training`."""

    def __init__(self, in_training: Any, in_eval: Any) -> None:
        super().__init__()
        self.in_training, self.in_eval = in_training, in_eval

    def forward(self) -> Any:
        """Return the constant of the mode."""
        return self.in_training if self.training else self.in_eval

    def extra_repr(self) -> str:
        """Return what print shows."""
        return f"in training {self.in_training!r}, else {self.in_eval!r}"


class FrozenNorm(_BatchNorm):
    """A batch normalization that stays in eval mode: its statistics rest, and it uses them in training too."""

    def train(self, mode: bool = True) -> FrozenNorm:  # noqa: ARG002
        """Return itself, in eval mode."""
        super().train(False)
        return self


class FrozenBatchNorm1d(FrozenNorm, nn.BatchNorm1d):
    """A BatchNorm1d whose statistics rest."""


class FrozenBatchNorm2d(FrozenNorm, nn.BatchNorm2d):
    """A BatchNorm2d whose statistics rest."""


class FrozenBatchNorm3d(FrozenNorm, nn.BatchNorm3d):
    """A BatchNorm3d whose statistics rest."""


class FrozenSyncBatchNorm(FrozenNorm, nn.SyncBatchNorm):
    """A SyncBatchNorm whose statistics rest."""


_FROZEN: dict[type[nn.Module], type[FrozenNorm]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
    nn.SyncBatchNorm: FrozenSyncBatchNorm,
}
_THAWED: dict[type[nn.Module], type[nn.Module]] = {frozen: norm for norm, frozen in _FROZEN.items()}


def freeze_bn_stats(module: nn.Module) -> None:
    """Let a batch normalization keep and use its running statistics, through `.train()` too: for `model.apply`.

    Its weight and bias go on to learn. Not in a state_dict: freeze again what a checkpoint is loaded into.
    """
    if type(module) in _FROZEN:
        module.__class__ = _FROZEN[type(module)]
    if isinstance(module, _BatchNorm):
        module.train(False)


def update_bn_stats(module: nn.Module) -> None:
    """Let a batch normalization use and follow its batches' statistics again: for `model.apply(update_bn_stats)`."""
    if type(module) in _THAWED:
        module.__class__ = _THAWED[type(module)]
    if isinstance(module, _BatchNorm):
        module.train(True)
