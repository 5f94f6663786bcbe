"""The ways of encoding and decoding that are compared."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.runtime import pick_dtype
from tokenizer.bsq import pack_bits
from tokenizer.decoding import PictureDecoder
from tokenizer.throughput.config import COMPILED, PICTURES, layout_of
from tokenizer.tokenizer import ChannelTokenizer

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way. `holder` holds all its weights, encoder and decoder.

    `work["encode"]` takes images (b 3 H W) in [-1, 1], float32, contiguous, and gives tokens (b c); `work["decode"]`
    takes tokens (b c) and gives images (b 3 H W): floats in [-1, 1], or uint8. Which of them: `config.tasks_of`.
    """

    holder: object
    work: Mapping[str, Callable[[Tensor], Tensor]]


class VariantFactory:
    """Builds variants over a tokenizer's weights, which it leaves alone; those of a format and layout exist once."""

    def __init__(self, tokenizer: ChannelTokenizer):
        self._tokenizer = tokenizer
        self._networks: dict[tuple[str, str], ChannelTokenizer] = {("float32", "contiguous"): tokenizer}

    def build(self, name: str, dtype: str) -> Variant:
        """One of `VARIANTS`, in float32 or bfloat16."""
        if name == PICTURES:
            pictures = PictureDecoder(self._tokenizer, dtype=pick_dtype(dtype))
            return Variant(holder=pictures, work={"decode": pictures})
        return network_variant(name, dtype, self._network(dtype, layout_of(name)))

    def _network(self, dtype: str, layout: str) -> ChannelTokenizer:
        if (dtype, layout) not in self._networks:
            network = copy.deepcopy(self._tokenizer)
            # the quantizer stays in float32, whatever the networks around it compute in
            for part in (network.encoder, network.decoder):
                part.to(dtype=pick_dtype(dtype)).to(memory_format=LAYOUTS[layout])
            self._networks[dtype, layout] = network
        return self._networks[dtype, layout]


def network_variant(name: str, dtype: str, tokenizer: ChannelTokenizer) -> Variant:
    """The plain networks of a tokenizer whose weights are in the variant's format and layout already."""
    target: dict[str, Any] = {"dtype": pick_dtype(dtype), "memory_format": LAYOUTS[layout_of(name)]}
    networks: list[nn.Module] = [tokenizer.encoder, tokenizer.decoder]
    # shapes are fixed, and what cannot be compiled as a whole is an error: no variant is eager in part unseen
    encoder, decoder = (
        torch.compile(part, fullgraph=True, dynamic=False) if name in COMPILED else part for part in networks
    )

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        return pack_bits(tokenizer.quantize(encoder(images.to(**target))))

    @torch.no_grad()
    def decode(tokens: Tensor) -> Tensor:
        images: Tensor = decoder(tokenizer.lookup(tokens).to(**target))
        return images

    return Variant(holder=tokenizer, work={"encode": encode, "decode": decode})
