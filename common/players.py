"""The models of a run, each with its optimizer."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

OPPONENT_BETAS = (0.5, 0.9)  # of a discriminator's AdamW, as Esser et al. (arXiv 2012.09841) train theirs
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps beside the number of its steps


@dataclass(frozen=True, kw_only=True)
class Opponent:
    """A second model that is trained against the first, with an optimizer of its own: a GAN's discriminator."""

    model: nn.Module
    learning_rate: float


def make_optimizer(model: nn.Module, rate: float, betas: tuple[float, float], decay: float) -> torch.optim.AdamW:
    """AdamW, fused; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)


class Player:
    """A model with its optimizer, and the names under which a checkpoint keeps them.

    Args:
        prefix: before every name.
        model: what accelerate has wrapped around the module.
        bare: the module itself.
        optimizer: as accelerate gives it.
    """

    def __init__(self, prefix: str, model: nn.Module, bare: Any, optimizer: Any):
        self.prefix, self.model, self.bare, self.optimizer = prefix, model, bare, optimizer

    def state(self) -> dict[str, Tensor]:
        """Weights and the optimizer's state, as a checkpoint keeps them."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.bare.named_parameters():
            state[f"{self.prefix}model.{name}"] = parameter
            # there is no state yet where the optimizer has not made a step
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{self.prefix}optimizer.{name}.{key}"] = value
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take them back."""
        for name, parameter in self.bare.named_parameters():
            parameter.copy_(state[f"{self.prefix}model.{name}"])
            # fused AdamW keeps all of its state beside the parameter
            stem = f"{self.prefix}optimizer.{name}."
            if f"{stem}step" in state:
                # the moments must lie in memory as the parameter does: fused AdamW walks through all of them at once
                moments = {key: torch.empty_like(parameter).copy_(state[stem + key]) for key in MOMENTS}
                self.optimizer.state[parameter] = {"step": state[f"{stem}step"].to(parameter.device), **moments}
