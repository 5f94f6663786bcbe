"""The files in configs/ are what they say, the published layouts are read, and the documentation names what exists."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

import benchmark
import sample
import train_refiner
import train_tokenizer
from common import cli
from common.config import InputError
from evaluation.speed.measure import random_config
from generator.config import GENERATOR_SIZES, GeneratorConfig, GeneratorTrainingConfig, SampleConfig
from generator.model import Block, ChannelGPT
from page.config import PageConfig
from tokenizer.published import PUBLISHED_TOKENIZERS, published_config
from tokenizer.settings import DataConfig, ExtractionConfig, VerificationConfig
from training.schedule import split_batch

REPO = Path(__file__).resolve().parents[1]
COMMANDS = {
    "sample.py": (SampleConfig, sample.SamplingFlags),
    "train_ar.py": (GeneratorTrainingConfig, GeneratorConfig),
    "train_tokenizer.py": train_tokenizer.CONFIGS,
    "train_refiner.py": train_refiner.CONFIGS,
    "extract_tokens.py": (ExtractionConfig, DataConfig, VerificationConfig),
    "demo.py": (PageConfig,),
    **{f"benchmark.py {name}": kinds for name, (_, kinds) in benchmark.COMMANDS.items()},
}
PHOTOS = "--data-dir", "photos", "--output-dir", "run"
DOCUMENTS = [path for path in (REPO / "README.md", *sorted(REPO.glob("docs/*.md"))) if path.name != "lab.md"]


def parsed(path, *more):
    """The settings in a file and in flags, by class name."""
    stem = path.stem.partition("-")[2] or path.stem
    command = {"generator": "train_ar.py", "refiner": "train_refiner.py", "features": "benchmark.py features"}.get(stem)
    words = ["--config", str(path), "--output_dir", "run", *more]
    words += ["--tokens", "tokens"] if stem == "generator" else ["--data_dir", "photos"]
    words += ["--tokenizer", "tokenizer"] if stem == "refiner" else []
    found = cli.parse(*COMMANDS[command or "train_tokenizer.py"], argv=words)
    return {type(entry).__name__: entry for entry in found}


@pytest.mark.parametrize("path", sorted((REPO / "configs").iterdir()), ids=lambda path: path.name)
def test_every_config_is_accepted(path):
    assert path.suffix == ".yaml"
    assert parsed(path)


@pytest.mark.parametrize("name", PUBLISHED_TOKENIZERS)
def test_the_paper_s_configs_have_the_paper_s_sizes(name):
    settings = parsed(REPO / "configs" / f"{name}.yaml")
    model = settings["TokenizerConfig"]
    assert model == published_config(name)
    training, gan, loss = (settings[f"{part}Config"] for part in ("TokenizerTraining", "Gan", "TokenizerLoss"))
    images, epochs, gan_epoch = (1_281_167, 150, 15) if name == "paper-512" else (100_000, 100, 25)
    assert 0 <= training.steps * training.batch_size - epochs * images < training.batch_size * epochs
    assert gan.gan_start_step == pytest.approx(gan_epoch * images / training.batch_size, abs=1)
    assert (loss.l1_weight, loss.lpips_weight, loss.perceptual) == (0.25, 1.0, "lpips")
    assert loss.entropy_group_bits == model.num_bits
    assert training.batch_size % training.micro_batch_size == 0


SIZES = re.findall(r"^\| `--size (\w+)([^`]*)` \| ([\d,]+) \|", (REPO / "docs" / "training.md").read_text(), re.M)


def test_every_size_of_a_generator_is_in_the_table():
    assert [name for name, _, _ in SIZES] == list(GENERATOR_SIZES)


@pytest.mark.parametrize("name, flags, count", SIZES)
def test_the_generators_of_the_table_have_the_sizes_and_the_paper_s_recipe(name, flags, count):
    settings = parsed(REPO / "configs" / "paper-generator.yaml", "--size", name, *flags.split())
    training = settings["GeneratorTrainingConfig"]
    assert training.transformer(settings["GeneratorConfig"]) == GENERATOR_SIZES[name]
    epochs = 100 if name == "S" else 300
    assert 0 <= training.steps * training.batch_size - epochs * 1_281_167 < training.batch_size
    assert (training.batch_size, training.beta1, training.beta2, training.weight_decay) == (256, 0.9, 0.95, 0.05)
    assert (training.max_grad_norm, training.label_dropout, training.dropout) == (1.0, 0.1, 0.1)
    paper = {"B": (4e-4, "none"), "L": (3e-4, "linear")}
    if name in paper:
        assert (training.learning_rate, training.position_weighting) == paper[name]
    for world_size in (1, 2, 4, 8, 16):
        split_batch(training, 0, world_size)
    with torch.device("meta"):
        assert f"{sum(p.numel() for p in ChannelGPT(random_config(name)).parameters()):,}" == count
    with pytest.raises(InputError, match=f"size is {name}"):
        training.transformer(GeneratorConfig(num_layers=3))


def test_the_settings_for_shards_are_those_that_accelerate_reads(monkeypatch):
    path = REPO / "docs" / "cluster" / "fsdp.yaml"
    config = ClusterConfig.from_yaml_file(str(path))
    assert (config.distributed_type, config.mixed_precision) == (DistributedType.FSDP, "bf16")
    assert config.to_dict().items() >= yaml.safe_load(path.read_text()).items()
    words = ["--config_file", str(path), "train_ar.py"]
    arguments = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    for name, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.transformer_cls_names_to_wrap == [Block.__name__]
    assert plugin.reshard_after_forward is True


def snippets(text):
    """Commands and names in backticks, each on one line."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = [line.partition("  #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def test_flags_in_the_documentation_exist():
    flags = {
        command: {f"--{field.name.replace('_', '-')}" for kind in kinds for field in dataclasses.fields(kind)}
        for command, kinds in COMMANDS.items()
    }
    found = [(path.name, snippet) for path in DOCUMENTS for snippet in snippets(path.read_text())]
    assert len(found) > 100
    for document, snippet in found:
        command = re.search(r"\b(?:\w+\.py)(?: (?:fid|reconstruction|speed|features)\b)?", snippet)
        allowed = flags.get(command[0], set()) if command else set().union(*flags.values())
        if command or snippet.startswith("--"):
            words = re.findall(r"(?<![\w-])--[a-z][\w-]*", snippet[command.end() if command else 0 :])
            assert not set(words) - {*allowed, "--config", "--help"}, (document, snippet)


def test_an_image_size_alone_selects_a_network_that_fits(monkeypatch):
    def parsed(*words):
        monkeypatch.setattr("sys.argv", ["train_tokenizer.py", *map(str, words), *PHOTOS])
        return cli.parse(*train_tokenizer.CONFIGS, adapt=train_tokenizer.adapt)[3]

    for config in (None, "cpu-tokenizer", "gpu-tokenizer"):
        words = ["--config", REPO / "configs" / f"{config}.yaml"] if config else []
        given = yaml.safe_load(words[1].read_text()) if words else {"image_size": 256, "encoder_widths": [128] * 6}
        for size in (16, 32, 64, 128, 256, 512):
            found = parsed(*words, "--image-size", size)
            stages = len(given["encoder_widths"]) + (size // given["image_size"]).bit_length() - 1
            assert found.image_size == size
            assert size < given["image_size"] or len(found.encoder_widths) == stages
    with pytest.raises(InputError, match="does not fit"):  # stages that are given are not changed
        parsed("--image-size", 32, "--decoder-widths", 64, 64, 64)
