"""The frozen tokenizer: every latent channel of an image is one token."""

from tokenizer.config import TokenizerConfig
from tokenizer.decoding import PendingPictures, PictureDecoder
from tokenizer.tokenizer import ChannelTokenizer, swap_channels

__all__ = ["ChannelTokenizer", "PendingPictures", "PictureDecoder", "TokenizerConfig", "swap_channels"]
