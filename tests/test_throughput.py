"""benchmark.py speed --tokenizer alone: what it compares, times and writes. No test looks at how fast anything is."""

import copy
import json
import math
from itertools import product

import pytest
import torch
from PIL import Image
from tqdm import tqdm

from common import peak, turns
from common.errors import InputError
from common.peak import MatmulProbe, products_as_in_convolutions
from common.plots import Bar, save_bar_plot
from tokenizer import ChannelTokenizer, TokenizerConfig
from tokenizer.throughput import VARIANTS, ThroughputConfig, lanes, measure, measure_throughput
from tokenizer.throughput.lanes import Lane, Reference
from tokenizer.throughput.limits import count_flops
from tokenizer.throughput.measure import reference_of, rows_of, run_lanes
from tokenizer.throughput.report import HEADS, table, write_report
from tokenizer.throughput.variants import Variant, VariantFactory

CPU = torch.device("cpu")
EAGER = ["eager", "eager-channels-last", "pictures"]
SMALL_PROBE = "import common.peak as peak; peak.SMALLEST = peak.LARGEST = 16"
FIELDS = {
    "variant", "task", "dtype", "layout", "batch_size", "device", "seconds", "images_per_second",
    "images_per_second_min", "images_per_second_max", "flops_per_second", "fraction_of_peak", "against_baseline",
    "peak_memory_mb", "tokens_changed", "grey_levels", "error",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_probe(monkeypatch):
    monkeypatch.setattr(peak, "SMALLEST", 16)
    monkeypatch.setattr(peak, "LARGEST", 16)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    """The tiny one with its last layer scaled up, so that pictures use all grey levels."""
    model = copy.deepcopy(tiny_tokenizer)
    with torch.no_grad():
        model.decoder.trunk[-1].weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def reference(tokenizer):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return reference_of(tokenizer, 4)[0]


def probe():
    return MatmulProbe(device=CPU, dtypes=["float32"])


def config(**settings):
    return ThroughputConfig(**{"variants": ["eager"], "dtype": ["float32"], "repeats": 2, "device": "cpu"} | settings)


def row_of(results, variant, task):
    (row,) = [row for row in results.rows if (row["variant"], row["task"]) == (variant, task)]
    return row


def fake_lane(reference, name="eager", task="encode", *, work=None, dtype="float32", batch_size=4):
    """A lane of a variant that answers with the reference, unless `work` says what it does."""
    answer = reference.tokens if task == "encode" else reference.decoded
    variant = Variant(holder=None, work={task: work or (lambda given: answer[: len(given)])})
    given = reference.given(task, batch_size)
    return Lane(name=name, dtype=dtype, task=task, batch_size=batch_size, variant=variant, given=given)


# ------------------------------------------------------------------------------------- the script


def refused(done):
    assert done.code == 2, done.err
    lines = done.err.splitlines()
    assert len(lines) == 1, done.err
    assert lines[0].startswith("benchmark.py: error: ")
    return lines[0]


def test_a_tokenizer_alone_writes_a_row_for_each_variant_task_format_and_batch(scripts, pipeline_folder, tmp_path):
    folder = pipeline_folder / "tokenizer"
    words = ["--tokenizer", folder, "--variants", *EAGER, "--batch-size", 3, 1, "--repeats", 2, "--device", "cpu"]
    words += ["--dtype", "float32"]  # the other one is emulated on many a CPU, and slow
    done = scripts("benchmark.py", "speed", *words, "--output-dir", "out", before=SMALL_PROBE, cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tokenizer.json", "tokenizer.md", "tokenizer.png"}

    found = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    wanted = set(product(EAGER, ("encode", "decode"), ("float32",), (3, 1)))
    wanted -= {key for key in wanted if key[:2] == ("pictures", "encode")}
    keys = ("variant", "task", "dtype", "batch_size")
    assert len(found["rows"]) == len(wanted)
    assert {tuple(row[key] for key in keys) for row in found["rows"]} == wanted
    for row in found["rows"]:
        assert row.keys() == FIELDS
        assert row["error"] is None
        assert (row["tokens_changed"] is None) is (row["task"] == "decode")
        assert (row["grey_levels"] is None) is (row["task"] == "encode")
        assert row["layout"] == {"eager": "contiguous", "eager-channels-last": "channels_last"}.get(
            row["variant"], "own"
        )
        assert len(row["seconds"]) == 2
        assert row["images_per_second"] == pytest.approx(row["batch_size"] / (sum(row["seconds"]) / 2))
        assert row["images_per_second_min"] <= row["images_per_second"] <= row["images_per_second_max"]
        speed = row["images_per_second"] * found["flops_per_image"][row["task"]]
        assert row["flops_per_second"] == pytest.approx(speed)
        assert row["fraction_of_peak"] == pytest.approx(speed / found["matmul_peak_flops"][row["dtype"]])
        assert row["peak_memory_mb"] is None or row["peak_memory_mb"] > 0.1
        if row["variant"] == "eager":
            assert row["against_baseline"] == 1
        assert math.isfinite(row["against_baseline"])
    assert found["tokenizer"]["name"] == str(folder)
    assert len(found["tokenizer"]["fingerprint"]) == 16
    assert found["matmul_rows"] == {"float32": 16}
    # before, between and after the rounds of each batch size
    assert {len(values) for values in found["matmul_flops_by_time"].values()} == {2 * 3}
    assert found["machine"]["threads"] == 1
    assert found["versions"].keys() == {"python", "torch", "transformers", "channeltok"}
    assert found["settings"]["batch_size"] == [3, 1]
    assert found["command"].startswith("benchmark.py speed --tokenizer ")
    text = (tmp_path / "out" / "tokenizer.md").read_text()
    assert found["command"] in text
    assert found["tokenizer"]["fingerprint"] in text
    assert sum(line.startswith("| eager |") for line in text.splitlines()) == 2
    with Image.open(tmp_path / "out" / "tokenizer.png") as plot:
        assert plot.format == "PNG"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--tokenizer", "none"], "no generator is given"),
        (["--tokenizer", "nowhere"], "nowhere is no folder"),
        (["--tokenizer", "paper-256", "--variants", "eager", "fast"], "'fast'; allowed: eager, "),
        (["--tokenizer", "paper-256", "--variants", "eager", "eager"], "each once"),
        (["--tokenizer", "paper-256", "--max-seconds", 0], "max_seconds is 0"),
        (["--tokenizer", "paper-256", "--max-seconds", "nan"], "max_seconds is nan"),
        (["--tokenizer", "paper-256", "--samplers", "eager"], "samplers is given, but a tokenizer alone"),
        (["--tokenizer", "paper-256", "--num-tokens", 4], "num_tokens is given, but a tokenizer alone"),
        (["--tokenizer", "paper-256", "--cfg-scale", 2], "cfg_scale is given, but a tokenizer alone"),
        (["--tokenizer", "paper-256", "--full-uncached"], "full_uncached is given, but a tokenizer alone"),
        (["--tokenizer", "paper-256", "--compile-pictures"], "compile_pictures is given, but a tokenizer alone"),
        (["--generator", "S", "--tokenizer", "none", "--variants", "eager"], "variants is given, but samplers"),
        (["--max-seconds", 3], "max_seconds is given, but samplers"),
        (["--generator", "S", "--tokenizer", "paper"], "'paper' is unknown; allowed: paper-256, paper-512, none"),
    ],
)  # fmt: skip
def test_flags_that_cannot_be_or_would_do_nothing_are_refused_in_one_line(scripts, tmp_path, words, named):
    assert named in refused(scripts("benchmark.py", "speed", *words, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"variants": []}, "variants is"),
        ({"dtype": ["float16"]}, "'float16'; allowed: float32, bfloat16"),
        ({"dtype": ["float32", "float32"]}, "each once"),
        ({"batch_size": []}, "batch_size is"),
        ({"batch_size": [2, 0]}, "batch_size has 0"),
        ({"repeats": 0}, "repeats is 0"),
        ({"max_seconds": math.inf}, "max_seconds is inf"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, named):
    with pytest.raises(InputError, match=named):
        ThroughputConfig(**settings)


def test_compiling_without_a_compiler_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(InputError, match="compiler"):
        measure_throughput(tokenizer, config(variants=["eager", "compiled"]))


# ------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EAGER)
def test_every_variant_computes_in_its_format_and_layout_and_leaves_the_tokenizer_alone(
    tokenizer, reference, name, dtype
):
    state = {key: (value.clone(), value.stride()) for key, value in tokenizer.state_dict().items()}
    variant = VariantFactory(tokenizer).build(name, dtype)
    assert list(variant.work) == (["decode"] if name == "pictures" else ["encode", "decode"])
    for task, work in variant.work.items():
        result = work(reference.given(task, 1))
        assert len(result) == 1
        if task == "encode":
            assert result.dtype == torch.int64
        elif name == "pictures":
            assert result.dtype == torch.uint8
        else:
            assert result.dtype == getattr(torch, dtype)
        difference = reference.difference(task, result)
        if dtype == "float32":
            assert difference <= (lanes.TOKENS_OF_ROUNDING if task == "encode" else 1)
        elif task == "encode":
            assert difference < 0.8
        else:
            assert difference > 0.1  # more than float32 does
    if name != "pictures":
        weight = variant.holder.encoder.trunk[0].weight
        assert weight.dtype == getattr(torch, dtype)
        assert weight.is_contiguous(memory_format=torch.channels_last) is (name == "eager-channels-last")
        assert variant.holder.quantizer.project_in.weight.dtype == torch.float32
    for key, value in tokenizer.state_dict().items():
        assert torch.equal(value, state[key][0])
        assert value.stride() == state[key][1]


def test_weights_of_a_format_and_layout_exist_once(tokenizer, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda part, **settings: part)
    factory = VariantFactory(tokenizer)
    assert factory.build("eager", "float32").holder is tokenizer
    holders = [
        factory.build(name, dtype).holder
        for dtype in ("float32", "bfloat16")
        for name in ("eager", "compiled", "eager-channels-last", "compiled-channels-last")
    ]
    assert [holders.index(holder) for holder in holders] == [0, 0, 2, 2, 4, 4, 6, 6]


def test_only_compiled_variants_are_compiled_as_a_whole_for_one_shape(tokenizer, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda part, **settings: compiled.append((type(part), settings)) or part)
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    factory = VariantFactory(tokenizer)
    for name in EAGER:
        factory.build(name, "float32")
    assert compiled == []
    for name in ("compiled", "compiled-channels-last"):
        factory.build(name, "float32")
    settings = {"fullgraph": True, "dynamic": False}
    assert compiled == [(type(part), settings) for part in (tokenizer.encoder, tokenizer.decoder)] * 2
    measure_throughput(tokenizer, config(repeats=1, batch_size=[1, 2]))
    assert resets == []
    measure_throughput(tokenizer, config(repeats=1, batch_size=[1, 2], variants=["compiled"]))
    assert resets == [1, 1]


@pytest.mark.slow
def test_compiled_variants_give_what_eager_ones_give():
    # without upsampling and attention all blocks are alike, which compiles in a third of the time
    shape = {"image_size": 32, "patch_size": 2, "latent_size": 16, "encoder_widths": [32, 32], "decoder_widths": [32]}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = ChannelTokenizer(TokenizerConfig(**shape, num_channels=16, middle_attention=False)).eval()
    results = measure_throughput(model, config(variants=["compiled", "compiled-channels-last"], batch_size=[2]))
    assert len(results.rows) == 4
    for row in results.rows:
        assert row["error"] is None
        assert len(row["seconds"]) == 2
        assert row["against_baseline"] is None


def test_formats_are_compared_within_one_run(tokenizer):
    results = measure_throughput(tokenizer, config(dtype=["float32", "bfloat16"], repeats=1, max_seconds=1e-9))
    assert [(row["task"], row["dtype"]) for row in results.rows] == [
        ("encode", "float32"), ("encode", "bfloat16"), ("decode", "float32"), ("decode", "bfloat16"),
    ]  # fmt: skip
    assert results.probe.best.keys() == {"float32", "bfloat16"}
    for row in results.rows:
        assert row["fraction_of_peak"] == pytest.approx(row["flops_per_second"] / results.probe.best[row["dtype"]])
        assert row["against_baseline"] == 1 or row["dtype"] == "bfloat16"
        assert row["against_baseline"] is not None


def test_the_reference_is_the_tokenizer_image_by_image(tokenizer, reference):
    assert reference.images.shape == (4, 3, 32, 32)
    assert -1 <= reference.images.min() < -0.9
    assert 0.9 < reference.images.max() <= 1
    assert torch.equal(reference.tokens[2:3], tokenizer.tokenize(reference.images[2:3]))
    assert torch.equal(reference.decoded[2:3], tokenizer.detokenize(reference.tokens[2:3]))
    assert reference.decoded.std() > 0.1
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = reference_of(tokenizer, 1)[0]
        torch.manual_seed(5)
        assert torch.equal(reference_of(tokenizer, 1)[0].images, first.images)


def test_no_memory_for_one_image_is_told_in_one_line(tokenizer, monkeypatch):
    def no_memory(images):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    broken = copy.deepcopy(tokenizer)
    monkeypatch.setattr(broken, "tokenize", no_memory)
    with pytest.raises(InputError, match="no memory on cpu for one image of 32x32"):
        reference_of(broken, 2)


# ------------------------------------------------------------------------------------- comparing with the reference


def test_differences_are_the_share_of_tokens_and_the_largest_of_grey_levels():
    decoded = torch.zeros(2, 3, 4, 4)
    reference = Reference(images=decoded, tokens=torch.arange(10).view(2, 5), decoded=decoded)
    assert reference.difference("encode", reference.tokens.clone()) == 0
    assert reference.difference("encode", torch.tensor([[0, 1, 2, 9, 9]])) == 0.4
    changed = decoded.clone()
    changed[1, 2, 3, 3] = -0.5
    assert reference.difference("decode", changed) == 0.5 * 127.5
    assert reference.difference("decode", changed[:1]) == 0
    levels = torch.full((2, 3, 4, 4), 128, dtype=torch.uint8)  # 0 is 127.5, rounded to even
    assert reference.difference("decode", levels) == 0
    levels[0, 0, 0, 0] = 3
    assert reference.difference("decode", levels) == 125


WRONG = [
    ("encode", lambda tokens: tokens ^ 1, "wrong: 100.0% of tokens differ"),
    ("encode", lambda tokens: tokens ^ torch.eye(4, 16, dtype=torch.int64), "wrong: 6.2% of tokens differ"),
    ("decode", lambda images: images + 2 / 127.5, "wrong: differs by 2.0 grey levels"),
    ("decode", lambda images: images * float("nan"), "wrong: differs by nan grey levels"),
]


@pytest.mark.parametrize(("task", "spoil", "error"), WRONG)
def test_a_wrong_float32_result_is_an_error_and_is_not_timed(reference, caplog, task, spoil, error):
    answer = reference.tokens if task == "encode" else reference.decoded
    calls = []
    wrong = fake_lane(reference, "compiled", task, work=lambda given: calls.append(1) or spoil(answer))
    right = fake_lane(reference, task=task)
    with tqdm(disable=True) as bar:
        run_lanes([wrong, right], reference, probe(), config(), bar)
    assert calls == [1]
    assert error in caplog.text
    bad, good = rows_of([wrong, right], {"encode": 10, "decode": 20}, probe_with(1.0))
    assert bad["error"] == error
    assert bad["seconds"] == []
    assert [bad[key] for key in measure.MEASURED] == [None] * 6
    assert good["error"] is None
    assert len(good["seconds"]) == 2
    # in bfloat16 the same difference is only told
    told = fake_lane(reference, "eager", task, dtype="bfloat16", work=lambda given: spoil(answer))
    told.prepare(reference, CPU, 10)
    assert told.error is None


def test_what_rounding_does_is_no_error(reference):
    one = reference.tokens.clone()
    one[0, 0] ^= 1
    for task, answer in (("encode", one), ("decode", reference.decoded + 0.9 / 127.5)):
        lane = fake_lane(reference, task=task, work=lambda given, answer=answer: answer)
        lane.prepare(reference, CPU, 10)
        assert lane.error is None
        assert lane.difference > 0


# ------------------------------------------------------------------------------------- turns, caps, memory


def test_variants_take_turns_and_products_are_measured_between_rounds(reference, monkeypatch):
    log = []
    monkeypatch.setattr(MatmulProbe, "measure", lambda probe: log.append("probe"))

    def logging_lane(name):
        return fake_lane(reference, name, work=lambda given: log.append(name) or reference.tokens)

    with tqdm(disable=True) as bar:
        run_lanes([logging_lane(name) for name in "abc"], reference, probe(), config(repeats=3), bar)
    assert log == [*"aabbcc", "probe", *"abc", "probe", *"bca", "probe", *"cab", "probe"]


def test_all_of_a_batch_size_are_interleaved_and_each_gets_what_it_takes(tokenizer, monkeypatch):
    groups = []
    monkeypatch.setattr(measure, "run_lanes", lambda lanes, *rest: groups.append(lanes))
    measure_throughput(tokenizer, config(variants=EAGER, dtype=["float32", "bfloat16"], batch_size=[2, 1]))
    assert [len(group) for group in groups] == [10, 10]
    for batch_size, group in zip((2, 1), groups, strict=True):
        assert [lane.task for lane in group] == ["encode"] * 4 + ["decode"] * 6
        assert {lane.given.shape for lane in group} == {(batch_size, 3, 32, 32), (batch_size, 16)}


@pytest.mark.parametrize(
    ("name", "first", "each", "runs"),
    [
        ("eager", 1.0, 1.0, 5),  # warm-up and memory, then three of three
        ("eager", 1.0, 4.0, 4),  # two of three: the second one used up what was left
        ("eager", 8.0, 8.0, 1),  # the first is beyond the cap already, and counts
        ("compiled", 8.0, 1.0, 5),  # but not if it compiled
        ("compiled", 8.0, 8.0, 2),
    ],
)
def test_a_variant_is_not_repeated_beyond_its_seconds(reference, monkeypatch, name, first, each, runs):
    calls = []
    lane = fake_lane(reference, name, work=lambda given: calls.append(1) or reference.tokens)
    monkeypatch.setattr(turns, "timed", lambda device, run: (run(), first if len(calls) == 1 else each)[::-1])
    other = fake_lane(reference)
    with tqdm(disable=True) as bar:
        run_lanes([lane, other], reference, probe(), config(repeats=3, max_seconds=7), bar)
    assert len(calls) == runs
    times = max(1, runs - 2)
    assert lane.seconds == [each] * times
    (row, _) = rows_of([lane, other], {"encode": 10, "decode": 20}, probe_with(1.0))
    assert row["images_per_second"] == 4 / each
    assert f"({times} run{'s' * (times > 1)})" in table(found([row], repeats=3)) or times == 3


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 400000 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_running_out_of_memory_is_a_row_and_the_others_go_on(reference, caplog, error, at):
    calls = []

    def small_machine(given):
        calls.append(1)
        if len(calls) == at:
            raise error
        return reference.tokens

    short, other = fake_lane(reference, "compiled", work=small_machine), fake_lane(reference)
    with tqdm(disable=True) as bar:
        run_lanes([short, other], reference, probe(), config(), bar)
    assert len(calls) == at
    row, rest = rows_of([short, other], {"encode": 10, "decode": 20}, probe_with(1.0))
    assert (row["error"], row["seconds"], row["images_per_second"]) == ("out of memory", [], None)
    assert rest["error"] is None
    assert len(rest["seconds"]) == 2
    assert "| out of memory | - |" in table(found([row, rest]))


def test_a_picture_decoder_short_of_memory_is_a_row_too(tokenizer, reference, monkeypatch):
    def no_memory(latents):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    variant = VariantFactory(tokenizer).build("pictures", "float32")
    monkeypatch.setattr(variant.holder, "_decode", no_memory)
    lane = fake_lane(reference, "pictures", "decode", work=variant.work["decode"])
    lane.prepare(reference, CPU, 10)
    assert lane.error == "out of memory"


def test_a_variant_that_cannot_be_built_is_a_row_too(tokenizer, monkeypatch):
    real = VariantFactory.build

    def build(factory, name, dtype):
        if name == "eager":
            return real(factory, name, dtype)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(VariantFactory, "build", build)
    results = measure_throughput(tokenizer, config(variants=EAGER))
    errors = [(row["variant"], row["task"]) for row in results.rows if row["error"] == "out of memory"]
    assert errors == [("eager-channels-last", "encode"), ("eager-channels-last", "decode"), ("pictures", "decode")]
    assert len(row_of(results, "eager", "decode")["seconds"]) == 2


def test_other_errors_pass_through(tokenizer, reference):
    def broken(given):
        raise RuntimeError("unsupported memory format option")

    with pytest.raises(RuntimeError, match="memory format"):
        fake_lane(reference, work=broken).prepare(reference, CPU, 10)
    with pytest.raises(InputError):  # a mistake in words that is not about memory
        fake_lane(reference, "pictures", "decode", work=lambda given: tokenizer.lookup(given[0])).prepare(
            reference, CPU, 10
        )


# ------------------------------------------------------------------------------------- limits


def conv(size, in_width, out_width, kernel=3):
    return 2 * size**2 * kernel**2 * in_width * out_width


def test_operations_of_an_image_by_hand():
    shape = {"image_size": 32, "patch_size": 2, "latent_size": 4, "num_channels": 5, "num_bits": 6, "num_heads": 4}
    widths = {"encoder_widths": [32, 64], "decoder_widths": [32], "middle_attention": True}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = ChannelTokenizer(TokenizerConfig(**shape, **widths)).eval()
    block = 2 * conv(16, 64, 64)
    encode = conv(16, 12, 32)  # 2x2 patches of 3 colours, maps of 16
    encode += conv(16, 32, 64) + conv(16, 64, 64) + conv(16, 32, 64, 1)  # widens, so with a shortcut
    encode += block
    # queries, keys, values and output; each of 256 positions with each
    encode += block + 4 * conv(16, 64, 64, 1) + 2 * 2 * 256 * 256 * 64 + block
    encode += conv(16, 64, 5)
    encode += conv(8, 5, 5) + conv(4, 5, 5)  # halved twice
    encode += 2 * 5 * 16 * 6  # 16 numbers of a channel to 6 bits
    decode = 2 * 5 * 6 * 16
    decode += conv(4, 5, 32)
    decode += 4 * conv(4, 32, 32) + 4 * conv(4, 32, 32, 1) + 2 * 2 * 16 * 16 * 32
    decode += conv(8, 32, 32) + conv(16, 32, 32)  # doubled twice
    decode += 3 * 2 * conv(16, 32, 32) + conv(16, 32, 12)
    assert count_flops(model) == {"encode": encode, "decode": decode}


def probe_with(best):
    result = probe()
    result.found = {"float32": [best / 2, best], "bfloat16": [best / 4]}
    return result


def test_matrices_grow_until_a_product_is_long_enough(monkeypatch):
    monkeypatch.setattr(peak, "LARGEST", 128)
    seconds = []
    monkeypatch.setattr(peak, "timed", lambda device, run: (seconds.append(len(run())) or len(run()) / 400, None))
    sized = MatmulProbe(device=CPU, dtypes=["float32", "bfloat16"])  # 0.16 s for 64 rows
    assert sized.sizes == {"float32": 64, "bfloat16": 64}
    sized.measure()
    assert sized.best == {dtype: pytest.approx(2 * 64**3 / 0.16) for dtype in ("float32", "bfloat16")}
    assert seconds[-3:] == [64] * 3
    monkeypatch.setattr(peak, "LARGEST", 32)
    assert MatmulProbe(device=CPU, dtypes=["float32"]).sizes == {"float32": 32}


def test_the_peak_is_the_best_of_all_times():
    measured = probe()
    measured.measure()
    measured.measure()
    assert [len(values) for values in measured.found.values()] == [2]
    measured.found = {"float32": [1.0, 9.0, 3.0]}
    assert measured.best == {"float32": 9}


def test_products_round_as_convolutions_do_on_cuda_and_only_for_a_while():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with products_as_in_convolutions(torch.device("cuda")):
        assert matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "tf32"
    assert matmul.fp32_precision == before
    with products_as_in_convolutions(CPU):
        assert matmul.fp32_precision == before


# ------------------------------------------------------------------------------------- rows, table and plot


def test_rows_by_hand(reference):
    def lane(name, dtype, task, seconds, **more):
        what = {"name": name, "dtype": dtype, "task": task, "seconds": seconds}
        return Lane(**what, batch_size=4, variant=None, given=reference.images, **more)

    compared = [
        lane("eager", "float32", "encode", [2.0, 1.0, 8.0], memory=3_000_000, difference=0.0),
        lane("eager", "float32", "decode", [1.0], difference=0.5),
        lane("pictures", "bfloat16", "decode", [0.25, 0.75], difference=3.0),
    ]
    first, second, third = rows_of(compared, {"encode": 10, "decode": 20}, probe_with(100.0))
    assert first["images_per_second"] == 2
    assert (first["images_per_second_min"], first["images_per_second_max"]) == (0.5, 4)
    assert first["flops_per_second"] == 20
    assert first["fraction_of_peak"] == 0.2
    assert (first["against_baseline"], second["against_baseline"], third["against_baseline"]) == (1, 1, 2)
    assert first["peak_memory_mb"] == 3
    assert (first["tokens_changed"], first["grey_levels"]) == (0, None)
    assert (third["tokens_changed"], third["grey_levels"]) == (None, 3)
    assert third["fraction_of_peak"] == pytest.approx(8 * 20 / 25)
    assert (third["layout"], third["device"]) == ("own", "cpu")
    assert rows_of(compared[2:], {"encode": 10, "decode": 20}, probe_with(1.0))[0]["against_baseline"] is None


def found(rows, repeats=2):
    return {
        "rows": rows,
        "flops_per_image": {"encode": 10**9, "decode": 2 * 10**9},
        "matmul_peak_flops": {"float32": 5 * 10**10},
        "matmul_rows": {"float32": 2048},
        "machine": {"cpu": "A Processor", "gpu": None, "threads": 2, "system": "Linux"},
        "versions": {"torch": "2.15"},
        "tokenizer": {
            "name": "paper-256",
            "fingerprint": "random weights",
            "parameters": 72_389_985,
            "image_size": 256,
        },
        "settings": {"repeats": repeats},
        "command": "benchmark.py speed --tokenizer paper-256",
    }


def test_the_table_has_both_tasks_of_a_variant_in_one_line(reference):
    def row(task, **more):
        lane = fake_lane(reference, task=task)
        lane.seconds, lane.memory = [1.0, 2.0, 4.0], 5_000_000 if task == "encode" else 7_400_000
        lane.difference = 0.015 if task == "encode" else 0.25
        return rows_of([lane], {"encode": 10**9, "decode": 2 * 10**9}, probe_with(5e10))[0] | more

    lines = table(found([row("encode"), row("decode", against_baseline=1.5)], repeats=3)).splitlines()
    assert lines[0] == "# Throughput: tokenizer paper-256 (72.4M, 256x256)"
    assert "A Processor, 2 threads, torch 2.15" in lines
    assert "`benchmark.py speed --tokenizer paper-256`" in lines
    assert any("random weights" in line and "float32 50 GFLOP/s (2048 rows)" in line for line in lines)
    expected = "| eager | float32 | contiguous | 4 | 2 [1, 4] 1.00x | 4% | 2 [1, 4] 1.50x | 8% | 7 | 1.50% | 0.25 |"
    assert expected in lines
    assert expected.count("|") == len(HEADS) + 1
    alone = table(found([row("decode", variant="pictures", layout="own", peak_memory_mb=None)], repeats=3))
    assert "| pictures | float32 | own | 4 | - | - | 2 [1, 4] 1.00x | 8% | - | - | 0.25 |" in alone.splitlines()


def test_a_report_without_any_time_is_still_written(tokenizer, monkeypatch, tmp_path):
    def no_memory(lane, device):
        raise MemoryError

    monkeypatch.setattr(Lane, "_watched", no_memory)
    results = measure_throughput(tokenizer, config(variants=list(EAGER)))
    write_report(results, tmp_path, "a command", name="tiny", fingerprint="abc")
    assert (tmp_path / "tokenizer.md").read_text().count("out of memory") == 5
    with Image.open(tmp_path / "tokenizer.png") as plot:
        plot.load()


def test_bars_are_a_whole_png(tmp_path):
    bars = [Bar(label=str(i), group="ab"[i % 2], value=i + 1.0, low=0.5, high=i + 2.0, limit=9.0) for i in range(3)]
    save_bar_plot(
        {"one": bars, "two": [], "three": bars[:1]},
        tmp_path / "plot.png",
        title="A title",
        x_label="x",
        limit_label="bound",
        columns=2,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
    with Image.open(tmp_path / "plot.png") as picture:
        assert len(picture.convert("RGB").getcolors(maxcolors=10**6) or []) > 20


def test_variants_are_what_the_help_tells():
    assert VARIANTS == ("eager", "eager-channels-last", "compiled", "compiled-channels-last", "pictures")
