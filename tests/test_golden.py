"""Parity with the measurements of the paper's public implementation (tests/golden)."""

from pathlib import Path

import pytest
import torch
from oracles.bits import full_table_entropies
from safetensors.torch import load_file

from common.config import InputError
from tokenizer import ChannelTokenizer, TokenizerConfig
from tokenizer.bsq import BinarySphericalQuantizer, pack_bits, quantization_losses, signs_to_codes, straight_through
from tokenizer.published import published_config
from tokenizer.tail_drop import drop_tail, prefix_mask

GOLDEN = Path(__file__).parent / "golden"
CLAMP = 1e-4  # relative: what the published clamp of 1e-5 inside the logarithm takes from the entropies
TINY_PROJ = {
    "image_size": 64,
    "num_channels": 16,
    "num_bits": 8,
    "encoder_widths": [32, 32, 32, 64, 64],
    "decoder_widths": [32, 32, 64],
    "encoder_attention_sizes": [8],
    "decoder_attention_sizes": [16],
    "num_heads": 4,
}


@pytest.fixture(scope="module")
def io():
    return load_file(GOLDEN / "tiny_proj.io.safetensors")


@pytest.fixture(scope="module")
def tokenizer():
    return ChannelTokenizer.from_published(GOLDEN / "tiny_proj.state.safetensors", TokenizerConfig(**TINY_PROJ))


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_tiny_proj_has_the_published_number_of_parameters(tokenizer):
    parts = (tokenizer.encoder, tokenizer.decoder, tokenizer.quantizer, tokenizer)
    assert [count(part) for part in parts] == [621_088, 690_979, 280, 1_312_347]


@pytest.mark.parametrize(
    ("name", "sizes", "counts"),
    [("paper-256", (256, 14, 256), [28_375_040, 44_014_467, 478, 72_389_985]),
     ("paper-512", (512, 16, 256), [64_620_800, 94_684_803, 0, 159_305_603])],
)  # fmt: skip
def test_the_paper_s_tokenizers_have_the_published_numbers_of_parameters(name, sizes, counts):
    config = published_config(name)
    assert (config.num_channels, config.num_bits, config.image_size) == sizes
    with torch.device("meta"):
        model = ChannelTokenizer(config)
    assert [count(part) for part in (model.encoder, model.decoder, model.quantizer, model)] == counts


def test_an_unknown_published_tokenizer_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="'paper-128' is unknown; allowed: paper-256, paper-512"):
        published_config("paper-128")


@torch.no_grad()
def test_encoder_output(tokenizer, io):
    latents = tokenizer.encode(io["image"])
    # the trunk's last convolution is the widest sum: a processor that adds in another order was seen at 1.2e-5
    torch.testing.assert_close(tokenizer.encoder.trunk(io["image"]), io["enc_trunk_out"], atol=2e-5, rtol=0)
    torch.testing.assert_close(latents, io["enc_out"], atol=1e-5, rtol=0)
    torch.testing.assert_close(tokenizer.quantizer.to_sphere(latents), io["bits_pre_sign"], atol=1e-5, rtol=0)


BUDGETS = {"none": [16, 16], "1": [1, 1], "5": [5, 5], "16": [16, 16], "vec": [3, 11]}


@pytest.mark.parametrize("name", BUDGETS)
def test_tokens_quantized_latents_and_images_of_each_budget(tokenizer, io, name):
    tokens, lengths = tokenizer.tokenize(io["image"]), BUDGETS[name]
    for row, length in enumerate(lengths):  # published tokens at and beyond the budget are junk
        assert torch.equal(tokens[row, :length], io[f"t_{name}.indices"][row, :length])
    quantized = tokenizer.lookup(tokens, torch.tensor(lengths))
    assert torch.equal(quantized, io[f"t_{name}.quantized"])
    images = tokenizer.detokenize(tokens, torch.tensor(lengths))
    torch.testing.assert_close(images, io[f"t_{name}.decoded"], atol=1e-4, rtol=0)
    if name != "vec":
        assert torch.equal(tokenizer.lookup(tokens[:, : lengths[0]]), quantized)


@torch.no_grad()
def test_no_channel_at_all_decodes_as_published(tokenizer, io):
    images = tokenizer.decode(torch.zeros_like(io["t_0.quantized"]))
    torch.testing.assert_close(images, io["t_0.decoded"], atol=1e-4, rtol=0)
    assert torch.equal(tokenizer.lookup(io["t_none.indices"]), io["lookup_latent"])


def close(found, expected, rtol, rounding=0.0):
    """Relative to the tensor's largest entry, so that entries near 0 do not decide."""
    atol = max(rtol * expected.abs().max().item(), rounding)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", ["proj", "noproj16"])
def test_quantizer_in_training(name):
    golden = load_file(GOLDEN / f"bsq_train_{name}.safetensors")
    num_bits = 8 if name == "proj" else 16
    quantizer = BinarySphericalQuantizer(4, num_bits)
    parameters = dict(quantizer.named_parameters())
    quantizer.load_state_dict({key: golden[f"param.{key}"] for key in parameters})
    latent = golden["latent"].clone().requires_grad_()
    vectors = quantizer.to_sphere(latent)
    assert torch.equal(pack_bits(vectors), golden["indices"])
    quantized = quantizer.to_latents(straight_through(vectors))
    torch.testing.assert_close(quantized, golden["quantized"], atol=1e-5, rtol=0)
    evaluated = quantizer.to_latents(signs_to_codes(vectors))
    torch.testing.assert_close(evaluated, golden["quantized_eval"], atol=1e-6, rtol=0)

    keep = torch.ones(latent.shape[:2], dtype=torch.bool)
    terms = quantization_losses(vectors, keep, group_bits=num_bits)
    aux = 0.1 * (terms["token_entropy"] - terms["codebook_entropy"]) + 0.25 * terms["commitment"]
    loss = (quantized * golden["weights"]).sum() + aux
    for found, key, rtol in (
        (terms["token_entropy"], "per_sample_entropy", CLAMP),
        (terms["codebook_entropy"], "codebook_entropy", CLAMP),
        (terms["commitment"], "commitment", 1e-5),
        (aux, "aux_loss", CLAMP),
        (loss, "loss", CLAMP),
    ):
        torch.testing.assert_close(found[None], golden[key], rtol=rtol, atol=1e-8)
    # the rest of that is the published clamp alone: the oracle gives their numbers with it, and ours without
    flat = vectors.flatten(0, 1)
    clamped = full_table_entropies(flat, 100.0)
    for value, key in zip(clamped, ("per_sample_entropy", "codebook_entropy"), strict=True):
        torch.testing.assert_close(value[None].float(), golden[key], rtol=1e-5, atol=1e-8)
    exact = full_table_entropies(flat, 100.0, clamp=1e-300)
    for value, found in zip(exact, (terms["token_entropy"], terms["codebook_entropy"]), strict=True):
        torch.testing.assert_close(found.double(), value, rtol=2e-6, atol=1e-7)

    # without projections two entropy gradients of 0.07 cancel to 0.0003 here: float32 leaves 2e-6 of them
    (entropy_gradient,) = torch.autograd.grad(0.1 * terms["token_entropy"], latent, retain_graph=True)
    rounding = 2e-6 * entropy_gradient.abs().max().item()
    theirs = 0.1 * (clamped[0] - clamped[1]) + 0.25 * terms["commitment"]
    (their_gradient,) = torch.autograd.grad(theirs, latent, retain_graph=True)
    close(their_gradient, golden["grad_latent_aux_only"], 1e-4, rounding)
    (aux_gradient,) = torch.autograd.grad(aux, latent, retain_graph=True)
    close(aux_gradient, golden["grad_latent_aux_only"], 1e-4, 5e-4 * entropy_gradient.abs().max().item())
    exactly = 0.1 * (exact[0] - exact[1]) + 0.25 * terms["commitment"]
    (exact_gradient,) = torch.autograd.grad(exactly, latent, retain_graph=True)
    close(aux_gradient, exact_gradient, 1e-4, 2 * rounding)
    loss.backward()
    close(latent.grad, golden["grad_latent"], 1e-4)
    for key, parameter in parameters.items():
        close(parameter.grad, golden[f"grad.{key}"], 1e-4)


def test_tail_drop_in_training(tokenizer):
    golden = load_file(GOLDEN / "taildrop_toggle_1_0.safetensors")
    lengths = torch.where(golden["toggle"] == 1, golden["t_values"], 16)
    keep = prefix_mask(lengths, 16)
    assert torch.equal(keep[:, :, None, None].float(), golden["mask_scale"])

    with torch.no_grad():
        torch.testing.assert_close(tokenizer.encode(golden["image"]), golden["enc_out"], atol=1e-5, rtol=0)
    encoded = golden["enc_out"].clone().requires_grad_()
    # as published: dropped channels are zeroed before quantization too, and enter the entropy terms
    masked = drop_tail(encoded, keep)
    assert torch.equal(masked, golden["quantizer_input"])
    vectors = tokenizer.quantizer.to_sphere(masked)
    assert torch.equal(pack_bits(vectors), golden["indices"])
    before = tokenizer.quantizer.to_latents(straight_through(vectors))
    torch.testing.assert_close(before, golden["quantized_before_mask"], atol=1e-5, rtol=0)
    quantized = drop_tail(before, keep)
    torch.testing.assert_close(quantized, golden["quantized"], atol=1e-5, rtol=0)
    decoded = tokenizer.decode(quantized)
    torch.testing.assert_close(decoded, golden["decoded"], atol=1e-4, rtol=0)

    terms = quantization_losses(vectors, torch.ones_like(keep), group_bits=8)
    reconstruction = (decoded * golden["weights"]).sum()
    aux = 0.1 * (terms["token_entropy"] - terms["codebook_entropy"]) + 0.25 * terms["commitment"]
    for found, key in (
        (terms["token_entropy"], "per_sample_entropy"),
        (terms["codebook_entropy"], "codebook_entropy"),
        (terms["commitment"], "commitment"),
        (aux, "aux_loss"),
        (reconstruction, "recon_loss"),
        (reconstruction + aux, "total_loss"),
    ):
        rtol = {"commitment": 1e-5, "recon_loss": 1e-4, "total_loss": 1e-4}.get(key, CLAMP)
        torch.testing.assert_close(found.reshape(-1), golden[key].reshape(-1), rtol=rtol, atol=1e-8)
    (reconstruction_gradient,) = torch.autograd.grad(reconstruction, encoded, retain_graph=True)
    (total_gradient,) = torch.autograd.grad(reconstruction + aux, encoded)
    close(reconstruction_gradient, golden["grad_enc_out_recon"], 1e-4)
    close(total_gradient, golden["grad_enc_out_total"], 1e-4)
    assert (total_gradient[~keep] == 0).all()
    assert (~keep).any()
