"""A drawing session: many images in batches, previews on the way, files at the end. What sample.py does."""

import logging
import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.errors import InputError
from common.images import captioned_table, save_png, to_pil
from common.runtime import StopOnSignal, is_out_of_memory
from generator.config import TokenLayout
from generator.drawing import Drawing
from generator.pipeline import ChannelTokPipeline, PipelineStep, Preview
from generator.sampling import SamplingConfig
from generator.stopping import check_deadline, check_epsilon

logger = logging.getLogger(__name__)
OUR_FILES = re.compile(r"\d{5,}(_k\d{4,})?\.png")


@dataclass(frozen=True, kw_only=True)
class DrawingRequest:
    """What to draw: an image for each entry of class_labels.

    rows: the name of each image: image i is written as <rows[i]>.png.
    num_tokens: where each image ends by itself.
    prefix, prefix_lengths: tokens (n j) to go on from, and how many each image has.
    sketch_tokens, keep: draw all to sketch_tokens, and only the `keep` likeliest of each class further.
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

    def check(self, layout: TokenLayout) -> None:
        """Refuse what cannot be drawn; here the null label is a mistake too."""
        for label in self.class_labels:
            if not 0 <= label < layout.num_classes:
                raise InputError(f"class label {label} is out of range; allowed are 0..{layout.num_classes - 1}")
        for count in self.num_tokens:
            if not 1 <= count <= layout.num_channels:
                raise InputError(f"num_tokens is {count}; this model draws 1..{layout.num_channels}")
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

    def part(self, images: range) -> "DrawingRequest":
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

    def batches(self, batch_size: int, start: int) -> Iterator[range]:
        """The images from `start` on in batches; sketches of a class stay together, as they are judged together."""
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


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Tokens (b k) and lengths of one batch, and what is to be seen of it on the way."""

    tokens: Tensor
    lengths: tuple[int, ...]
    previews: dict[int, Preview]


def _steps(pipeline: ChannelTokPipeline, request: DrawingRequest) -> Iterator[PipelineStep]:
    options = {
        "prefix": request.prefix,
        "prefix_lengths": request.prefix_lengths,
        "deadline": request.deadline,
        "stop_when_stable": request.stop_when_stable,
        **vars(request.sampling),
    }
    if request.sketch_tokens is None or request.keep is None:
        return pipeline.stream(request.class_labels, request.num_tokens, request.seeds, **options)
    end = request.num_tokens[0]
    return pipeline.refine(request.class_labels, request.sketch_tokens, request.keep, end, request.seeds, **options)


def _draw_batch(pipeline: ChannelTokPipeline, request: DrawingRequest, bar: tqdm, interrupt: StopOnSignal) -> _Batch:
    previews: dict[int, Preview] = {}
    for step in _steps(pipeline, request):
        if step.num_tokens in request.previews:
            previews[step.num_tokens] = step.begin_preview()
        bar.update(sum(length == step.num_tokens for length in step.lengths))
        last = step
        if interrupt.requested:
            break
    return _Batch(tokens=last.tokens.cpu(), lengths=last.lengths, previews=previews)


def _draw_batches(
    pipeline: ChannelTokPipeline, request: DrawingRequest, bar: tqdm, interrupt: StopOnSignal
) -> list[_Batch]:
    done: list[_Batch] = []
    size, start = min(request.batch_size, len(request.class_labels)), 0
    while start < len(request.class_labels) and not interrupt.requested:
        images = next(request.batches(size, start))
        before = bar.n
        try:
            done.append(_draw_batch(pipeline, request.part(images), bar, interrupt))
            start = images.stop
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(images) == 1:
                raise InputError(
                    "out of memory with a single image; use --dtype bfloat16, fewer tokens, or another --device"
                ) from error
            size = len(images) // 2
            bar.update(before - bar.n)
        if start < images.stop:
            # outside the handler: until it has ended, the error holds on to the memory that is to be freed
            logger.warning("out of memory with %d images side by side; going on with %d", len(images), size)
            if pipeline.engine.captures:
                torch.cuda.empty_cache()
    return done


def draw_to_folder(
    pipeline: ChannelTokPipeline,
    request: DrawingRequest,
    output_dir: str | Path,
    continued: Drawing | None = None,
    continued_path: Path | None = None,
) -> None:
    """Draw all images of a request and write them.

    Writes NNNNN.png, previews/NNNNN_kKKKK.png, grid.png and tokens.npz; pictures of an earlier drawing
    in the same folder are removed first. Ctrl-C ends the drawing: what has been drawn by then is
    written as it stands, and images of batches not begun are left out.

    Args:
        pipeline: the model.
        request: what to draw.
        output_dir: where to.
        continued: the drawing whose rows `request.rows` go on; its other rows stay in tokens.npz as they
            are, and, when the folder is its own, so do their pictures.
        continued_path: its tokens.npz.

    Raises:
        InputError: a request that the model cannot serve; nothing is written or removed then.
    """
    request.check(pipeline.layout)
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"output_dir {output_dir} is a file; give a folder")
    in_place = continued_path is not None and continued_path.resolve() == (output_dir / "tokens.npz").resolve()
    total, given = len(request.class_labels), sum(request.prefix_lengths or [])
    with (
        StopOnSignal(signal.SIGINT) as interrupt,
        tqdm(total=sum(request.num_tokens) - given, unit="token", delay=2) as bar,
    ):
        batches = _draw_batches(pipeline, request, bar, interrupt)
        _write(pipeline, request, batches, output_dir, continued, keep_earlier=in_place)
    lengths = [length for batch in batches for length in batch.lengths]
    if interrupt.requested:
        logger.info(
            "stopped at k = %d of %d tokens; %d of %d images written to %s",
            max(batches[-1].lengths), max(request.num_tokens), len(lengths), total, output_dir,
        )  # fmt: skip
    else:
        shown = str(lengths[0]) if len(set(lengths)) == 1 else f"{min(lengths)} to {max(lengths)}"
        logger.info("%d images of %s tokens written to %s", len(lengths), shown, output_dir)
    if request.keep is not None:
        sketched = request.sketch_tokens or 0
        kept = [row for row, length in zip(request.rows, lengths, strict=False) if length > sketched]
        logger.info("kept rows: %s", " ".join(map(str, kept)) or "none")


def _pictures(pipeline: ChannelTokPipeline, tokens: Tensor, lengths: Sequence[int]) -> list[Image.Image]:
    pending = pipeline.pictures.start(tokens.to(pipeline.engine.decoder.device), torch.tensor(list(lengths)))
    return [to_pil(image) for image in pending.images()]


def _write(
    pipeline: ChannelTokPipeline,
    request: DrawingRequest,
    batches: Sequence[_Batch],
    output_dir: Path,
    continued: Drawing | None,
    *,
    keep_earlier: bool,
) -> None:
    reached = max(batch.tokens.shape[1] for batch in batches)
    lengths = [length for batch in batches for length in batch.lengths]
    tokens = torch.cat([F.pad(batch.tokens, (0, reached - batch.tokens.shape[1])) for batch in batches])
    finals: list[Image.Image] = []
    for batch in batches:
        finals += _pictures(pipeline, batch.tokens, batch.lengths)
    columns = _previews(pipeline, request, batches, tokens, lengths)
    if not keep_earlier:
        _remove_earlier(output_dir)
    for row, picture in zip(request.rows, finals, strict=False):
        save_png(picture, output_dir / f"{row:05d}.png")
    for k, pictures in columns.items():
        for row, preview in zip(request.rows, pictures, strict=False):
            if preview is not None and k in request.previews:
                save_png(preview, output_dir / "previews" / f"{row:05d}_k{k:04d}.png")
    labels = request.class_labels[: len(finals)]
    shown = {k: pictures for k, pictures in columns.items() if k < reached}
    save_png(_grid(pipeline.layout, labels, finals, lengths, shown), output_dir / "grid.png")
    drawing = Drawing(
        tokens=tokens,
        num_tokens=torch.tensor(lengths),
        class_labels=labels,
        seeds=request.seeds[: len(finals)],
        sampling=request.sampling,
        fingerprint=pipeline.tokens_fingerprint,
    )
    if continued is not None:
        drawing = continued.with_rows(request.rows[: len(finals)], drawing)
    drawing.save(output_dir / "tokens.npz")


def _previews(
    pipeline: ChannelTokPipeline,
    request: DrawingRequest,
    batches: Sequence[_Batch],
    tokens: Tensor,
    lengths: Sequence[int],
) -> dict[int, list[Image.Image | None]]:
    """By k, a picture of each image that has so many tokens. Those that were begun on the way are fetched."""
    begins = {max(request.prefix_lengths)} if request.prefix_lengths else set()
    if request.sketch_tokens is not None:
        begins.add(request.sketch_tokens)
    columns: dict[int, list[Image.Image | None]] = {}
    for k in sorted({*request.previews, *begins}):
        found: list[Image.Image | None] = []
        for batch in batches:
            first = len(found)
            if k in batch.previews:
                pictures = batch.previews[k].pictures()
            else:
                upto = min(k, batch.tokens.shape[1])
                pictures = _pictures(pipeline, batch.tokens[:, :upto], [min(n, upto) for n in batch.lengths])
            found += [picture if lengths[first + i] >= k else None for i, picture in enumerate(pictures)]
        if any(picture is not None for picture in found):
            columns[k] = found
    return columns


def _remove_earlier(output_dir: Path) -> None:
    if (output_dir / "tokens.npz").exists():
        for path in [*output_dir.glob("*.png"), *output_dir.glob("previews/*.png")]:
            if OUR_FILES.fullmatch(path.name):
                path.unlink()


def _grid(
    layout: TokenLayout,
    labels: list[int],
    finals: list[Image.Image],
    lengths: Sequence[int],
    columns: dict[int, list[Image.Image | None]],
) -> Image.Image:
    """With columns: a row for each image, a column for each k. Without: a row for each class."""

    def name(label: int) -> str:
        return layout.class_names[label].split(",")[0][:22]

    if columns:
        rows = [[*(column[i] for column in columns.values()), final] for i, final in enumerate(finals)]
        last = f"k={lengths[0]}" if len(set(lengths)) == 1 else "as far as drawn"
        return captioned_table(rows, [name(label) for label in labels], [*(f"k={k}" for k in columns), last])
    by_class: dict[int, list[Image.Image]] = {}
    for label, picture in zip(labels, finals, strict=True):
        by_class.setdefault(label, []).append(picture)
    return captioned_table(list(by_class.values()), [name(label) for label in by_class])
