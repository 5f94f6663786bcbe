"""The frozen tokenizer: every latent channel of an image is one token."""

from tokenizer.config import TokenizerConfig
from tokenizer.tokenizer import ChannelTokenizer

__all__ = ["ChannelTokenizer", "TokenizerConfig"]
