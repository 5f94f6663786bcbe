"""What sample.py does: draws many images in batches, in one process or several, and writes the files."""

import logging
import re
import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.checkpoint import load_tensors, save_tensors
from common.config import Refinement
from common.errors import InputError
from common.images import captioned_table, save_png, to_pil
from common.runtime import StopOnSignal, is_out_of_memory, pick_dtype
from common.team import Team, team
from generator.config import SampleConfig
from generator.generate import Preview, Step
from generator.pipeline import ChannelTokPipeline
from generator.request import DrawRequest, request_of
from generator.token_file import TokenFile

logger = logging.getLogger(__name__)
OUR_FILES = re.compile(r"\d{5,}(_k\d{4,})?\.png")
GRID_IMAGES = 200  # grid.png shows at most so many


def draw(config: SampleConfig, given: dict[str, Any]) -> None:
    """Load a model, draw, and write; `given` are the fields of `SamplingConfig` that the user set.

    Raises:
        InputError: what the model cannot do; nothing is written or removed then.
    """
    with team(config.device) as workers:
        dtype = pick_dtype(config.dtype)
        pipeline = ChannelTokPipeline.from_pretrained(
            config.model, str(workers.device), dtype, compile=config.compile, refiner=config.refine != 0
        )
        draw_to_folder(pipeline, request_of(config, given, pipeline), config.output_dir, workers, config.continue_from)


def draw_to_folder(
    pipeline: ChannelTokPipeline,
    request: DrawRequest,
    output_dir: str | Path,
    workers: Team,
    continued_path: str | Path | None = None,
) -> None:
    """Draw all images of a request and write NNNNN.png, previews/NNNNN_kKKKK.png, grid.png and tokens.npz.

    Each process draws every count-th batch and writes to .partial/ in the folder; the main process moves everything to
    its place at the end, and removes pictures of an earlier drawing. Ctrl-C ends drawing: what has been drawn until
    then is written, images of later batches are omitted.

    Args:
        pipeline: the model.
        request: what to draw.
        output_dir: the folder; in a drawing that continues its own folder, pictures of other rows stay.
        workers: the processes.
        continued_path: tokens.npz of the drawing that is continued.

    Raises:
        InputError: a request that the model cannot serve; nothing is written or removed then.
    """
    request.check(pipeline.config)
    list(request.batches(request.batch_size))  # refuses classes that do not fit into a batch
    _steps(pipeline, replace(request, deadline=None, stop_when_stable=None))  # refuses arguments, draws nothing
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"output_dir {output_dir} is a file; give a folder")
    partial = output_dir / ".partial"
    if workers.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    workers.wait()
    with StopOnSignal(signal.SIGINT, patient=workers.count > 1) as interrupt:
        done = _draw_share(pipeline, request, partial, workers, interrupt)
        _save_part(partial, workers.index, done)
        workers.wait()
        if workers.is_main:
            in_place = (
                continued_path is not None and Path(continued_path).resolve() == (output_dir / "tokens.npz").resolve()
            )
            drawn = _finish(pipeline, request, output_dir, partial, workers.count, keep_earlier=in_place)
            _report(request, drawn, output_dir, interrupted=interrupt.requested)
        workers.wait()


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Tokens (b k), lengths and requested previews of some images of a request."""

    images: range
    tokens: Tensor
    lengths: tuple[int, ...]
    previews: dict[int, Preview]


def _steps(pipeline: ChannelTokPipeline, request: DrawRequest) -> Iterator[Step]:
    options = {
        "prefix": request.prefix,
        "prefix_lengths": request.prefix_lengths,
        "deadline": request.deadline,
        "stop_when_stable": request.stop_when_stable,
        "refine": request.refinement or 0,
        **vars(request.sampling),
    }
    if request.sketch_tokens is None or request.keep is None:
        return pipeline.stream(request.class_labels, request.num_tokens, request.seeds, **options)
    end = request.num_tokens[0]
    return pipeline.stream_best(
        request.class_labels, request.sketch_tokens, request.keep, end, request.seeds, **options
    )


def _draw_batch(
    pipeline: ChannelTokPipeline, request: DrawRequest, images: range, bar: tqdm, interrupt: StopOnSignal
) -> _Batch:
    previews: dict[int, Preview] = {}
    for step in _steps(pipeline, request.part(images)):
        if step.num_tokens in request.previews:
            previews[step.num_tokens] = step.begin_preview(request.preview_refinement)
        bar.update(sum(length == step.num_tokens for length in step.lengths))
        last = step
        if interrupt.requested:
            break
    return _Batch(images=images, tokens=last.tokens.cpu(), lengths=last.lengths, previews=previews)


def _draw_share(
    pipeline: ChannelTokPipeline, request: DrawRequest, folder: Path, workers: Team, interrupt: StopOnSignal
) -> list[_Batch]:
    """Draw this process's batches and write their pictures; halve them when memory runs out."""
    done: list[_Batch] = []
    own = list(request.batches(request.batch_size))[workers.index :: workers.count]
    given = request.prefix_lengths or [0] * len(request.num_tokens)
    total = sum(request.num_tokens[i] - given[i] for images in own for i in images)
    most = request.batch_size
    with tqdm(total=total, unit="token", delay=2, disable=not workers.is_main) as bar:
        while own and not (done and interrupt.requested):
            images, before, short_of_memory = own.pop(0), bar.n, False
            if len(images) > most and request.keep is None:
                own[:0] = [images[most:]]
                images = images[:most]
            try:
                batch = _draw_batch(pipeline, request, images, bar, interrupt)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(images) == 1 or request.keep is not None:
                    raise InputError(
                        f"out of memory with {len(images)} images; use --dtype bfloat16, a smaller --batch-size, "
                        "fewer tokens, or another --device"
                    ) from error
                short_of_memory = True
            if short_of_memory:  # outside the handler: until it has ended, the error keeps memory from being freed
                most = len(images) // 2
                logger.warning("out of memory with %d images in a batch; continuing with %d", len(images), most)
                own[:0] = [images]
                bar.update(before - bar.n)
                if pipeline.engine.captures:
                    torch.cuda.empty_cache()
                continue
            _save_pictures(pipeline, request, batch, folder)
            done.append(_Batch(images=images, tokens=batch.tokens, lengths=batch.lengths, previews={}))
    return done


def _columns(request: DrawRequest) -> list[int]:
    """The k at which grid.png shows images beside the last: previews, ends of prefixes and of sketches."""
    begins = {max(request.prefix_lengths)} if request.prefix_lengths else set()
    if request.sketch_tokens is not None:
        begins.add(request.sketch_tokens)
    return sorted({*request.previews, *begins})


def _save_pictures(pipeline: ChannelTokPipeline, request: DrawRequest, batch: _Batch, folder: Path) -> None:
    """Write the final picture of each image of a batch, and those at the k of `_columns` that it has reached."""
    part = request.part(batch.images)
    drawn = pipeline.images(part.class_labels, part.seeds)

    def pictures(tokens: Tensor, lengths: Sequence[int], refine: Refinement | int) -> list[Image.Image]:
        return [to_pil(image) for image in drawn.start(tokens, torch.tensor(list(lengths)), refine).images()]

    finals = pictures(batch.tokens, batch.lengths, request.refinement or 0)
    for row, picture in zip(part.rows, finals, strict=True):
        save_png(picture, _picture_path(folder, row))
    for k in _columns(request):
        if k in batch.previews:
            columns = batch.previews[k].pictures()
        else:
            shown = min(k, batch.tokens.shape[1])
            lengths = [min(length, shown) for length in batch.lengths]
            columns = pictures(batch.tokens[:, :shown], lengths, request.preview_refinement)
        for row, picture, length in zip(part.rows, columns, batch.lengths, strict=True):
            if length >= k:
                save_png(picture, _picture_path(folder, row, k))


def _picture_path(folder: Path, row: int, k: int | None = None) -> Path:
    return folder / f"{row:05d}.png" if k is None else folder / "previews" / f"{row:05d}_k{k:04d}.png"


def _save_part(folder: Path, index: int, batches: Sequence[_Batch]) -> None:
    """Write the tokens that a process drew, for the main process."""
    width = max((batch.tokens.shape[1] for batch in batches), default=1)
    tokens = [F.pad(batch.tokens, (0, width - batch.tokens.shape[1])) for batch in batches]
    part = {
        "images": torch.tensor([i for batch in batches for i in batch.images], dtype=torch.long),
        "lengths": torch.tensor([length for batch in batches for length in batch.lengths], dtype=torch.long),
        "tokens": torch.cat(tokens) if tokens else torch.empty(0, width, dtype=torch.long),
    }
    save_tensors(folder / f"part-{index}.safetensors", part)


def _finish(
    pipeline: ChannelTokPipeline,
    request: DrawRequest,
    output_dir: Path,
    partial: Path,
    processes: int,
    *,
    keep_earlier: bool,
) -> dict[int, int]:
    """Merge what all processes wrote, move it into place, and return the length of each row that was drawn."""
    parts = [load_tensors(partial / f"part-{index}.safetensors") for index in range(processes)]
    width = max(part["tokens"].shape[1] for part in parts)
    images, order = torch.cat([part["images"] for part in parts]).sort()
    lengths = torch.cat([part["lengths"] for part in parts])[order]
    tokens = torch.cat([F.pad(part["tokens"], (0, width - part["tokens"].shape[1])) for part in parts])[order]
    drawn = images.tolist()
    grid = _grid(pipeline, request, drawn, lengths.tolist(), width, partial)
    if not keep_earlier and (output_dir / "tokens.npz").exists():
        for path in [*output_dir.glob("*.png"), *output_dir.glob("previews/*.png")]:
            if OUR_FILES.fullmatch(path.name):
                path.unlink()
    for row in (request.rows[i] for i in drawn):
        _picture_path(partial, row).replace(_picture_path(output_dir, row))
        for k in request.previews:
            if (path := _picture_path(partial, row, k)).exists():
                target = _picture_path(output_dir, row, k)
                target.parent.mkdir(exist_ok=True)
                path.replace(target)
    save_png(grid, output_dir / "grid.png")
    drawing = TokenFile(
        tokens=tokens,
        num_tokens=lengths,
        class_labels=[request.class_labels[i] for i in drawn],
        seeds=[request.seeds[i] for i in drawn],
        sampling=request.sampling,
        fingerprint=pipeline.tokens_fingerprint,
    )
    if request.continued is not None:
        drawing = request.continued.with_rows([request.rows[i] for i in drawn], drawing)
    drawing.save(output_dir / "tokens.npz")
    shutil.rmtree(partial)
    return dict(zip((request.rows[i] for i in drawn), lengths.tolist(), strict=True))


def _grid(
    pipeline: ChannelTokPipeline,
    request: DrawRequest,
    drawn: Sequence[int],
    lengths: Sequence[int],
    reached: int,
    folder: Path,
) -> Image.Image:
    """With previews: a row for each image, a column for each k. Without: a row for each class."""

    def opened(path: Path) -> Image.Image | None:
        if not path.exists():
            return None
        with Image.open(path) as picture:
            return picture.copy()

    drawn, lengths = drawn[:GRID_IMAGES], lengths[:GRID_IMAGES]
    rows = [request.rows[i] for i in drawn]
    names = [pipeline.config.class_names[request.class_labels[i]].split(",")[0][:22] for i in drawn]
    finals = [opened(_picture_path(folder, row)) for row in rows]
    columns = {k: [opened(_picture_path(folder, row, k)) for row in rows] for k in _columns(request) if k < reached}
    columns = {k: column for k, column in columns.items() if any(picture is not None for picture in column)}
    if columns:
        table = [[*(column[i] for column in columns.values()), final] for i, final in enumerate(finals)]
        last = f"k={lengths[0]}" if len(set(lengths)) == 1 else "as far as drawn"
        return captioned_table(table, names, [*(f"k={k}" for k in columns), last])
    by_class: dict[int, list[Image.Image | None]] = {}
    for i, picture in zip(drawn, finals, strict=True):
        by_class.setdefault(request.class_labels[i], []).append(picture)
    titles = {request.class_labels[i]: name for i, name in zip(drawn, names, strict=True)}
    return captioned_table(list(by_class.values()), [titles[label] for label in by_class])


def _report(request: DrawRequest, drawn: dict[int, int], output_dir: Path, *, interrupted: bool) -> None:
    lengths, total = list(drawn.values()), len(request.class_labels)
    if interrupted:
        logger.info(
            "stopped at k = %d of %d tokens; %d of %d images written to %s",
            lengths[-1], max(request.num_tokens), len(lengths), total, output_dir,
        )  # fmt: skip
    else:
        shown = str(lengths[0]) if len(set(lengths)) == 1 else f"{min(lengths)} to {max(lengths)}"
        logger.info("%d images of %s tokens written to %s", len(lengths), shown, output_dir)
    if request.keep is not None:
        sketched = request.sketch_tokens or 0
        kept = [row for row, length in drawn.items() if length > sketched]
        logger.info("kept rows: %s", " ".join(map(str, kept)) or "none")
