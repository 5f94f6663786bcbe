"""Binary Spherical Quantization of latent channels (Zhao et al., 2024, arXiv 2406.07548, section 3).

One latent channel, flattened, is projected to `n` numbers and put on the unit sphere; the signs are
the code, so the codebook of 2**n codes needs no table. A code packs into one integer, its token.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def signs_to_codes(vectors: Tensor) -> Tensor:
    """Nearest codes of vectors (..., n): entries +-1/sqrt(n). Exactly 0, and NaN, count as negative."""
    scale = vectors.shape[-1] ** -0.5
    return torch.where(vectors > 0, scale, -scale).to(vectors.dtype)


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


def _pattern_probabilities(log_odds: Tensor) -> Tensor:
    """Log-odds of independent bits (t g) -> probability of each of their patterns (t 2**g)."""
    table = log_odds.new_ones(len(log_odds), 1)
    for bit in log_odds.unbind(-1):
        both = torch.stack([table * torch.sigmoid(-bit)[:, None], table * torch.sigmoid(bit)[:, None]], dim=-1)
        table = rearrange(both, "t k z -> t (k z)")
    return table


def _mean_probabilities(log_odds: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over t of all patterns' probabilities, for log-odds (t g) and weights (t,): (2**g,).

    A pattern's probability is the product of its two halves', so the sum over t is one matrix product of two tables of
    2**(g/2) columns.
    """
    first, second = log_odds.tensor_split([log_odds.shape[-1] // 2], dim=-1)
    return ((_pattern_probabilities(first) * weights[:, None]).T @ _pattern_probabilities(second)).flatten()


def quantization_losses(
    vectors: Tensor,
    keep: Tensor,
    inverse_temperature: float = 100.0,
    group_bits: int = 16,
    sum_over_processes: Callable[[Tensor], Tensor] = lambda value: value,
) -> dict[str, Tensor]:
    """Entropy and commitment terms of the channels that were kept, in float32, also under autocast.

    The soft assignment of a vector u to a code c is softmax(2 * inverse_temperature * <u, c>), a product of independent
    bits, so the entropy of a token is the sum of its bits' entropies. The codebook's is that of the mean assignment
    over all kept tokens of all processes, taken over groups of bits whose entropies are added: an upper bound, exact
    where one group holds all bits. Needs b * c * 2**(group_bits/2) + 2**group_bits numbers.

    Args:
        vectors: (b, c, n) on the unit sphere, float32.
        keep: (b, c) bool; dropped channels take no part. At least one is kept.
        inverse_temperature: sharpness of the assignment.
        group_bits: most bits in a group, 1..16.
        sum_over_processes: tensor -> its sum over all training processes, whose gradients are averaged
            afterwards (`training.trainer.Trainer.sum_over_processes`); for one process the tensor itself.

    Returns:
        token_entropy and codebook_entropy in nats, and commitment, a squared distance: unweighted scalars.
    """
    num_bits = vectors.shape[-1]
    with torch.autocast(vectors.device.type, enabled=False):
        # a selection first and weights later: shapes that depend on data would stall a GPU and break a compiled graph
        kept = torch.where(keep[..., None], vectors, torch.zeros((), dtype=vectors.dtype, device=vectors.device))
        kept, weights = rearrange(kept, "b c n -> (b c) n"), keep.flatten().to(vectors.dtype)
        count = sum_over_processes(weights.sum())

        def mean(values: Tensor) -> Tensor:
            return sum_over_processes((values * weights).sum()) / count

        log_odds = 4 * inverse_temperature * num_bits**-0.5 * kept
        bit_entropies = F.softplus(log_odds) - log_odds * torch.sigmoid(log_odds)
        codebook_entropy = kept.new_zeros(())
        for group in log_odds.tensor_split(-(-num_bits // group_bits), dim=-1):
            probabilities = sum_over_processes(_mean_probabilities(group, weights)) / count
            # the clamp keeps the logarithm of a code without probability, and its gradient, finite
            logarithms = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
            codebook_entropy = codebook_entropy - (probabilities * logarithms).sum()
        return {
            "token_entropy": mean(bit_entropies.sum(-1)),
            "codebook_entropy": codebook_entropy,
            "commitment": mean((kept - signs_to_codes(kept).detach()).square().mean(-1)),
        }


class BinarySphericalQuantizer(nn.Module):
    """Latent channels to codes and back; holds the two projections where n differs from h * w.

    Always computes in float32, also under autocast: signs near zero must not depend on the precision.
    """

    def __init__(self, latent_size: int, num_bits: int):
        super().__init__()
        self.latent_size, flat = latent_size, latent_size**2
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
