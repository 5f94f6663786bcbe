"""tokens.npz: tokens that were drawn, and all that is needed to continue them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import InputError
from common.files import load_arrays, written_whole
from generator.config import ChannelGPTConfig, SamplingConfig


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """Drawn tokens and what they were drawn from.

    In the file: tokens (n, k) uint16, num_tokens (n,), class_labels (n,), seeds (n,), the sampling
    settings as JSON, and the model's fingerprint. Row i has num_tokens[i] tokens; its entries at and
    beyond that are 0 and mean nothing.
    """

    tokens: Tensor
    num_tokens: Tensor
    class_labels: list[int]
    seeds: list[int]
    sampling: SamplingConfig
    fingerprint: str

    def save(self, path: str | Path) -> None:
        """Write tokens.npz, whole or not at all."""
        with written_whole(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                tokens=self.tokens.numpy().astype(np.uint16),
                num_tokens=self.num_tokens.numpy(),
                class_labels=np.array(self.class_labels, dtype=np.int64),
                seeds=np.array(self.seeds, dtype=np.int64),
                sampling=np.array(json.dumps(asdict(self.sampling))),
                fingerprint=np.array(self.fingerprint),
            )

    @classmethod
    def load(cls, path: str | Path) -> "TokenFile":
        """Read a tokens.npz.

        Raises:
            InputError: no such file, not one of ours, or rows that contradict one another.
        """
        content = load_arrays(path)
        try:
            for name in ("tokens", "num_tokens", "class_labels", "seeds"):
                if content[name].dtype.kind not in "iu":
                    raise ValueError(f"{name} are of type {content[name].dtype}, not integers")
            drawing = cls(
                tokens=torch.from_numpy(content["tokens"].astype(np.int64)),
                num_tokens=torch.from_numpy(content["num_tokens"].astype(np.int64)),
                class_labels=content["class_labels"].tolist(),
                seeds=content["seeds"].tolist(),
                sampling=SamplingConfig.from_file(json.loads(str(content["sampling"])), path),
                fingerprint=str(content["fingerprint"]),
            )
            rows = {len(drawing.num_tokens), len(drawing.class_labels), len(drawing.seeds)}
            if drawing.tokens.ndim != 2 or rows != {len(drawing.tokens)}:
                raise ValueError("parts of different lengths")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path} is not a tokens.npz ({error}); give one that sample.py wrote") from error
        return drawing

    def check(self, path: str | Path, config: ChannelGPTConfig, fingerprint: str) -> None:
        """Refuse a drawing that a model cannot continue.

        Raises:
            InputError: of another model, or with tokens, lengths or labels that this one does not have.
        """
        if self.fingerprint != fingerprint:
            raise InputError(
                f"{path} was drawn with model {self.fingerprint}, this is {fingerprint}; "
                "give the model it came from with --model"
            )
        if len(self.tokens) and not 0 <= int(self.tokens.min()) <= int(self.tokens.max()) < config.codebook_size:
            raise InputError(f"{path} holds tokens beyond the codebook; allowed are 0..{config.codebook_size - 1}")
        if bool(((self.num_tokens < 1) | (self.num_tokens > min(self.tokens.shape[1], config.num_channels))).any()):
            raise InputError(f"{path} holds rows of no tokens or too many; allowed are 1..{config.num_channels}")
        config.check_labels(self.class_labels)

    def rows(self, rows: Sequence[int]) -> "TokenFile":
        """Some rows, in that order.

        Raises:
            InputError: a row that does not exist, or is given twice.
        """
        for row in rows:
            if not 0 <= row < len(self.seeds):
                raise InputError(f"row {row} is out of range; this file has 0..{len(self.seeds) - 1}")
        if len(set(rows)) < len(rows):
            raise InputError(f"rows has {max(rows, key=list(rows).count)} twice; give each once")
        return replace(
            self,
            tokens=self.tokens[list(rows)],
            num_tokens=self.num_tokens[list(rows)],
            class_labels=[self.class_labels[row] for row in rows],
            seeds=[self.seeds[row] for row in rows],
        )

    def with_rows(self, rows: Sequence[int], other: "TokenFile") -> "TokenFile":
        """This file with the tokens of some rows, and the sampling settings, of another."""
        width = max(self.tokens.shape[1], other.tokens.shape[1])
        tokens, replaced = (F.pad(part.tokens, (0, width - part.tokens.shape[1])) for part in (self, other))
        tokens, num_tokens = tokens.clone(), self.num_tokens.clone()
        tokens[list(rows)], num_tokens[list(rows)] = replaced, other.num_tokens
        return replace(self, tokens=tokens, num_tokens=num_tokens, sampling=other.sampling)
