"""Key names and shapes of a published tokenizer's checkpoint, by walking the list of layers as it is described.

Layers have numbers in the order in which they stand; a Swish has one too, and no weights.
"""

import itertools
from collections.abc import Sequence


class Walk:
    """A list of layers in the making: the shapes of its weights by key, and the number of the next layer."""

    def __init__(self, stem: str):
        self.stem, self.number = stem, 0
        self.shapes: dict[str, tuple[int, ...]] = {}

    def _add(self, name: str, *shape: int) -> None:
        self.shapes[f"{self.stem}.{self.number}.{name}"] = shape

    def _weights(self, name: str, *shape: int) -> None:
        self._add(f"{name}weight", *shape)
        self._add(f"{name}bias", shape[0])

    def conv(self, width: int, new: int) -> None:
        """A 3x3 convolution."""
        self._weights("", new, width, 3, 3)
        self.number += 1

    def norm(self, width: int) -> None:
        """A GroupNorm."""
        self._weights("gn.", width)
        self.number += 1

    def swish(self) -> None:
        """A layer without weights."""
        self.number += 1

    def residual(self, width: int, new: int) -> None:
        """Norm, Swish, convolution, twice, and a 1x1 shortcut where the width changes."""
        self._weights("block.0.gn.", width)
        self._weights("block.2.", new, width, 3, 3)
        self._weights("block.3.gn.", new)
        self._weights("block.5.", new, new, 3, 3)
        if width != new:
            self._weights("channel_up.", new, width, 1, 1)
        self.number += 1

    def attention(self, width: int) -> None:
        """Norm and four 1x1 convolutions."""
        self._weights("norm.gn.", width)
        for name in ("q", "k", "v", "proj_out"):
            self._weights(f"{name}.", width, width, 1, 1)
        self.number += 1

    def resample(self, width: int) -> None:
        """Down or up, with a Swish after it."""
        self._weights("conv.", width, width, 3, 3)
        self.number += 1
        self.swish()

    def middle(self, width: int) -> None:
        """Two residual blocks around attention."""
        self.residual(width, width)
        self.attention(width)
        self.residual(width, width)


def published_shapes(
    channels: int,
    bits: int,
    encoder: Sequence[int],
    decoder: Sequence[int],
    encoder_attention: Sequence[int],
    decoder_attention: Sequence[int],
    size: int,
) -> dict[str, tuple[int, ...]]:
    """All keys of a tokenizer for images of `size` pixels with a 4x4 latent, attention at these map sizes."""
    down = Walk("encoder.model")
    down.conv(3, encoder[0])
    for i, (width, new) in enumerate(itertools.pairwise(encoder)):
        for block in range(2):
            down.residual(new if block else width, new)
            if size in encoder_attention:
                down.attention(new)
        if i < len(encoder) - 2:
            down.resample(new)
            size //= 2
    down.middle(encoder[-1])
    down.norm(encoder[-1])
    down.swish()
    down.conv(encoder[-1], channels)
    shrink = Walk("encoder.spatial_adjust")
    while size > 4:
        shrink.resample(channels)
        size //= 2

    up = Walk("decoder.model")
    up.conv(channels, decoder[-1])
    up.middle(decoder[-1])
    for _ in range(2):
        up.resample(decoder[-1])
        size *= 2
    width = decoder[-1]
    for i in reversed(range(len(decoder))):
        for _ in range(3):
            up.residual(width, decoder[i])
            width = decoder[i]
            if size in decoder_attention:
                up.attention(width)
        if i:
            up.resample(width)
            size *= 2
    up.norm(width)
    up.swish()
    up.conv(width, 3)
    quantizer: dict[str, tuple[int, ...]] = {"quantizer.mask": (bits,)}
    if bits != 16:
        for name, rows, columns in (("project_in", bits, 16), ("project_out", 16, bits)):
            quantizer |= {f"quantizer.{name}.weight": (rows, columns), f"quantizer.{name}.bias": (rows,)}
    return down.shapes | shrink.shapes | up.shapes | quantizer
