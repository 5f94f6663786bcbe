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

from evaluation.config import SpeedConfig
from evaluation.speed import measure, samplers
from evaluation.speed.measure import (
    bytes_per_token,
    measure_speed,
    random_config,
    read_bandwidth,
    report,
    rows_of,
    run_rounds,
)
from evaluation.speed.samplers import Task, build_samplers, draw_uncached, llama_of
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


def test_speed_writes_a_row_for_each_sampler_setting_and_k(
    scripts: ScriptRunner, pipeline_folder: Path, tiny_generator: ChannelGPT, tmp_path: Path
) -> None:
    names = ["uncached", "transformers", "eager"]
    words = ["--model", pipeline_folder, "--num-tokens", 16, 4, "--batch-size", 3, "--dtype", "float32"]
    words += ["--cfg-scale", 1, 2, "--samplers", *names, "--repeats", 2, "--device", "cpu", "--output-dir", "out"]
    done = speed(scripts, *words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "speed.json and speed.md written to out" in done.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["speed.json", "speed.md"]

    found = json.loads((tmp_path / "out" / "speed.json").read_text())
    keys = ("sampler", "dtype", "batch_size", "cfg_scale", "num_tokens")
    wanted = product(names, ("float32",), (3,), (1, 2), (4, 16))
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
    assert (tmp_path / "out" / "speed.md").read_text().count("| uncached (estimated) |") == 2


def test_speed_of_a_size_without_tokenizer_is_that_of_tokens(scripts: ScriptRunner, tmp_path: Path) -> None:
    words = ["--generator", "S", "--tokenizer", "none", "--num-tokens", 2, "--samplers", "eager", "--repeats", 1]
    done = speed(scripts, *words, "--dtype", "float32", cwd=tmp_path)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "runs" / "speed" / "speed.json").read_text())
    (row,) = found["rows"]
    assert found["generator"]["name"] == "S"
    assert found["tokenizer"] is row["decode_ms"] is row["first_preview_ms"] is None
    assert row["images_per_second"] == pytest.approx(1000 / (2 * row["ms_per_token"]))
    assert "tokens only" in (tmp_path / "runs" / "speed" / "speed.md").read_text()


MISTAKES: list[tuple[list[object], str]] = [
    (["--samplers", "eager", "greedy"], "'greedy'"),
    (["--num-tokens", 4, 17], "this model has 1..16"),
    (["--cfg-scale", "nan"], "cfg_scale"),
    (["--generator", "B"], "model is given"),
]


@pytest.mark.parametrize(("words", "named"), MISTAKES, ids=[" ".join(map(str, words)) for words, _ in MISTAKES])
def test_speed_refuses_in_one_line_and_writes_nothing(
    scripts: ScriptRunner, pipeline_folder: Path, tmp_path: Path, words: list[object], named: str
) -> None:
    assert named in refused(speed(scripts, "--model", pipeline_folder, *words, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("words", "named"), [(["sped"], "did you mean speed?"), ([], "must be a command: speed")])
def test_benchmark_refuses_unknown_names(
    scripts: ScriptRunner, tmp_path: Path, words: list[object], named: str
) -> None:
    assert named in refused(scripts("benchmark.py", *words, cwd=tmp_path))


def test_guidance_needs_a_model_with_a_null_label(tiny_generator: ChannelGPT) -> None:
    without = sharp_generator(replace(tiny_generator.config, has_null_label=False))
    with pytest.raises(ValueError, match="trained without null label"):
        measure_speed(without, None, SpeedConfig(cfg_scale=[1.0, 2.0]))


def test_a_token_reads_the_blocks_and_the_cache() -> None:
    with torch.device("meta"):
        model = ChannelGPT(random_config("B")).to(torch.bfloat16)
    # step i reads i earlier positions; in each of 12 layers a key and a value of width 768
    cache = [2 * earlier * 12 * 2 * 768 * 6 for earlier in range(10)]
    assert bytes_per_token(model, 6, 10) == 2 * 84_953_088 + sum(cache) / 10


def test_rows_by_hand() -> None:
    times = np.array([[3.0, 10.0], [4.0, 9.0], [4.0, 14.0]])
    setting = {"device": "cpu", "dtype": "float32", "batch_size": 2, "cfg_scale": 1.5}
    two, four = rows_of("eager", setting, [2, 4], times, 6.0)
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
    draws = build_samplers(["uncached", "transformers", "eager", "compiled"], tiny_generator)
    assert made == [False, True]
    for draw in (*draws.values(), *draws.values()):
        times = draw(task(budgets, cfg_scale))
        assert len(times) == len(budgets)
        assert (np.diff([0, *times]) > 0).all()


@pytest.mark.parametrize(("cfg_scale", "rows"), [(1.0, 3), (2.0, 6)])
def test_uncached_reads_whole_prefixes_and_interpolates_between_them(
    tiny_generator: ChannelGPT, monkeypatch: pytest.MonkeyPatch, cfg_scale: float, rows: int
) -> None:
    llama = llama_of(tiny_generator)
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
    lines = "\n".join(report(found)).splitlines()
    assert lines[0] == "# Speed: generator B (111.7M), tokens only"
    assert "A Processor, 2 threads, torch 2.15, memory reads 20 GB/s" in lines
    assert "| float32, batch 1 | uncached (estimated) | 30.00 | 60.00 | 2.00 | - | 12.5% |" in lines
    assert "| float32, batch 1 | eager | 7.50 (4.0x) | 15.00 (4.0x) | 2.00 | - | 12.5% |" in lines
    assert "| eager | 7.50 | 15.00 |" in "".join(report(found | {"rows": rows[2:]}))
