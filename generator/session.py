"""A run of sample.py: draw many images in batches, in one process or several, and write the files."""

import logging
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.config import InputError, Refinement
from common.files import exclusive_folder
from common.images import captioned_table, save_animation, save_png, to_pil
from common.runtime import StopOnSignal, Workers, is_out_of_memory, launched_workers, pick_dtype
from generator.config import SampleConfig
from generator.generate import Step
from generator.pipeline import ChannelTokPipeline
from generator.request import Request, request_of
from generator.token_file import TokenFile

logger = logging.getLogger(__name__)
OUR_FILES = re.compile(r"\d{5,}((_k\d{4,}|_strip)?\.png|\.gif|\.webp)")
STRIP_LENGTHS = (1, 4, 16, 32, 64, 128, 256, 512)
ANIMATION_FRAMES = 48
GRID_IMAGES = 200  # the most that grid.png shows


def draw(config: SampleConfig, given: dict[str, Any]) -> None:
    """Load a model, draw, and write NNNNN.png, previews/NNNNN_kKKKK.png, grid.png and tokens.npz.

    `given` has the fields of `SamplingConfig` that the user set.

    Raises:
        InputError: wrong flags, or a request that the model cannot serve; nothing is written or removed then.
    """
    with launched_workers(config.device) as workers:
        dtype = pick_dtype(config.dtype)
        pipeline = ChannelTokPipeline.from_pretrained(
            config.model, str(workers.device), dtype, compile=config.compile, refiner=config.refine != 0
        )
        Session(pipeline, request_of(config, given, pipeline), workers).run()


class Session:
    """Draws all images of a request.

    Each process draws every count-th batch and writes to .partial/ in the output folder; the main process moves
    everything to its place at the end. Ctrl-C or SIGTERM ends drawing: images drawn until then are written, those of
    later batches are omitted.
    """

    def __init__(self, pipeline: ChannelTokPipeline, request: Request, workers: Workers):
        self.pipeline, self.request, self.workers = pipeline, request, workers
        self.folder = Path(request.config.output_dir)
        self.partial = self.folder / ".partial"
        self.batches = list(request.batches())
        # k of the columns of grid.png beside the last
        others = {int(request.images.num_tokens.max()), request.config.sketch_tokens or 0} - {0}
        self.columns = sorted({*request.previews, *others})

    def run(self) -> None:
        """Draw and write."""
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"output_dir {self.folder} is a file; give a folder")
        config = replace(self.request.config, deadline=None, stop_when_stable=None)
        self._steps(replace(self.request, config=config))  # refuses arguments, draws nothing
        workers = self.workers
        with ExitStack() as stack:
            if workers.is_main:
                stack.enter_context(exclusive_folder(self.folder))
                shutil.rmtree(self.partial, ignore_errors=True)
                self.partial.mkdir()
            workers.wait()
            interrupt = stack.enter_context(StopOnSignal(ignore_repeats=workers.count > 1))
            self._draw_share(interrupt).save(self.partial / f"part-{workers.index}.npz")
            workers.wait()
            if workers.is_main:
                self._finish(interrupted=interrupt.requested)
            workers.wait()

    def _steps(self, request: Request) -> Iterator[Step]:
        images, config = request.images, request.config
        begun = bool(images.num_tokens.max())
        options = {
            "prefix": images.tokens if begun else None,
            "prefix_lengths": images.num_tokens.tolist() if begun else None,
            "deadline": config.deadline,
            "stop_when_stable": config.stop_when_stable,
            "refine": request.refinement,
            **vars(images.sampling),
        }
        labels, seeds = images.class_labels, images.seeds
        if config.sketch_tokens is None or config.keep is None:
            return self.pipeline.stream(labels, request.ends, seeds, **options)
        return self.pipeline.stream_best(labels, config.sketch_tokens, config.keep, request.ends[0], seeds, **options)

    def _draw_share(self, interrupt: StopOnSignal) -> TokenFile:
        """Draw this process's batches and write their images; return their tokens, in the order of the batches."""
        request, drawing = self.request, self.request.images
        done: list[int] = []
        own = self.batches[self.workers.index :: self.workers.count]
        total = sum(request.ends[i] - int(drawing.num_tokens[i]) for images in own for i in images)
        with tqdm(total=total, unit="token", delay=2, disable=not self.workers.is_main) as bar:
            for images in own:
                if done and interrupt.requested:
                    break
                try:
                    drawing = drawing.with_rows(images, self._draw_batch(request.part(images), bar, interrupt))
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    raise InputError(
                        f"out of memory with {len(images)} images; use --dtype bfloat16, a smaller --batch-size, "
                        "fewer tokens, or another --device"
                    ) from error
                done += images
        return drawing.rows(done)

    def _draw_batch(self, part: Request, bar: tqdm, interrupt: StopOnSignal) -> TokenFile:
        previews: dict[int, Any] = {}
        for step in self._steps(part):
            if step.num_tokens in part.previews:
                previews[step.num_tokens] = step.start_preview(part.preview_refinement)
            bar.update(sum(length == step.num_tokens for length in step.lengths))
            last = step
            if interrupt.requested:
                break
        drawn = replace(part.images, tokens=last.tokens.cpu(), num_tokens=torch.tensor(last.lengths))
        self._save_images(part, drawn, previews)
        return drawn

    def _images(self, drawn: TokenFile, num_tokens: Tensor, refine: Refinement | int) -> list[Image.Image]:
        """Decode the first num_tokens[i] tokens of each row."""
        decoder = self.pipeline.images(drawn.class_labels, drawn.seeds)
        tokens = drawn.tokens[:, : int(num_tokens.max())]
        return [to_pil(image) for image in decoder.start(tokens, num_tokens, refine).images()]

    def _save_images(self, part: Request, drawn: TokenFile, previews: dict[int, Any]) -> None:
        """Write the final image of each row, those at the k of `columns` that it has reached, and how it grows."""
        for row, picture in zip(part.rows, self._images(drawn, drawn.num_tokens, part.refinement), strict=True):
            save_png(picture, _path(self.partial, row))
        for k in self.columns:
            if k in previews:
                column = [to_pil(image) for image in previews[k].images()]
            else:
                column = self._images(drawn, drawn.num_tokens.clamp(max=k), part.preview_refinement)
            for row, picture, length in zip(part.rows, column, drawn.num_tokens.tolist(), strict=True):
                if length >= k:
                    save_png(picture, _path(self.partial, row, k))
        for i, row in enumerate(part.rows):
            self._save_growth(drawn.rows([i]), self.partial / f"{row:05d}", part.refinement)

    def _save_growth(self, image: TokenFile, path: Path, refine: Refinement | int) -> None:
        """Write an image at growing k as a strip, as an animation, or not at all."""
        config, length = self.request.config, int(image.num_tokens)

        def grown(lengths: list[int]) -> list[Image.Image]:
            count = len(lengths)
            copies = replace(
                image, tokens=image.tokens.expand(count, -1), class_labels=image.class_labels * count,
                seeds=image.seeds * count,
            )  # fmt: skip
            return self._images(copies, torch.tensor(lengths), refine)

        if config.strip:
            lengths = [*(k for k in STRIP_LENGTHS if k < length), length]
            save_png(captioned_table([grown(lengths)], (), [f"k={k}" for k in lengths]), f"{path}_strip.png")
        if config.animate:
            stride = -(-length // ANIMATION_FRAMES)
            save_animation(grown([*range(1, length, stride), length]), f"{path}.{config.animate}")

    def _finish(self, *, interrupted: bool) -> None:
        """Join the parts of all processes, and replace the files of an earlier run by the new ones."""
        request, count = self.request, self.workers.count
        drawing = request.continued or request.images
        done: list[int] = []
        for index in range(count):
            part = TokenFile.load(self.partial / f"part-{index}.npz")
            own = [i for images in self.batches[index::count] for i in images][: len(part.seeds)]
            drawing = drawing.with_rows([request.rows[i] for i in own], part)
            done += own
        done.sort()
        rows = [request.rows[i] for i in done]
        lengths = {row: int(drawing.num_tokens[row]) for row in rows}
        save_png(self._grid(done, lengths), self.partial / "grid.png")
        (drawing if request.continued else drawing.rows(rows)).save(self.partial / "tokens.npz")
        for k in set(self.columns) - set(request.previews):  # for the grid only
            for row in rows:
                _path(self.partial, row, k).unlink(missing_ok=True)
        self._replace_files()
        self._report(lengths, interrupted=interrupted)

    def _replace_files(self) -> None:
        """Move new files to their places; then remove those of an earlier run, unless this run continues it."""
        source, target = self.request.config.continue_from, self.folder / "tokens.npz"
        in_place = source is not None and Path(source).resolve() == target.resolve()
        earlier = {*self.folder.glob("*"), *self.folder.glob("previews/*")} if target.exists() else set()
        for path in [path for path in self.partial.rglob("*.*") if not path.name.startswith("part-")]:
            place = self.folder / path.relative_to(self.partial)
            place.parent.mkdir(exist_ok=True)
            path.replace(place)
            earlier.discard(place)
        for path in earlier:
            if not in_place and OUR_FILES.fullmatch(path.name):
                path.unlink()
        shutil.rmtree(self.partial)

    def _grid(self, images: Sequence[int], lengths: dict[int, int]) -> Image.Image:
        """With previews a row for each image and a column for each k; without, a row for each class with several."""
        images = images[:GRID_IMAGES]
        rows, labels = [self.request.rows[i] for i in images], [self.request.images.class_labels[i] for i in images]
        names = {label: self.pipeline.config.class_names[label].split(",")[0][:22] for label in labels}
        captions, reached = [names[label] for label in labels], max(lengths.values())
        finals = [_opened(_path(self.partial, row)) for row in rows]
        columns = {k: [_opened(_path(self.partial, row, k)) for row in rows] for k in self.columns if k < reached}
        columns = {k: column for k, column in columns.items() if any(column)}
        if columns:
            table = [list(cells) for cells in zip(*columns.values(), finals, strict=True)]
            last = f"k={reached}" if len(set(lengths.values())) == 1 else "as far as drawn"
            return captioned_table(table, captions, [*(f"k={k}" for k in columns), last])
        if len(names) == len(images):
            side = math.isqrt(len(images) - 1) + 1
            lines = [slice(start, start + side) for start in range(0, len(images), side)]
            return captioned_table([finals[line] for line in lines], cell_labels=[captions[line] for line in lines])
        by_class = [[final for final, own in zip(finals, labels, strict=True) if own == label] for label in names]
        return captioned_table(by_class, list(names.values()))

    def _report(self, lengths: dict[int, int], *, interrupted: bool) -> None:
        found, request = list(lengths.values()), self.request
        if interrupted:
            logger.info(
                "stopped at k = %d of %d tokens; %d of %d images written to %s",
                found[-1], max(request.ends), len(found), len(request.rows), self.folder,
            )  # fmt: skip
        else:
            shown = str(found[0]) if len(set(found)) == 1 else f"{min(found)} to {max(found)}"
            logger.info("%d images of %s tokens written to %s", len(found), shown, self.folder)
        if request.config.keep is not None:
            kept = [row for row, length in lengths.items() if length > (request.config.sketch_tokens or 0)]
            logger.info("kept rows: %s", " ".join(map(str, kept)) or "none")


def _path(folder: Path, row: int, k: int | None = None) -> Path:
    return folder / f"{row:05d}.png" if k is None else folder / "previews" / f"{row:05d}_k{k:04d}.png"


def _opened(path: Path) -> Image.Image | None:
    if not path.exists():
        return None
    with Image.open(path) as picture:
        return picture.copy()
