"""Vectors of single bits, which all codes share while a generator learns them.

A code's bits say on which side of so many planes a channel lies (BSQ, arXiv 2406.07548), so codes that agree in many of
them mean something alike. A plain embedding does not know that: each of its rows is learned alone, from the few tokens
that are that very code. So in training a row is a vector of its own plus, for each of its bits, that bit's vector, or
minus it where the bit is 0; in the embedding and in the head. Every token then teaches all codes. A sum of vectors is a
vector: for use it is added up, and what is left is an ordinary Llama.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generator.config import TokenLayout


class BitVectors(nn.Module):
    """A vector for each bit of a code, zeros at first.

    Args:
        layout: of the vocabulary.
        width: of a vector.
    """

    signs: Tensor

    def __init__(self, layout: TokenLayout, width: int):
        super().__init__()
        self.vectors = nn.Parameter(torch.zeros(layout.num_bits, width))
        shifts = torch.arange(layout.num_bits - 1, -1, -1)  # the first bit is the most significant one
        signs = 2 * (torch.arange(layout.codebook_size)[:, None] >> shifts & 1) - 1
        # classes have no bits
        signs = F.pad(signs, (0, 0, 0, layout.vocab_size - layout.codebook_size))
        self.register_buffer("signs", signs.to(torch.int8), persistent=False)

    def forward(self, rows: Tensor | None = None) -> Tensor:
        """What bits add to these rows of the vocabulary, integers of any shape (...), or to all v: (... d) or (v d).

        Zeros for classes.
        """
        signs = self.signs if rows is None else self.signs[rows]
        return signs.to(self.vectors.dtype) @ self.vectors
