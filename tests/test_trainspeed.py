"""benchmark.py speed --train: what it compares, times and writes. No test looks at how fast anything is."""

import copy
import json
import math
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from conftest import Finished, ScriptRunner
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaForCausalLM

from common import peak, turns
from common.errors import InputError
from common.peak import MatmulProbe, Peak
from generator.config import TokenLayout
from generator.objective import NextTokenNats, flops_per_token
from generator.trainspeed import Subject, TrainSpeedConfig, measure, measure_training, write_report
from generator.trainspeed.config import VARIANTS
from generator.trainspeed.lanes import Batch, Lane, Trainee
from generator.trainspeed.measure import build_lanes, random_batch, rows_of, run_lanes
from generator.trainspeed.report import HEADS, table

CPU = torch.device("cpu")
C = 16
SMALL_PROBE = "import common.peak as peak; peak.SMALLEST = peak.LARGEST = 16"
UNCOMPILED = ["eager", "checkpointed", "unchunked"]
FIELDS = {
    "generator", "variant", "dtype", "batch_size", "device", "seconds", "tokens_per_second", "tokens_per_second_min",
    "tokens_per_second_max", "mfu", "fraction_of_matmul", "against_baseline", "step_memory_mb", "loss",
    "gradient_norm", "error",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "SMALLEST", 16)
    monkeypatch.setattr(peak, "LARGEST", 16)


class Watch:
    """Stands for `MemoryWatch`, which collects garbage of the whole process each time."""

    def __init__(self, device: torch.device):
        self.growth = 5_000_000

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to do."""


@pytest.fixture(autouse=True)
def quick_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "MemoryWatch", Watch)


@pytest.fixture
def subject(tiny_generator: LlamaForCausalLM, tiny_layout: TokenLayout) -> Subject:
    return Subject(name="tiny", layout=tiny_layout, build=lambda: copy.deepcopy(tiny_generator))


@pytest.fixture
def trainee(tiny_generator: LlamaForCausalLM, tiny_layout: TokenLayout) -> Trainee:
    return Trainee(copy.deepcopy(tiny_generator), tiny_layout, loss_chunk=10)


def config(**settings: Any) -> TrainSpeedConfig:
    few = {"batch_size": [2], "dtype": ["float32"], "loss_chunk": 10, "repeats": 2, "device": "cpu"}
    return TrainSpeedConfig(**(few | settings))


def probe() -> MatmulProbe:
    return MatmulProbe(device=CPU, dtypes=["float32"])


def lanes_of(trainee: Trainee, variants: Sequence[str] = UNCOMPILED, batch_size: int = 2) -> list[Lane]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_lanes("tiny", trainee, list(variants), ["float32"], random_batch(trainee, batch_size))


def run(lanes: list[Lane], **settings: Any) -> None:
    with tqdm(disable=True) as bar:
        run_lanes(lanes, probe(), config(**settings), bar)


# ------------------------------------------------------------------------------------- the script


def speed_train(scripts: ScriptRunner, *words: object, cwd: Path) -> Finished:
    return scripts("benchmark.py", "speed", *words, before=SMALL_PROBE, cwd=cwd)


def test_training_speed_writes_a_row_for_each_variant_format_and_batch(
    scripts: ScriptRunner, pipeline_folder: Path, tiny_generator: LlamaForCausalLM, tmp_path: Path
) -> None:
    words = ["--model", pipeline_folder, "--variants", *UNCOMPILED, "--batch-size", 3, "--loss-chunk", 10]
    words += ["--dtype", "float32", "bfloat16", "--repeats", 2, "--device", "cpu", "--output-dir", "out", "--train"]
    done = speed_train(scripts, *words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out == ""
    assert "train.json, train.md and train.png written to out" in done.err
    assert "Traceback" not in done.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train.json", "train.md", "train.png"}

    found = json.loads((tmp_path / "out" / "train.json").read_text())
    name = pipeline_folder.name
    flops = flops_per_token(tiny_generator, C)
    keys = ("generator", "variant", "dtype", "batch_size")
    wanted = set(product([name], UNCOMPILED, ("float32", "bfloat16"), (3,)))
    assert len(found["rows"]) == len(wanted)
    assert {tuple(row[key] for key in keys) for row in found["rows"]} == wanted
    for row in found["rows"]:
        assert row.keys() == FIELDS
        assert row["error"] is None
        assert len(row["seconds"]) == 2
        assert row["tokens_per_second"] == pytest.approx(row["batch_size"] * C / (sum(row["seconds"]) / 2))
        assert row["tokens_per_second_min"] <= row["tokens_per_second"] <= row["tokens_per_second_max"]
        best = found["matmul_peak_flops"][row["dtype"]]
        assert found["peak"][row["dtype"]] == {"flops": best, "source": "fastest square matrix product here"}
        assert row["mfu"] == row["fraction_of_matmul"] == pytest.approx(row["tokens_per_second"] * flops / best)
        assert (row["against_baseline"] == 1) is (row["variant"] == "eager")
        assert row["step_memory_mb"] is None or row["step_memory_mb"] >= 0
        assert math.isfinite(row["loss"] + row["gradient_norm"])
    losses = {row["loss"] for row in found["rows"] if row["dtype"] == "float32"}
    assert max(losses) == pytest.approx(min(losses), rel=1e-4)
    parameters = sum(parameter.numel() for parameter in tiny_generator.parameters())
    model = found["models"][name]
    assert model["parameters"] == parameters
    assert (model["num_tokens"], model["flops_per_token"]) == (C, flops)
    assert model["held_mb"] == pytest.approx(3 * 4 * parameters / 1e6, rel=0.01)  # weights, and two moments
    # once before all, and before, between and after the rounds of each batch size
    assert {len(values) for values in found["matmul_flops_by_time"].values()} == {1 + 3}
    assert found["machine"]["threads"] == 1
    assert found["versions"].keys() == {"python", "torch", "transformers", "channeltok"}
    assert found["settings"]["batch_size"] == [3]
    assert found["command"].startswith("benchmark.py speed --model ")
    text = (tmp_path / "out" / "train.md").read_text()
    assert found["command"] in text
    assert text.count(f"| {name} | ") == 6
    with Image.open(tmp_path / "out" / "train.png") as plot:
        assert plot.format == "PNG"


MISTAKES: list[tuple[list[object], str]] = [
    (["--generator", "S", "M"], "generator has 'M'; allowed: S, B, L, XL, XXL"),
    (["--generator", "S", "S"], "generator is ['S', 'S']; give one or more values, each once"),
    (["--generator", "S", "--model", "x"], "model is given, and so is generator"),
    (["--model", "nowhere"], "nowhere"),
    (["--variants", "eager", "fast"], "'fast'; allowed: eager, compiled, checkpointed, unchunked"),
    (["--variants", "unchunked"], "1024 tokens is one chunk of loss_chunk 8192; give a smaller loss_chunk"),
    (["--dtype", "float16"], "'float16'; allowed: float32, bfloat16"),
    (["--batch-size", 2, 0], "batch_size has 0"),
    (["--loss-chunk", 0], "loss_chunk is 0"),
    (["--repeats", 0], "repeats is 0"),
    (["--max-seconds", "nan"], "max_seconds is nan"),
    (["--seed", -1], "seed is -1"),
    (["--device", "gpu"], "gpu"),
    # those of drawing, and of a tokenizer
    (["--samplers", "eager"], "unknown argument '--samplers'"),
    (["--num-tokens", 4], "unknown argument '--num-tokens'"),
    (["--tokenizer", "paper-256"], "unknown argument '--tokenizer'"),
    (["--train", "false"], "unknown argument 'false'"),
]


@pytest.mark.parametrize(("words", "named"), MISTAKES, ids=[" ".join(map(str, words)) for words, _ in MISTAKES])
def test_training_speed_refuses_in_one_line_and_writes_nothing(
    scripts: ScriptRunner, tmp_path: Path, words: list[object], named: str
) -> None:
    done = speed_train(scripts, "--train", "--device", "cpu", *words, cwd=tmp_path)
    assert done.code == 2, done.err
    (line,) = done.err.splitlines()
    assert line.startswith("benchmark.py: error: ")
    assert named in line
    assert list(tmp_path.iterdir()) == []


def test_flags_of_training_are_none_of_drawing(scripts: ScriptRunner, tmp_path: Path) -> None:
    done = speed_train(scripts, "--loss-chunk", 4, cwd=tmp_path)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "unknown argument '--loss-chunk'" in done.err
    shown = scripts("benchmark.py", "speed", "--help").out
    assert "--samplers" in shown
    assert "--train" in shown
    shown = scripts("benchmark.py", "speed", "--train", "--help").out
    assert "--loss_chunk" in shown
    assert "--samplers" not in shown


# ------------------------------------------------------------------------------------- settings


def test_defaults_are_few_and_depend_on_the_device() -> None:
    cuda, plain = torch.device("cuda"), TrainSpeedConfig()
    assert (plain.batch_sizes_on(CPU), plain.batch_sizes_on(cuda)) == ([4], [64])
    assert plain.variants_at(CPU, 4 * 256) == plain.variants_at(CPU, 8192) == ["eager", "checkpointed"]
    assert plain.variants_at(CPU, 8193) == ["eager", "checkpointed", "unchunked"]
    assert plain.variants_at(cuda, 64 * 256) == list(VARIANTS)
    assert plain.variants_at(cuda, 8192) == ["eager", "compiled", "checkpointed"]
    assert TrainSpeedConfig(dtype=["bfloat16"]).dtypes_on(CPU) == ["bfloat16"]
    assert len(plain.dtypes_on(CPU)) == 1


def test_compiling_without_a_compiler_is_refused(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(InputError, match="compiler"):
        measure_training([subject], config(variants=["eager", "compiled"]))


# ------------------------------------------------------------------------------------- variants


def test_variants_differ_from_eager_in_one_setting_and_share_its_weights(
    trainee: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[NextTokenNats] = []
    monkeypatch.setattr(NextTokenNats, "compile_blocks", lambda model: compiled.append(model))
    models = {name: trainee.model(name) for name in VARIANTS}
    assert {name: model.chunk for name, model in models.items()} == {
        "eager": 10, "compiled": 10, "checkpointed": 10, "unchunked": 0,
    }  # fmt: skip
    assert compiled == [models["compiled"]]
    for name, model in models.items():
        blocks = model.llama.model.layers
        assert [block.gradient_checkpointing for block in blocks] == [name == "checkpointed"] * len(blocks)
        assert model.training
        pairs = zip(model.llama.parameters(), trainee.llama.parameters(), strict=True)
        assert all(mine is theirs for mine, theirs in pairs)


@pytest.mark.parametrize("name", UNCOMPILED)
def test_a_step_is_that_of_training_and_leaves_the_weights_as_they_were(
    tiny_generator: LlamaForCausalLM, tiny_layout: TokenLayout, trainee: Trainee, name: str
) -> None:
    (lane,) = lanes_of(trainee, [name])
    plain = NextTokenNats(copy.deepcopy(tiny_generator).train(), tiny_layout)
    loss = plain(lane.batch.class_labels, lane.batch.tokens).mean()
    loss.backward()
    squares = sum(float(parameter.grad.double().square().sum()) for parameter in plain.parameters())  # type: ignore[union-attr]
    moved = []
    trainee.optimizer.register_step_pre_hook(
        lambda optimizer, *rest: moved.append(
            math.sqrt(sum(float(p.grad.double().square().sum()) for g in optimizer.param_groups for p in g["params"]))
        )
    )
    for _ in range(2):  # the second one finds no gradient of the first
        found = lane.run()
        assert float(found[0]) == pytest.approx(float(loss.detach()), rel=1e-5)
        assert float(found[1]) == pytest.approx(math.sqrt(squares), rel=1e-3)
    assert math.sqrt(squares) > 1
    assert moved == [pytest.approx(1, rel=1e-3)] * 2  # clipped
    for parameter, original in zip(trainee.llama.parameters(), tiny_generator.parameters(), strict=True):
        assert torch.equal(parameter, original)
        assert parameter.grad is None


def test_bfloat16_is_autocast_over_float32_weights(trainee: Trainee) -> None:
    dtypes = []
    trainee.llama.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, i, out: dtypes.append(out.dtype))
    with torch.random.fork_rng():
        lanes = build_lanes("tiny", trainee, ["eager"], ["float32", "bfloat16"], random_batch(trainee, 2))
    found = [lane.run() for lane in lanes]
    assert dtypes == [torch.float32, torch.bfloat16]
    assert {parameter.dtype for parameter in trainee.llama.parameters()} == {torch.float32}
    assert float(found[1][0]) == pytest.approx(float(found[0][0]), rel=0.05)
    assert not torch.equal(found[0][0], found[1][0])


@pytest.mark.slow
def test_a_compiled_step_gives_what_an_eager_one_gives(subject: Subject) -> None:
    results = measure_training([subject], config(variants=["eager", "compiled"]))
    eager, compiled = results.rows
    assert compiled["error"] is None
    assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-4)
    assert compiled["gradient_norm"] == pytest.approx(eager["gradient_norm"], rel=1e-3)


def spoil_loss(model: NextTokenNats) -> None:
    model.register_forward_hook(lambda module, given, nats: nats * 1.01)


def spoil_gradient(model: NextTokenNats) -> None:
    model.register_forward_hook(lambda module, given, nats: nats.detach() + 2 * (nats - nats.detach()))


@pytest.mark.parametrize(("spoil", "named"), [(spoil_loss, "wrong: loss"), (spoil_gradient, "wrong: gradient norm")])
def test_a_variant_that_disagrees_with_eager_is_an_error_and_is_not_timed(
    trainee: Trainee, caplog: pytest.LogCaptureFixture, spoil: Callable[[NextTokenNats], None], named: str
) -> None:
    lanes = lanes_of(trainee)
    spoil(lanes[1]._model)
    run(lanes)
    good, bad, other = rows_of(lanes, CPU)
    assert bad["error"].startswith(named)
    assert named in caplog.text
    assert (bad["seconds"], bad["tokens_per_second"], bad["loss"]) == ([], None, None)
    assert good["error"] is other["error"] is None
    assert len(other["seconds"]) == 2


# ------------------------------------------------------------------------------------- memory


class ShortOfMemory:
    """Hook of a module's forward pass that fails at a certain call, after gradients have begun to exist."""

    def __init__(self, at: int):
        self.at, self.calls = at, 0

    def __call__(self, module: object, given: object, nats: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            nats.sum().backward()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return nats


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_running_out_of_memory_is_a_row_and_the_others_go_on_unharmed(trainee: Trainee, at: int) -> None:
    lanes = lanes_of(trainee)
    hook = ShortOfMemory(at)
    lanes[0]._model.register_forward_hook(hook)
    run(lanes)
    assert hook.calls == at
    short, *others = rows_of(lanes, CPU)
    assert (short["error"], short["seconds"], short["mfu"]) == ("out of memory", [], None)
    for row in others:
        assert row["error"] is None
        assert len(row["seconds"]) == 2
        assert row["against_baseline"] is None
    assert all(parameter.grad is None for parameter in trainee.llama.parameters())
    text = table(found(rows_of(lanes, CPU)))
    assert "| tiny | 2 | float32 | eager | out of memory | - | - |" in text.splitlines()


def test_a_generator_that_does_not_fit_is_reported_and_the_next_one_measured(subject: Subject, tmp_path: Path) -> None:
    def too_large() -> LlamaForCausalLM:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    large = Subject(name="huge", layout=subject.layout, build=too_large)
    results = measure_training([large, subject], config(variants=UNCOMPILED, repeats=1, batch_size=[2, 1]))
    write_report(results, tmp_path, "a command")
    assert [row["error"] for row in results.rows] == ["out of memory"] * 6 + [None] * 6
    assert [row["batch_size"] for row in results.rows] == [2, 2, 2, 1, 1, 1] * 2
    assert {row["step_memory_mb"] for row in results.rows[6:]} == {5}
    text = (tmp_path / "train.md").read_text()
    assert "- huge: no memory for its weights and optimizer" in text
    assert text.count("out of memory") == 6
    with Image.open(tmp_path / "train.png") as plot:
        plot.load()


# ------------------------------------------------------------------------------------- figures, table and plot


def test_rows_and_mfu_by_hand(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(lanes: list[Lane], probe: MatmulProbe, *rest: object) -> None:
        times = {"eager": [2.0, 1.0, 8.0], "checkpointed": [4.0]}
        for lane in lanes:
            lane.seconds, lane.memory, lane.found = times[lane.variant], 3_000_000, (4.0, 2.0)
        probe.found = {"float32": [1e9, 3e9, 2e9]}

    monkeypatch.setattr(measure, "run_lanes", told)
    settings = config(variants=["eager", "checkpointed"], batch_size=[5])
    eager, other = measure_training([subject], settings).rows
    # 5 sequences of 16 tokens; two blocks 32 wide, attention 4 x 32 x 32, MLP 3 x 32 x 64, head 70 x 32
    flops = 6 * (2 * (4 * 32 * 32 + 3 * 32 * 64) + 70 * 32) + 6 * 2 * 32 * 16
    assert eager["tokens_per_second"] == 5 * 16 / 2
    assert (eager["tokens_per_second_min"], eager["tokens_per_second_max"]) == (10, 80)
    assert eager["mfu"] == pytest.approx(40 * flops / 3e9, rel=1e-12)
    assert eager["fraction_of_matmul"] == eager["mfu"]
    assert (eager["against_baseline"], other["against_baseline"]) == (1, 0.5)
    assert (eager["step_memory_mb"], eager["loss"], eager["gradient_norm"]) == (3, 4, 2)
    assert other["mfu"] == pytest.approx(20 * flops / 3e9, rel=1e-12)
    # of a GPU whose data sheet is known
    monkeypatch.setattr(peak, "data_sheet_peak", lambda device, dtype: Peak(6e9, "data sheet"))
    results = measure_training([subject], settings)
    assert results.peaks == {"float32": (6e9, "data sheet")}
    assert results.rows[0]["mfu"] == pytest.approx(40 * flops / 6e9, rel=1e-12)
    assert results.rows[0]["fraction_of_matmul"] == pytest.approx(40 * flops / 3e9, rel=1e-12)


def found(rows: list[dict[str, Any]]) -> dict[str, Any]:
    model = {"parameters": 343_936_000, "num_tokens": 256, "flops_per_token": 1.98e9, "held_mb": 4127.2}
    return {
        "rows": rows,
        "models": {"tiny": model},
        "peak": {"float32": {"flops": 9.89e14, "source": "data sheet"}},
        "matmul_peak_flops": {"float32": 5e13},
        "matmul_rows": {"float32": 2048},
        "machine": {"cpu": "A Processor", "gpu": "A GPU", "threads": 2, "system": "Linux"},
        "versions": {"torch": "2.15"},
        "settings": {"repeats": 3, "loss_chunk": 8192, "batch_size": [2]},
        "command": "benchmark.py speed --train",
    }


def test_the_table_by_hand(trainee: Trainee) -> None:
    (lane,) = lanes_of(trainee, ["eager"], batch_size=4)
    lane.seconds, lane.memory, lane.found = [0.032, 0.064], 1_234_500_000, (4.0, 2.0)
    (row,) = rows_of([lane], CPU)
    lines = table(found([row | {"mfu": 0.456}])).splitlines()
    assert "A GPU, torch 2.15" in lines
    assert "`benchmark.py speed --train`" in lines
    assert (
        "- tiny: 343.9M parameters, 256 tokens a sequence, 1.98 GFLOP a token; weights and optimizer 4,127 MB" in lines
    )
    assert "- float32: peak 989 TFLOP/s (data sheet); best product 50 TFLOP/s (2048 rows)" in lines
    expected = "| tiny | 4 | float32 | eager | 1,333 [1,000, 2,000] 1.00x (2 runs) | 46% | 1,234 |"
    assert expected in lines
    assert expected.count("|") == len(HEADS) + 1


def test_a_batch_is_random_in_labels_and_tokens(trainee: Trainee) -> None:
    batch = random_batch(trainee, 50)
    assert isinstance(batch, Batch)
    assert batch.tokens.shape == (50, C)
    assert set(batch.class_labels.tolist()) == set(range(5))
    assert set(batch.tokens.flatten().tolist()) == set(range(64))
