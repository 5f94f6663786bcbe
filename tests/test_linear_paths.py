"""The linear maps beside a small encoder and decoder."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.config import InputError
from tokenizer import ChannelTokenizer, PictureDecoder, TokenizerConfig

SIZES: dict[str, Any] = {
    "image_size": 32, "num_channels": 8, "num_bits": 6, "patch_size": 2, "encoder_widths": [32, 32],
    "decoder_widths": [32], "num_heads": 4,
}  # fmt: skip


def tokenizer(**changes: Any) -> ChannelTokenizer:
    torch.manual_seed(0)
    return ChannelTokenizer(TokenizerConfig(**(SIZES | {"linear_paths": True} | changes))).eval()


def linear_only(module: Any) -> Any:
    """With the output of the network set to 0, so that the linear path remains."""
    nn.init.zeros_(module.trunk[-1].weight)
    nn.init.zeros_(module.trunk[-1].bias)
    for layer in getattr(module, "shrink", []):
        nn.init.zeros_(layer.conv.bias)
    return module


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def test_an_encoders_path_is_linear_and_reads_its_part_and_half_of_each_adjacent_one() -> None:
    encoder = linear_only(tokenizer().encoder)
    one, other, origin = random(1, 3, 32, 32), random(1, 3, 32, 32, seed=1), encoder(torch.zeros(1, 3, 32, 32))
    assert torch.allclose(encoder(one + 2 * other) - origin, encoder(one) + 2 * encoder(other) - 3 * origin, atol=1e-5)
    changed = (encoder(one) - origin).abs().amax(1)[0]
    assert changed.min() > 0
    # a dot of light at (row 9, column 17): entries of 8 pixels, each seeing 4 more on all sides
    dot = torch.zeros(1, 3, 32, 32)
    dot[..., 9, 17] = 1
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[0:2, 1:3] = True
    assert torch.equal((encoder(dot) - origin).abs().amax(1)[0] > 0, expected)


@torch.no_grad()
def test_a_decoders_path_is_linear_before_the_last_function_and_overlaps() -> None:
    decoder = linear_only(tokenizer().decoder)
    one, other, origin = random(1, 8, 4, 4), random(1, 8, 4, 4, seed=1), decoder(torch.zeros(1, 8, 4, 4)).atanh()
    both = decoder(one + other).atanh()
    assert torch.allclose(both - origin, decoder(one).atanh() + decoder(other).atanh() - 2 * origin, atol=1e-4)
    spot = torch.zeros(1, 8, 4, 4)
    spot[..., 1, 2] = 1
    drawn = ((decoder(spot).atanh() - origin).abs().amax(1)[0] > 1e-6).nonzero()
    assert [drawn.min(0).values.tolist(), drawn.max(0).values.tolist()] == [[4, 12], [19, 27]]


@torch.no_grad()
def test_prefixes_saving_and_fast_decoding_with_linear_paths(tmp_path: Any) -> None:
    model, images = tokenizer(), random(3, 3, 32, 32)
    latents = model.quantizer.to_latents(model.quantize(model.encode(images)))
    latents[:, 5:] = 0
    tokens = model.tokenize(images)
    assert torch.equal(model.detokenize(tokens[:, :5]), model.decode(latents))
    model.save_pretrained(tmp_path)
    assert torch.equal(ChannelTokenizer.from_pretrained(tmp_path).detokenize(tokens), model.detokenize(tokens))
    fast = PictureDecoder(model, dtype=torch.float32)(tokens[:, :5]).int()
    plain = ((model.detokenize(tokens[:, :5]) + 1) * 127.5).round().clamp(0, 255).int()
    assert (fast - plain).abs().max() <= 1
    assert not any("straight" in name for name, _ in tokenizer(linear_paths=False).named_parameters())


def test_maps_that_cannot_overlap_are_refused() -> None:
    sizes = SIZES | {"latent_size": 16, "image_size": 64, "patch_size": 4}
    with pytest.raises(InputError, match="linear_paths overlap by half a patch, which patch_size 4"):
        TokenizerConfig(**sizes, linear_paths=True)
    TokenizerConfig(**sizes)


@torch.no_grad()
def test_an_encoder_s_path_is_float32_under_autocast_on_a_cpu() -> None:
    """In bfloat16, oneDNN 3 has a relative error above 1 for the path of 16 x 16 patches on CPUs with AMX."""
    encoder = linear_only(
        tokenizer(image_size=64, num_channels=64, encoder_widths=[32] * 3, decoder_widths=[32, 32]).encoder
    )
    images = random(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(images)
    assert torch.equal(half, encoder(images))
