import pytest
import torch
import torch.nn.functional as F
from oracles import bits

from tokenizer.bsq import (
    BinarySphericalQuantizer,
    pack_bits,
    quantization_losses,
    signs_to_codes,
    straight_through,
    unpack_bits,
)


def sphere(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("num_bits", [1, 7, 16])
def test_every_token_is_the_token_of_its_code(num_bits):
    tokens = torch.arange(2**num_bits).reshape(2, -1, 1)
    codes = unpack_bits(tokens.to(torch.int32), num_bits)
    assert codes.dtype == torch.float32
    assert codes.shape == (*tokens.shape, num_bits)
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(tokens.shape))
    packed = pack_bits(codes)
    assert packed.dtype == torch.int64
    assert torch.equal(packed, tokens)
    chosen = torch.arange(0, 2**num_bits, 37)
    torch.testing.assert_close(codes.flatten(0, 2)[chosen], bits.unpack(chosen, num_bits), atol=1e-7, rtol=0)
    assert torch.equal(bits.pack(codes.flatten(0, 2)[chosen]), chosen)


def test_codes_of_signs_are_those_of_tokens_bit_for_bit():
    vectors = sphere(50, 12)
    assert torch.equal(signs_to_codes(vectors), unpack_bits(pack_bits(vectors), 12))


def test_the_first_bit_is_the_most_significant_and_zero_and_nan_are_negative():
    assert pack_bits(torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]])).tolist() == [4, 1]
    codes = signs_to_codes(torch.tensor([0.0, -0.0, float("nan"), 1e-30]))
    assert codes.tolist() == [-0.5, -0.5, -0.5, 0.5]
    assert pack_bits(torch.tensor([0.0, -0.0, float("nan"), 1e-30])).item() == 1


def test_a_latent_of_zeros_has_a_code():
    quantizer = BinarySphericalQuantizer(4, 16)
    vectors = quantizer.to_sphere(torch.zeros(1, 2, 4, 4))
    assert torch.equal(pack_bits(vectors), torch.zeros(1, 2, dtype=torch.int64))


def test_straight_through_gives_codes_and_passes_the_gradient_unchanged():
    vectors = sphere(2, 3, 8).requires_grad_()
    weights = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    out = straight_through(vectors)
    torch.testing.assert_close(out, signs_to_codes(vectors), atol=1e-7, rtol=0)
    (out * weights).sum().backward()
    assert torch.equal(vectors.grad, weights)


def test_the_gradient_goes_through_the_normalisation_to_the_latents():
    quantizer = BinarySphericalQuantizer(4, 16)
    latents = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    (quantizer.to_latents(straight_through(quantizer.to_sphere(latents))) * weights).sum().backward()
    flat, along = latents.detach().reshape(2, 16), weights.reshape(2, 16)
    unit = F.normalize(flat, dim=-1)
    expected = (along - unit * (along * unit).sum(-1, keepdim=True)) / flat.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(latents.grad.reshape(2, 16), expected)


@pytest.mark.parametrize("num_bits", [1, 6, 8])
@pytest.mark.parametrize("inverse_temperature", [1.0, 100.0])
def test_one_group_of_all_bits_is_the_full_table(num_bits, inverse_temperature):
    vectors = sphere(2, 5, num_bits)
    keep = torch.ones(2, 5, dtype=torch.bool)
    found = quantization_losses(vectors, keep, inverse_temperature, group_bits=num_bits)
    token, codebook = bits.full_table_entropies(vectors.flatten(0, 1), inverse_temperature, clamp=1e-300)
    torch.testing.assert_close(found.token_entropy.double(), token, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.codebook_entropy.double(), codebook, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("group_bits", [1, 2, 3, 4, 6, 7, 16])
@pytest.mark.parametrize("inverse_temperature", [2.0, 30.0])
def test_groups_keep_the_token_entropy_and_bound_the_codebook_entropy(group_bits, inverse_temperature):
    num_bits = 7
    vectors = sphere(3, 6, num_bits)
    found = quantization_losses(vectors, torch.ones(3, 6, dtype=torch.bool), inverse_temperature, group_bits)
    token, codebook = bits.full_table_entropies(vectors.flatten(0, 1), inverse_temperature, clamp=1e-300)
    assert abs(found.token_entropy.item() - token.item()) < 1e-6
    assert found.codebook_entropy.item() >= codebook.item() - 1e-5
    if group_bits < num_bits:
        assert found.codebook_entropy.item() > codebook.item() + 0.01


def table_loss(vectors, keep, inverse_temperature):
    """Token entropy - 2 * codebook entropy, by the table of all codes for all tokens, in float64."""
    token, codebook = bits.full_table_entropies(vectors[keep], inverse_temperature, clamp=1e-300)
    return token - 2 * codebook


@pytest.mark.parametrize("num_bits", [5, 8, 12])
@pytest.mark.parametrize("inverse_temperature", [1.0, 20.0, 100.0])
def test_gradients_are_those_of_the_full_table(num_bits, inverse_temperature):
    vectors = sphere(4, 8, num_bits, seed=num_bits)
    keep = torch.rand(4, 8, generator=torch.Generator().manual_seed(1)) < 0.7
    ours = vectors.clone().requires_grad_()
    terms = quantization_losses(ours, keep, inverse_temperature, group_bits=num_bits)
    (terms.token_entropy - 2 * terms.codebook_entropy).backward()
    theirs = vectors.double().requires_grad_()
    table_loss(theirs, keep, inverse_temperature).backward()
    largest = theirs.grad.abs().max().item()
    assert largest > 1e-3
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5 * largest)


def test_saturated_bits_leave_values_and_gradients_finite():
    vectors = (torch.eye(16).repeat(2, 1)[None] * torch.tensor([1.0, -1.0]).repeat(16)[None, :, None]).requires_grad_()
    keep = torch.ones(1, 32, dtype=torch.bool)
    terms = quantization_losses(vectors, keep, inverse_temperature=1e4, group_bits=16)
    (terms.token_entropy - terms.codebook_entropy).backward()
    assert torch.isfinite(terms.codebook_entropy)
    assert torch.isfinite(vectors.grad).all()


def test_sixteen_bits_fit_where_the_full_table_would_not():
    # 8,192 tokens x 2**16 codes in float32 are 2 GiB, once; the process may grow by a tenth of that
    vectors = sphere(16, 512, 16).requires_grad_()
    keep = torch.ones(16, 512, dtype=torch.bool)
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = quantization_losses(vectors, keep, group_bits=16)
    assert max(sizes) <= 8192 * 256
    assert sum(sizes) < 8192 * 2**16 / 10
    terms.codebook_entropy.backward()
    assert (vectors.grad != 0).any()


@pytest.mark.parametrize("shares", [1, 2, 3])
def test_processes_that_average_their_gradients_have_those_of_one(shares):
    vectors = sphere(6, 5, 6)
    keep = torch.rand(6, 5, generator=torch.Generator().manual_seed(2)) < 0.5

    def terms_of(values, kept, total=lambda value: value):
        terms = quantization_losses(values, kept, 3.0, 3, total)
        return torch.stack([terms.token_entropy, terms.codebook_entropy, terms.commitment])

    weights = torch.tensor([1.0, -2.0, 3.0])
    whole = vectors.clone().requires_grad_()
    expected = terms_of(whole, keep)
    (expected * weights).sum().backward()

    # every process first returns its sums in the order of the calls, then computes with those of all
    own_sums = []
    for values, kept in zip(vectors.chunk(shares), keep.chunk(shares), strict=True):
        calls = []
        terms_of(values, kept, lambda value, calls=calls: calls.append(value.detach()) or value)
        own_sums.append(calls)
    sums = [sum(values) for values in zip(*own_sums, strict=True)]
    gradients = []
    for values, kept in zip(vectors.chunk(shares), keep.chunk(shares), strict=True):
        own, remaining = values.clone().requires_grad_(), iter(sums)

        def total(value, remaining=remaining):
            own = shares * value
            return next(remaining) + (own - own.detach())

        found = terms_of(own, kept, total)
        torch.testing.assert_close(found, expected)
        (found * weights).sum().backward()
        gradients.append(own.grad / shares)  # as DistributedDataParallel averages them
    torch.testing.assert_close(torch.cat(gradients), whole.grad, rtol=1e-4, atol=1e-6)


def test_groups_that_agree_give_the_bound_and_not_the_joint_entropy():
    agreeing = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])[None] / 2**0.5
    keep = torch.ones(1, 2, dtype=torch.bool)
    joint = quantization_losses(agreeing, keep, group_bits=2).codebook_entropy
    grouped = quantization_losses(agreeing, keep, group_bits=1).codebook_entropy
    torch.testing.assert_close(joint, torch.tensor(2.0).log(), atol=1e-4, rtol=0)
    torch.testing.assert_close(grouped, 2 * torch.tensor(2.0).log(), atol=1e-4, rtol=0)


def test_commitment_is_the_mean_squared_distance_to_the_code():
    vectors = sphere(2, 3, 4)
    found = quantization_losses(vectors, torch.ones(2, 3, dtype=torch.bool)).commitment
    codes = bits.unpack(bits.pack(vectors.flatten(0, 1)), 4).reshape(2, 3, 4)
    torch.testing.assert_close(found, ((vectors - codes) ** 2).mean())


def gradient_of_losses(vectors, keep):
    vectors = vectors.clone().requires_grad_()
    terms = quantization_losses(vectors, keep, inverse_temperature=3.0, group_bits=3)
    values = torch.stack([terms.token_entropy, terms.codebook_entropy, terms.commitment])
    (values * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
    return values.detach(), vectors.grad


@pytest.mark.parametrize("filler", [0.0, 1e38, float("inf"), float("nan")])
def test_dropped_channels_have_no_influence_and_no_gradient(filler):
    vectors = sphere(2, 4, 6)
    keep = torch.tensor([[True, True, False, False], [True, False, False, False]])
    values, gradient = gradient_of_losses(vectors, keep)
    filled = torch.where(keep[..., None], vectors, filler)
    filled_values, filled_gradient = gradient_of_losses(filled, keep)
    assert torch.equal(filled_values, values)
    assert torch.equal(filled_gradient, gradient)
    assert (gradient[~keep] == 0).all()
    assert (gradient[keep] != 0).any(-1).all()
    alone, _ = gradient_of_losses(vectors[keep][None], torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(values, alone)


def test_kept_channels_do_have_influence():
    vectors = sphere(2, 4, 6)
    keep = torch.ones(2, 4, dtype=torch.bool)
    fewer = keep.clone()
    fewer[0, 3] = False
    assert not torch.allclose(gradient_of_losses(vectors, keep)[0], gradient_of_losses(vectors, fewer)[0])


@pytest.mark.parametrize("num_bits", [8, 16])
def test_quantizer_computes_in_float32_inside_bfloat16_autocast(num_bits):
    torch.manual_seed(0)
    quantizer = BinarySphericalQuantizer(4, num_bits)
    latents = torch.randn(2, 3, 4, 4)
    vectors = quantizer.to_sphere(latents)
    out = quantizer.to_latents(straight_through(vectors))
    with torch.autocast("cpu", torch.bfloat16):
        vectors_inside = quantizer.to_sphere(latents)
        out_inside = quantizer.to_latents(straight_through(vectors_inside))
        terms = quantization_losses(vectors_inside, torch.ones(2, 3, dtype=torch.bool))
        from_bfloat16 = quantizer.to_sphere(latents.bfloat16())
    assert vectors_inside.dtype == out_inside.dtype == from_bfloat16.dtype == torch.float32
    assert {terms.token_entropy.dtype, terms.codebook_entropy.dtype, terms.commitment.dtype} == {torch.float32}
    assert torch.equal(vectors_inside, vectors)
    assert torch.equal(out_inside, out)
    assert torch.equal(from_bfloat16, quantizer.to_sphere(latents.bfloat16().float()))
