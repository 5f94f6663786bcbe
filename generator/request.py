"""What to draw: from the flags of sample.py, or from the tokens of an earlier drawing."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from common.config import Refinement
from common.errors import InputError
from generator.config import ChannelGPTConfig, SampleConfig, SamplingConfig
from generator.pipeline import ChannelTokPipeline
from generator.stopping import check_deadline, check_epsilon
from generator.token_file import TokenFile

SHOWN_CLASSES = 6


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """Images to draw, one for each entry of class_labels.

    rows: number of each image: image i is written as <rows[i]>.png.
    num_tokens: where each image ends by itself.
    prefix, prefix_lengths: tokens (n j) to continue, and how many each image has.
    sketch_tokens, keep: draw all to sketch_tokens, and only the `keep` likeliest of each class further.
    continued: the drawing whose rows are continued; its other rows stay as they are.
    refinement: of the final images, and of the previews if refine_previews is set; None: none.
    """

    class_labels: list[int]
    seeds: list[int]
    rows: list[int]
    num_tokens: list[int]
    sampling: SamplingConfig
    batch_size: int
    previews: list[int] = field(default_factory=list)
    prefix: Tensor | None = None
    prefix_lengths: list[int] | None = None
    deadline: float | None = None
    stop_when_stable: float | None = None
    sketch_tokens: int | None = None
    keep: int | None = None
    continued: TokenFile | None = None
    refinement: Refinement | None = None
    refine_previews: bool = False

    @property
    def preview_refinement(self) -> Refinement | int:
        """How previews are refined; 0: not at all."""
        return self.refinement if self.refinement and self.refine_previews else 0

    def check(self, config: ChannelGPTConfig) -> None:
        """Refuse what cannot be drawn; the null label is a mistake here."""
        for label in self.class_labels:
            if not 0 <= label < config.num_classes:
                raise InputError(f"class label {label} is out of range; allowed are 0..{config.num_classes - 1}")
        for count in self.num_tokens:
            if not 1 <= count <= config.num_channels:
                raise InputError(f"num_tokens is {count}; this model draws 1..{config.num_channels}")
        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}; it must be at least 1")
        for k in self.previews:
            if not 1 <= k <= max(self.num_tokens):
                raise InputError(f"a preview at {k} tokens is asked for; allowed are 1..{max(self.num_tokens)}")
        if self.deadline is not None:
            check_deadline(self.deadline)
        if self.stop_when_stable is not None:
            check_epsilon(self.stop_when_stable)
        if (self.sketch_tokens is None) != (self.keep is None):
            raise InputError("sketch_tokens and keep go together; give both or neither")
        if self.sketch_tokens is not None and len(set(self.num_tokens)) > 1:
            raise InputError("num_tokens must be one number with sketch_tokens")

    def part(self, images: range) -> "DrawRequest":
        """The request for some of its images."""
        rows = slice(images.start, images.stop)
        return replace(
            self,
            class_labels=self.class_labels[rows],
            seeds=self.seeds[rows],
            rows=self.rows[rows],
            num_tokens=self.num_tokens[rows],
            prefix=None if self.prefix is None else self.prefix[rows],
            prefix_lengths=None if self.prefix_lengths is None else self.prefix_lengths[rows],
        )

    def batches(self, batch_size: int) -> Iterator[range]:
        """Images in batches; sketches of a class stay together, because they are compared."""
        start = 0
        while start < len(self.class_labels):
            end = min(start + batch_size, len(self.class_labels))
            if self.keep is not None and end < len(self.class_labels):
                while end > start and self.class_labels[end] == self.class_labels[end - 1]:
                    end -= 1
                if end == start:
                    raise InputError(
                        f"the sketches of class {self.class_labels[start]} do not fit into one batch of {batch_size}; "
                        "raise --batch-size or lower --samples-per-class"
                    )
            yield range(start, end)
            start = end


def request_of(config: SampleConfig, given: dict[str, Any], pipeline: ChannelTokPipeline) -> DrawRequest:
    """The request of the flags of sample.py; `given` are the fields of `SamplingConfig` among them.

    Raises:
        InputError: flags that do not fit the model or each other, or a drawing that cannot be continued.
    """
    refinement = pipeline.refinement(
        config.refine, cfg_scale=config.refine_cfg_scale, temperature=config.refine_temperature
    )
    if config.refine_previews and refinement is None:
        raise InputError("refine_previews is given, but images are not refined; omit it")
    if config.continue_from is None:
        request = _fresh_request(config, given, pipeline)
    else:
        request = _continued_request(config, given, pipeline)
    return replace(request, refinement=refinement, refine_previews=config.refine_previews)


def _fresh_request(config: SampleConfig, given: dict[str, Any], pipeline: ChannelTokPipeline) -> DrawRequest:
    """New images of given classes, or of a few classes at growing k."""
    model = pipeline.config
    labels = [*(config.class_labels or []), *pipeline.class_labels(config.class_names or [])]
    previews = config.previews or []
    if not labels:
        shown = min(SHOWN_CLASSES, model.num_classes)
        labels = [i * model.num_classes // shown for i in range(shown)]
        longest = max(config.num_tokens or [model.num_channels])
        previews = previews or [k for k in (1, 4, 16, 32, 64, 128) if k < longest]
    labels = [label for label in labels for _ in range(config.samples_per_class)]
    num_tokens = _counts(config.num_tokens, len(labels), model.num_channels)
    prefix = None
    if config.prefix_image is not None:
        prefix = pipeline.prefix_of(config.prefix_image, config.prefix_tokens).expand(len(labels), -1)
    return DrawRequest(
        class_labels=labels,
        seeds=[config.seed + i for i in range(len(labels))],
        rows=list(range(len(labels))),
        num_tokens=num_tokens,
        # images that end at several k are drawn with the settings of those that go to the end, so that none depends on
        # the others
        sampling=pipeline.sampling(num_tokens[0] if len(set(num_tokens)) == 1 else None, **given),
        batch_size=config.batch_size,
        previews=previews,
        prefix=prefix,
        prefix_lengths=None if prefix is None else [config.prefix_tokens] * len(labels),
        deadline=config.deadline,
        stop_when_stable=config.stop_when_stable,
        sketch_tokens=config.sketch_tokens,
        keep=config.keep,
    )


def _continued_request(config: SampleConfig, given: dict[str, Any], pipeline: ChannelTokPipeline) -> DrawRequest:
    """Rows of a drawing to continue, with its own settings unless others are given."""
    path = Path(config.continue_from or "")
    drawing = TokenFile.load(path)
    drawing.check(path, pipeline.config, pipeline.tokens_fingerprint)
    rows = list(range(len(drawing.seeds))) if config.rows is None else config.rows
    chosen = drawing.rows(rows)
    lengths = chosen.num_tokens.tolist()
    num_tokens = _counts(config.num_tokens, len(rows), pipeline.config.num_channels)
    for row, length, count in zip(rows, lengths, num_tokens, strict=True):
        if length >= count:
            raise InputError(f"row {row} has {length} tokens already; num_tokens is {count} and must be above that")
    return DrawRequest(
        class_labels=chosen.class_labels,
        seeds=chosen.seeds,
        rows=rows,
        num_tokens=num_tokens,
        sampling=drawing.sampling.override(given),
        batch_size=config.batch_size,
        previews=config.previews or [],
        prefix=chosen.tokens,
        prefix_lengths=lengths,
        deadline=config.deadline,
        stop_when_stable=config.stop_when_stable,
        continued=drawing,
    )


def _counts(num_tokens: list[int] | None, images: int, default: int) -> list[int]:
    """The length of each image from --num-tokens: none, one for all, or one for each."""
    given = [default] if num_tokens is None else num_tokens
    if len(given) not in (1, images):
        raise InputError(f"num_tokens has {len(given)} numbers for {images} images; give one for all or one for each")
    return given * images if len(given) == 1 else given
