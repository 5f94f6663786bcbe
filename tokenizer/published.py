"""What the paper published: the architectures of its tokenizers, and the key names of its public implementation."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import InputError
from tokenizer.config import TokenizerConfig

if TYPE_CHECKING:
    from torch import Tensor


def _paper_512() -> TokenizerConfig:
    return TokenizerConfig(
        num_channels=512,
        num_bits=16,
        encoder_widths=[192, 256, 384, 512, 640],
        decoder_widths=[192, 256, 384, 512, 640],
        encoder_attention_sizes=[32, 16, 8],
        decoder_attention_sizes=[8, 16, 32],
    )


# 72,389,985 parameters: what the paper's generator draws with; and 159,305,603: the main tokenizer of its tables
PUBLISHED_TOKENIZERS: dict[str, Callable[[], TokenizerConfig]] = {"paper-256": TokenizerConfig, "paper-512": _paper_512}

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


def published_config(name: str) -> TokenizerConfig:
    """The architecture of a published tokenizer, by its name in `PUBLISHED_TOKENIZERS`.

    Raises:
        InputError: an unknown name.
    """
    if name not in PUBLISHED_TOKENIZERS:
        raise InputError(f"tokenizer {name!r} is unknown; allowed: {', '.join(PUBLISHED_TOKENIZERS)}")
    return PUBLISHED_TOKENIZERS[name]()


def _check_bit_order(weights: "Tensor", path: str | Path) -> None:
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


def rename_published_keys(state: dict[str, "Tensor"], prefix: str, path: str | Path) -> dict[str, "Tensor"]:
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
