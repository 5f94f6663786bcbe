"""Images of a run of sample.py: new ones of given classes, or those of an earlier run that are continued."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from common.config import InputError, Refinement
from generator.config import SampleConfig
from generator.pipeline import ChannelTokPipeline
from generator.token_file import TokenFile

SHOWN_CLASSES = 6
PREFIX_TOKENS = 16  # default
SHOWN_LENGTHS = (1, 4, 16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Images to draw.

    config: the flags.
    images: class and seed of each image, and the num_tokens[i] tokens that it starts with, 0 or more.
    rows: number of each image: image i is written as <rows[i]>.png.
    ends: number of tokens at which each image ends by itself.
    previews: each k at which images are also written.
    refinement: of final images; 0: none.
    preview_refinement: the same if config.refine_previews is set, else 0.
    continued: the earlier run whose rows are continued; its other rows stay as they are.
    """

    config: SampleConfig
    images: TokenFile
    rows: list[int]
    ends: list[int]
    previews: list[int]
    refinement: Refinement | int
    preview_refinement: Refinement | int
    continued: TokenFile | None

    def part(self, images: range) -> "Request":
        """The request for some of its images."""
        return replace(
            self,
            images=self.images.rows(images),
            rows=[self.rows[i] for i in images],
            ends=[self.ends[i] for i in images],
        )

    def batches(self) -> Iterator[range]:
        """Images in batches; sketches of a class stay together, because they are compared.

        Raises:
            InputError: sketches of a class that do not fit into a batch.
        """
        labels, size, start = self.images.class_labels, self.config.batch_size, 0
        while start < len(labels):
            end = min(start + size, len(labels))
            if self.config.keep is not None and end < len(labels):
                while end > start and labels[end] == labels[end - 1]:
                    end -= 1
                if end == start:
                    raise InputError(
                        f"the sketches of class {labels[start]} do not fit into one batch of {size}; "
                        "raise --batch-size or lower --samples-per-class"
                    )
            yield range(start, end)
            start = end


def request_of(config: SampleConfig, given: dict[str, Any], pipeline: ChannelTokPipeline) -> Request:
    """The request of the flags of sample.py; `given` are the fields of `SamplingConfig` among them.

    Raises:
        InputError: flags that do not fit the model or each other, or a run that cannot be continued.
    """
    model, continued, previews = pipeline.config, None, config.previews or []
    if config.continue_from is None:
        images = _new_images(config, given, pipeline)
        rows = list(range(len(images.seeds)))
        if config.class_labels is None and config.class_names is None and not previews:
            longest = max(config.num_tokens or [model.num_channels])
            previews = [k for k in SHOWN_LENGTHS if k < longest]
    else:
        continued = TokenFile.load(config.continue_from)
        continued.check(config.continue_from, model, pipeline.tokens_fingerprint)
        rows = list(range(len(continued.seeds))) if config.rows is None else config.rows
        images = replace(continued.rows(rows), sampling=continued.sampling.override(given))
    for label in images.class_labels:
        if not 0 <= label < model.num_classes:
            raise InputError(f"class label {label} is out of range; allowed are 0..{model.num_classes - 1}")
    ends = _ends(config, len(rows), model.num_channels)
    for row, length, end in zip(rows, images.num_tokens.tolist(), ends, strict=True):
        if length and length >= end:
            raise InputError(f"row {row} has {length} tokens already; num_tokens is {end} and must be above that")
    for k in previews:
        if not 1 <= k <= max(ends):
            raise InputError(f"previews has {k}; allowed are 1..{max(ends)}")
    refinement = pipeline.refinement(
        config.refine, cfg_scale=config.refine_cfg_scale, temperature=config.refine_temperature
    )
    if config.refine_previews and refinement is None:
        raise InputError("refine_previews is given, but images are not refined; omit it")
    return Request(
        config=config,
        images=images,
        rows=rows,
        ends=ends,
        previews=previews,
        refinement=refinement or 0,
        preview_refinement=refinement if refinement and config.refine_previews else 0,
        continued=continued,
    )


def _new_images(config: SampleConfig, given: dict[str, Any], pipeline: ChannelTokPipeline) -> TokenFile:
    """Images of the given classes, or of a few classes, without tokens or with those of a photograph."""
    model = pipeline.config
    labels = [*(config.class_labels or []), *pipeline.class_labels(config.class_names or [])]
    if not labels:
        shown = min(SHOWN_CLASSES, model.num_classes)
        labels = [i * model.num_classes // shown for i in range(shown)]
    labels = [label for label in labels for _ in range(config.samples_per_class)]
    ends = set(_ends(config, len(labels), model.num_channels))
    tokens = torch.zeros(len(labels), 0, dtype=torch.long)
    if config.prefix_image is not None:
        kept = config.prefix_tokens or PREFIX_TOKENS
        if kept >= model.num_channels:
            raise InputError(f"prefix_tokens is {kept}; allowed are 1..{model.num_channels - 1}")
        tokens = pipeline.tokens_of(config.prefix_image)[:, :kept].repeat(len(labels), 1)
    return TokenFile(
        tokens=tokens,
        num_tokens=torch.full((len(labels),), tokens.shape[1]),
        class_labels=labels,
        seeds=[config.seed + i for i in range(len(labels))],
        # images that end at different k use the settings of those of all C tokens, so that none depends on the others
        sampling=pipeline.sampling(ends.pop() if len(ends) == 1 else None, **given),
        fingerprint=pipeline.tokens_fingerprint,
    )


def _ends(config: SampleConfig, images: int, default: int) -> list[int]:
    """Number of tokens of each image from --num-tokens: none, one for all, or one for each."""
    given = [default] if config.num_tokens is None else config.num_tokens
    if len(given) not in (1, images):
        raise InputError(f"num_tokens has {len(given)} numbers for {images} images; give one for all or one for each")
    return given * images if len(given) == 1 else given
