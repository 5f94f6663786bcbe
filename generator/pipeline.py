"""`ChannelTokPipeline`: class labels in, pictures out. The one place where both models meet."""

import difflib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.checkpoint import files_fingerprint, fingerprint, resolve_folder
from common.config import InputError, Refinement, integers
from common.images import UnreadableImageError, load_image, to_float
from common.runtime import move, pick_device
from generator.config import ChannelGPTConfig, SamplingConfig
from generator.decode import CachedDecoder
from generator.engine import Engine
from generator.generate import Step, stream
from generator.model import ChannelGPT
from generator.settings import ModelSettings
from generator.stopping import Deadline, KeepBest, Scorer, StopRule, WhenStable, log_likelihood_scorer, ruled
from refiner.flow import ImageRefiner
from refiner.model import Refiner
from tokenizer.decoding import PendingPictures, PictureDecoder
from tokenizer.tokenizer import ChannelTokenizer


@dataclass(frozen=True, kw_only=True)
class PipelineOutput:
    """Finished drawings: PIL pictures, tokens (b k) int64 on the CPU, and how many of them each image has."""

    images: list[Image.Image]
    tokens: Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class StreamImages:
    """Images of one stream: decodes tokens, and refines what it has decoded, with each image's class and seed."""

    decoder: PictureDecoder
    refiner: ImageRefiner | None
    class_labels: Sequence[int]
    seeds: Sequence[int]

    def start(self, tokens: Tensor, num_tokens: Tensor, refine: int | Refinement = 0) -> PendingPictures:
        """As `PictureDecoder.start`; with `refine` other than 0 the images are refined when they are requested.

        Raises:
            InputError: a negative number of steps, or a model without refiner.
        """
        decoded = self.decoder.start(tokens.to(self.decoder.device), num_tokens)
        if refine == 0:
            return decoded
        if self.refiner is None:
            raise InputError(f"refine is {refine}, but this model has no refiner; use 0")
        refiner, refinement, lengths = self.refiner, self.refiner.refinement(refine), num_tokens.tolist()
        return PendingPictures(
            lambda: refiner(decoded.images(), lengths, self.class_labels, self.seeds, refinement).cpu()
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelTokPipeline:
    """A tokenizer and a generator that belong together, and a refiner if the model has one.

    Example:
        pipe = ChannelTokPipeline.from_pretrained("weights/demo")
        pipe([3, 7], num_tokens=32, seed=0).images[0].save("out.png")

    Attributes: `fingerprint` of tokenizer and generator, `tokens_fingerprint` of the weights that decide tokens.
    """

    tokenizer: ChannelTokenizer
    engine: Engine
    pictures: PictureDecoder
    refiner: ImageRefiner | None
    settings: ModelSettings
    fingerprint: str
    tokens_fingerprint: str

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
        refiner: bool = True,
    ) -> Self:
        """Load a folder with tokenizer/, generator/ and perhaps refiner/, or a model from the Hugging Face hub.

        Args:
            name_or_path: the folder or hub name.
            device: auto, cpu, cuda, cuda:1 or mps.
            dtype: of the generator's weights; sums are float32. The picture decoder picks its own.
            compile: compile the step, the picture decoder and the refiner; see `Engine`.
            refiner: whether to load the refiner if there is one.

        Raises:
            InputError: a missing or damaged file, another architecture, or models that were not trained together.
        """
        target, folder = pick_device(device), resolve_folder(name_or_path)
        for part in ("tokenizer", "generator"):
            if not (folder / part).is_dir():
                raise InputError(f"{folder} has no folder {part}/; give a folder with tokenizer/ and generator/")
        with ThreadPoolExecutor(1) as pool:  # hashing takes a third of the time
            generator_hash = pool.submit(files_fingerprint, folder / "generator")
            tokenizer = ChannelTokenizer.from_pretrained(folder / "tokenizer")
            tokenizer_hash = pool.submit(fingerprint, tokenizer)
            model = ChannelGPT.from_pretrained(folder / "generator", dtype=dtype)
            token_hash = tokenizer.token_fingerprint()
        whole_hash, drawing_hash = tokenizer_hash.result(), generator_hash.result()
        if token_hash != model.config.tokenizer_fingerprint:
            raise InputError(
                f"{folder}: the generator was trained on tokens of tokenizer {model.config.tokenizer_fingerprint}, "
                f"the folder holds {token_hash}; put the right tokenizer/ beside it"
            )
        images = None
        if refiner and (folder / "refiner").is_dir():
            network = Refiner.from_pretrained(folder / "refiner")
            expected = {
                "tokenizer_fingerprint": whole_hash, "image_size": tokenizer.config.image_size,
                "num_channels": tokenizer.config.num_channels, "class_names": model.config.class_names,
            }  # fmt: skip
            for name, value in expected.items():
                if getattr(network.config, name) != value:
                    raise InputError(
                        f"{folder}: {name} of the refiner differs from that of the model; train one for it"
                    )
            images = ImageRefiner(move(network, target), compile=compile)
        return cls(
            tokenizer=tokenizer,
            engine=Engine(CachedDecoder.from_model(move(model, target)), compile=compile),
            pictures=PictureDecoder(move(tokenizer, target), compile=compile),
            refiner=images,
            settings=ModelSettings.load(folder / "generator", f"{whole_hash}-{drawing_hash}"),
            fingerprint=f"{whole_hash}-{drawing_hash}",
            tokens_fingerprint=f"{token_hash}-{drawing_hash}",
        )

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

    def tokens_of(self, path: str | Path) -> Tensor:
        """Tokens of a photograph, (1 C) int64 on the CPU.

        Raises:
            InputError: a file that is no image.
        """
        try:
            image = load_image(path, self.tokenizer.config.image_size)
        except UnreadableImageError as error:
            raise InputError(f"{error}; give an image file") from error
        return self.tokenizer.tokenize(to_float(image[None]).to(self.tokenizer.device)).cpu()

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
        refine: int | Refinement | None = None,
        **sampling: Any,
    ) -> Iterator[Step]:
        """Draw, one token of every image at each step; stop whenever you like by not asking for the next.

        Args:
            class_labels: a label for each image.
            num_tokens: where an image ends by itself, one for all or one for each; None draws all C.
            seed: a seed for each image, or one number: image i then has seed + i.
            prefix: tokens (b j) of an earlier drawing or of a photograph to continue.
            prefix_lengths: how many of them each image has; None: all j.
            deadline: seconds from this call in which the pictures are to be finished, decoding included.
            stop_when_stable: grey levels; see `stopping.WhenStable`.
            scored: whether steps carry the log-likelihood.
            refine: steps of the refiner for the final images, or all its settings; the deadline includes it; 0: none;
                None: the default if the model has a refiner. `Step.preview` has an argument of its own.
            sampling: the fields of `SamplingConfig`: temperature, top_k, top_p, cfg_scale, ... What is not given is
                the model's own for all C, whatever num_tokens is, so that a prefix stays one.

        Raises:
            InputError: an argument out of its range, at the call.
        """
        config, refinement = self.sampling(**sampling), self.refinement(refine)
        class_labels = integers("class_labels", class_labels)
        if isinstance(seed, int | np.integer):
            seed = [int(seed) + i for i in range(len(class_labels))]
        seeds = integers("seed", seed)
        count = self.config.num_channels if num_tokens is None else num_tokens
        images = self.images(class_labels, seeds)
        rules: list[StopRule] = []
        if deadline is not None:
            # what is compiled, captured or measured once is done before the clock starts
            for _ in stream(self.engine, class_labels, seeds, 1, config, scored=scored):
                decode_seconds = self.pictures.seconds(len(class_labels))
                if refinement is not None and self.refiner is not None:
                    decode_seconds += self.refiner.seconds(len(class_labels), refinement)
            rules.append(Deadline(deadline, decode_seconds, self.engine.decoder.device))
        if stop_when_stable is not None:
            rules.append(WhenStable(stop_when_stable, self.pictures, self.config.num_channels))
        steps = stream(self.engine, class_labels, seeds, count, config, prefix, prefix_lengths, scored, images)
        return ruled(steps, rules)

    def __call__(
        self,
        class_labels: Sequence[int],
        num_tokens: int | Sequence[int] | None = None,
        seed: int | Sequence[int] = 0,
        **options: Any,
    ) -> PipelineOutput:
        """Draw whole images, refined by default if the model has a refiner; the arguments are those of `stream`."""
        refinement = self.refinement(options.get("refine"))
        *_, last = self.stream(class_labels, num_tokens, seed, **options)
        images = last.preview(refine=refinement or 0)
        return PipelineOutput(images=images, tokens=last.tokens.cpu(), lengths=last.lengths)

    def images(self, class_labels: Sequence[int], seeds: Sequence[int]) -> StreamImages:
        """A decoder, and refiner, of tokens of these classes and seeds."""
        return StreamImages(self.pictures, self.refiner, class_labels, seeds)

    def refinement(self, refine: int | Refinement | None, **changes: float | None) -> Refinement | None:
        """How final images are refined, None for not at all.

        Args:
            refine: as in `stream`.
            changes: other fields of `Refinement`; None leaves a field as it is.

        Raises:
            InputError: a value that is not allowed, refinement without a refiner, or changes without refinement.
        """
        given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
        if refine == 0 or (refine is None and self.refiner is None):
            if given:
                raise InputError(f"refine_{next(iter(given))} is given, but images are not refined; omit it")
            return None
        if self.refiner is None:
            raise InputError("refine is given, but this model has no refiner/; use 0, or train one (train_refiner.py)")
        return replace(self.refiner.refinement(Refinement.steps if refine is None else refine), **given)

    def stream_best(
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
        """Draw all to `sketch_tokens`, and only the best of each class to the end.

        The kept ones continue from their caches; nothing is drawn twice. At the last step `.lengths` distinguishes
        finished images from sketches. `scorer` maps a step to a number for each image, the higher the better; it may
        look at `step.preview()`. `keep` of each class continue. The other arguments are those of `stream`.

        Raises:
            InputError: an argument out of its range, at the call; a scorer's answer of another length.
        """
        end = self.config.num_channels if num_tokens is None else num_tokens
        if not 1 <= sketch_tokens < end:
            raise InputError(f"sketch_tokens is {sketch_tokens}; allowed are 1..{end - 1}, below num_tokens")
        if keep < 1:
            raise InputError(f"keep is {keep}; it must be at least 1")
        prefix, lengths = options.get("prefix"), options.get("prefix_lengths")
        begun = 0 if prefix is None else max(lengths or [prefix.shape[-1]])
        if begun >= sketch_tokens:
            raise InputError(f"sketch_tokens is {sketch_tokens}, but a prefix has {begun} tokens; raise sketch_tokens")
        steps = self.stream(class_labels, end, seed, **({"scored": True} | options))
        return ruled(steps, [KeepBest(list(class_labels), sketch_tokens, keep, scorer)])
