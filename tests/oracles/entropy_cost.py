"""What the codebook's entropy costs by halves of bits and by the table of all codes: memory and time.

Run as `PYTHONPATH=.:tests python -m oracles.entropy_cost`. Prints one line for each number of bits.
"""

import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from oracles import bits
from tokenizer.bsq import quantization_losses

TOKENS = 2048  # of one step; the table grows with their number times 2**num_bits


def by_table(vectors: Tensor) -> Tensor:
    """The entropy terms over a softmax of all codes for every token, in float32."""
    probabilities = torch.softmax(200 * vectors @ bits.codebook(vectors.shape[-1]).float().T, dim=-1)
    return bits.entropy(probabilities, 1e-30).mean() - bits.entropy(probabilities.mean(0), 1e-30)


def by_halves(vectors: Tensor) -> Tensor:
    """The product's terms, all bits in one group."""
    keep = torch.ones(1, len(vectors), dtype=torch.bool)
    terms = quantization_losses(vectors[None], keep, group_bits=vectors.shape[-1])
    return terms.token_entropy - terms.codebook_entropy


def measure(function: Callable[[Tensor], Tensor], vectors: Tensor) -> tuple[float, float, Tensor]:
    """Seconds forward and backward (the best of three), MiB kept for the backward pass, and the gradient."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    best = float("inf")
    for _ in range(3):
        own = vectors.clone().requires_grad_()
        kept.clear()
        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = function(own)
        value.backward()
        best = min(best, time.perf_counter() - start)
    return best, sum(kept.values()) / 2**20, own.grad


def main() -> None:
    """Measure and print."""
    for num_bits in (8, 14):
        vectors = F.normalize(torch.randn(TOKENS, num_bits, generator=torch.Generator().manual_seed(0)), dim=-1)
        rows = {name: measure(function, vectors) for name, function in (("table", by_table), ("halves", by_halves))}
        for name, (seconds, memory, _) in rows.items():
            sys.stdout.write(f"2^{num_bits}, {TOKENS} tokens, {name}: {1000 * seconds:.1f} ms, {memory:.1f} MiB\n")
        ours, theirs = rows["halves"][2], rows["table"][2]
        sys.stdout.write(
            f"2^{num_bits}: gradients differ by {float((ours - theirs).norm() / theirs.norm()):.1e} of their norm\n"
        )
    vectors = F.normalize(torch.randn(TOKENS, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    seconds, memory, _ = measure(by_halves, vectors)
    sys.stdout.write(f"2^16, {TOKENS} tokens, halves: {1000 * seconds:.1f} ms, {memory:.1f} MiB\n")


if __name__ == "__main__":
    main()
