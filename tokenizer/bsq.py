"""Binary Spherical Quantization of latent channels (Zhao et al., 2024, arXiv 2406.07548, section 3).

One latent channel, flattened, is projected to `n` numbers and put on the unit sphere; the signs are
the code, so the codebook of 2**n codes needs no table. A code packs into one integer, its token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def signs_to_codes(vectors: Tensor) -> Tensor:
    """Nearest codes of vectors (..., n): entries +-1/sqrt(n). Exactly 0, and NaN, count as negative."""
    scale = vectors.shape[-1] ** -0.5
    positive = vectors > 0
    signs: Tensor = torch.where(positive, scale, -scale).to(vectors.dtype)
    return signs


def pack_bits(codes: Tensor) -> Tensor:
    """Codes (..., n) -> tokens (...), int64 in [0, 2**n): the first entry is the most significant bit."""
    weights = 1 << torch.arange(codes.shape[-1] - 1, -1, -1, device=codes.device)
    tokens: Tensor = ((codes > 0) * weights).sum(-1)
    return tokens


def unpack_bits(tokens: Tensor, num_bits: int) -> Tensor:
    """Tokens (...) in [0, 2**num_bits) -> codes (..., num_bits), float32 entries +-1/sqrt(num_bits)."""
    shifts = torch.arange(num_bits - 1, -1, -1, device=tokens.device)
    bits = (tokens.long()[..., None] >> shifts) & 1
    codes: Tensor = (2 * bits - 1).float() * num_bits**-0.5
    return codes


def straight_through(vectors: Tensor) -> Tensor:
    """Codes in the forward pass, the identity in the backward pass: (..., n) -> (..., n)."""
    return vectors + (signs_to_codes(vectors) - vectors).detach()


@dataclass(frozen=True, kw_only=True)
class QuantizationLosses:
    """The three terms of the quantizer, unweighted scalars: nats, nats, squared distance."""

    token_entropy: Tensor
    codebook_entropy: Tensor
    commitment: Tensor


def _entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats over the last axis; the clamp keeps the logarithm of an empty code finite."""
    return -(probabilities * probabilities.clamp_min(1e-5).log()).sum(-1)


def _code_probabilities(vectors: Tensor, scale: float) -> Tensor:
    """Soft assignment of (t g) entries to all 2**g sign patterns: (t 2**g).

    A softmax over codes of scale * <u, c> is a product of independent bits, so it is built up bit by bit.
    """
    ones = torch.sigmoid(scale * vectors)
    zeros = torch.sigmoid(-scale * vectors)
    table = torch.ones_like(vectors[:, :1])
    for one, zero in zip(ones.unbind(-1), zeros.unbind(-1), strict=True):
        table = rearrange(torch.stack([table * zero[:, None], table * one[:, None]], dim=-1), "t k z -> t (k z)")
    return table


def quantization_losses(
    vectors: Tensor, keep: Tensor, inverse_temperature: float = 100.0, group_bits: int = 8
) -> QuantizationLosses:
    """Entropy and commitment terms of the channels that were kept.

    The soft assignment of a vector u to a code c is softmax(2 * inverse_temperature * <u, c>). Bits are
    taken in groups of at most `group_bits`: the entropy of a token is the sum over its groups exactly,
    that of the codebook is bounded by it; one group of all bits gives the full table of 2**n codes.

    Args:
        vectors: (b, c, n) on the unit sphere, float32.
        keep: (b, c) bool; dropped channels take no part. At least one is kept.
        inverse_temperature: sharpness of the assignment.
        group_bits: largest group; memory is b * c * 2**group_bits numbers.
    """
    num_bits = vectors.shape[-1]
    kept = vectors[keep]
    scale = 4 * inverse_temperature * num_bits**-0.5
    num_groups = -(-num_bits // group_bits)
    token_entropy = codebook_entropy = kept.new_zeros(())
    for group in kept.tensor_split(num_groups, dim=-1):
        probabilities = _code_probabilities(group, scale)
        token_entropy = token_entropy + _entropy(probabilities).mean()
        codebook_entropy = codebook_entropy + _entropy(probabilities.mean(0))
    commitment = (kept - signs_to_codes(kept).detach()).square().mean()
    return QuantizationLosses(token_entropy=token_entropy, codebook_entropy=codebook_entropy, commitment=commitment)


class BinarySphericalQuantizer(nn.Module):
    """Latent channels to codes and back; holds the two projections where n differs from h * w.

    Always computes in float32, also under autocast: signs near zero must not depend on the precision.
    """

    def __init__(self, latent_size: int, num_bits: int):
        super().__init__()
        self.latent_size = latent_size
        self.num_bits = num_bits
        flat = latent_size**2
        self.project_in = nn.Identity() if flat == num_bits else nn.Linear(flat, num_bits)
        self.project_out = nn.Identity() if flat == num_bits else nn.Linear(num_bits, flat)

    def to_sphere(self, latents: Tensor) -> Tensor:
        """Latents (b c h w) -> unit vectors (b c n), float32."""
        with torch.autocast(latents.device.type, enabled=False):
            flat = rearrange(latents.float(), "b c h w -> b c (h w)")
            unit: Tensor = F.normalize(self.project_in(flat), dim=-1, eps=1e-12)
        return unit

    def to_latents(self, codes: Tensor) -> Tensor:
        """Codes (b c n) -> latents (b c h w), float32."""
        with torch.autocast(codes.device.type, enabled=False):
            flat: Tensor = self.project_out(codes.float())
        return rearrange(flat, "b c (h w) -> b c h w", h=self.latent_size)
