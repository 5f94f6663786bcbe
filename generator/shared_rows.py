"""What codes with bits in common share of their vectors while a generator learns them.

A code's bits say on which side of so many planes a channel lies (BSQ, arXiv 2406.07548), so codes that agree in half of
them mean something alike. A plain embedding does not know that: each of its rows is learned alone, from the few tokens
that are that very code. So in training a row is its own vector plus one for each group of its bits, in the embedding
and in the head; every token then teaches all codes that share a group with it. A sum of vectors is a vector:
for use the rows are added up, and what is left is an ordinary Llama.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import InputError
from generator.config import TokenLayout


class SharedRows(nn.Module):
    """One table for each group of bits: a group of s bits has 2**s rows, zeros at first.

    Args:
        layout: of the vocabulary; bits are split as evenly as possible, the first groups being the longer ones.
        num_groups: 1..num_bits.
        width: of a row.

    Raises:
        InputError: another number of groups.
    """

    def __init__(self, layout: TokenLayout, num_groups: int, width: int):
        super().__init__()
        if not 1 <= num_groups <= layout.num_bits:
            raise InputError(f"bit_groups is {num_groups}; tokens of {layout.num_bits} bits allow 0..{layout.num_bits}")
        sizes = [len(group) for group in torch.arange(layout.num_bits).tensor_split(num_groups)]
        self.tables = nn.ParameterList(torch.zeros(2**size, width) for size in sizes)
        self.unshared = layout.vocab_size - layout.codebook_size

    def forward(self) -> Tensor:
        """The sum of its groups' rows for every row of the vocabulary, (v d); zeros for classes."""
        rows, *others = self.tables
        for table in others:
            # the first bits are the most significant ones, so their rows change slowest
            rows = (rows[:, None] + table).flatten(0, 1)
        return F.pad(rows, (0, 0, 0, self.unshared))
