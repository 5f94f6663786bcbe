"""Going on from a trained generator with classes of one's own: their rows are new, the rest is kept."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CLASS_NAMES, ScriptRunner
from transformers import LlamaForCausalLM

from common.errors import InputError
from generator.config import GeneratorConfig, TokenLayout
from generator.model import load_generator, save_generator, start_from

CODES = 64
OWN = ["my cat", "my dog", "neither", "both", "a mouse", "a bird", "a boat"]


@pytest.fixture
def own_layout(tiny_layout: TokenLayout) -> TokenLayout:
    return dataclasses.replace(tiny_layout, class_names=OWN)


@torch.no_grad()
@pytest.mark.parametrize("has_null_label", [True, False])
@pytest.mark.parametrize("inside", ["", "generator"])
def test_class_rows_are_replaced_and_the_rest_is_kept(
    tiny_generator: LlamaForCausalLM,
    tiny_layout: TokenLayout,
    own_layout: TokenLayout,
    tmp_path: Path,
    has_null_label: bool,
    inside: str,
) -> None:
    layout = dataclasses.replace(tiny_layout, has_null_label=has_null_label)
    save_generator(tiny_generator, layout, tmp_path / inside)
    model, size, _ = start_from(str(tmp_path), own_layout, GeneratorConfig(attention_dropout=0.1))
    assert size == GeneratorConfig(
        num_layers=2, num_heads=2, hidden_size=32, intermediate_size=64, attention_dropout=0.1
    )
    assert model.config.vocab_size == CODES + 7 + 1
    assert model.config.attention_dropout == 0.1
    before, after = tiny_generator.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        if value.shape == after[name].shape:
            assert torch.equal(after[name], value), name
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name][:CODES], before[name][:CODES])
        classes, null = before[name][CODES : CODES + 5], before[name][CODES + 5]
        start = null if has_null_label else classes.mean(0)
        for row in after[name][CODES:]:
            torch.testing.assert_close(row, start)
    if has_null_label:
        # of any class it draws what it drew of none
        rows = torch.tensor([[CODES + 5, 3, 9]]), torch.tensor([[CODES + 6, 3, 9]])
        old, new = tiny_generator(rows[0]).logits, model.eval()(rows[1]).logits
        torch.testing.assert_close(new[..., :CODES], old[..., :CODES])


@pytest.mark.parametrize(
    ("change", "size", "named"),
    [
        ({"tokenizer_fingerprint": "0123456789abcdef"}, {}, "tokenizer_fingerprint"),
        ({"num_channels": 8}, {}, "num_channels"),
        ({"num_bits": 5}, {}, "num_bits"),
        ({}, {"num_layers": 3, "num_heads": 2, "hidden_size": 32, "intermediate_size": 64}, "num_layers is 3"),
        ({}, {"hidden_size": 96}, "has 2"),
    ],
)
def test_what_does_not_fit_is_refused(
    pipeline_folder: Path, own_layout: TokenLayout, change: dict[str, Any], size: dict[str, Any], named: str
) -> None:
    with pytest.raises(InputError, match=named) as caught:
        start_from(pipeline_folder, dataclasses.replace(own_layout, **change), GeneratorConfig(**size))
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
    flags = ("--tokens", tokens, "--output-dir", run, "--init-from", pipeline_folder, "--num-workers", 0)
    flags = (*flags, "--mixed-precision", "no", "--learning-rate", 1e-6, "--warmup-steps", 0, "--batch-size", 4)
    done = scripts("train_ar.py", *flags, "--steps", 2)
    assert done.code == 0, done.err
    old, old_layout = load_generator(pipeline_folder / "generator")
    new, new_layout = load_generator(run / "generator")
    assert old_layout.class_names == CLASS_NAMES
    assert new_layout.class_names == ["n01", "n02", "n03"]
    drift = (new.model.layers[0].mlp.up_proj.weight - old.model.layers[0].mlp.up_proj.weight).abs().max()
    assert 0 < drift.item() < 1e-5  # it went on from there
    figures = json.loads((run / "log.jsonl").read_text().splitlines()[-1])["evaluation"]
    assert figures["nats"] > 0
    # a run that is resumed goes on from its own weights
    done = scripts("train_ar.py", *flags, "--steps", 4, "--resume")
    assert done.code == 0, done.err
    assert "resumed at step 2 of 4" in done.err
    # sizes that are the model's are not asked for
    done = scripts("train_ar.py", *flags, "--steps", 2, "--num-layers", 9)
    assert done.code == 2
    assert done.err.count("\n") == 1, done.err
    assert "leave the size out" in done.err
    assert scripts("sample.py", "--model", run, "--class-names", "n02", "--output-dir", tmp_path / "out").code == 0
