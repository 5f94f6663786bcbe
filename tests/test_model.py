"""ChannelGPT at the size of the paper's largest tokenizer: 512 tokens of 16 bits."""

import torch
from conftest import CLASS_NAMES

from generator.config import ChannelGPTConfig, SamplingConfig
from generator.decode import CachedDecoder
from generator.engine import Engine
from generator.generate import stream
from generator.model import ChannelGPT
from generator.objective import GeneratorObjective

CONFIG = ChannelGPTConfig(
    num_layers=1, num_heads=2, hidden_size=32, intermediate_size=64, num_channels=512, num_bits=16,
    class_names=CLASS_NAMES, tokenizer_fingerprint="", has_null_label=True,
)  # fmt: skip


def test_512_tokens_of_16_bits_are_trained_on_and_drawn() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ChannelGPT(CONFIG)
    assert not [name for name, value in model.named_parameters() if 2**16 in value.shape]
    tokens = torch.randint(2**16, (2, 512), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 5])
    objective, optimizer = GeneratorObjective(model), torch.optim.AdamW(model.parameters(), lr=1e-2)
    saved: list[int] = []
    losses = []
    for _ in range(3):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
            nats = objective(labels, tokens).nats
        nats.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(nats.mean().item())
    # 16 fair coins a token at first
    assert abs(losses[0] - 16 * 0.6931) < 0.05
    assert losses[2] < 0.7 * losses[0]
    # no more is kept for the backward pass than the prior's matrix: nothing of 2**16 numbers a token
    assert max(saved) <= (512 * 16) ** 2
    steps = stream(Engine(CachedDecoder.from_model(model.eval())), [0, 4], [1, 2], 3, SamplingConfig(cfg_scale=2.0))
    *_, last = steps
    assert last.tokens.shape == (2, 3)
    assert 0 <= int(last.tokens.min()) <= int(last.tokens.max()) < 2**16
