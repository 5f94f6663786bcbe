"""The one owner of a measurement's parts/: what is kept of each batch of samples, so that an interruption loses one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import load_tensor, read_json, save_tensors, write_text
from common.errors import InputError

SETTINGS = "settings.json"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A batch of samples at every k.

    tokens: (b k) int64, k the largest. features, logits: for each k (b d), (b c) float32. predicted: for each k the
    class that the classifier puts a sample in, (b,) int64; empty without one. draw_seconds: to each k from the start;
    decode_seconds, look_seconds: of the pictures of each k, and of what networks see in them.
    """

    tokens: Tensor
    features: dict[int, Tensor]
    logits: dict[int, Tensor]
    predicted: dict[int, Tensor]
    draw_seconds: list[float]
    decode_seconds: list[float]
    look_seconds: list[float]


class Parts:
    """Files part-NNNNNN.safetensors; each is whole or absent.

    Args:
        folder: parts/ of the output folder.
        settings: everything that decides what is in a part, JSON values.
        budgets: each k.
        num_samples: N; may differ between runs, since a sample does not depend on how many there are.
        batch_size: samples in a part.
    """

    def __init__(
        self, folder: Path, settings: dict[str, Any], budgets: Sequence[int], num_samples: int, batch_size: int
    ):
        self.folder, self.settings = folder, settings
        self.budgets, self.num_samples, self.batch_size = list(budgets), num_samples, batch_size

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def begin(self) -> None:
        """Check that what is there belongs to this measurement, or write down its settings; before any part is saved.

        Raises:
            InputError: parts of other settings, or of unknown ones.
        """
        path = self.folder / SETTINGS
        there = any(self.folder.glob("part-*"))  # looked for first: whoever writes a part has written settings before
        if path.is_file():
            then = read_json(path)
            for name, value in json.loads(json.dumps(self.settings)).items():
                if then.get(name) != value:
                    raise InputError(
                        f"{self.folder} was measured with {name} = {then.get(name)}, now it is {value}; "
                        "go on with the same settings, or choose another --output-dir"
                    )
        elif there:
            raise InputError(f"{self.folder} has parts and no {SETTINGS}; remove it, or choose another --output-dir")
        else:
            write_text(path, json.dumps(self.settings, indent=1))

    def samples(self, index: int) -> range:
        """The samples of a part."""
        return range(index * self.batch_size, min((index + 1) * self.batch_size, self.num_samples))

    def path(self, index: int) -> Path:
        """The file of a part."""
        return self.folder / f"part-{index:06d}.safetensors"

    def has(self, index: int) -> bool:
        """Whether a part is there with all of its samples."""
        if not self.path(index).is_file():
            return False
        return len(load_tensor(self.path(index), "tokens")) == len(self.samples(index))

    def save(self, index: int, part: Part) -> None:
        """Write a part."""
        tensors = {"tokens": part.tokens.to(torch.int32)}
        for name in ("features", "logits", "predicted"):
            tensors |= {f"{name}.{k}": value for k, value in getattr(part, name).items()}
        for name in ("draw_seconds", "decode_seconds", "look_seconds"):
            tensors[name] = torch.tensor(getattr(part, name), dtype=torch.float64)
        save_tensors(self.path(index), tensors)

    def tokens(self, index: int) -> Tensor:
        """The tokens of a part, (b k) int64."""
        return load_tensor(self.path(index), "tokens").long()

    def column(self, name: str, k: int) -> Tensor:
        """`features`, `logits` or `predicted` of all samples at k, in order; only these are in memory."""
        return torch.cat([load_tensor(self.path(i), f"{name}.{k}") for i in range(len(self))])

    def seconds(self) -> dict[str, Tensor]:
        """Seconds over all parts, for each k: draw (from the start), decode and look."""
        return {
            name: torch.stack([load_tensor(self.path(i), f"{name}_seconds") for i in range(len(self))]).sum(0)
            for name in ("draw", "decode", "look")
        }
