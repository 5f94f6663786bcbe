"""The models of a run, each with its optimizer, and the average of the main model's weights."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.distributed import copy_into, own_part, whole

State = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class AuxiliaryModel:
    """A model that is trained in place with a loss of its own and AdamW without weight decay, such as a discriminator.

    With `follows_schedule` its learning rate is scaled as the main model's schedule does; otherwise it is constant.
    """

    model: nn.Module
    learning_rate: float
    betas: tuple[float, float]
    follows_schedule: bool = False


@dataclass(frozen=True, kw_only=True)
class StepLoss:
    """Losses of a micro-batch.

    Attributes:
        terms: named scalars; "loss" is minimised by the model, the others are logged.
        auxiliary: for each auxiliary model that is updated in this step, by name: the model -> its named scalars, of
            which it minimises "loss"; all are logged with the model's name in front.
    """

    terms: dict[str, Tensor]
    auxiliary: Mapping[str, Callable[[nn.Module], dict[str, Tensor]]] = field(default_factory=dict)


def call_frozen(module: nn.Module, *inputs: Tensor) -> Any:
    """Forward pass with gradients for the inputs only, not for the parameters."""
    frozen = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, frozen, inputs)


def make_optimizer(
    model: nn.Module, rate: float, betas: tuple[float, float], decay: float, rate_scales: Mapping[str, float]
) -> torch.optim.AdamW:
    """AdamW, fused; weight decay on matrices only.

    Parameters whose names start with a key of `rate_scales` have their learning rate scaled by its value and no weight
    decay.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        scale = next((scale for prefix, scale in rate_scales.items() if name.startswith(prefix)), None)
        key = (1.0, decay if parameter.ndim >= 2 else 0.0) if scale is None else (scale, 0.0)
        groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate * scale, "rate_scale": scale, "weight_decay": weight_decay}
            for (scale, weight_decay), parameters in groups.items()
        ],
        betas=betas,
        fused=True,
    )


class ModelState:
    """A model (`bare`; `model` is what accelerate wraps around it) and its optimizer; names in files have `prefix`."""

    def __init__(self, prefix: str, model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator):
        self.prefix = prefix
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.bare: Any = accelerator.unwrap_model(self.model)

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of all parameters, times the scale of their group."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_scale"]

    def state(self) -> State:
        """Weights and the optimizer's state, by name; sharded ones as they are."""
        for name, parameter in self.bare.named_parameters():
            yield f"{self.prefix}model.{name}", parameter
            # there is no state yet where the optimizer has not made a step
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{self.prefix}optimizer.{name}.{key}", value

    def restore(self, state: dict[str, Tensor]) -> None:
        """Load a state."""
        for name, parameter in self.bare.named_parameters():
            copy_into(parameter, state[f"{self.prefix}model.{name}"])
            stem = f"{self.prefix}optimizer.{name}."
            if f"{stem}step" in state:
                # fused AdamW needs moments with the parameter's memory layout
                moments = {key: torch.empty_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                for key, value in moments.items():
                    copy_into(value, state[stem + key])
                self.optimizer.state[parameter] = {"step": state[f"{stem}step"].to(parameter.device), **moments}


class EMA:
    """The exponential moving average of a model's weights; sharded if these are.

    Args:
        averaged: a copy of the model for the averaged weights; None where nothing is evaluated.
        bare: the model under training.
        decay: the average's own share of itself at every update; 0 = always the last weights.
    """

    def __init__(self, averaged: nn.Module | None, bare: nn.Module, decay: float):
        self.averaged, self.decay, self.updates = averaged, decay, 0
        self._parameters = dict(bare.named_parameters())
        first = next(iter(self._parameters.values()))
        self.device, self._sharded = own_part(first).device, own_part(first) is not first
        if averaged is not None:
            averaged.requires_grad_(False).eval()
        if averaged is None or self._sharded:
            self.weights = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        else:
            self.weights = dict(averaged.to(self.device).named_parameters())

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the model's weights."""
        # a young average follows quickly, so that early evaluations do not show the initial weights
        count = self.updates
        share = 1.0 if count == 0 else 1 - min(self.decay, (1 + count) / (10 + count))
        weights = [own_part(self.weights[name]) for name in self._parameters]
        torch._foreach_lerp_(weights, [own_part(parameter) for parameter in self._parameters.values()], share)
        self.updates += 1

    @torch.no_grad()
    def model(self) -> Any:
        """The averaged model, on the device; if it is sharded, all processes must call."""
        if self._sharded:
            places = {} if self.averaged is None else dict(self.averaged.to(self.device).named_parameters())
            for name, weight in self.weights.items():
                full = whole(weight)
                if places:
                    places[name].copy_(full)
        return self.averaged

    def release(self) -> None:
        """Free the device memory that `model` took."""
        if self._sharded and self.averaged is not None:
            self.averaged.to("cpu")

    def state(self) -> State:
        """The average, by name."""
        yield from ((f"ema.{name}", value) for name, value in self.weights.items())
        yield "ema_updates", torch.tensor(self.updates)

    def restore(self, state: dict[str, Tensor]) -> None:
        """Load a state."""
        for name, value in self.weights.items():
            copy_into(value, state[f"ema.{name}"])
        self.updates = int(state["ema_updates"])
