"""benchmark.py reconstruction: what it measures, in one pass, and what it writes."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Finished, ScriptRunner
from oracles import fid as fid_oracle
from oracles import pictures as oracle
from PIL import Image
from torch import Tensor, nn

import benchmark
from common.checkpoint import fingerprint
from common.errors import InputError
from common.images import load_image, to_float
from evaluation.features import FeatureExtractor
from evaluation.reconstruction import measure, report
from evaluation.reconstruction.codebook import CodebookCounts
from evaluation.reconstruction.config import ReconstructionConfig
from evaluation.reconstruction.measure import ReconstructionResults, measure_reconstruction, psnr_curve
from tokenizer import ChannelTokenizer, PictureDecoder
from tokenizer.data import spread
from tokenizer.settings import DataConfig

C, BITS, SIZE = 16, 6, 32
NONE = {"perceptual": "none", "inception": "none"}
NO_WEIGHTS = ["--perceptual", "none", "--inception", "none", "--num-workers", 0, "--device", "cpu"]
FIELDS = {
    *("num_tokens", "psnr", "ssim", "lpips", "rfid", "bits_per_pixel", "codebook_use"),
    *("nats_per_token", "bits", "prior_distance"),
}
FILES = ["channel_gain.png", "codebook.png", "plots.png", "reconstructions.png", "results.json", "results.md"]
NO_INITIAL_VALUES = """
import torch
for name in ("normal_", "kaiming_normal_", "uniform_", "kaiming_uniform_"):
    setattr(torch.nn.init, name, lambda tensor, *arguments, **options: tensor)
"""


def files_of(folder: Path) -> list[Path]:
    return sorted((folder / "val").rglob("*.*"))


@pytest.fixture(scope="module")
def photos(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 readable pictures in val/, and two files that are none."""
    folder = tmp_path_factory.mktemp("photos") / "images"
    shutil.copytree(image_folder, folder)
    rng = np.random.default_rng(1)
    for i in range(7):
        pixels = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((40, 36 + i), Image.Resampling.BICUBIC)
        picture.save(folder / "val" / f"n0{1 + i % 3}" / f"more{i}.png")
    (folder / "val" / "n01" / "broken.png").write_bytes(b"no picture")
    (folder / "val" / "n03" / "0empty.jpg").touch()
    return folder


@pytest.fixture(scope="module")
def readable(photos: Path) -> Tensor:
    """(13 3 H W) uint8, in the order of the listing."""
    paths = [path for path in files_of(photos) if path.name not in ("broken.png", "0empty.jpg")]
    assert len(paths) == 13
    return torch.stack([load_image(path, SIZE) for path in paths])


def measured(tokenizer: ChannelTokenizer, folder: Path, **settings: Any) -> ReconstructionResults:
    settings = {"tokenizer": "tiny", "num_workers": 0, "device": "cpu"} | NONE | settings
    return measure_reconstruction(tokenizer, DataConfig(data_dir=str(folder)), ReconstructionConfig(**settings))


@pytest.fixture(scope="module")
def results(tiny_tokenizer: ChannelTokenizer, photos: Path) -> ReconstructionResults:
    return measured(tiny_tokenizer, photos, num_tokens=[1, 5, C], batch_size=4, curve_images=5, sheet_images=3)


def pictures_of(tokenizer: ChannelTokenizer, images: Tensor, k: int) -> Tensor:
    return PictureDecoder(tokenizer, dtype=torch.float32)(tokenizer.tokenize(to_float(images))[:, :k])


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """What was measured."""
    return {name: value for name, value in row.items() if value is not None}


# ------------------------------------------------------------------------------------- the figures


def test_psnr_and_ssim_are_means_over_images(
    results: ReconstructionResults, tiny_tokenizer: ChannelTokenizer, readable: Tensor
) -> None:
    assert [row["num_tokens"] for row in results.rows] == [1, 5, C]
    for row in results.rows:
        pairs = [
            (one.numpy(), other.numpy())
            for one, other in zip(pictures_of(tiny_tokenizer, readable, row["num_tokens"]), readable, strict=True)
        ]
        assert row["psnr"] == pytest.approx(np.mean([oracle.psnr(*pair) for pair in pairs]), rel=1e-5)
        if row["num_tokens"] == 5:  # loops over every pixel are slow
            assert row["ssim"] == pytest.approx(np.mean([oracle.ssim(*pair) for pair in pairs]), abs=1e-4)
        assert row["bits_per_pixel"] == row["num_tokens"] * BITS / SIZE**2
        assert row["lpips"] is row["rfid"] is None
    assert len({row["ssim"] for row in results.rows}) == 3


def test_codes_are_counted_by_channel(
    results: ReconstructionResults, tiny_tokenizer: ChannelTokenizer, readable: Tensor
) -> None:
    tokens = tiny_tokenizer.tokenize(to_float(readable)).tolist()
    for row in results.rows:
        occurring = {token for image in tokens for token in image[: row["num_tokens"]]}
        assert row["codebook_use"] == len(occurring) / 2**BITS
    book = results.codebook
    assert (book["codes"], book["tokens_counted"]) == (2**BITS, 13 * C)
    assert book["use"] == results.rows[-1]["codebook_use"]
    for channel, (use, entropy) in enumerate(
        zip(book["by_channel"]["use"], book["by_channel"]["entropy_bits"], strict=True)
    ):
        counts = Counter(image[channel] for image in tokens)
        assert use == len(counts) / 2**BITS
        expected = -sum(count / 13 * math.log2(count / 13) for count in counts.values())
        assert entropy == pytest.approx(expected, abs=1e-12)
        assert entropy <= book["limit_by_channel"]["entropy_bits"] == math.log2(13)
    assert book["limit_by_channel"]["use"] == 13 / 64


def test_counts_of_a_large_codebook() -> None:
    counts = CodebookCounts(3, 2**16, torch.device("cpu"))
    tokens = torch.tensor([[0, 65535, 7], [0, 65535, 8], [1, 65535, 9], [2, 65535, 10]])
    counts.add(tokens[:3])
    counts.add(tokens[3:])
    assert counts.counts.dtype == torch.int32
    assert counts.counts.sum() == 12
    assert [counts.counts[0, 0], counts.counts[1, -1], counts.counts[2, 10]] == [2, 4, 1]
    assert counts.use(1) == 3 / 2**16
    assert counts.use(3) == 8 / 2**16
    book = counts.summary()
    assert book["by_channel"]["entropy_bits"] == pytest.approx([1.5, 0, 2])
    assert book["limit_by_channel"] == {"use": 4 / 2**16, "entropy_bits": 2}


def test_the_curve_has_every_k(
    results: ReconstructionResults, tiny_tokenizer: ChannelTokenizer, readable: Tensor
) -> None:
    chosen = readable[[0, 3, 6, 9, 12]]  # 5 of the 15 that are listed, spread, counted over those that could be read
    assert results.curve_images == 5
    assert len(results.curve) == C
    for k in range(1, C + 1):
        pairs = zip(pictures_of(tiny_tokenizer, chosen, k).numpy(), chosen.numpy(), strict=True)
        assert results.curve[k - 1] == pytest.approx(np.mean([oracle.psnr(*pair) for pair in pairs]), rel=1e-5)
    gains = report.channel_gain(results.curve)
    assert gains is not None
    assert gains[0] is None
    assert gains[1:] == pytest.approx(np.diff(results.curve))
    assert report.channel_gain([]) is None


@pytest.mark.parametrize("at_once", [1, 7, 100])
def test_a_curve_in_pieces_of_any_size(tiny_tokenizer: ChannelTokenizer, readable: Tensor, at_once: int) -> None:
    tokens = tiny_tokenizer.tokenize(to_float(readable[:2]))
    done: list[int] = []
    decode = PictureDecoder(tiny_tokenizer, dtype=torch.float32)
    found = psnr_curve(decode, tokens, readable[:2], at_once, done.append)
    assert found.shape == (2, C)
    assert sum(done) == 2 * C
    assert max(done) <= at_once
    alone = psnr_curve(decode, tokens[1:], readable[1:2], C, done.append)
    torch.testing.assert_close(found[1:], alone, rtol=1e-4, atol=1e-4)


def test_the_sheet_shows_every_k_and_the_original(
    results: ReconstructionResults, tiny_tokenizer: ChannelTokenizer, readable: Tensor
) -> None:
    chosen = readable[[0, 5, 10]]
    columns = [pictures_of(tiny_tokenizer, chosen, k) for k in (1, 5, C)] + [chosen]
    assert [len(row) for row in results.sheet] == [4, 4, 4]
    for i, row in enumerate(results.sheet):
        for found, column in zip(row, columns, strict=True):
            assert (found.int() - column[i].int()).abs().max() <= 1


def test_unreadable_images_are_named_counted_and_left_out(results: ReconstructionResults, photos: Path) -> None:
    assert results.images == 13
    assert results.unreadable["count"] == 2
    assert sorted(Path(line.split(":")[0]).name for line in results.unreadable["files"]) == ["0empty.jpg", "broken.png"]
    assert results.reference["available"] == 15
    assert "13 images" in results.reference["set"]


@pytest.mark.parametrize(("total", "count"), [(15, 5), (10, 3), (7, 7), (3, 9), (1, 1), (5000, 64)])
def test_images_are_spread_evenly(total: int, count: int) -> None:
    chosen = spread(total, count)
    assert chosen[0] == 0
    assert len(set(chosen)) == len(chosen) == min(total, count)
    gaps = np.diff([*chosen, total])
    assert gaps.max() - gaps.min() <= 1


# ------------------------------------------------------------------------------------- one pass


def test_each_image_is_read_and_encoded_once(
    tiny_tokenizer: ChannelTokenizer, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, read = [], []
    encode, load = tiny_tokenizer.encode, load_image
    monkeypatch.setattr(tiny_tokenizer, "encode", lambda images: encoded.append(len(images)) or encode(images))
    monkeypatch.setattr("tokenizer.data.load_image", lambda path, *more: read.append(path) or load(path, *more))
    results = measured(tiny_tokenizer, photos, num_tokens=[1, 2, 3, C], batch_size=4, curve_images=9)
    assert sum(encoded) == results.images == 13
    assert max(Counter(read).values()) == 1
    assert len(read) == 15


@pytest.mark.parametrize("batch_size", [1, 13])
def test_the_batch_size_changes_no_figure(
    results: ReconstructionResults, tiny_tokenizer: ChannelTokenizer, photos: Path, batch_size: int
) -> None:
    settings = {"num_tokens": [1, 5, C], "curve_images": 5, "sheet_images": 3}
    other = measured(tiny_tokenizer, photos, batch_size=batch_size, **settings)
    for row, same in zip(results.rows, other.rows, strict=True):
        assert numbers(row) == pytest.approx(numbers(same), rel=1e-5, abs=5e-6)  # sums of float32 within an image
    assert other.curve == pytest.approx(results.curve, rel=1e-5)
    assert other.codebook == results.codebook
    assert len(other.sheet) == 3


def test_the_row_of_a_k_does_not_depend_on_the_other_k(
    results: ReconstructionResults, tiny_tokenizer: ChannelTokenizer, photos: Path
) -> None:
    for row in results.rows:
        alone = measured(tiny_tokenizer, photos, num_tokens=[row["num_tokens"]], batch_size=4, curve_images=0)
        assert alone.rows == [row]
        assert alone.curve == []


def test_some_images_are_spread_over_the_data(
    tiny_tokenizer: ChannelTokenizer, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    load = load_image
    monkeypatch.setattr("tokenizer.data.load_image", lambda path, *more: read.append(Path(path)) or load(path, *more))
    results = measured(tiny_tokenizer, photos, num_tokens=[1], max_images=3, curve_images=0)
    listed = files_of(photos)
    assert sorted(read) == [listed[0], listed[5], listed[10]]
    assert results.images + results.unreadable["count"] == 3


def test_no_readable_image_is_one_line(tiny_tokenizer: ChannelTokenizer, tmp_path: Path) -> None:
    (tmp_path / "val" / "n01").mkdir(parents=True)
    (tmp_path / "val" / "n01" / "broken.png").touch()
    with pytest.raises(InputError, match="none of the 1 images"):
        measured(tiny_tokenizer, tmp_path)


# ------------------------------------------------------------------------------------- with weights


class Mean(nn.Module):
    """Stands in for LPIPS, whose weights are large: the mean absolute difference, after checking what it is given."""

    def __init__(self, weights: str | None):
        super().__init__()
        assert weights == "vgg.pth"

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        for picture in (images, others):
            torch.testing.assert_close((picture + 1) * 127.5, ((picture + 1) * 127.5).round(), rtol=0, atol=1e-4)
        return (images - others).abs().mean((1, 2, 3))


class Features:
    """Stands in for Inception, which is slow: 5 numbers of a picture."""

    def __init__(self, weights: str | None, device: torch.device):
        assert weights == "inception.pth"

    def __call__(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        pooled = images.float().mean((2, 3))
        return torch.cat([pooled, images.float().amax((2, 3))[:, :2]], dim=1)


@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_lpips_is_a_mean_over_images_and_rfid_the_distance_of_all(
    tiny_tokenizer: ChannelTokenizer, photos: Path, readable: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "PerceptualDistance", Mean)
    monkeypatch.setattr(measure, "FeatureExtractor", Features)
    monkeypatch.setattr(measure, "FEATURES", 5)
    weights = {"perceptual_weights": "vgg.pth", "inception_weights": "inception.pth"}
    settings = {"perceptual": "lpips", "inception": "auto", **weights, "num_tokens": [2, C], "curve_images": 0}
    extract = Features("inception.pth", torch.device("cpu"))
    for batch_size in (5, 13):
        for row in measured(tiny_tokenizer, photos, **settings, batch_size=batch_size).rows:
            decoded = pictures_of(tiny_tokenizer, readable, row["num_tokens"])
            difference = (to_float(decoded) - to_float(readable)).abs().mean()
            assert row["lpips"] == pytest.approx(float(difference), rel=1e-5)
            vectors = [extract(images).double().numpy() for images in (decoded, readable)]
            assert row["rfid"] == pytest.approx(fid_oracle.frechet_distance(*vectors), rel=1e-6)


def reconstruction(scripts: ScriptRunner, *words: object, cwd: Path, before: str = "") -> Finished:
    return scripts("benchmark.py", "reconstruction", *words, cwd=cwd, before=before)


@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_a_run_with_weights_from_files(
    pipeline_folder: Path,
    image_folder: Path,
    inception_weights: Path,
    vgg_weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In this process, which has imported torchmetrics and torch-fidelity already."""
    for name in ("normal_", "kaiming_normal_", "uniform_", "kaiming_uniform_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *arguments, **options: tensor)
    words = ["--tokenizer", pipeline_folder / "tokenizer", "--data-dir", image_folder, "--num-tokens", C]
    words += ["--max-images", 3, "--num-workers", 0, "--device", "cpu", "--curve-images", 0, "--sheet-images", 0]
    words += ["--inception-weights", inception_weights, "--perceptual-weights", vgg_weights]
    monkeypatch.setattr("sys.argv", ["benchmark.py", "reconstruction", *map(str, words)])
    monkeypatch.chdir(tmp_path)
    benchmark.main()
    assert "N = 3 is below 10,000: rFID is biased" in caplog.text
    out = tmp_path / "runs" / "reconstruction"
    assert sorted(path.name for path in out.iterdir()) == ["codebook.png", "plots.png", "results.json", "results.md"]
    found = json.loads((out / "results.json").read_text())
    (row,) = found["rows"]
    assert row["lpips"] > 0
    assert "torch-fidelity" in found["methods"]["rfid"]

    tokenizer = ChannelTokenizer.from_pretrained(pipeline_folder / "tokenizer")
    listed = files_of(image_folder)
    originals = torch.stack([load_image(listed[i], SIZE) for i in (0, 2, 4)])
    extract = FeatureExtractor(inception_weights)
    both = [extract(images).double().numpy() for images in (originals, pictures_of(tokenizer, originals, C))]
    assert row["rfid"] == pytest.approx(low_rank_distance(*both), rel=1e-4)
    assert row["rfid"] > 1e-3

    text = (out / "results.md").read_text()
    assert "| k | PSNR, dB | SSIM | LPIPS (VGG) | rFID, N = 3 |" in text
    assert "rFID is biased upwards" in text
    assert "Not measured: bits, distance of the prior's samples." in text


def low_rank_distance(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    """The formula in the space that a few vectors span, where it is small: a rotation changes no distance."""
    basis, _ = np.linalg.qr(np.concatenate([first, second]).T)
    return fid_oracle.frechet_distance(first @ basis, second @ basis)


# ------------------------------------------------------------------------------------- the script


def test_everything_that_a_run_leaves(
    scripts: ScriptRunner, pipeline_folder: Path, photos: Path, tmp_path: Path, results: ReconstructionResults
) -> None:
    words = ["--tokenizer", pipeline_folder / "tokenizer", "--data-dir", photos, "--num-tokens", 5, C, 1]
    words += ["--batch-size", 4, "--curve-images", 5, "--sheet-images", 3, "--output-dir", "out"]
    done = reconstruction(scripts, *NO_WEIGHTS, *words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.out == ""
    assert done.err.count("skipped unreadable image") == 2
    assert "results.json, results.md and pictures written to out" in done.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES

    found = json.loads((tmp_path / "out" / "results.json").read_text())
    for row, same in zip(found["rows"], results.rows, strict=True):
        assert row.keys() == FIELDS
        assert numbers(row) == pytest.approx(numbers(same), rel=1e-6)
    assert found["images"] == 13
    assert found["unreadable"]["count"] == 2
    assert found["reference"] == results.reference
    assert found["reference"]["name"].endswith("/val")
    assert len(found["reference"]["fingerprint"]) == 16
    assert f"{SIZE} pixels" in found["reference"]["preparation"]
    assert found["methods"].keys() == {"psnr", "ssim", "lpips", "rfid", "bits", "prior_distance"}
    assert found["methods"]["lpips"] is found["methods"]["rfid"] is None
    assert found["tokenizer"]["fingerprint"] == fingerprint(
        ChannelTokenizer.from_pretrained(pipeline_folder / "tokenizer")
    )
    assert (found["tokenizer"]["num_channels"], found["tokenizer"]["num_bits"]) == (C, BITS)
    assert found["codebook"] == results.codebook
    gains = report.channel_gain(results.curve)
    assert gains is not None
    assert found["channel_gain"][0] is gains[0] is None
    assert found["channel_gain"][1:] == pytest.approx(gains[1:], abs=1e-4)
    assert found["curve"]["images"] == 5
    assert found["settings"]["batch_size"] == 4
    assert found["settings"]["data_dir"] == str(photos)
    assert found["command"].startswith("benchmark.py reconstruction --perceptual none")
    assert (found["device"], found["dtype"]) == ("cpu", "float32")
    measured_with = {"torch", "transformers", "torchmetrics", "torch-fidelity", "channeltok"}
    assert found["versions"].keys() == measured_with | {"python"}
    assert found["images_per_second"] == pytest.approx(13 / found["seconds"])

    text = (tmp_path / "out" / "results.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == "| k | PSNR, dB | SSIM | bits per pixel | codes used |"
    for line, row in zip(lines[2:], found["rows"], strict=True):
        assert line.startswith(f"| {row['num_tokens']} | {row['psnr']:.2f} | {row['ssim']:.4f} |")
    assert found["command"] in text
    assert f"N = 13 images of 15, spread evenly ({found['reference']['name']})" in text
    assert "2 unreadable" in text
    assert "Not measured: LPIPS (VGG), rFID, bits, distance of the prior's samples." in text
    for name in FILES[:4]:
        with Image.open(tmp_path / "out" / name) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert len(picture.convert("RGB").getcolors(maxcolors=10**6) or []) > 20


MISTAKES: list[tuple[list[object], str]] = [
    (["--num-tokens", 4, 17], "17; this model has 1..16"),
    (["--num-tokens", 0], "num_tokens has 0"),
    (["--num-tokens", 4, 4], "each once"),
    (["--num-tokens", "all"], "all"),
    (["--max-images", 0], "max_images is 0"),
    (["--max-images", 1, "--inception", "auto"], "rFID needs at least 2"),
    (["--batch-size", 0], "batch_size is 0"),
    (["--num-workers", -1], "num_workers is -1"),
    (["--curve-images", -1], "curve_images is -1"),
    (["--sheet-images", -1], "sheet_images is -1"),
    (["--dtype", "float16"], "'float16'; allowed: float32, bfloat16"),
    (["--device", "gpu"], "gpu"),
    (["--perceptual", "vgg"], "'vgg'; allowed: lpips, none"),
    (["--inception", "v3"], "'v3'; allowed: auto, none"),
    (["--perceptual-weights", "a.pth"], "perceptual is none, but perceptual_weights"),
    (["--inception-weights", "a.pth"], "inception is none, but inception_weights"),
    (["--perceptual", "lpips", "--perceptual-weights", "a.pth"], "a.pth is missing"),
    (["--inception", "auto", "--inception-weights", "a.bin"], "a.bin ends in"),
    (["--data-dir", "nowhere"], "nowhere"),
    (["--tokenizer", "nowhere"], "nowhere"),
    (["--strict"], "unreadable image"),
    (["--num-token", 4], "--num-tokens"),
]


@pytest.mark.parametrize(("words", "named"), MISTAKES, ids=[" ".join(map(str, words)) for words, _ in MISTAKES])
def test_a_mistake_is_refused_in_one_line_and_nothing_is_written(
    scripts: ScriptRunner, pipeline_folder: Path, photos: Path, tmp_path: Path, words: list[object], named: str
) -> None:
    given = ["--tokenizer", pipeline_folder / "tokenizer", "--data-dir", photos, *NO_WEIGHTS, *words]
    done = reconstruction(scripts, *given, cwd=tmp_path, before=NO_INITIAL_VALUES)
    assert done.code == 2, done.err
    assert done.out == ""
    (line,) = [line for line in done.err.splitlines() if "error:" in line]
    assert line.startswith("benchmark.py: error: ")
    assert named in line
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_cannot_be_measured_are_refused() -> None:
    for size, settings, named in ((8, NONE, "SSIM"), (12, NONE | {"perceptual": "lpips"}, "LPIPS")):
        with pytest.raises(InputError, match=named):
            ReconstructionConfig(tokenizer="", **settings).budgets(size, 4)
    assert ReconstructionConfig(tokenizer="").budgets(16, 20) == [1, 4, 16, 20]


INTERRUPT = """
import os, signal
import tokenizer.metrics as metrics
real, calls = metrics.ssim, []
def ssim(*pictures):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return real(*pictures)
metrics.ssim = ssim
"""


def test_ctrl_c_leaves_nothing_behind(
    scripts: ScriptRunner, photos: Path, pipeline_folder: Path, tmp_path: Path
) -> None:
    words = ["--tokenizer", pipeline_folder / "tokenizer", "--data-dir", photos, *NO_WEIGHTS, "--batch-size", 2]
    done = reconstruction(scripts, *words, cwd=tmp_path, before=INTERRUPT)
    assert done.code == 130, done.err
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def found_with(**changes: Any) -> dict[str, Any]:
    row = {"num_tokens": 4, "psnr": 20.126, "ssim": 0.51234, "lpips": 0.25, "rfid": 33.333, "bits_per_pixel": 0.25}
    return {
        "rows": [{**row, "codebook_use": 0.5, "nats_per_token": 2.5, "bits": 14.43, "prior_distance": 8.125}],
        "images": 50_000,
        "unreadable": {"count": 0, "files": []},
        "reference": {"name": "val", "fingerprint": "ab", "available": 50_000, "preparation": "upright"},
        "methods": report.METHODS,
        "tokenizer": {"name": "t", "fingerprint": "cd", "image_size": 256, "num_channels": 256, "num_bits": 14},
        "codebook": {"use": 0.5, "codes": 16384, "tokens_counted": 12_800_000},
        "command": "benchmark.py reconstruction",
        "dtype": "float32",
        "machine": {"cpu": "A Processor", "gpu": None},
        "versions": {"torch": "2.15"},
    } | changes


def test_the_table_gives_the_number_of_images_of_rfid() -> None:
    text = report.table(found_with())
    assert "| k | PSNR, dB | SSIM | LPIPS (VGG) | rFID, N = 50,000 | bits per pixel | codes used |" in text
    assert "| 4 | 20.13 | 0.5123 | 0.2500 | 33.33 | 0.2500 | 50.0% | 2.500 | 14 | 8.12 |" in text
    assert "N = 50,000 images (val)" in text
    assert "biased" not in text
    assert "the same 50,000 images, as the tokenizer sees them" in text
    assert "N = 9,999 is below 10,000: rFID is biased upwards" in report.table(found_with(images=9_999))
