"""benchmark.py speed: what it writes, and the arithmetic of its rows. No test depends on how fast anything is."""

import json
import math
import time
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
from tqdm import tqdm
from transformers import LlamaForCausalLM

from benchmark import random_config
from common.measuring import held_bytes, peak_memory
from common.plots import Panel, save_line_plot
from evaluation.speed import limits, measure, samplers
from evaluation.speed.config import SAMPLERS, SpeedConfig
from evaluation.speed.limits import BandwidthProbe, TokenBytes, token_bytes
from evaluation.speed.measure import Measured, Setting, Subject, measure_speed, rows_of
from evaluation.speed.report import table
from evaluation.speed.samplers import Clock, Task, build_sampler, lengths_to_measure, same_trunk, total_times
from generator.decode import CachedDecoder
from generator.engine import Engine
from generator.model import ChannelGPT

C = 16
SMALL_PROBE = "import evaluation.speed.limits as limits; limits.PROBE_BYTES = 2**20"
FIELDS = {
    "sampler", "device", "dtype", "batch_size", "cfg_scale", "num_tokens", "ms_per_token", "ms_per_token_min",
    "ms_by_position", "decode_ms", "images_per_second", "pictures_decoded", "first_preview_ms", "peak_memory_mb",
    "bytes_per_token", "fraction_of_limit", "estimated",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PROBE_BYTES", 2**20)


def speed(scripts: ScriptRunner, *words: object, cwd: Path) -> Finished:
    return scripts("benchmark.py", "speed", *words, before=SMALL_PROBE, cwd=cwd)


def refused(done: Finished) -> str:
    assert done.code == 2, done.err
    assert done.out == ""
    lines = done.err.splitlines()
    assert len(lines) == 1, done.err
    assert lines[0].startswith("benchmark.py: error: ")
    return lines[0]


# ------------------------------------------------------------------------------------- the script


def test_speed_writes_a_row_for_each_sampler_setting_and_k(
    scripts: ScriptRunner, pipeline_folder: Path, tiny_generator: ChannelGPT, tmp_path: Path
) -> None:
    names = [name for name in SAMPLERS if name != "compiled"]
    words = ["--model", pipeline_folder, "--num-tokens", 16, 4, "--batch-size", 3, "--dtype", "float32", "bfloat16"]
    words += ["--cfg-scale", 1, 2, "--samplers", *names, "--repeats", 2, "--device", "cpu", "--output-dir", "out"]
    done = speed(scripts, *words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out == ""
    assert "speed.json, speed.md and speed.png written to out" in done.err
    assert "Traceback" not in done.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["speed.json", "speed.md", "speed.png"]

    found = json.loads((tmp_path / "out" / "speed.json").read_text())
    rows = found["rows"]
    keys = ("sampler", "dtype", "batch_size", "cfg_scale", "num_tokens")
    wanted = product(names, ("float32", "bfloat16"), (3,), (1, 2), (4, 16))
    assert sorted(tuple(row[key] for key in keys) for row in rows) == sorted(wanted)
    for row in rows:
        assert row.keys() == FIELDS
        assert row["device"] == "cpu"
        assert row["estimated"] is (row["sampler"] == "uncached")
        assert row["pictures_decoded"] is True
        assert len(row["ms_by_position"]) == min(8, row["num_tokens"])
        numbers = [row[key] for key in FIELDS if isinstance(row[key], float)] + row["ms_by_position"]
        assert all(math.isfinite(number) and number > 0 for number in numbers), row
        assert row["ms_per_token_min"] <= row["ms_per_token"]
        limit_ms = row["bytes_per_token"] / found["bandwidth_gb_s"] / 1e6
        assert row["fraction_of_limit"] == pytest.approx(limit_ms / row["ms_per_token"])
        picture_ms = row["batch_size"] / row["images_per_second"] * 1000 - row["num_tokens"] * row["ms_per_token"]
        assert picture_ms == pytest.approx(row["decode_ms"], rel=1e-3)

    assert found["bandwidth_gb_s"] >= found["bandwidth_median_gb_s"] > 0
    # once before all, and before, between and after the rounds of each setting
    assert {len(values) for values in found["bandwidth_by_way_gb_s"].values()} == {1 + 4 * 3}
    assert found["machine"]["threads"] == 1
    assert found["machine"]["cpu"]
    assert found["versions"].keys() == {"python", "torch", "transformers", "channeltok"}
    parameters = sum(parameter.numel() for parameter in tiny_generator.parameters())
    assert found["generator"] == {"name": pipeline_folder.name, "parameters": parameters}
    assert found["tokenizer"]["name"] == pipeline_folder.name
    assert found["settings"]["repeats"] == 2
    assert found["command"].startswith("benchmark.py speed --model ")
    assert found["seconds"] > 0

    text = (tmp_path / "out" / "speed.md").read_text()
    assert text.count("| uncached (estimated) |") == 4
    assert found["command"] in text
    with Image.open(tmp_path / "out" / "speed.png") as plot:
        assert plot.format == "PNG"
        assert plot.height > 800  # two rows of panels


def test_speed_of_a_size_without_tokenizer_is_that_of_tokens(scripts: ScriptRunner, tmp_path: Path) -> None:
    words = ["--generator", "S", "--tokenizer", "none", "--num-tokens", 2, "--samplers", "eager", "--repeats", 1]
    done = speed(scripts, *words, "--dtype", "float32", cwd=tmp_path)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "runs" / "speed" / "speed.json").read_text())
    (row,) = found["rows"]
    assert found["generator"] == {"name": "S", "parameters": parameters_of(7, 384, 1024)}
    assert found["tokenizer"] is None
    assert row["pictures_decoded"] is False
    assert row["decode_ms"] is None
    assert row["first_preview_ms"] is None
    assert row["images_per_second"] == pytest.approx(1000 / (2 * row["ms_per_token"]))
    assert row["peak_memory_mb"] > 4 * parameters_of(7, 384, 1024) / 1e6
    assert "tokens only" in (tmp_path / "runs" / "speed" / "speed.md").read_text()


MISTAKES: list[tuple[list[object], str]] = [
    (["--samplers", "eager", "greedy"], "'greedy'; allowed: uncached, transformers-dynamic"),
    (["--samplers", "eager", "eager"], "each once"),
    (["--dtype", "float16"], "'float16'; allowed: float32, bfloat16"),
    (["--num-tokens", 4, 17], "17; this model draws 1..16"),
    (["--batch-size", 1, 0], "batch_size has 0"),
    (["--cfg-scale", "nan"], "cfg_scale"),
    (["--seed", 2**63 - 1], "seed"),
    (["--device", "cuda"], "cuda"),
    (["--generator", "B"], "model is given"),
    (["--tokenizer", "none"], "model is given"),
    (["--sampler", "eager"], "--samplers"),
]


@pytest.mark.parametrize(("words", "named"), MISTAKES, ids=[" ".join(map(str, words)) for words, _ in MISTAKES])
def test_speed_refuses_in_one_line_and_writes_nothing(
    scripts: ScriptRunner, pipeline_folder: Path, tmp_path: Path, words: list[object], named: str
) -> None:
    if words == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has it")
    assert named in refused(speed(scripts, "--model", pipeline_folder, *words, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["speed", "--generator", "M"], "'M' is unknown; allowed: S, B, L, XL, XXL"),
        (["speed", "--tokenizer", "paper"], "tokenizer 'paper' is unknown"),
        (["speed", "--model", "nowhere"], "nowhere"),
        (["sped"], "did you mean speed?"),
        ([], "the first word must be a command: speed"),
    ],
)
def test_benchmark_refuses_unknown_names(
    scripts: ScriptRunner, tmp_path: Path, words: list[object], named: str
) -> None:
    assert named in refused(scripts("benchmark.py", *words, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_help_lists_commands_and_flags(scripts: ScriptRunner) -> None:
    for words, shown in ((["--help"], "speed"), (["speed", "--help"], "--full_uncached")):
        done = scripts("benchmark.py", *words)
        assert (done.code, done.err) == (0, "")
        assert shown in done.out


def test_guidance_needs_a_model_with_a_null_label(tiny_generator: ChannelGPT) -> None:
    without = sharp_generator(replace(tiny_generator.config, has_null_label=False))
    with pytest.raises(ValueError, match="trained without null label"):
        measure_speed(Subject(model=without, name="tiny"), SpeedConfig(cfg_scale=[1.0, 2.0]))


# ------------------------------------------------------------------------------------- sizes


def parameters_of(layers: int, width: int, inner: int) -> int:
    """With 256 tokens of 14 bits and 1,000 classes."""
    channels, bits, tables = 256, 14, 1000 + 1
    total = channels * bits
    blocks = layers * (4 * width**2 + 3 * width * inner + 2 * width)
    prior = total * (total - 1) // 2 + total + tables * total
    maps = 2 * (channels + 1) * bits * width + bits * (bits - 1) // 2 * width
    return blocks + prior + maps + (channels + tables + 1) * width


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
def test_generator_sizes_have_these_parameters(name: str, blocks: int, size: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        model = ChannelGPT(random_config(name))
    assert sum(parameter.numel() for parameter in model.blocks.parameters()) == blocks
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters_of(*size)


# ------------------------------------------------------------------------------------- arithmetic


def interpolated(lengths: list[int], values: list[float], at: int) -> float:
    """Between the two neighbours."""
    for left, right, low, high in zip(lengths, lengths[1:], values, values[1:], strict=False):
        if left <= at <= right:
            return low + (high - low) * (at - left) / (right - left)
    assert [at] == lengths
    return values[0]


@pytest.mark.parametrize(
    ("lengths", "values"),
    [
        ([1, 32, 64, 128, 192, 256], [10.0, 12.5, 40.0, 35.0, 90.0, 200.0]),
        ([1, 2], [3.0, 5.0]),
        ([1], [7.0]),
        ([1, 2, 3, 4, 5], [5.0, 1.0, 9.0, 2.0, 2.0]),
    ],
)
def test_the_time_of_uncached_drawing_is_the_sum_of_interpolated_times(lengths: list[int], values: list[float]) -> None:
    expected, total = [], 0.0
    for length in range(1, lengths[-1] + 1):
        total += interpolated(lengths, values, length)
        expected.append(total)
    np.testing.assert_allclose(total_times(lengths, values), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("num_tokens", "whole", "lengths"),
    [
        (256, False, [1, 32, 64, 128, 192, 256]),
        (512, False, [1, 32, 64, 128, 192, 256, 384, 512]),
        (100, False, [1, 32, 64, 100]),
        (32, False, [1, 32]),
        (1, False, [1]),
        (5, True, [1, 2, 3, 4, 5]),
    ],
)
def test_prefix_lengths_that_are_measured(num_tokens: int, whole: bool, lengths: list[int]) -> None:
    assert lengths_to_measure(num_tokens, whole) == lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("images", "sequences"), [(1, 1), (3, 6)])
def test_bytes_of_a_token_are_those_of_the_weights_it_reads(dtype: torch.dtype, images: int, sequences: int) -> None:
    model = ChannelGPT(random_config("S", num_channels=16, num_bits=6)).to(dtype)
    state, size = model.state_dict(), dtype.itemsize
    blocks = sum(value.numel() for name, value in state.items() if name.startswith(("blocks.", "norm.")))
    # float32: two maps of a channel and the pairs; what a bit has of the prior, on average; bits, and vectors
    maps = sum(state[name].numel() for name in ("read_bits.shared", "bit_head.shared", "pair_head.weight"))
    prior = 6 * (16 * 6 - 1) / 2 + images * 16 * 6
    needed = token_bytes(model, images, sequences)
    assert needed.fixed == pytest.approx(size * blocks + 4 * (maps + prior + (1 + sequences) * (384 + 6)), abs=4)
    # step i reads i earlier positions; 7 layers, a key and a value each
    read = [needed.fixed + earlier * 7 * 2 * 384 * size * sequences for earlier in range(10)]
    assert needed.mean(10) == sum(read) / 10
    assert needed.mean(1) == needed.fixed


def test_rows_by_hand() -> None:
    times = np.array([[1.0, 3.0, 6.0, 10.0], [2.0, 4.0, 6.0, 9.0], [1.0, 4.0, 8.0, 14.0]])
    measured = Measured(
        times=times,
        decoding=np.array([5.0, 30.0, 6.0]),
        memory=3_000_000,
        needed=TokenBytes(fixed=100, per_position=10),
    )
    setting = Setting(dtype="float32", batch_size=2, cfg_scale=1.5)
    two, four = rows_of("eager", False, setting, "cpu", [2, 4], measured)
    assert (two["num_tokens"], four["num_tokens"]) == (2, 4)
    assert four["ms_per_token"] == 10 / 4
    assert four["ms_per_token_min"] == 9 / 4
    assert two["ms_per_token"] == 4 / 2
    assert two["ms_per_token_min"] == 3 / 2
    # steps of the rounds: 1 2 1, 2 2 3, 3 2 4, 4 3 6
    assert four["ms_by_position"] == [1, 2, 3, 4]
    assert two["ms_by_position"] == [1, 2]
    assert four["images_per_second"] == pytest.approx(2 / 0.016)
    assert two["first_preview_ms"] == four["first_preview_ms"] == 4 + 6
    assert four["peak_memory_mb"] == 3
    assert four["bytes_per_token"] == 100 + 10 * (0 + 1 + 2 + 3) / 4
    assert four | {"dtype": "float32", "batch_size": 2, "cfg_scale": 1.5, "device": "cpu", "estimated": False} == four
    measured = Measured(times=times, decoding=None, memory=None, needed=measured.needed)
    (row,) = rows_of("eager", True, setting, "cpu", [4], measured)
    assert row["images_per_second"] == pytest.approx(2 / 0.010)
    assert (row["first_preview_ms"], row["peak_memory_mb"], row["decode_ms"]) == (None, None, None)
    assert row["estimated"] is True


def test_positions_are_divided_into_eight_equal_parts() -> None:
    times = np.cumsum(np.arange(1.0, 33.0))[None]
    measured = Measured(times=times, decoding=None, memory=None, needed=TokenBytes(fixed=1, per_position=1))
    setting = Setting(dtype="float32", batch_size=1, cfg_scale=1)
    (row,) = rows_of("eager", False, setting, "cpu", [32], measured)
    assert row["ms_by_position"] == [2.5 + 4 * part for part in range(8)]


# ------------------------------------------------------------------------------------- memory and bandwidth


class Holder:
    def __init__(self, **values: Any):
        self.__dict__ |= values


def test_what_an_object_holds_is_counted_once() -> None:
    weight = torch.zeros(1000)
    module = nn.Linear(10, 20)
    module.register_buffer("extra", torch.zeros(5, dtype=torch.float64))
    parts = Holder(parts=[{"a": weight, "b": (weight[:10], torch.zeros(3))}], module=module, name="x", number=1)
    parts.itself = parts
    assert held_bytes(parts) == 4000 + 12 + 4 * 220 + 40
    assert held_bytes(weight[:1]) == 4000
    assert held_bytes(None, "text", print) == 0


def test_a_decoder_holds_blocks_and_tables(tiny_generator: ChannelGPT, tiny_decoder: CachedDecoder) -> None:
    blocks = sum(parameter.nbytes for parameter in tiny_generator.blocks.parameters())
    norms = (2 * 2 + 1) * 32 * 4
    bits, width, classes = 6, 32, 5 + 1
    by_channel = 2 * width * bits + width + bits * bits + bits * (C + 1) * bits + bits + classes * bits + 2 * 16
    tables = 4 * (C * by_channel + bits * bits * width + classes * width)
    assert blocks + tables - norms <= held_bytes(tiny_decoder) <= blocks + tables + norms
    assert held_bytes(tiny_generator) == sum(parameter.nbytes for parameter in tiny_generator.parameters())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("pieces", [1, 4096])
def test_peak_memory_is_what_is_held_and_what_a_run_takes(pieces: int) -> None:
    holder = Holder(weight=torch.zeros(5 * 2**20))  # 20 MiB
    calls = []

    def run() -> None:
        calls.append(1)
        for _ in range(3):  # freed each time; the allocator keeps small pieces
            assert len([torch.ones(8 * 2**20 // pieces) for _ in range(pieces)]) == pieces  # 32 MiB

    for _ in range(2):  # also when an earlier run has freed as much
        peak = peak_memory(torch.device("cpu"), holder, run)
        assert peak is not None
        # the kernel counts pages in groups for each processor, and small pieces may find a fragmented heap
        assert 51 * 2**20 < peak < (60 if pieces == 1 else 80) * 2**20
    assert len(calls) == 4


def test_bandwidth_is_the_best_of_all_ways_and_times() -> None:
    probe = BandwidthProbe(device=torch.device("cpu"), compiled=False)
    probe.measure()
    probe.measure()
    assert set(probe.found) == {"sum", "matrix-vector"}
    assert all(len(values) == 2 and min(values) > 0 for values in probe.found.values())
    probe.found = {"sum": [1.0, 9.0, 3.0], "matrix-vector": [2.0, 4.0, 8.0]}
    assert probe.best == 9
    assert probe.median == 8  # of 2, 9, 8


def test_every_way_reads_the_whole_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    probe = BandwidthProbe(device=torch.device("cpu"), compiled=True)
    found = {name: float(way().sum()) for name, way in probe._ways.items()}
    assert found == dict.fromkeys(("sum", "matrix-vector", "compiled product and sum"), 2**18)


# ------------------------------------------------------------------------------------- samplers


@pytest.fixture
def engines(tiny_decoder: CachedDecoder) -> dict[str, Engine]:
    # the compiled step is tested elsewhere; here it is only a second name
    return {name: Engine(tiny_decoder, compile=False) for name in ("eager", "compiled")}


@pytest.fixture
def rival(tiny_generator: ChannelGPT) -> LlamaForCausalLM:
    """The model of transformers, with odds that are far from even."""
    llama = same_trunk(tiny_generator, SAMPLERS)
    assert llama is not None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for weight in (llama.model.embed_tokens.weight, llama.lm_head.weight):
            nn.init.normal_(weight, std=0.5)
    return llama


def task(num_tokens: int, cfg_scale: float = 1.0) -> Task:
    return Task(num_tokens=num_tokens, class_labels=[0, 3, 1], seeds=[4, 5, 6], cfg_scale=cfg_scale)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("num_tokens", "cfg_scale"), [(1, 1.0), (5, 2.0), (C, 1.0), (C, 2.0)])
def test_every_sampler_gives_a_rising_time_for_each_token(
    rival: LlamaForCausalLM,
    tiny_generator: ChannelGPT,
    engines: dict[str, Engine],
    name: str,
    num_tokens: int,
    cfg_scale: float,
) -> None:
    sampler = build_sampler(name, tiny_generator.config, rival, engines, task(num_tokens, cfg_scale), False)
    for _ in range(2):
        times = sampler.times()
        assert times.shape == (num_tokens,)
        assert times[0] > 0
        assert (np.diff(times) > 0).all()
    assert held_bytes(sampler.holder) > 0


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_transformers_draws_codes_from_the_guided_odds(
    rival: LlamaForCausalLM,
    tiny_generator: ChannelGPT,
    monkeypatch: pytest.MonkeyPatch,
    cache: str,
    cfg_scale: float,
) -> None:
    """So that it does the same work as ours."""
    scores = []

    class Recording(samplers._CodesOnly):
        def __call__(self, input_ids: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
            result = super().__call__(input_ids, given)
            scores.append(result.clone())
            return result

    monkeypatch.setattr(samplers, "_CodesOnly", Recording)
    sampler = samplers.TransformersSampler(rival, tiny_generator.config, task(C, cfg_scale), cache)
    tokens = sampler.draw(Clock(torch.device("cpu")))
    assert tokens.shape == (3, C)
    codes = tiny_generator.config.codebook_size
    assert int(tokens.max()) < codes
    with torch.no_grad():
        logits, null_logits = (
            rival(torch.cat([codes + torch.tensor(labels)[:, None], tokens[:, :-1]], dim=1)).logits.log_softmax(-1)
            for labels in ([0, 3, 1], [5, 5, 5])
        )
    expected = (null_logits + cfg_scale * (logits - null_logits))[..., :codes].softmax(-1)
    assert expected.max() > 0.2
    found = torch.stack(scores, dim=1)
    torch.testing.assert_close(found[..., :codes].softmax(-1), expected, atol=1e-4, rtol=1e-3)
    assert (found[..., codes:] == -torch.inf).all()


@pytest.mark.parametrize(("whole", "lengths"), [(False, [1, C]), (True, list(range(1, C + 1)))])
@pytest.mark.parametrize(("cfg_scale", "rows"), [(1.0, 3), (2.0, 6)])
def test_uncached_reads_the_whole_prefix_for_every_token(
    rival: LlamaForCausalLM,
    tiny_generator: ChannelGPT,
    monkeypatch: pytest.MonkeyPatch,
    whole: bool,
    lengths: list[int],
    cfg_scale: float,
    rows: int,
) -> None:
    seen = []
    real = rival.forward

    def forward(**arguments: Any) -> Any:
        output = real(**arguments)
        seen.append((tuple(arguments["input_ids"].shape), tuple(output.logits.shape), output.past_key_values))
        return output

    monkeypatch.setattr(rival, "forward", forward)
    sampler = samplers.UncachedSampler(rival, tiny_generator.config, task(C, cfg_scale), whole)
    assert sampler.estimated is not whole
    assert sampler.times().shape == (C,)
    assert seen == [((rows, length), (rows, 1, 64 + 5 + 1), None) for length in lengths]


def test_only_the_compiled_sampler_compiles(tiny_generator: ChannelGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def engine(decoder: CachedDecoder, *, compile: bool) -> Engine:
        made.append(compile)
        return Engine(decoder, compile=False)

    monkeypatch.setattr(measure, "Engine", engine)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    config = SpeedConfig(samplers=["compiled", "eager"], repeats=1, dtype=["float32"], batch_size=[2, 1], device="cpu")
    results = measure_speed(Subject(model=tiny_generator, name="tiny"), config)
    assert made == [True, False]
    found = [(row["sampler"], row["batch_size"], row["num_tokens"]) for row in results.rows]
    assert found == [("compiled", 2, C), ("eager", 2, C), ("compiled", 1, C), ("eager", 1, C)]
    assert "compiled product and sum" in results.bandwidth.found
    assert same_trunk(tiny_generator, ["compiled", "eager"]) is None  # no rival without its samplers


class FakeSampler(samplers.Sampler):
    def __init__(self, name: str, log: list[str]):
        self.holder, self.name, self.log = None, name, log

    def times(self) -> samplers.Milliseconds:
        self.log.append(self.name)
        return np.array([1.0])


def test_rounds_are_interleaved_with_probes_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(BandwidthProbe, "measure", lambda probe: log.append("probe"))
    fakes = {name: FakeSampler(name, log) for name in "abc"}
    probe = BandwidthProbe(device=torch.device("cpu"), compiled=False)
    with tqdm(disable=True) as bar:
        _, times, decoding = measure._run(fakes, [1], lambda tokens: tokens, 2, task(1), probe, bar)
    assert log == [*"aabbcc", "probe", *"abc", "probe", *"bca", "probe"]
    assert {name: found.tolist() for name, found in times.items()} == {name: [[1.0], [1.0]] for name in "abc"}
    assert decoding is not None
    assert decoding.shape == (2,)


def test_the_clock_gives_milliseconds_since_its_start() -> None:
    clock = Clock(torch.device("cpu"))
    start = time.perf_counter()
    while time.perf_counter() - start < 0.02:
        pass
    clock.mark()
    clock.mark()
    first, second = clock.elapsed()
    assert 20 <= first <= second


# ------------------------------------------------------------------------------------- table and plot


def results(samplers_: list[str]) -> dict[str, Any]:
    rows = []
    for name, milliseconds in zip(samplers_, (30.0, 7.5), strict=False):
        for k in (8, 16):
            rows.append(
                dict.fromkeys(FIELDS)
                | {"sampler": name, "dtype": "float32", "batch_size": 1, "cfg_scale": 1.0, "num_tokens": k}
                | {"ms_per_token": milliseconds * k / 8, "images_per_second": 2.0, "fraction_of_limit": 0.125}
                | {"estimated": name == "uncached"}
            )
    return {
        "rows": rows,
        "bandwidth_gb_s": 20.0,
        "machine": {"cpu": "A Processor", "gpu": None, "threads": 2, "system": "Linux"},
        "versions": {"torch": "2.15"},
        "generator": {"name": "B", "parameters": 111_657_216},
        "tokenizer": None,
        "settings": {"repeats": 3},
        "command": "benchmark.py speed",
    }


def test_the_table_gives_factors_over_uncached() -> None:
    lines = table(results(["uncached", "eager"])).splitlines()
    assert lines[0] == "# Speed: generator B (111.7M), tokens only"
    assert "A Processor, 2 threads, torch 2.15, memory reads 20 GB/s" in lines
    assert "| uncached (estimated) | 30.00 | 60.00 | 2.00 | - | - | 12.5% |" in lines
    assert "| eager | 7.50 (4.0x) | 15.00 (4.0x) | 2.00 | - | - | 12.5% |" in lines
    assert "| eager | 30.00 | 60.00 | 2.00 | - | - | 12.5% |" in table(results(["eager"])).splitlines()


@pytest.mark.parametrize(("panels", "columns"), [(1, 1), (3, 2)])
def test_a_plot_is_a_whole_png(tmp_path: Path, panels: int, columns: int) -> None:
    lines = {"one": [(1, 2.0), (2, 3.0)], "two": [(1, 1.0)]}
    save_line_plot(
        [Panel(title=str(i), lines=lines, limit=[(1, 0.5), (2, 0.5)]) for i in range(panels)],
        tmp_path / "plot.png",
        title="A title",
        x_label="x",
        y_label="y",
        limit_label="bound",
        columns=columns,
        dashed={"one"},
    )
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
    with Image.open(tmp_path / "plot.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(maxcolors=10**6) or []) > 20
