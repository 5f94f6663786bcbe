"""The sampling settings of a model (sampling.json): which k they apply to, and how sample.py uses them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import ScriptRunner

from common.config import InputError
from generator.config import SamplingConfig
from generator.pipeline import ChannelTokPipeline
from generator.settings import ModelSettings
from generator.token_file import TokenFile


def test_settings_are_those_of_the_next_larger_k() -> None:
    cold, warm = SamplingConfig(temperature=0.5), SamplingConfig(temperature=0.9)
    settings = ModelSettings(by_num_tokens={4: cold, 16: warm}, fingerprint="", measured={})
    assert [settings.of(k) for k in (1, 4, 5, 16, 17)] == [cold, cold, warm, warm, warm]
    assert ModelSettings(by_num_tokens={}, fingerprint="", measured={}).of(3) == SamplingConfig()


@pytest.fixture
def with_settings(pipeline_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(pipeline_folder, tmp_path / "model")
    chosen = {4: SamplingConfig(temperature=0.5), 16: SamplingConfig(cfg_scale=2, cfg_schedule="linear", top_k=9)}
    model = ChannelTokPipeline.from_pretrained(tmp_path / "model", "cpu").fingerprint
    ModelSettings(by_num_tokens=chosen, fingerprint=model, measured={}).save(tmp_path / "model" / "generator")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--num-tokens", 4], {"temperature": 0.5}),
        ([], {"cfg_scale": 2.0, "cfg_schedule": "linear", "top_k": 9}),
        (["--cfg-scale", 1], {"top_k": 9}),
        (["--top-k", 0, "--cfg-scale", 3], {"cfg_scale": 3.0}),
    ],
)
def test_sample_py_draws_with_the_model_s_settings_unless_others_are_given(
    scripts: ScriptRunner, with_settings: Path, tmp_path: Path, flags: list[Any], expected: dict[str, Any]
) -> None:
    output = tmp_path / "drawn"
    done = scripts("sample.py", "--model", with_settings, "--class-labels", 1, "--output-dir", output, *flags)
    assert done.code == 0, done.err
    drawing = TokenFile.load(output / "tokens.npz")
    assert drawing.sampling == SamplingConfig(**expected)
    pipeline = ChannelTokPipeline.from_pretrained(with_settings, "cpu")
    alone = pipeline([1], drawing.tokens.shape[1], 0, **(vars(SamplingConfig()) | expected))
    assert alone.tokens.tolist() == drawing.tokens.tolist()


def test_images_of_several_lengths_have_the_settings_of_whole_drawings(
    scripts: ScriptRunner, with_settings: Path, tmp_path: Path
) -> None:
    flags = ["--model", with_settings, "--class-labels", 1, 1, "--output-dir", tmp_path, "--num-tokens", 4, 5]
    assert scripts("sample.py", *flags).code == 0
    drawing = TokenFile.load(tmp_path / "tokens.npz")
    assert drawing.sampling == SamplingConfig(cfg_scale=2, cfg_schedule="linear", top_k=9)


def test_settings_of_other_weights_are_not_used(scripts: ScriptRunner, with_settings: Path, tmp_path: Path) -> None:
    path = with_settings / "generator" / "sampling.json"
    path.write_text(path.read_text().replace('"model": "', '"model": "0'))
    done = scripts("sample.py", "--model", with_settings, "--class-labels", 1, "--output-dir", tmp_path / "drawn")
    assert done.code == 0
    assert "measured for other weights" in done.err
    assert TokenFile.load(tmp_path / "drawn" / "tokens.npz").sampling == SamplingConfig()


def test_given_guidance_replaces_all_fields_of_guidance() -> None:
    base = SamplingConfig(temperature=0.5, cfg_scale=3, cfg_schedule="interval", cfg_end=0.5)
    assert base.override({}) == base
    assert base.override({"cfg_schedule": "constant"}) == SamplingConfig(temperature=0.5)
    assert base.override({"top_k": 3, "cfg_scale": 2}) == SamplingConfig(temperature=0.5, top_k=3, cfg_scale=2)
    with pytest.raises(InputError):
        base.override({"cfg_end": 0.5})


def test_in_python_a_model_s_settings_keep_the_prefix_law(with_settings: Path) -> None:
    pipeline = ChannelTokPipeline.from_pretrained(with_settings, "cpu")
    assert pipeline([0, 3], 4, seed=5).tokens.tolist() == pipeline([0, 3], seed=5).tokens[:, :4].tolist()
    assert pipeline([0], seed=5).tokens.tolist() == pipeline([0], seed=5, **vars(pipeline.sampling(16))).tokens.tolist()


@pytest.mark.parametrize("content", ["{", "[]", '{"by_num_tokens": {"4": {"temp": 1}}, "measured": {}}', "{}"])
def test_damaged_settings_are_refused_in_one_line(scripts: ScriptRunner, with_settings: Path, content: str) -> None:
    (with_settings / "generator" / "sampling.json").write_text(content)
    done = scripts("sample.py", "--model", with_settings)
    assert done.code == 2
    assert "sampling.json" in done.err
    assert done.err.strip().count("\n") == 0
