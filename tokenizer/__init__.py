"""The frozen tokenizer: every latent channel of an image is one token."""

import importlib
from typing import Any

_MODULES = {
    "ChannelTokenizer": "tokenizer.tokenizer",
    "PictureDecoder": "tokenizer.decoding",
    "TokenizerConfig": "tokenizer.config",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    """Import public names when they are used: configuration does not need torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(importlib.import_module(_MODULES[name]))[name]
