"""A way of making a training step, and what is known of it: its times, its memory, what it gives beside the others."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from common.measuring import held_bytes
from common.model_state import make_optimizer
from common.runtime import pick_dtype
from common.turns import Contender
from generator.config import TokenLayout
from generator.objective import NextTokenNats
from generator.trainspeed.config import CHECKPOINTED, COMPILED, UNCHUNKED

MAX_GRAD_NORM = 1.0  # as train_ar.py clips by default, and so are the optimizer's settings
BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.05
# what rounding may do to the loss and to the norm of its gradient, relative; a lost chunk or block does more
ROUNDING = {"float32": 1e-3, "bfloat16": 5e-2}


class Trainee:
    """A generator with its optimizer; all variants train these same weights.

    The learning rate is 0: an update does all of its work and changes nothing, so that every step of every
    variant computes the same, and can be compared.
    """

    def __init__(self, llama: LlamaForCausalLM, layout: TokenLayout, loss_chunk: int):
        self.llama, self.layout, self.loss_chunk = llama.train(), layout, loss_chunk
        self.optimizer = make_optimizer(llama, 0.0, BETAS, WEIGHT_DECAY)
        for parameter in llama.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()  # what the optimizer keeps exists from here on, and belongs to no variant's memory
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def held(self) -> int:
        """Bytes of weights and of what the optimizer keeps."""
        return held_bytes(self.llama, self.optimizer.state)

    def model(self, variant: str) -> NextTokenNats:
        """One of `config.VARIANTS`: modules of its own around the same weights."""
        shared = {id(parameter): parameter for parameter in self.llama.parameters()}
        model = NextTokenNats(
            copy.deepcopy(self.llama, shared),
            self.layout,
            chunk=0 if variant == UNCHUNKED else self.loss_chunk,
            gradient_checkpointing=variant == CHECKPOINTED,
        )
        if variant == COMPILED:
            model.compile_blocks()
        return model


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Class labels (b,) and tokens (b k)."""

    class_labels: Tensor
    tokens: Tensor


@dataclass(kw_only=True)
class Lane(Contender):
    """A variant in a number format at a batch size; `given` and `found` are (loss, norm of its gradient)."""

    subject: str
    variant: str
    dtype: str
    trainee: Trainee
    batch: Batch
    found: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        self._model = self.trainee.model(self.variant)

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"{self.subject}, {self.variant}, {self.dtype}, batch {len(self.batch.tokens)}"

    @property
    def settles(self) -> bool:
        """Whether its first run is unlike the others: it compiles."""
        return self.variant == COMPILED

    def run(self) -> tuple[Tensor, Tensor]:
        """One training step -> mean nats of its tokens, and the norm of the gradient before it is clipped."""
        device, optimizer = self.batch.tokens.device, self.trainee.optimizer
        try:
            with torch.autocast(device.type, pick_dtype("bfloat16"), enabled=self.dtype == "bfloat16"):
                loss = self._model(self.batch.class_labels, self.batch.tokens).mean()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.trainee.llama.parameters(), MAX_GRAD_NORM)
            optimizer.step()
        finally:
            optimizer.zero_grad(set_to_none=True)  # also where memory ran out: the weights are those of all variants
        return loss.detach(), norm

    def judge(self, result: tuple[Tensor, Tensor], expected: tuple[float, float] | None) -> str | None:
        """Keep what the first step gave; what is wrong with it beside another variant's, or None."""
        loss, norm = self.found = float(result[0]), float(result[1])
        for name, value, other in zip(("loss", "gradient norm"), self.found, expected or self.found, strict=True):
            if not math.isclose(value, other, rel_tol=ROUNDING[self.dtype]):
                return f"wrong: {name} {value:.4g}, not {other:.4g}"
        return None if math.isfinite(loss) and math.isfinite(norm) else f"wrong: loss {loss}, gradient norm {norm}"
