"""The one place that knows the key names of the paper's public implementation."""

import re
from pathlib import Path

from torch import Tensor

from common.errors import InputError

_RENAMES = [
    (r"^encoder\.model\.", "encoder.trunk."),
    (r"^encoder\.spatial_adjust\.", "encoder.shrink."),
    (r"^decoder\.model\.", "decoder.trunk."),
    (r"\.block\.0\.gn\.", ".norm1."),
    (r"\.block\.2\.", ".conv1."),
    (r"\.block\.3\.gn\.", ".norm2."),
    (r"\.block\.5\.", ".conv2."),
    (r"\.channel_up\.", ".shortcut."),
    (r"\.q\.", ".query."),
    (r"\.k\.", ".key."),
    (r"\.v\.", ".value."),
    (r"\.proj_out\.", ".out."),
    (r"\.gn\.", "."),
]


BIT_WEIGHTS = "quantizer.mask"  # a constant of theirs: what each bit of a token counts


def _check_bit_order(weights: Tensor, path: str | Path) -> None:
    expected = [2**i for i in reversed(range(len(weights)))]
    if weights.tolist() != expected:
        raise InputError(f"{path}: {BIT_WEIGHTS} is {weights.tolist()}; only first bit most significant is known")


def _renumber(names: set[str]) -> dict[str, str]:
    """Close the gaps in layer numbers: published Swish layers have a number but no weights of their own.

    Ours keep the Swish inside `Downsample` and `Upsample`; only the one before the last convolution
    counts as a layer, in both.
    """
    numbers: dict[str, set[int]] = {}
    for name in names:
        if match := re.match(r"^((?:encoder|decoder)\.(?:trunk|shrink)\.)(\d+)\.", name):
            numbers.setdefault(match[1], set()).add(int(match[2]))
    new: dict[str, str] = {}
    for stem, found in numbers.items():
        order = sorted(found)
        for position, number in enumerate(order):
            last = stem.endswith("trunk.") and position == len(order) - 1
            new[f"{stem}{number}."] = f"{stem}{position + last}."
    return new


def rename_published_keys(state: dict[str, Tensor], prefix: str, path: str | Path) -> dict[str, Tensor]:
    """Published key names -> ours. Every key must begin with `prefix`, which is removed."""
    foreign = [key for key in state if not key.startswith(prefix)]
    if foreign:
        raise InputError(f"{path}: {len(foreign)} keys do not begin with prefix {prefix!r}, first {foreign[0]!r}")
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix(prefix)
        if name == BIT_WEIGHTS:
            _check_bit_order(value, path)
            continue
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise InputError(f"{path}: {key!r} and another key both mean {name!r}; the file mixes two models")
        renamed[name] = value
    numbers = _renumber(set(renamed))

    def number(name: str) -> str:
        stem = re.match(r"^(?:encoder|decoder)\.(?:trunk|shrink)\.\d+\.", name)
        return numbers[stem[0]] + name[stem.end() :] if stem else name

    return {number(name): value for name, value in renamed.items()}
