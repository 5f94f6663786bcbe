"""Fast decoding of tokens to images with the weights of a `ChannelTokenizer`; see docs/performance.md."""

import copy
import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from common.images import to_uint8
from common.runtime import check_can_compile, has_fast_bfloat16
from tokenizer.autoencoder import Decoder
from tokenizer.tokenizer import ChannelTokenizer

PIXELS_AT_ONCE = 2**19  # decoded in one go: 8 images of 256 x 256, about 1 GB in float32


def _fastest_layout(tokenizer: ChannelTokenizer, dtype: torch.dtype) -> Decoder:
    """The tokenizer's decoder in the fastest layout of its device; the tokenizer's own where that is the same.

    Convolutions are faster in channels_last. GroupNorm is not: in bfloat16 on a CPU the layout costs more than it gains
    (docs/lab.md), and on Apple's MPS it gains nothing.
    """
    device = tokenizer.device.type
    fast = device == "cuda" or (device == "cpu" and dtype == torch.float32)
    if not fast and dtype == tokenizer.dtype:
        return tokenizer.decoder
    layout = torch.channels_last if fast else torch.contiguous_format
    return copy.deepcopy(tokenizer.decoder).requires_grad_(False).to(dtype=dtype).to(memory_format=layout)


class PendingPictures:
    """Images that are being decoded, or will be when they are requested."""

    def __init__(self, finish: Callable[[], Tensor]):
        self._finish = functools.cache(finish)

    def images(self) -> Tensor:
        """The pictures, (b 3 H W) uint8 on the CPU; waits for them, or decodes them, the first time."""
        return self._finish()


class PictureDecoder:
    """Tokens (b k) -> uint8 pictures (b 3 H W), with a copy of a tokenizer's weights.

    Example: `PictureDecoder(tokenizer)(tokens[:, :32])`.

    Args:
        tokenizer: on the device where pictures are to be decoded.
        dtype: of the decoder's weights and sums, float32 or bfloat16; None is bfloat16 where that runs in
            hardware, else float32. Codes and latents are looked up in float32 whatever it is.
        compile: compile the decoder with torch.compile, at the first picture of each batch size.

    Raises:
        InputError: no compiler.
    """

    def __init__(self, tokenizer: ChannelTokenizer, *, dtype: torch.dtype | None = None, compile: bool = False):
        self.tokenizer, self.device = tokenizer, tokenizer.device
        if dtype is None:
            dtype = torch.bfloat16 if has_fast_bfloat16(self.device) else torch.float32
        if compile:
            check_can_compile(self.device)
        self.dtype = dtype
        decoder = _fastest_layout(tokenizer, dtype)
        self._decode: Callable[[Tensor], Tensor] = torch.compile(decoder) if compile else decoder
        self._at_once = max(1, PIXELS_AT_ONCE // tokenizer.config.image_size**2)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._seconds: dict[int, float] = {}

    @torch.no_grad()
    def __call__(self, tokens: Tensor, num_tokens: Tensor | None = None) -> Tensor:
        """Tokens (b k) of any 1 <= k <= C -> pictures (b 3 H W) uint8, on the tokenizer's device.

        Tokens may be on any device. See `ChannelTokenizer.lookup` for `num_tokens`, ranges and errors.
        """
        return self._pictures(self.tokenizer.lookup(tokens.to(self.device), num_tokens))

    @torch.no_grad()
    def start(self, tokens: Tensor, num_tokens: Tensor | None = None) -> PendingPictures:
        """As a call, but the pictures are fetched later with `.images()`, on the CPU.

        The tokens are read now: they may be overwritten afterwards. On CUDA the pictures are decoded
        beside what the current stream does next (keep `num_tokens` on the CPU: checking it must not wait for
        the device); on other devices when they are first requested.
        """
        latents = self.tokenizer.lookup(tokens.to(self.device), num_tokens)
        if self._stream is None:
            return PendingPictures(lambda: self._pictures(latents).cpu())
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            images = self._pictures(latents)
            copied = torch.empty(images.shape, dtype=images.dtype, pin_memory=True)
            copied.copy_(images, non_blocking=True)
            done = self._stream.record_event()
        latents.record_stream(self._stream)  # or the next tensor of the other stream could take their place

        def finish() -> Tensor:
            done.synchronize()
            return copied

        return PendingPictures(finish)

    def seconds(self, batch_size: int) -> float:
        """Seconds that decoding a batch of this size at full length takes: median of three, measured once."""
        if batch_size not in self._seconds:
            shape = batch_size, self.tokenizer.config.num_channels
            tokens = torch.zeros(shape, dtype=torch.int64, device=self.device)
            self(tokens).cpu()  # compiles
            rounds = []
            for _ in range(3):
                begun = time.perf_counter()
                self(tokens).cpu()  # fetching is what waits for a device
                rounds.append(time.perf_counter() - begun)
            self._seconds[batch_size] = sorted(rounds)[1]
        return self._seconds[batch_size]

    @torch.no_grad()
    def _pictures(self, latents: Tensor) -> Tensor:
        """Latents (b c h w), dropped channels 0 -> pictures (b 3 H W) uint8, in parts of bounded memory."""
        parts = latents.to(self.dtype).split(self._at_once)
        return torch.cat([to_uint8(self._decode(part)) for part in parts])
