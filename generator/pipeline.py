"""`ChannelTokPipeline`: class labels in, pictures out. The one place where both models meet."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.checkpoint import files_fingerprint, fingerprint, resolve_folder
from common.errors import InputError
from common.images import to_pil, to_uint8
from common.runtime import move, pick_device
from generator.config import TokenLayout
from generator.decode import CachedDecoder
from generator.generate import stream
from generator.model import load_generator
from generator.sampling import SamplingConfig
from tokenizer import ChannelTokenizer


@dataclass(frozen=True, kw_only=True)
class PipelineStep:
    """A drawing on its way: `.tokens` (b num_tokens) int64, and `.preview()` for the pictures so far."""

    num_tokens: int
    tokens: Tensor
    _tokenizer: ChannelTokenizer

    def preview(self) -> list[Image.Image]:
        """Decode what has been drawn: whole pictures, one for each image."""
        return decode_pictures(self._tokenizer, self.tokens)


@dataclass(frozen=True, kw_only=True)
class PipelineOutput:
    """Finished drawings: `.images`, PIL pictures, and `.tokens` (b num_tokens) int64 on the CPU."""

    images: list[Image.Image]
    tokens: Tensor


def decode_pictures(tokenizer: ChannelTokenizer, tokens: Tensor, num_tokens: Tensor | None = None) -> list[Image.Image]:
    """Tokens (b k), and a length for each row if they differ -> PIL pictures."""
    images = to_uint8(tokenizer.detokenize(tokens.to(tokenizer.device), num_tokens)).cpu()
    return [to_pil(image) for image in images]


class ChannelTokPipeline:
    """A tokenizer and a generator that belong together.

    Example:
        pipe = ChannelTokPipeline.from_pretrained("weights/demo")
        pipe([3, 7], num_tokens=32, seed=0).images[0].save("out.png")
    """

    def __init__(self, tokenizer: ChannelTokenizer, decoder: CachedDecoder, model_fingerprint: str):
        self.tokenizer = tokenizer
        self.decoder = decoder
        self.fingerprint = model_fingerprint

    @property
    def layout(self) -> TokenLayout:
        """Sizes, class names and special rows of the generator."""
        return self.decoder.layout

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, device: str = "auto", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Load a folder with tokenizer/ and generator/, or a model of that name from the Hugging Face hub.

        Args:
            name_or_path: the folder or hub name.
            device: auto, cpu, cuda, cuda:1 or mps.
            dtype: of the generator's weights and sums; the tokenizer stays in float32.

        Raises:
            InputError: a missing or damaged file, another architecture, or two models that were not
                trained together.
        """
        target = pick_device(device)
        folder = resolve_folder(name_or_path)
        for part in ("tokenizer", "generator"):
            if not (folder / part).is_dir():
                raise InputError(f"{folder} has no folder {part}/; give a folder with tokenizer/ and generator/")
        tokenizer = ChannelTokenizer.from_pretrained(folder / "tokenizer")
        model, layout = load_generator(folder / "generator", dtype)
        made_by = fingerprint(tokenizer)
        if made_by != layout.tokenizer_fingerprint:
            raise InputError(
                f"{folder}: the generator was trained on tokens of tokenizer {layout.tokenizer_fingerprint}, "
                f"the folder holds {made_by}; put the right tokenizer/ beside it"
            )
        model_fingerprint = f"{made_by}-{files_fingerprint(folder / 'generator')}"
        decoder = CachedDecoder.from_llama(move(model, target), layout)
        return cls(move(tokenizer, target), decoder, model_fingerprint)

    def class_labels(self, names: Sequence[str]) -> list[int]:
        """Labels of classes by name: the whole name, or any part of it between commas; case does not matter.

        Raises:
            InputError: an unknown name; the line gives the nearest ones.
        """
        known: dict[str, int] = {}
        for label, name in enumerate(self.layout.class_names):
            for part in (name, *name.split(",")):
                known.setdefault(part.strip().lower(), label)
        labels = []
        for name in names:
            wanted = name.strip().lower()
            if wanted not in known:
                close = difflib.get_close_matches(wanted, known, n=3, cutoff=0.0)
                raise InputError(f"class name {name!r} is unknown; the nearest are {', '.join(map(repr, close))}")
            labels.append(known[wanted])
        return labels

    def stream(
        self,
        class_labels: Sequence[int],
        num_tokens: int | None = None,
        seed: int | Sequence[int] = 0,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        cfg_scale: float = 1.0,
        prefix: Tensor | None = None,
    ) -> Iterator[PipelineStep]:
        """Draw, one token of every image at each step; stop whenever you like by not asking for the next.

        Args:
            class_labels: a label for each image.
            num_tokens: where the stream ends by itself; None draws all C.
            seed: a seed for each image, or one number: image i then has seed + i.
            temperature: see `SamplingConfig`, as for the next three.
            top_k: see `SamplingConfig`.
            top_p: see `SamplingConfig`.
            cfg_scale: see `SamplingConfig`.
            prefix: tokens (b j) of an earlier drawing to go on from.

        Raises:
            InputError: an argument out of its range, at the call.
        """
        sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, cfg_scale=cfg_scale)
        if isinstance(seed, int | np.integer):
            seeds = [int(seed) + i for i in range(len(class_labels))]
        else:
            seeds = [int(entry) for entry in seed]
        count = self.layout.num_channels if num_tokens is None else num_tokens
        steps = stream(self.decoder, class_labels, seeds, count, sampling, prefix)
        return (PipelineStep(num_tokens=s.num_tokens, tokens=s.tokens, _tokenizer=self.tokenizer) for s in steps)

    def __call__(
        self, class_labels: Sequence[int], num_tokens: int | None = None, seed: int | Sequence[int] = 0, **options
    ) -> PipelineOutput:
        """Draw whole pictures; the arguments are those of `stream`."""
        *_, last = self.stream(class_labels, num_tokens, seed, **options)
        return PipelineOutput(images=last.preview(), tokens=last.tokens.cpu())
