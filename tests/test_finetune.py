"""Fine-tuning: training that starts from a trained generator, with other classes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLASS_NAMES, ScriptRunner, sharp_generator

from common.config import InputError
from generator.config import ChannelGPTConfig, GeneratorConfig, size_of
from generator.model import ChannelGPT, start_from

OWN = ["my cat", "my dog", "neither", "both", "a mouse", "a bird", "a boat"]
CLASS_TABLES = ("class_vectors", "prior.class_bias")


def config_of(model: ChannelGPT, **changes: Any) -> ChannelGPTConfig:
    """The tokens of a model with other classes, of the default size."""
    return replace(model.config, **vars(GeneratorConfig()) | {"class_names": OWN} | changes)


@torch.no_grad()
@pytest.mark.parametrize(("has_null_label", "inside"), [(True, ""), (False, "generator")])
def test_class_tables_are_replaced_and_the_rest_is_kept(
    tiny_generator: ChannelGPT, tmp_path: Path, has_null_label: bool, inside: str
) -> None:
    old = sharp_generator(replace(tiny_generator.config, has_null_label=has_null_label))
    old.save_pretrained(tmp_path / inside)
    model = start_from(str(tmp_path), config_of(old, has_null_label=True), dropout=0.2, attention_dropout=0.1)
    assert size_of(model.config) == size_of(old.config)
    assert (model.config.class_names, model.config.has_null_label) == (OWN, True)
    assert (model.dropout.p, model.blocks[0].attention_dropout) == (0.2, 0.1)
    before, after = old.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name not in CLASS_TABLES:
            assert torch.equal(after[name], value), name
    for name in CLASS_TABLES:
        start = before[name][5] if has_null_label else before[name][:5].mean(0)
        assert len(after[name]) == 7 + 1
        for row in after[name]:
            torch.testing.assert_close(row, start)
    if has_null_label:
        # every class gives the probabilities that the null class gave
        bits = torch.randn(1, 16, 6).sign()
        torch.testing.assert_close(model.eval()(torch.tensor([6]), bits), old(torch.tensor([5]), bits))
    # with the same classes the tables are kept, and with its own size given
    same = start_from(str(tmp_path), old.config)
    assert all(torch.equal(value, before[name]) for name, value in same.state_dict().items())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokenizer_fingerprint": "0123456789abcdef"}, "tokenizer_fingerprint"),
        ({"num_channels": 8}, "num_channels"),
        ({"num_layers": 3, "num_heads": 2, "hidden_size": 32, "intermediate_size": 64}, "num_layers is 3"),
        ({"hidden_size": 96}, "has 2"),
    ],
)
def test_what_does_not_fit_is_refused(
    pipeline_folder: Path, tiny_generator: ChannelGPT, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(InputError, match=named) as caught:
        start_from(pipeline_folder, config_of(tiny_generator, **change))
    assert "\n" not in str(caught.value)


def test_two_commands_from_a_model_and_photographs_to_a_model_of_other_classes(
    scripts: ScriptRunner, pipeline_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    tokens, run = tmp_path / "tokens", tmp_path / "run"
    done = scripts(
        "extract_tokens.py", "--tokenizer", pipeline_folder / "tokenizer", "--data-dir", image_folder,
        "--output-dir", tokens, "--num-workers", 0,
    )  # fmt: skip
    assert done.code == 0, done.err
    flags = ("--tokens", tokens, "--init-from", pipeline_folder, "--num-workers", 0, "--mixed-precision", "no")
    flags = (*flags, "--learning-rate", 1e-6, "--warmup-steps", 0, "--batch-size", 4)
    done = scripts("train_ar.py", *flags, "--output-dir", run, "--steps", 2)
    assert done.code == 0, done.err
    old, new = (ChannelGPT.from_pretrained(folder / "generator") for folder in (pipeline_folder, run))
    assert (old.config.class_names, new.config.class_names) == (CLASS_NAMES, ["n01", "n02", "n03"])
    for name, largest in (("blocks.0.down.weight", 1e-5), ("prior.weight", 1e-6)):  # not fitted again
        change = (new.get_parameter(name) - old.get_parameter(name)).abs().max().item()
        assert 0 < change < largest, name
    figures = json.loads((run / "log.jsonl").read_text().splitlines()[-1])["evaluation"]
    assert figures["nats"] > 0
    # a resumed run starts from its checkpoint
    done = scripts("train_ar.py", *flags, "--output-dir", run, "--steps", 4, "--resume")
    assert done.code == 0, done.err
    assert "resumed at step 2 of 4" in done.err
    assert scripts("sample.py", "--model", run, "--class-names", "n02", "--output-dir", tmp_path / "out").code == 0
