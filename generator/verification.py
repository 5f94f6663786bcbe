"""Looking through a whole token store: what is wrong with it, and what it holds."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from generator.tokens import SPLITS, Split, StoreHeader, TokenStore

EACH_CLASS = 20  # up to so many classes, each has a line of its own
RANGES = 10  # of more, so many lines, about
NAMED = 10  # of those without images


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was found.

    Attributes:
        problems: a line for each thing that is wrong.
        images: split -> how many of its images each class has, of the shards that are sound.
        left_out: split -> how many files of these shards could not be read.
    """

    problems: list[str]
    images: dict[Split, npt.NDArray[np.int64]]
    left_out: dict[Split, int]


def verify(store: TokenStore) -> Verified:
    """Read all that a store holds: checksums, counts, shapes, number formats, ranges, and whose tokens they are.

    The store need not be complete; a missing shard is a problem like any other.
    """
    header = store.header
    problems: list[str] = []
    images = {split: np.zeros(header.num_classes, dtype=np.int64) for split in SPLITS}
    left_out: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    for split, shard in tqdm(header.shards(), unit="shard", leave=False):
        found = store.problems(split, shard)
        problems += found
        if not found:
            images[split] += np.bincount(store.read_labels(split, shard), minlength=header.num_classes)
            left_out[split] += len(store.record(split, shard).left_out)
    return Verified(problems=problems, images=images, left_out=left_out)


def describe(header: StoreHeader, found: Verified) -> list[str]:
    """Lines for a reader: how much each split holds, and of which classes."""
    lines = []
    for split in SPLITS:
        images, views = found.images[split], header.num_views(split)
        lines.append(
            f"{split}: {int(images.sum()):,} images in {views} view{'s' if views > 1 else ''}, "
            f"each {header.num_channels} tokens of {header.num_bits} bits; "
            f"{found.left_out[split]:,} unreadable files left out"
        )
        lines += [f"  {line}" for line in _histogram(images, header.class_names)]
    return lines


def _histogram(images: npt.NDArray[np.int64], names: list[str]) -> list[str]:
    if len(images) <= EACH_CLASS:
        return [
            f"class {i} ({name}): {count:,} images" for i, (name, count) in enumerate(zip(names, images, strict=True))
        ]
    step = -(-len(images) // RANGES)
    lines = []
    for start in range(0, len(images), step):
        part = images[start : start + step]
        lines.append(
            f"classes {start} to {start + len(part) - 1}: {int(part.sum()):,} images, "
            f"{int(part.min()):,} to {int(part.max()):,} a class"
        )
    empty = np.flatnonzero(images == 0).tolist()
    shown = ", ".join(f"{i} ({names[i]})" for i in empty[:NAMED]) + (", ..." if len(empty) > NAMED else "")
    return [*lines, f"classes without images: {len(empty)}{f': {shown}' if empty else ''}"]
