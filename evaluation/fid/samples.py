"""The pass: each sample is drawn once to the largest k, and every k is decoded from its first tokens."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.checkpoint import write_text
from common.errors import InputError
from common.images import save_png, to_pil
from common.measuring import synchronize
from common.randomness import generator_for
from common.runtime import is_out_of_memory
from common.team import Team
from evaluation.features import FeatureExtractor
from evaluation.fid.config import QualityConfig
from evaluation.fid.parts import Part, Parts
from evaluation.fid.reference import DRAWN_MARK
from generator.config import SamplingConfig
from generator.pipeline import ChannelTokPipeline

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Eyes:
    """What looks at pictures: features and logits for distances, and a classifier that says what they show.

    classes: the model's class for each class of the classifier, -1 for those that the model does not have; None
    without a classifier.
    """

    extractor: FeatureExtractor
    classifier: FeatureExtractor | None
    classes: Tensor | None

    def look(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Pictures (b 3 H W) uint8 -> features (b d), logits (b c), and the model's class of each (b,); on the CPU."""
        features, logits = (seen.cpu() for seen in self.extractor.see(images))
        if self.classifier is None or self.classes is None:
            return features, logits, None
        opinion = logits if self.classifier is self.extractor else self.classifier.see(images)[1].cpu()
        return features, logits, self.classes[opinion.argmax(1)]


def open_eyes(config: QualityConfig, class_names: Sequence[str], device: torch.device) -> Eyes:
    """The networks that a configuration asks for, on a device.

    Raises:
        InputError: weights that cannot be had, or a --classifier that does not know the model's classes.
    """
    extractor = FeatureExtractor(config.inception_weights, device, classifier=config.features)
    if config.classifier is not None:
        classifier = FeatureExtractor(device=device, classifier=config.classifier)
    elif config.features is not None:
        classifier = extractor
    else:
        return Eyes(extractor=extractor, classifier=None, classes=None)
    known = classifier.class_names or []
    unknown = [name for name in class_names if name not in known]
    if unknown and config.classifier is not None:
        raise InputError(
            f"{config.classifier} does not know {len(unknown)} classes of {config.model}, first {unknown[0]!r}; "
            "give a classifier of the same classes, by name"
        )
    if unknown:
        logger.warning("%s does not know class %r: no class accuracy is measured", config.features, unknown[0])
        return Eyes(extractor=extractor, classifier=None, classes=None)
    places = {name: label for label, name in enumerate(class_names)}
    return Eyes(
        extractor=extractor,
        classifier=classifier,
        classes=torch.tensor([places.get(name, -1) for name in known]),
    )


def labels_of(samples: range, num_classes: int) -> list[int]:
    """The classes of samples: all classes in one random order, again and again.

    So every number of samples is balanced but for one, and fewer than there are classes are any of them.
    """
    order = torch.randperm(num_classes, generator=generator_for(6, num_classes)).tolist()
    return [order[sample % num_classes] for sample in samples]


@contextmanager
def memory_errors(config: QualityConfig) -> Iterator[None]:
    """Put what runs out of memory into a user's words."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"out of memory with {config.batch_size} pictures side by side; give a smaller --batch-size"
        ) from error


def draw_samples(
    pipeline: ChannelTokPipeline,
    sampling: SamplingConfig,
    config: QualityConfig,
    eyes: Eyes,
    parts: Parts,
    team: Team,
    title: str = "",
) -> None:
    """Write the parts that are missing, of those that fall to this process."""
    # dealt out before looking which are there: what one process has written moves nothing to another
    own = range(team.index, len(parts), team.count)
    total = sum(len(parts.samples(index)) for index in own)
    with tqdm(total=total, unit="sample", desc=title or None, disable=not team.is_main, smoothing=0.05) as bar:
        is_warm = False
        for index in own:
            if not parts.has(index):
                if not is_warm:
                    _warm_up(pipeline, sampling, parts.samples(index))
                    is_warm = True
                parts.save(index, _draw(pipeline, sampling, config.seed, eyes, parts, index))
            bar.update(len(parts.samples(index)))


def _warm_up(pipeline: ChannelTokPipeline, sampling: SamplingConfig, samples: range) -> None:
    """Compile and capture before a clock runs."""
    labels = labels_of(samples, pipeline.config.num_classes)
    for step in pipeline.stream(labels, 1, **vars(sampling)):
        pipeline.pictures(step.tokens)


def _draw(
    pipeline: ChannelTokPipeline, sampling: SamplingConfig, seed: int, eyes: Eyes, parts: Parts, index: int
) -> Part:
    samples, device = parts.samples(index), pipeline.engine.decoder.device
    labels = labels_of(samples, pipeline.config.num_classes)
    seeds = [seed + sample for sample in samples]
    draw_seconds, decode_seconds, look_seconds = [], [], []
    begun = time.perf_counter()
    for step in pipeline.stream(labels, parts.budgets[-1], seeds, **vars(sampling)):
        if step.num_tokens in parts.budgets:
            synchronize(device)
            draw_seconds.append(time.perf_counter() - begun)
        tokens = step.tokens
    found: dict[str, dict[int, Tensor]] = {"features": {}, "logits": {}, "predicted": {}}
    for k in parts.budgets:
        begun = time.perf_counter()
        images = pipeline.pictures(tokens[:, :k])
        synchronize(device)
        decoded = time.perf_counter()
        found["features"][k], found["logits"][k], predicted = eyes.look(images)
        if predicted is not None:
            found["predicted"][k] = predicted
        decode_seconds.append(decoded - begun)
        look_seconds.append(time.perf_counter() - decoded)
    return Part(
        tokens=tokens.cpu(),
        **found,
        draw_seconds=draw_seconds,
        decode_seconds=decode_seconds,
        look_seconds=look_seconds,
    )


def pictures_of(pipeline: ChannelTokPipeline, parts: Parts, index: int, k: int) -> Tensor:
    """The pictures of a part at k, (b 3 H W) uint8 on the CPU, decoded anew from its tokens."""
    return pipeline.pictures(parts.tokens(index)[:, :k]).cpu()


def save_pictures(pipeline: ChannelTokPipeline, parts: Parts, folder: Path, drawn_by: str, team: Team) -> None:
    """Write k0032/000000.png and so on for the parts of this process; those that are there already stay.

    Raises:
        InputError: pictures of another drawing, or more than there are samples, are there.
    """
    mark = folder / DRAWN_MARK
    text = f"{drawn_by}\n"
    if mark.is_file() and mark.read_text(encoding="utf-8") != text:
        raise InputError(f"{folder} holds pictures of another drawing; remove it, or choose another --output-dir")
    for k in parts.budgets:
        if len(list((folder / f"k{k:04d}").glob("*.png"))) > parts.num_samples:
            raise InputError(f"{folder} holds more than {parts.num_samples} pictures of a k; remove it")
    write_text(mark, text)
    own = range(team.index, len(parts), team.count)
    for index in tqdm(own, desc="pictures", leave=False, disable=not team.is_main):
        for k in parts.budgets:
            paths = [folder / f"k{k:04d}" / f"{sample:06d}.png" for sample in parts.samples(index)]
            if not all(path.is_file() for path in paths):
                for path, image in zip(paths, pictures_of(pipeline, parts, index, k), strict=True):
                    save_png(to_pil(image), path)
