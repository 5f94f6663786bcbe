"""The files in configs/ are what they say, and the published layouts are read."""

from pathlib import Path

import pytest
import torch
from oracles.published import published_shapes
from safetensors import safe_open

import train_tokenizer
from common import cli
from generator.config import GeneratorConfig
from generator.training import GeneratorTrainingConfig
from tokenizer import ChannelTokenizer, TokenizerConfig
from tokenizer.published import published_config, rename_published_keys

REPO = Path(__file__).resolve().parents[1]
NEEDED = ["--data_dir", "photos", "--output_dir", "run"]
PAPER = {
    "paper-256": (72_389_985, 256, 14, [128, 128, 128, 256, 256, 512], [128, 128, 256, 256, 512], [], []),
    "paper-512": (
        159_305_603, 512, 16, [192, 256, 384, 512, 640], [192, 256, 384, 512, 640], [32, 16, 8], [8, 16, 32]
    ),
}  # fmt: skip


def parsed(path):
    """The settings in a file, by class name."""
    if "generator" in path.name:
        words = ["--config", str(path), "--tokens", "tokens", "--output_dir", "run"]
        found = cli.parse(GeneratorTrainingConfig, GeneratorConfig, argv=words)
    else:
        found = cli.parse(*train_tokenizer.CONFIGS, argv=["--config", str(path), *NEEDED])
    return {type(entry).__name__: entry for entry in found}


@pytest.mark.parametrize("path", sorted((REPO / "configs").iterdir()), ids=lambda path: path.name)
def test_every_config_is_accepted(path):
    assert path.suffix == ".yaml"
    assert parsed(path)


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_configs_have_the_paper_s_sizes(name):
    settings = parsed(REPO / "configs" / f"{name}.yaml")
    model = settings["TokenizerConfig"]
    assert model.architecture() == published_config(name).architecture()
    with torch.device("meta"):
        built = ChannelTokenizer(model)
    assert sum(p.numel() for p in built.parameters()) == PAPER[name][0]
    training, gan, loss = (settings[f"{part}Config"] for part in ("TokenizerTraining", "Gan", "TokenizerLoss"))
    images, epochs, gan_epoch = (1_281_167, 150, 15) if name == "paper-512" else (100_000, 100, 25)
    assert 0 <= training.steps * training.batch_size - epochs * images < training.batch_size * epochs
    assert gan.gan_start_step == pytest.approx(gan_epoch * images / training.batch_size, abs=1)
    assert (loss.l1_weight, loss.lpips_weight, loss.perceptual) == (0.25, 1.0, "lpips")
    assert loss.entropy_group_bits == model.num_bits
    assert training.batch_size % training.micro_batch_size == 0


def test_the_oracle_of_published_keys_gives_those_of_a_published_state():
    shapes = published_shapes(16, 8, [32, 32, 32, 64, 64], [32, 32, 64], [8], [16], 64)
    with safe_open(REPO / "tests" / "golden" / "tiny_proj.state.safetensors", "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert found | {"quantizer.mask": (8,)} == shapes


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_both_published_layouts_are_read(name, prefix):
    _, channels, bits, encoder, decoder, *attention = PAPER[name]
    shapes = published_shapes(channels, bits, encoder, decoder, *attention, 256)
    with torch.device("meta"):
        state = {prefix + key: torch.empty(shape) for key, shape in shapes.items()}
        model = ChannelTokenizer(published_config(name))
    state[f"{prefix}quantizer.mask"] = 2 ** torch.arange(bits).flip(0)
    renamed = rename_published_keys(state, prefix, "checkpoint")
    expected = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in renamed.items()} == expected


def test_the_defaults_are_the_paper_s_smaller_tokenizer():
    assert TokenizerConfig().architecture() == published_config("paper-256").architecture()
