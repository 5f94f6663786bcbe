"""`ChannelTokPipeline`: class labels in, pictures out. The one place where both models meet."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.checkpoint import files_fingerprint, fingerprint, resolve_folder
from common.errors import InputError
from common.images import UnreadableImageError, load_image, to_float
from common.runtime import move, pick_device
from generator.config import ChannelGPTConfig, SamplingConfig
from generator.decode import CachedDecoder
from generator.engine import Engine
from generator.generate import Step, stream
from generator.model import ChannelGPT
from generator.settings import ModelSettings
from generator.stopping import Deadline, StopRule, WhenStable, check_deadline, waiter
from tokenizer.decoding import PictureDecoder
from tokenizer.tokenizer import ChannelTokenizer


@dataclass(frozen=True, kw_only=True)
class PipelineOutput:
    """Finished drawings: PIL pictures, tokens (b k) int64 on the CPU, and how many of them each image has."""

    images: list[Image.Image]
    tokens: Tensor
    lengths: tuple[int, ...]


Scorer = Callable[[Step], Sequence[float]]


def log_likelihood_scorer(step: Step) -> Sequence[float]:
    """The built-in scorer: the generator's own log-likelihood of each image's tokens, in nats."""
    if step.log_likelihood is None:
        raise InputError("the stream carries no log-likelihood; ask for it with scored=True")
    scores: list[float] = step.log_likelihood.tolist()
    return scores


def best_of_each_class(class_labels: Sequence[int], scores: Sequence[float], keep: int) -> list[int]:
    """Indices of the `keep` highest scores of each class, in their order; ties go to the earlier image."""
    ranked = sorted(range(len(scores)), key=lambda image: -scores[image])
    chosen: list[int] = []
    for label in dict.fromkeys(class_labels):
        chosen += [image for image in ranked if class_labels[image] == label][:keep]
    return sorted(chosen)


class ChannelTokPipeline:
    """A tokenizer and a generator that belong together.

    Example:
        pipe = ChannelTokPipeline.from_pretrained("weights/demo")
        pipe([3, 7], num_tokens=32, seed=0).images[0].save("out.png")

    Attributes: `fingerprint` stands for all weights; `tokens_fingerprint` for those that decide which tokens are drawn
    and what they mean: a decoder that was trained further draws the same ones.
    """

    def __init__(
        self,
        tokenizer: ChannelTokenizer,
        engine: Engine,
        pictures: PictureDecoder,
        model_fingerprint: str,
        tokens_fingerprint: str,
        settings: ModelSettings,
    ):
        self.tokenizer, self.engine, self.pictures = tokenizer, engine, pictures
        self.fingerprint, self.tokens_fingerprint, self.settings = model_fingerprint, tokens_fingerprint, settings

    @property
    def config(self) -> ChannelGPTConfig:
        """Sizes and class names of the generator."""
        return self.engine.decoder.config

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        device: str = "auto",
        dtype: torch.dtype = torch.float32,
        *,
        compile: bool = False,
    ) -> Self:
        """Load a folder with tokenizer/ and generator/, or a model of that name from the Hugging Face hub.

        Args:
            name_or_path: the folder or hub name.
            device: auto, cpu, cuda, cuda:1 or mps.
            dtype: of the generator's weights; sums are float32. The picture decoder picks its own.
            compile: compile the step and the picture decoder; see `Engine`.

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
        model = ChannelGPT.from_pretrained(folder / "generator", dtype=dtype)
        made_by = tokenizer.token_fingerprint()
        if made_by != model.config.tokenizer_fingerprint:
            raise InputError(
                f"{folder}: the generator was trained on tokens of tokenizer {model.config.tokenizer_fingerprint}, "
                f"the folder holds {made_by}; put the right tokenizer/ beside it"
            )
        drawn_by = files_fingerprint(folder / "generator")
        model_fingerprint = f"{fingerprint(tokenizer)}-{drawn_by}"
        engine = Engine(CachedDecoder.from_model(move(model, target)), compile=compile)
        tokenizer = move(tokenizer, target)
        settings = ModelSettings.load(folder / "generator", model_fingerprint)
        pictures = PictureDecoder(tokenizer, compile=compile)
        return cls(tokenizer, engine, pictures, model_fingerprint, f"{made_by}-{drawn_by}", settings)

    def sampling(self, num_tokens: int | None = None, **given: Any) -> SamplingConfig:
        """How tokens are drawn: what is given, and for all else the model's own settings for drawings of k tokens.

        Args:
            num_tokens: k; None: all C.
            given: fields of `SamplingConfig`; if one of guidance is given (cfg_...), so are the others, as plain ones.

        Raises:
            InputError: a value that is not allowed.
        """
        return self.settings.of(self.config.num_channels if num_tokens is None else num_tokens).override(given)

    def class_labels(self, names: Sequence[str]) -> list[int]:
        """Labels of classes by name: the whole name, or any part of it between commas; case does not matter.

        Raises:
            InputError: an unknown name; the line gives the nearest ones.
        """
        known: dict[str, int] = {}
        for label, name in enumerate(self.config.class_names):
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

    def prefix_of(self, path: str | Path, num_tokens: int) -> Tensor:
        """The first channels of a photograph: an image file -> tokens (1 num_tokens).

        Raises:
            InputError: a file that is no image, or a number of tokens outside [1, C).
        """
        if not 1 <= num_tokens < self.config.num_channels:
            raise InputError(f"prefix_tokens is {num_tokens}; allowed are 1..{self.config.num_channels - 1}")
        try:
            image = load_image(path, self.tokenizer.config.image_size)
        except UnreadableImageError as error:
            raise InputError(f"prefix_image {error}; give an image file") from error
        return self.tokenizer.tokenize(to_float(image[None]).to(self.tokenizer.device))[:, :num_tokens].cpu()

    def stream(
        self,
        class_labels: Sequence[int],
        num_tokens: int | Sequence[int] | None = None,
        seed: int | Sequence[int] = 0,
        *,
        prefix: Tensor | None = None,
        prefix_lengths: Sequence[int] | None = None,
        deadline: float | None = None,
        stop_when_stable: float | None = None,
        scored: bool = False,
        **sampling: Any,
    ) -> Iterator[Step]:
        """Draw, one token of every image at each step; stop whenever you like by not asking for the next.

        Args:
            class_labels: a label for each image.
            num_tokens: where an image ends by itself, one for all or one for each; None draws all C.
            seed: a seed for each image, or one number: image i then has seed + i.
            prefix: tokens (b j) of an earlier drawing or of a photograph to go on from.
            prefix_lengths: how many of them each image has; None: all j.
            deadline: seconds from this call in which the pictures are to be finished, decoding included.
            stop_when_stable: grey levels; see `stopping.WhenStable`.
            scored: whether steps carry the log-likelihood.
            sampling: the fields of `SamplingConfig`: temperature, top_k, top_p, cfg_scale, ... What is not given is
                the model's own for all C, whatever num_tokens is, so that a prefix stays one.

        Raises:
            InputError: an argument out of its range, at the call.
        """
        config = self.sampling(**sampling)
        if isinstance(seed, int | np.integer):
            seeds = [int(seed) + i for i in range(len(class_labels))]
        else:
            seeds = [int(entry) for entry in seed]
        count = self.config.num_channels if num_tokens is None else num_tokens
        rules: list[StopRule] = []
        if deadline is not None:
            check_deadline(deadline)
            # what is compiled, captured or measured once is done before the clock starts
            for _ in stream(self.engine, class_labels, seeds, 1, config, scored=scored):
                decode_seconds = self.pictures.seconds(len(class_labels))
            rules.append(Deadline(deadline, decode_seconds, waiter(self.engine.decoder.device)))
        if stop_when_stable is not None:
            rules.append(WhenStable(stop_when_stable, self.pictures, self.config.num_channels))
        steps = stream(self.engine, class_labels, seeds, count, config, prefix, prefix_lengths, scored, self.pictures)
        return self._ruled(steps, rules)

    def _ruled(self, steps: Iterator[Step], rules: Sequence[StopRule]) -> Iterator[Step]:
        for step in steps:
            for rule in rules:
                step.stop(rule(step))
            yield step

    def __call__(
        self,
        class_labels: Sequence[int],
        num_tokens: int | Sequence[int] | None = None,
        seed: int | Sequence[int] = 0,
        **options: Any,
    ) -> PipelineOutput:
        """Draw whole pictures; the arguments are those of `stream`."""
        *_, last = self.stream(class_labels, num_tokens, seed, **options)
        return PipelineOutput(images=last.preview(), tokens=last.tokens.cpu(), lengths=last.lengths)

    def refine(
        self,
        class_labels: Sequence[int],
        sketch_tokens: int,
        keep: int,
        num_tokens: int | None = None,
        seed: int | Sequence[int] = 0,
        *,
        scorer: Scorer = log_likelihood_scorer,
        **options: Any,
    ) -> Iterator[Step]:
        """Sketch many, refine few: draw all to `sketch_tokens`, and only the best of each class to the end.

        The kept ones go on from their caches; nothing is drawn twice. At the last step `.lengths` tells
        the finished images from the sketches.

        Args:
            class_labels: a label for each sketch.
            sketch_tokens: where the sketches are judged, below num_tokens.
            keep: how many of each class go on.
            num_tokens: where the kept ones end; None draws all C.
            seed: as in `stream`.
            scorer: a step -> a number for each image, the higher the better; it may look at `step.preview()`.
            options: as in `stream`.

        Raises:
            InputError: an argument out of its range, at the call; a scorer's answer of another length.
        """
        end = self.config.num_channels if num_tokens is None else num_tokens
        if not 1 <= sketch_tokens < end:
            raise InputError(f"sketch_tokens is {sketch_tokens}; allowed are 1..{end - 1}, below num_tokens")
        if keep < 1:
            raise InputError(f"keep is {keep}; it must be at least 1")
        steps = self.stream(class_labels, end, seed, **({"scored": True} | options))
        return self._refining(steps, list(class_labels), sketch_tokens, keep, scorer)

    def _refining(
        self,
        steps: Iterator[Step],
        class_labels: Sequence[int],
        sketch_tokens: int,
        keep: int,
        scorer: Scorer,
    ) -> Iterator[Step]:
        for step in steps:
            if step.num_tokens == sketch_tokens:
                scores = list(scorer(step))
                if len(scores) != len(class_labels):
                    raise InputError(f"the scorer gave {len(scores)} numbers for {len(class_labels)} images")
                step.keep(best_of_each_class(class_labels, scores, keep))
            yield step
