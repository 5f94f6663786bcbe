"""What the paper published: the architectures of its tokenizers, and the key names of its public implementation."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import InputError
from tokenizer.config import TokenizerConfig

if TYPE_CHECKING:
    from torch import Tensor

PUBLISHED_TOKENIZERS: dict[str, dict[str, Any]] = {
    "paper-256": {},  # 72,389,985 parameters: what the paper's generator draws with
    "paper-512": {  # 159,305,603 parameters: the main tokenizer of its tables
        "num_channels": 512,
        "num_bits": 16,
        "encoder_widths": [192, 256, 384, 512, 640],
        "decoder_widths": [192, 256, 384, 512, 640],
        "encoder_attention_sizes": [32, 16, 8],
        "decoder_attention_sizes": [8, 16, 32],
    },
}
BIT_WEIGHTS = "quantizer.mask"  # a constant of theirs: the place value of each bit of a token
LAYER = re.compile(r"^((?:encoder|decoder)\.(?:trunk|shrink)\.)(\d+)\.")
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


def published_config(name: str) -> TokenizerConfig:
    """The architecture of a published tokenizer, by its name in `PUBLISHED_TOKENIZERS`.

    Raises:
        InputError: an unknown name.
    """
    if name not in PUBLISHED_TOKENIZERS:
        raise InputError(f"tokenizer {name!r} is unknown; allowed: {', '.join(PUBLISHED_TOKENIZERS)}")
    return TokenizerConfig(**PUBLISHED_TOKENIZERS[name])


def rename_published_keys(state: dict[str, "Tensor"], prefix: str, path: str | Path) -> dict[str, "Tensor"]:
    """Published key names -> ours. Every key must begin with `prefix`, which is removed."""
    foreign = [key for key in state if not key.startswith(prefix)]
    if foreign:
        raise InputError(f"{path}: {len(foreign)} keys do not begin with prefix {prefix!r}, first {foreign[0]!r}")
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix(prefix)
        if name == BIT_WEIGHTS:
            if value.tolist() != [2**i for i in reversed(range(len(value)))]:
                raise InputError(f"{path}: {name} is {value.tolist()}; only first bit most significant is known")
            continue
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise InputError(f"{path}: {key!r} and another key both mean {name!r}; the file mixes two models")
        renamed[name] = value
    layers: dict[str, set[int]] = {}
    for match in filter(None, map(LAYER.match, renamed)):
        layers.setdefault(match[1], set()).add(int(match[2]))

    def renumber(match: re.Match[str]) -> str:
        """Close gaps: published Swish layers have a number; of ours, only the one before the last convolution."""
        order = sorted(layers[match[1]])
        position = order.index(int(match[2]))
        last = match[1].endswith("trunk.") and position == len(order) - 1
        return f"{match[1]}{position + last}."

    return {LAYER.sub(renumber, name): value for name, value in renamed.items()}
