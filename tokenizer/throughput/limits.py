"""What bounds a tokenizer: the arithmetic of one image."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokenizer.tokenizer import ChannelTokenizer


def count_flops(tokenizer: ChannelTokenizer) -> dict[str, int]:
    """Operations that one image takes, two for each multiplication with its sum: {"encode": n, "decode": n}.

    Of convolutions and matrix products, of the plain network; norms, activations and sums are not counted.
    """
    size, channels = tokenizer.config.image_size, tokenizer.config.num_channels
    images = torch.zeros(1, 3, size, size, device=tokenizer.device)
    tokens = torch.zeros(1, channels, dtype=torch.long, device=tokenizer.device)
    counts = {}
    # attention as two matrix products, which are counted on every device; fused kernels are not
    with sdpa_kernel(SDPBackend.MATH):
        for task, run, given in (("encode", tokenizer.tokenize, images), ("decode", tokenizer.detokenize, tokens)):
            with FlopCounterMode(display=False) as counter:
                run(given)
            counts[task] = int(counter.get_total_flops())
    return counts
