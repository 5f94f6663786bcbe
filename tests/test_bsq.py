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
    assert (codes.dtype, codes.shape) == (torch.float32, (*tokens.shape, num_bits))
    packed = pack_bits(codes)
    assert packed.dtype == torch.int64
    assert torch.equal(packed, tokens)
    assert torch.equal(signs_to_codes(codes), codes)
    chosen = torch.arange(0, 2**num_bits, 37)
    torch.testing.assert_close(codes.flatten(0, 2)[chosen], bits.unpack(chosen, num_bits), atol=1e-7, rtol=0)
    assert torch.equal(bits.pack(codes.flatten(0, 2)[chosen]), chosen)


def test_the_first_bit_is_the_most_significant_and_zero_and_nan_are_negative():
    assert pack_bits(torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]])).tolist() == [4, 1]
    edges = torch.tensor([0.0, -0.0, float("nan"), 1e-30])
    assert signs_to_codes(edges).tolist() == [-0.5, -0.5, -0.5, 0.5]
    assert pack_bits(edges).item() == 1
    vectors = BinarySphericalQuantizer(4, 16).to_sphere(torch.zeros(1, 2, 4, 4))
    assert torch.equal(pack_bits(vectors), torch.zeros(1, 2, dtype=torch.int64))


def test_gradients_pass_the_codes_unchanged_and_go_through_the_normalisation():
    quantizer = BinarySphericalQuantizer(4, 16)
    latents = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    vectors = quantizer.to_sphere(latents)
    vectors.retain_grad()
    codes = straight_through(vectors)
    torch.testing.assert_close(codes, signs_to_codes(vectors), atol=1e-7, rtol=0)
    (quantizer.to_latents(codes) * weights).sum().backward()
    flat, along = latents.detach().reshape(2, 16), weights.reshape(2, 16)
    assert torch.equal(vectors.grad[0], along)
    unit = F.normalize(flat, dim=-1)
    expected = (along - unit * (along * unit).sum(-1, keepdim=True)) / flat.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(latents.grad.reshape(2, 16), expected)


@pytest.mark.parametrize("num_bits", [1, 8, 12])
@pytest.mark.parametrize("inverse_temperature", [1.0, 100.0])
def test_entropies_and_their_gradients_are_those_of_the_full_table(num_bits, inverse_temperature):
    vectors = sphere(4, 8, num_bits, seed=num_bits)
    keep = torch.rand(4, 8, generator=torch.Generator().manual_seed(1)) < 0.7
    ours, theirs = vectors.clone().requires_grad_(), vectors.double().requires_grad_()
    terms = quantization_losses(ours, keep, inverse_temperature, group_bits=num_bits)
    token, codebook = bits.full_table_entropies(theirs[keep], inverse_temperature, clamp=1e-300)
    torch.testing.assert_close(terms["token_entropy"].double(), token, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["codebook_entropy"].double(), codebook, rtol=1e-5, atol=1e-6)
    (terms["token_entropy"] - 2 * terms["codebook_entropy"]).backward()
    (token - 2 * codebook).backward()
    largest = theirs.grad.abs().max().item()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5 * largest + 1e-30)


@pytest.mark.parametrize("group_bits", [1, 3, 6, 16])
def test_groups_keep_the_token_entropy_and_bound_the_codebook_entropy(group_bits):
    num_bits = 7
    vectors = sphere(3, 6, num_bits)
    found = quantization_losses(vectors, torch.ones(3, 6, dtype=torch.bool), 30.0, group_bits)
    token, codebook = bits.full_table_entropies(vectors.flatten(0, 1), 30.0, clamp=1e-300)
    assert abs(found["token_entropy"].item() - token.item()) < 1e-6
    assert found["codebook_entropy"].item() >= codebook.item() + (0.01 if group_bits < num_bits else -1e-5)


def test_saturated_bits_leave_values_and_gradients_finite():
    vectors = (torch.eye(16).repeat(2, 1)[None] * torch.tensor([1.0, -1.0]).repeat(16)[None, :, None]).requires_grad_()
    keep = torch.ones(1, 32, dtype=torch.bool)
    terms = quantization_losses(vectors, keep, inverse_temperature=1e4, group_bits=16)
    (terms["token_entropy"] - terms["codebook_entropy"]).backward()
    assert torch.isfinite(terms["codebook_entropy"])
    assert torch.isfinite(vectors.grad).all()


def test_sixteen_bits_fit_where_the_full_table_would_not():
    # a table of 1,024 tokens x 2**16 codes would have 64 times as many numbers as all that is kept here
    vectors = sphere(16, 64, 16).requires_grad_()
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = quantization_losses(vectors, torch.ones(16, 64, dtype=torch.bool), group_bits=16)
    assert max(sizes) <= 1024 * 256
    assert sum(sizes) < 1024 * 2**16 / 10
    terms["codebook_entropy"].backward()
    assert (vectors.grad != 0).any()


WEIGHTS = torch.tensor([1.0, -2.0, 3.0])


def terms_of(vectors, keep, total=lambda value: value):
    return torch.stack(list(quantization_losses(vectors, keep, 3.0, 3, total).values()))


@pytest.mark.parametrize("shares", [2, 3])
def test_processes_that_average_their_gradients_have_those_of_one(shares):
    vectors = sphere(6, 5, 6)
    keep = torch.rand(6, 5, generator=torch.Generator().manual_seed(2)) < 0.5
    whole = vectors.clone().requires_grad_()
    expected = terms_of(whole, keep)
    (expected * WEIGHTS).sum().backward()
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
        (found * WEIGHTS).sum().backward()
        gradients.append(own.grad / shares)  # as DistributedDataParallel averages them
    torch.testing.assert_close(torch.cat(gradients), whole.grad, rtol=1e-4, atol=1e-6)


def test_commitment_is_the_mean_squared_distance_to_the_code():
    vectors = sphere(2, 3, 4)
    found = quantization_losses(vectors, torch.ones(2, 3, dtype=torch.bool))["commitment"]
    codes = bits.unpack(bits.pack(vectors.flatten(0, 1)), 4).reshape(2, 3, 4)
    torch.testing.assert_close(found, ((vectors - codes) ** 2).mean())


@pytest.mark.parametrize("filler", [0.0, 1e38, float("inf"), float("nan")])
def test_dropped_channels_have_no_influence_and_no_gradient(filler):
    keep = torch.tensor([[True, True, False, False], [True, False, False, False]])
    plain = sphere(2, 4, 6).requires_grad_()
    filled = torch.where(keep[..., None], plain.detach(), filler).requires_grad_()
    values = [terms_of(vectors, keep) for vectors in (plain, filled)]
    for found in values:
        (found * WEIGHTS).sum().backward()
    assert torch.equal(values[0], values[1])
    assert torch.equal(plain.grad, filled.grad)
    assert (plain.grad[~keep] == 0).all()
    assert (plain.grad[keep] != 0).any(-1).all()
    torch.testing.assert_close(values[0], terms_of(plain[keep][None], torch.ones(1, 3, dtype=torch.bool)))


@pytest.mark.parametrize("num_bits", [8, 16])
def test_quantizer_computes_in_float32_inside_bfloat16_autocast(num_bits):
    torch.manual_seed(0)
    quantizer = BinarySphericalQuantizer(4, num_bits)
    latents = torch.randn(2, 3, 4, 4).bfloat16()
    vectors = quantizer.to_sphere(latents.float())
    out, keep = quantizer.to_latents(straight_through(vectors)), torch.ones(2, 3, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer.to_sphere(latents)
        assert torch.equal(inside, vectors)
        assert torch.equal(quantizer.to_latents(straight_through(inside)), out)
        assert torch.equal(terms_of(inside, keep), terms_of(vectors, keep))
