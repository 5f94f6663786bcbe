"""benchmark.py speed: what it writes, and the arithmetic of its rows. No test depends on how fast anything is."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Finished, ScriptRunner, sharp_generator
from PIL import Image
from torch import nn
from transformers import LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from common.plots import Panel, save_line_plot
from evaluation.speed import measure, samplers
from evaluation.speed.config import SAMPLERS, SpeedConfig
from evaluation.speed.measure import (
    bytes_per_token,
    measure_speed,
    random_config,
    read_bandwidth,
    rows_of,
    run_rounds,
)
from evaluation.speed.report import table
from evaluation.speed.samplers import Task, build_samplers, draw_transformers, draw_uncached, llama_of
from generator.engine import Engine
from generator.model import ChannelGPT

C = 16
SMALL_PROBE = "import evaluation.speed.measure as measure; measure.PROBE_BYTES = 2**20"
FIELDS = {
    "sampler", "device", "dtype", "batch_size", "cfg_scale", "num_tokens", "ms_per_token", "ms_per_token_min",
    "decode_ms", "images_per_second", "first_preview_ms", "bytes_per_token", "fraction_of_limit", "estimated",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PROBE_BYTES", 2**20)


def speed(scripts: ScriptRunner, *words: object, cwd: Path) -> Finished:
    return scripts("benchmark.py", "speed", *words, before=SMALL_PROBE, cwd=cwd)


def refused(done: Finished) -> str:
    assert done.code == 2, done.err
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("benchmark.py: error: ")
    return line


# ------------------------------------------------------------------------------------- the script


def test_speed_writes_a_row_for_each_sampler_setting_and_k(
    scripts: ScriptRunner, pipeline_folder: Path, tiny_generator: ChannelGPT, tmp_path: Path
) -> None:
    names = [name for name in SAMPLERS if name != "compiled"]
    words = ["--model", pipeline_folder, "--num-tokens", 16, 4, "--batch-size", 3, "--dtype", "float32", "bfloat16"]
    words += ["--cfg-scale", 1, 2, "--samplers", *names, "--repeats", 2, "--device", "cpu", "--output-dir", "out"]
    done = speed(scripts, *words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "speed.json, speed.md and speed.png written to out" in done.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["speed.json", "speed.md", "speed.png"]

    found = json.loads((tmp_path / "out" / "speed.json").read_text())
    keys = ("sampler", "dtype", "batch_size", "cfg_scale", "num_tokens")
    wanted = product(names, ("float32", "bfloat16"), (3,), (1, 2), (4, 16))
    assert sorted(tuple(row[key] for key in keys) for row in found["rows"]) == sorted(wanted)
    for row in found["rows"]:
        assert row.keys() == FIELDS
        assert row["estimated"] is (row["sampler"] == "uncached")
        numbers = [row[key] for key in FIELDS if isinstance(row[key], float)]
        assert all(math.isfinite(number) and number > 0 for number in numbers), row
        limit_ms = row["bytes_per_token"] / found["bandwidth_gb_s"] / 1e6
        assert row["fraction_of_limit"] == pytest.approx(limit_ms / row["ms_per_token"])
    parameters = sum(parameter.numel() for parameter in tiny_generator.parameters())
    assert found["generator"] == {"name": str(pipeline_folder), "parameters": parameters}
    assert found["tokenizer"]["name"] == str(pipeline_folder)
    assert found["command"].startswith("benchmark.py speed --model ")
    assert (tmp_path / "out" / "speed.md").read_text().count("| uncached (estimated) |") == 4
    with Image.open(tmp_path / "out" / "speed.png") as plot:
        assert plot.height > 800  # two rows of panels


def parameters_of(layers: int, width: int, inner: int) -> int:
    """With 256 tokens of 14 bits and 1,000 classes."""
    channels, bits, tables = 256, 14, 1000 + 1
    total = channels * bits
    blocks = layers * (4 * width**2 + 3 * width * inner + 2 * width)
    prior = total * (total - 1) // 2 + total + tables * total
    maps = 2 * (channels + 1) * bits * width + bits * (bits - 1) // 2 * width
    return blocks + prior + maps + (channels + tables + 1) * width


def test_speed_of_a_size_without_tokenizer_is_that_of_tokens(scripts: ScriptRunner, tmp_path: Path) -> None:
    words = ["--generator", "S", "--tokenizer", "none", "--num-tokens", 2, "--samplers", "eager", "--repeats", 1]
    done = speed(scripts, *words, "--dtype", "float32", cwd=tmp_path)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "runs" / "speed" / "speed.json").read_text())
    (row,) = found["rows"]
    assert found["generator"] == {"name": "S", "parameters": parameters_of(7, 384, 1024)}
    assert found["tokenizer"] is row["decode_ms"] is row["first_preview_ms"] is None
    assert row["images_per_second"] == pytest.approx(1000 / (2 * row["ms_per_token"]))
    assert "tokens only" in (tmp_path / "runs" / "speed" / "speed.md").read_text()


MISTAKES: list[tuple[list[object], str]] = [
    (["--samplers", "eager", "greedy"], "'greedy'"),
    (["--samplers", "eager", "eager"], "each once"),
    (["--dtype", "float16"], "'float16'"),
    (["--num-tokens", 4, 17], "this model has 1..16"),
    (["--batch-size", 1, 0], "batch_size is 0"),
    (["--cfg-scale", "nan"], "cfg_scale"),
    (["--generator", "B"], "model is given"),
    (["--tokenizer", "none"], "model is given"),
    (["--sampler", "eager"], "--samplers"),
]


@pytest.mark.parametrize(("words", "named"), MISTAKES, ids=[" ".join(map(str, words)) for words, _ in MISTAKES])
def test_speed_refuses_in_one_line_and_writes_nothing(
    scripts: ScriptRunner, pipeline_folder: Path, tmp_path: Path, words: list[object], named: str
) -> None:
    assert named in refused(speed(scripts, "--model", pipeline_folder, *words, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["speed", "--generator", "M"], "invalid choice: 'M'"),
        (["speed", "--tokenizer", "paper"], "invalid choice: 'paper'"),
        (["speed", "--model", "nowhere"], "nowhere"),
        (["sped"], "did you mean speed?"),
        ([], "the first word must be a command: speed"),
    ],
)
def test_benchmark_refuses_unknown_names(
    scripts: ScriptRunner, tmp_path: Path, words: list[object], named: str
) -> None:
    assert named in refused(scripts("benchmark.py", *words, cwd=tmp_path))


def test_guidance_needs_a_model_with_a_null_label(tiny_generator: ChannelGPT) -> None:
    without = sharp_generator(replace(tiny_generator.config, has_null_label=False))
    with pytest.raises(ValueError, match="trained without null label"):
        measure_speed(without, None, SpeedConfig(cfg_scale=[1.0, 2.0]))


# ------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("name", "blocks", "size"),
    [
        ("S", 12_391_680, (7, 384, 1024)),
        ("B", 84_953_088, (12, 768, 2048)),
        ("L", 308_330_496, (24, 1024, 2816)),
        ("XL", 731_473_920, (36, 1280, 3584)),
        ("XXL", 1_359_101_952, (48, 1536, 4096)),
    ],
)
def test_generator_sizes_have_these_parameters_and_a_token_reads_the_blocks(
    name: str, blocks: int, size: tuple[int, int, int]
) -> None:
    with torch.device("meta"):
        model = ChannelGPT(random_config(name)).to(torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters_of(*size)
    # step i reads i earlier positions; in each layer a key and a value
    cache = [2 * earlier * size[0] * 2 * size[1] * 6 for earlier in range(10)]
    assert bytes_per_token(model, 6, 10) == 2 * blocks + sum(cache) / 10


def test_rows_by_hand() -> None:
    times = np.array([[3.0, 10.0], [4.0, 9.0], [4.0, 14.0]])
    setting = {"device": "cpu", "dtype": "float32", "batch_size": 2, "cfg_scale": 1.5}
    two, four = rows_of("eager", setting, [2, 4], times, np.array([[5.0], [30.0], [6.0]]))
    assert (four["ms_per_token"], four["ms_per_token_min"]) == (10 / 4, 9 / 4)
    assert (two["ms_per_token"], two["ms_per_token_min"]) == (4 / 2, 3 / 2)
    assert four["images_per_second"] == pytest.approx(2 / 0.016)
    assert two["first_preview_ms"] == four["first_preview_ms"] == 4 + 6
    assert four == four | setting | {"num_tokens": 4, "estimated": False}
    (row, _) = rows_of("uncached", setting, [2, 4], times, None)
    assert row["images_per_second"] == pytest.approx(2 / 0.004)
    assert (row["first_preview_ms"], row["decode_ms"], row["estimated"]) == (None, None, True)


def test_rounds_are_interleaved_with_probes_of_the_memory() -> None:
    log: list[str] = []

    def draw(name: str) -> Callable[[Task], list[float]]:
        return lambda given: log.append(name) or [float(len(log))]  # type: ignore[func-returns-value]

    times = run_rounds({name: draw(name) for name in "abc"}, task([1]), 2, lambda: log.append("probe"))
    assert log == [*"abcabc", "probe", *"abc", "probe", *"bca", "probe"]
    assert {name: found.tolist() for name, found in times.items()} == {
        "a": [[8.0], [14.0]], "b": [[9.0], [12.0]], "c": [[10.0], [13.0]],
    }  # fmt: skip


def test_the_bandwidth_is_that_of_the_fastest_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(
        [value for start, seconds in enumerate((9, 4, 2, 5, 8, 3, 7, 6)) for value in (start, start + seconds)]
    )
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    assert read_bandwidth(torch.device("cpu")) == 2**20 / 2 / 1e9


# ------------------------------------------------------------------------------------- samplers


@pytest.fixture
def llama(tiny_generator: ChannelGPT) -> LlamaForCausalLM:
    """The model of transformers, with probabilities that are far from even."""
    model = llama_of(tiny_generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
            nn.init.normal_(weight, std=0.5)
    return model


def task(budgets: list[int], cfg_scale: float = 1.0) -> Task:
    return Task(budgets=budgets, class_labels=[0, 3, 1], seeds=[4, 5, 6], cfg_scale=cfg_scale)


@pytest.mark.parametrize(("budgets", "cfg_scale"), [([1], 1.0), ([2, 5], 2.0), ([1, 7, C], 1.0), ([C], 2.0)])
def test_every_sampler_gives_a_rising_time_for_each_k(
    tiny_generator: ChannelGPT, monkeypatch: pytest.MonkeyPatch, budgets: list[int], cfg_scale: float
) -> None:
    made = []

    def engine(decoder: Any, *, compile: bool) -> Engine:
        made.append(compile)  # the compiled step is tested elsewhere; here it is only a second name
        return Engine(decoder, compile=False)

    monkeypatch.setattr(samplers, "Engine", engine)
    draws = build_samplers(SAMPLERS, tiny_generator)
    assert made == [False, True]
    for draw in (*draws.values(), *draws.values()):
        times = draw(task(budgets, cfg_scale))
        assert len(times) == len(budgets)
        assert (np.diff([0, *times]) > 0).all()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_transformers_draws_codes_from_the_guided_odds(
    llama: LlamaForCausalLM, tiny_generator: ChannelGPT, cache: str, cfg_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it does the same work as ours."""
    scores, drawn = [], []

    class Recording(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
            scores.append(given.clone())
            return given

    generate = llama.generate

    def recorded(*given: Any, **options: Any) -> Any:
        drawn.append(generate(*given, logits_processor=LogitsProcessorList([Recording()]), **options))

    monkeypatch.setattr(llama, "generate", recorded)
    draw_transformers(llama, tiny_generator.config, task([C], cfg_scale), cache)
    tokens, codes = drawn[0][:, 1:], tiny_generator.config.codebook_size
    assert tokens.shape == (3, C)
    assert int(tokens.max()) < codes
    with torch.no_grad():
        logits, null_logits = (
            llama(torch.cat([codes + torch.tensor(labels)[:, None], tokens[:, :-1]], dim=1)).logits.log_softmax(-1)
            for labels in ([0, 3, 1], [5, 5, 5])
        )
    expected = (null_logits + cfg_scale * (logits - null_logits)).softmax(-1)
    assert expected.max() > 0.2
    torch.testing.assert_close(torch.stack(scores, dim=1).softmax(-1), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("cfg_scale", "rows"), [(1.0, 3), (2.0, 6)])
def test_uncached_reads_whole_prefixes_and_interpolates_between_them(
    llama: LlamaForCausalLM, tiny_generator: ChannelGPT, monkeypatch: pytest.MonkeyPatch, cfg_scale: float, rows: int
) -> None:
    seen, real, clock = [], llama.forward, [0.0]

    def forward(**given: Any) -> Any:
        output = real(**given)
        seen.append((tuple(given["input_ids"].shape), tuple(output.logits.shape), output.past_key_values))
        clock[0] += {1: 10.0, 4: 16.0, C: 40.0}[given["input_ids"].shape[1]] / 1000
        return output

    monkeypatch.setattr(llama, "forward", forward)
    monkeypatch.setattr(samplers, "UNCACHED_LENGTHS", (1, 4, 32))
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    times = draw_uncached(llama, tiny_generator.config, task([1, 3, 6, C], cfg_scale))
    assert seen == [((rows, length), (rows, 1, 64), None) for length in (1, 4, C)]
    each = [10, 12, 14, 16, *(16 + 2 * i for i in range(1, 13))]
    assert times == pytest.approx([sum(each[:k]) for k in (1, 3, 6, C)])


# ------------------------------------------------------------------------------------- table and plot


def test_the_table_gives_factors_over_uncached() -> None:
    rows = [
        {"sampler": name, "dtype": "float32", "batch_size": 1, "cfg_scale": 1.0, "num_tokens": k}
        | {"ms_per_token": ms * k / 8, "images_per_second": 2.0, "fraction_of_limit": 0.125}
        | {"first_preview_ms": None, "estimated": name == "uncached"}
        for name, ms in (("uncached", 30.0), ("eager", 7.5))
        for k in (8, 16)
    ]
    found = {
        "rows": rows,
        "bandwidth_gb_s": 20.0,
        "machine": {"cpu": "A Processor", "gpu": None, "threads": 2},
        "versions": {"torch": "2.15"},
        "generator": {"name": "B", "parameters": 111_657_216},
        "tokenizer": None,
        "settings": {"repeats": 3},
        "command": "benchmark.py speed",
    }
    lines = table(found).splitlines()
    assert lines[0] == "# Speed: generator B (111.7M), tokens only"
    assert "A Processor, 2 threads, torch 2.15, memory reads 20 GB/s" in lines
    assert "| float32, batch 1 | uncached (estimated) | 30.00 | 60.00 | 2.00 | - | 12.5% |" in lines
    assert "| float32, batch 1 | eager | 7.50 (4.0x) | 15.00 (4.0x) | 2.00 | - | 12.5% |" in lines
    assert "| eager | 7.50 | 15.00 |" in table(found | {"rows": rows[2:]})


@pytest.mark.parametrize(("panels", "columns"), [(1, 1), (3, 2)])
def test_a_plot_is_a_whole_png(tmp_path: Path, panels: int, columns: int) -> None:
    lines = {"one": [(1, 2.0), (2, 3.0)], "two": [(1, 1.0)]}
    save_line_plot(
        [Panel(title=str(i), lines=lines, limit=[(1, 0.5), (2, 0.5)]) for i in range(panels)],
        tmp_path / "plot.png",
        title="A title",
        x_label="x",
        limit_label="bound",
        columns=columns,
        dashed={"one"},
        log2_x=True,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(maxcolors=10**6) or []) > 20
