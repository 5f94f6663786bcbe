"""A drawing session: many images in batches, previews on the way, files at the end.

Also the one owner of tokens.npz: tokens (n, k) uint16, num_tokens (n,), class_labels (n,), seeds (n,)
and the model's fingerprint; a row's entries at and beyond its own num_tokens are 0 and mean nothing.
"""

import logging
import re
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.checkpoint import written_whole
from common.errors import InputError
from common.images import captioned_table, save_png
from common.runtime import StopOnInterrupt
from generator.config import TokenLayout
from generator.pipeline import ChannelTokPipeline, decode_pictures
from generator.sampling import SamplingConfig

logger = logging.getLogger(__name__)
OUR_FILES = re.compile(r"\d{5,}(_k\d{4,})?\.png")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Drawn tokens and what they were drawn from; row i has num_tokens[i] tokens."""

    tokens: Tensor
    num_tokens: Tensor
    class_labels: list[int]
    seeds: list[int]
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
                fingerprint=np.array(self.fingerprint),
            )

    @classmethod
    def load(cls, path: str | Path) -> "Drawing":
        """Read a tokens.npz.

        Raises:
            InputError: no such file, or not one of ours.
        """
        try:
            with np.load(path, allow_pickle=False) as content:
                return cls(
                    tokens=torch.from_numpy(content["tokens"].astype(np.int64)),
                    num_tokens=torch.from_numpy(content["num_tokens"]),
                    class_labels=content["class_labels"].tolist(),
                    seeds=content["seeds"].tolist(),
                    fingerprint=str(content["fingerprint"]),
                )
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(
                f"{path} is no tokens.npz of a drawing ({error}); give one that sample.py wrote"
            ) from error


@dataclass(frozen=True, kw_only=True)
class DrawingRequest:
    """What to draw: an image for each entry of class_labels, image i with seed + i."""

    class_labels: list[int]
    num_tokens: int
    seed: int
    sampling: SamplingConfig
    batch_size: int
    previews: list[int] = field(default_factory=list)

    def check(self, layout: TokenLayout) -> None:
        """Refuse what cannot be drawn; here the null label is a mistake too."""
        for label in self.class_labels:
            if not 0 <= label < layout.num_classes:
                raise InputError(f"class label {label} is out of range; allowed are 0..{layout.num_classes - 1}")
        if not 1 <= self.num_tokens <= layout.num_channels:
            raise InputError(f"num_tokens is {self.num_tokens}; this model draws 1..{layout.num_channels}")
        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}; it must be at least 1")
        for k in self.previews:
            if not 1 <= k <= self.num_tokens:
                raise InputError(f"a preview at {k} tokens is asked for; allowed are 1..{self.num_tokens}")


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Tokens (b k) of one batch, and its pictures by k on the way."""

    tokens: Tensor
    previews: dict[int, list[Image.Image]]


def _draw_batch(
    pipeline: ChannelTokPipeline, request: DrawingRequest, rows: range, bar: tqdm, interrupt: StopOnInterrupt
) -> _Batch:
    labels = [request.class_labels[i] for i in rows]
    seeds = [request.seed + i for i in rows]
    previews: dict[int, list[Image.Image]] = {}
    tokens = torch.empty(len(rows), 0, dtype=torch.long)
    for step in pipeline.stream(labels, request.num_tokens, seeds, **asdict(request.sampling)):
        tokens = step.tokens
        if step.num_tokens in request.previews:
            previews[step.num_tokens] = step.preview()
        bar.update(len(rows))
        if interrupt.requested:
            break
    return _Batch(tokens=tokens.cpu(), previews=previews)


def draw_to_folder(pipeline: ChannelTokPipeline, request: DrawingRequest, output_dir: str | Path) -> None:
    """Draw all images of a request and write them.

    Writes NNNNN.png, previews/NNNNN_kKKKK.png, grid.png and tokens.npz; pictures of an earlier drawing
    in the same folder are removed first. Ctrl-C ends the drawing: what has been drawn by then is
    written as it stands, and images of batches not begun are left out.

    Raises:
        InputError: a request that the model cannot serve; nothing is written or removed then.
    """
    request.check(pipeline.layout)
    output_dir = Path(output_dir)
    total = len(request.class_labels)
    batches: list[_Batch] = []
    with (
        StopOnInterrupt() as interrupt,
        tqdm(total=total * request.num_tokens, unit="token", delay=2) as bar,
    ):
        for start in range(0, total, request.batch_size):
            rows = range(start, min(start + request.batch_size, total))
            batches.append(_draw_batch(pipeline, request, rows, bar, interrupt))
            if interrupt.requested:
                break
        _write(pipeline, request, batches, output_dir)
    lengths = sorted({batch.tokens.shape[1] for batch in batches})
    drawn = sum(len(batch.tokens) for batch in batches)
    if interrupt.requested:
        logger.info(
            "stopped at k = %d of %d tokens; %d of %d images written to %s",
            lengths[0], request.num_tokens, drawn, total, output_dir,
        )  # fmt: skip
    else:
        logger.info("%d images of %d tokens written to %s", drawn, request.num_tokens, output_dir)


def _write(pipeline: ChannelTokPipeline, request: DrawingRequest, batches: Sequence[_Batch], output_dir: Path) -> None:
    _remove_earlier(output_dir)
    reached = max(batch.tokens.shape[1] for batch in batches)
    finals: list[Image.Image] = []
    columns: dict[int, list[Image.Image]] = {k: [] for k in sorted(set(request.previews)) if k < reached}
    for batch in batches:
        finals += decode_pictures(pipeline.tokenizer, batch.tokens)
        for k, pictures in batch.previews.items():
            for i, picture in enumerate(pictures, start=len(finals) - len(pictures)):
                save_png(picture, output_dir / "previews" / f"{i:05d}_k{k:04d}.png")
            if k in columns:
                columns[k] += pictures
    for i, picture in enumerate(finals):
        save_png(picture, output_dir / f"{i:05d}.png")
    labels = request.class_labels[: len(finals)]
    save_png(_grid(pipeline, labels, finals, columns, reached), output_dir / "grid.png")
    Drawing(
        tokens=torch.cat([torch.nn.functional.pad(b.tokens, (0, reached - b.tokens.shape[1])) for b in batches]),
        num_tokens=torch.cat([torch.full((len(b.tokens),), b.tokens.shape[1]) for b in batches]),
        class_labels=labels,
        seeds=[request.seed + i for i in range(len(finals))],
        fingerprint=pipeline.fingerprint,
    ).save(output_dir / "tokens.npz")


def _remove_earlier(output_dir: Path) -> None:
    if (output_dir / "tokens.npz").exists():
        for path in [*output_dir.glob("*.png"), *output_dir.glob("previews/*.png")]:
            if OUR_FILES.fullmatch(path.name):
                path.unlink()


def _grid(
    pipeline: ChannelTokPipeline,
    labels: list[int],
    finals: list[Image.Image],
    columns: dict[int, list[Image.Image]],
    reached: int,
) -> Image.Image:
    """With previews: a row for each image, a column for each k. Without: a row for each class."""

    def name(label: int) -> str:
        return pipeline.layout.class_names[label].split(",")[0][:22]

    if columns:
        # after Ctrl-C the last batch may not have come to every preview
        rows = [
            [*(column[i] if i < len(column) else None for column in columns.values()), finals[i]]
            for i in range(len(finals))
        ]
        return captioned_table(rows, [name(label) for label in labels], [f"k={k}" for k in [*columns, reached]])
    by_class: dict[int, list[Image.Image]] = {}
    for label, picture in zip(labels, finals, strict=True):
        by_class.setdefault(label, []).append(picture)
    return captioned_table(list(by_class.values()), [name(label) for label in by_class])
