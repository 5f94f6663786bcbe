"""Drawing for the web page: checked requests in, frames out; knows no web framework."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from common.config import InputError
from common.images import load_image, to_pil
from generator.generate import Step
from generator.pipeline import ChannelTokPipeline
from page.config import Choice

SKETCHES, SKETCH_TOKENS = 9, 32
MAX_FILE_BYTES, MAX_PIXELS = 10 * 2**20, 40_000_000
FRAME_SECONDS = 0.06  # between frames, or twice as long as making one takes
DRAFT_STEPS = 2  # of the refiner, for images that are replaced soon or are many


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A partially drawn image.

    choice: its settings.
    tokens: those of the first k channels.
    seconds: time spent drawing, decoding of frames included.
    """

    choice: Choice
    tokens: tuple[int, ...] = ()
    seconds: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Number of tokens drawn."""
        return len(self.tokens)


class Studio:
    """Draws for visitors with one shared model; calls from several threads do not affect each other.

    Args:
        pipeline: the model.
    """

    def __init__(self, pipeline: ChannelTokPipeline):
        self.pipeline = pipeline
        self.num_tokens, self.class_names = pipeline.config.num_channels, pipeline.config.class_names
        self.bits, self.can_refine = pipeline.config.num_bits, pipeline.refiner is not None
        self.sketch_tokens = min(SKETCH_TOKENS, self.num_tokens)

    def choice(self, class_label: int, seed: float, cfg_scale: float, temperature: float, refine: bool) -> Choice:
        """Check a visitor's settings.

        Raises:
            InputError: a value out of range, or a class that the model does not have.
        """
        if not isinstance(seed, int | float) or not float(seed).is_integer():
            raise InputError(f"seed is {seed}; it must be a whole number")
        choice = Choice(
            class_label=class_label, seed=int(seed), cfg_scale=cfg_scale, temperature=temperature,
            refine=refine and self.can_refine,
        )  # fmt: skip
        if choice.class_label >= len(self.class_names):
            raise InputError(f"class {class_label} is unknown; allowed are 0..{len(self.class_names) - 1}")
        return choice

    def draw(self, drawing: Drawing) -> Iterator[tuple[Drawing, Image.Image]]:
        """Continue a drawing to its last token: the drawing and its image, as often as images can be made.

        Stop by not asking for the next one. The first image is not refined, the others but the last are drafts (see
        `images`). The tokens are those of an uninterrupted drawing with the same choice. A complete drawing is yielded
        unchanged: a visitor's Stop may arrive after the last token.
        """
        if drawing.num_tokens >= self.num_tokens:
            yield drawing, self.image(drawing)
            return
        begun = time.perf_counter()
        shown, cost = -1.0, 0.0
        for step in self._stream([drawing]):
            now = time.perf_counter()
            if now - shown < max(FRAME_SECONDS, 2 * cost) and step.drawing:
                continue
            (found,) = self._drawings([drawing], step)
            if shown < 0 and step.drawing:  # at once
                image = self.image(replace(found, choice=replace(drawing.choice, refine=False)))
            else:
                image = self.image(found, draft=bool(step.drawing))
            shown = time.perf_counter()
            cost = shown - now
            yield replace(found, seconds=drawing.seconds + shown - begun), image

    def sketches(self, choice: Choice) -> list[Drawing]:
        """Draw the first tokens of nine images whose seeds follow each other."""
        drawings = [Drawing(choice=replace(choice, seed=choice.seed + i)) for i in range(SKETCHES)]
        begun = time.perf_counter()
        for step in self._stream(drawings):
            if step.num_tokens == self.sketch_tokens:
                break
        seconds = time.perf_counter() - begun
        return [replace(drawing, seconds=seconds) for drawing in self._drawings(drawings, step)]

    def sketch_images(self, sketches: Sequence[Drawing]) -> Iterator[list[Image.Image]]:
        """The images of sketches: decoded, and again as refined drafts if the choice says so."""
        yield self.images([replace(sketch, choice=replace(sketch.choice, refine=False)) for sketch in sketches])
        if sketches[0].choice.refine:
            yield self.images(sketches, draft=True)

    def image(self, drawing: Drawing, *, draft: bool = False) -> Image.Image:
        """The image of a drawing; see `images`."""
        return self.images([drawing], draft=draft)[0]

    def images(self, drawings: Sequence[Drawing], *, draft: bool = False) -> list[Image.Image]:
        """Decode drawings of any lengths, and refine them if the first one's choice says so; a draft in fewer steps."""
        choices = [drawing.choice for drawing in drawings]
        decoder = self.pipeline.images([choice.class_label for choice in choices], [choice.seed for choice in choices])
        tokens = pad_sequence([torch.tensor(drawing.tokens) for drawing in drawings], batch_first=True)
        lengths = torch.tensor([drawing.num_tokens for drawing in drawings])
        refine = (DRAFT_STEPS if draft else None) if choices[0].refine else 0
        pending = decoder.start(tokens, lengths, self.pipeline.refinement(refine) or 0)
        return [to_pil(image) for image in pending.images()]

    def prefixes(self, drawing: Drawing, lengths: Sequence[int], *, draft: bool = False) -> list[Image.Image]:
        """The image at each of some k."""
        return self.images([replace(drawing, tokens=drawing.tokens[:k]) for k in lengths], draft=draft)

    def lengths(self, num_tokens: int) -> list[int]:
        """1, 4, 16, 32, 64, 128, ... below num_tokens, and num_tokens."""
        return [*(k for k in (1, 4, 16, 32, 64, 128, 256) if k < num_tokens), num_tokens]

    def photograph(self, path: str | Path, choice: Choice) -> Drawing:
        """All tokens of a photograph, as a drawing that can be cut to any k and continued.

        Raises:
            InputError: a file that is too large, or no image.
        """
        if (size := Path(path).stat().st_size) > MAX_FILE_BYTES:
            raise InputError(f"the file has {size / 2**20:.1f} MB; allowed are {MAX_FILE_BYTES // 2**20} MB")
        try:
            with Image.open(path) as header:  # reads no pixels
                width, height = header.size
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise InputError("the file is not an image that can be read; give a PNG, JPEG or WebP file") from error
        if width * height > MAX_PIXELS:
            raise InputError(f"the image has {width} x {height} pixels; allowed are {MAX_PIXELS // 10**6} million")
        tokens = self.pipeline.tokens_of(path)
        return Drawing(choice=choice, tokens=tuple(tokens[0].tolist()))

    def square(self, path: str | Path) -> Image.Image:
        """The middle square of a photograph, in the size of the model's images."""
        return to_pil(load_image(path, self.pipeline.tokenizer.config.image_size))

    def _stream(self, drawings: Sequence[Drawing]) -> Iterator[Step]:
        choices = [drawing.choice for drawing in drawings]
        tokens = torch.tensor([drawing.tokens for drawing in drawings], dtype=torch.long)
        return self.pipeline.stream(
            [choice.class_label for choice in choices],
            seed=[choice.seed for choice in choices],
            prefix=tokens if tokens.shape[1] else None,
            cfg_scale=choices[0].cfg_scale,
            temperature=choices[0].temperature,
        )

    @staticmethod
    def _drawings(drawings: Sequence[Drawing], step: Step) -> list[Drawing]:
        rows = step.tokens.tolist()
        return [replace(drawing, tokens=tuple(row)) for drawing, row in zip(drawings, rows, strict=True)]
