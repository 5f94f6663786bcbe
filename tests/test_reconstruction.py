"""benchmark.py reconstruction: the figures against plain formulas, and the files that it writes."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ScriptRunner
from oracles import fid as fid_oracle
from oracles import pictures as oracle
from PIL import Image
from torch import Tensor

from common.config import InputError
from common.images import load_image, to_float
from evaluation.config import ReconstructionConfig
from evaluation.features import FeatureExtractor
from evaluation.reconstruction.measure import measure_reconstruction
from evaluation.reconstruction.report import report
from tokenizer import ChannelTokenizer, PictureDecoder
from tokenizer.settings import DataConfig

C, BITS, SIZE = 16, 6, 32
NO_WEIGHTS = ["--perceptual", "none", "--inception", "none", "--num-workers", 0, "--device", "cpu"]
FIELDS = {
    *("num_tokens", "psnr", "ssim", "lpips", "rfid", "bits_per_pixel", "codebook_use"),
    *("nats_per_token", "bits", "prior_distance", "refined", "feature_distance"),
}
Results = tuple[dict[str, Any], list[list[Tensor]]]


@pytest.fixture(scope="module")
def photos(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 readable pictures in val/, and two files that cannot be read."""
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
    paths = [path for path in sorted((photos / "val").rglob("*.*")) if path.stat().st_size > 20]
    return torch.stack([load_image(path, SIZE) for path in paths])


def measured(tokenizer: ChannelTokenizer, folder: Path, **settings: Any) -> Results:
    none = {"perceptual": "none", "inception": "none"}
    settings = {"tokenizer": "tiny", "num_workers": 0, "device": "cpu", "sheet_images": 0} | none | settings
    return measure_reconstruction(tokenizer, DataConfig(data_dir=str(folder)), ReconstructionConfig(**settings))


@pytest.fixture(scope="module")
def results(tiny_tokenizer: ChannelTokenizer, photos: Path) -> Results:
    return measured(tiny_tokenizer, photos, num_tokens=[1, 5, C], batch_size=4, curve_images=5, sheet_images=3)


def pictures_of(tokenizer: ChannelTokenizer, images: Tensor, k: int) -> Tensor:
    return PictureDecoder(tokenizer, dtype=torch.float32)(tokenizer.tokenize(to_float(images))[:, :k])


def mean_psnr(decoded: Tensor, images: Tensor) -> float:
    return float(np.mean([oracle.psnr(a.numpy(), b.numpy()) for a, b in zip(decoded, images, strict=True)]))


def test_psnr_and_ssim_are_means_over_images(
    results: Results, tiny_tokenizer: ChannelTokenizer, readable: Tensor
) -> None:
    assert [row["num_tokens"] for row in results[0]["rows"]] == [1, 5, C]
    for row in results[0]["rows"]:
        decoded = pictures_of(tiny_tokenizer, readable, row["num_tokens"])
        assert row["psnr"] == pytest.approx(mean_psnr(decoded, readable), rel=1e-5)
        if row["num_tokens"] == 5:  # loops over every pixel are slow
            expected = [oracle.ssim(a.numpy(), b.numpy()) for a, b in zip(decoded, readable, strict=True)]
            assert row["ssim"] == pytest.approx(np.mean(expected), abs=1e-4)
        assert row["bits_per_pixel"] == row["num_tokens"] * BITS / SIZE**2
        assert row["lpips"] is row["rfid"] is row["bits"] is row["prior_distance"] is None
    assert len({row["ssim"] for row in results[0]["rows"]}) == 3


def test_codes_are_counted_by_channel(results: Results, tiny_tokenizer: ChannelTokenizer, readable: Tensor) -> None:
    tokens, book = tiny_tokenizer.tokenize(to_float(readable)).tolist(), results[0]["codebook"]
    for row in results[0]["rows"]:
        assert row["codebook_use"] == len({token for image in tokens for token in image[: row["num_tokens"]]}) / 2**BITS
    assert (book["codes"], book["tokens_counted"]) == (2**BITS, 13 * C)
    assert book["use"] == results[0]["rows"][-1]["codebook_use"]
    for channel in range(C):
        counts = Counter(image[channel] for image in tokens)
        assert book["by_channel"]["use"][channel] == len(counts) / 2**BITS
        expected = -sum(count / 13 * math.log2(count / 13) for count in counts.values())
        assert book["by_channel"]["entropy_bits"][channel] == pytest.approx(expected, abs=1e-12)


def test_the_curve_has_every_k_and_the_sheet_each_reported_one(
    results: Results, tiny_tokenizer: ChannelTokenizer, readable: Tensor
) -> None:
    found, sheet = results
    chosen = readable[[0, 3, 6, 9, 12]]  # 5 of the 15 that are listed, spread, counted over those that can be read
    expected = [mean_psnr(pictures_of(tiny_tokenizer, chosen, k), chosen) for k in range(1, C + 1)]
    assert found["curve"]["images"] == 5
    assert found["curve"]["psnr"] == pytest.approx(expected, rel=1e-5)
    assert found["channel_gain"][0] is None
    assert found["channel_gain"][1:] == pytest.approx(np.diff(expected), abs=1e-4)
    shown = readable[[0, 5, 10]]
    columns = [pictures_of(tiny_tokenizer, shown, k) for k in (1, 5, C)] + [shown]
    assert [len(row) for row in sheet] == [4, 4, 4]
    for i, row in enumerate(sheet):
        for picture, column in zip(row, columns, strict=True):
            assert (picture.int() - column[i].int()).abs().max() <= 1


def test_neither_the_batch_size_nor_the_other_k_change_a_figure_and_images_are_encoded_once(
    results: Results,
    tiny_tokenizer: ChannelTokenizer,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded, read = [], []
    encode, load = tiny_tokenizer.encode, load_image
    monkeypatch.setattr(tiny_tokenizer, "encode", lambda images: encoded.append(len(images)) or encode(images))
    monkeypatch.setattr("tokenizer.data.load_image", lambda path, *more: read.append(path) or load(path, *more))
    found, _ = measured(tiny_tokenizer, photos, num_tokens=[5], batch_size=1, curve_images=5)
    assert sum(encoded) == found["images"] == 13
    assert len(read) == len(set(read)) == 15
    expected = {name: value for name, value in results[0]["rows"][1].items() if value is not None}
    row = {name: value for name, value in found["rows"][0].items() if value is not None}
    assert row == pytest.approx(expected, rel=1e-5, abs=5e-6)  # sums of float32 within an image
    assert found["curve"]["psnr"] == pytest.approx(results[0]["curve"]["psnr"], rel=1e-5)
    assert found["codebook"] == results[0]["codebook"]


def low_rank_distance(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    """The formula in the space that a few vectors span, where it is small: a rotation changes no distance."""
    basis, _ = np.linalg.qr(np.concatenate([first, second]).T)
    return fid_oracle.frechet_distance(first @ basis, second @ basis)


@pytest.mark.filterwarnings("ignore:Matrix is singular")
def test_a_run_with_weights_from_files(
    scripts: ScriptRunner,
    tiny_tokenizer: ChannelTokenizer,
    pipeline_folder: Path,
    image_folder: Path,
    inception_weights: Path,
    vgg_weights: Path,
    tmp_path: Path,
) -> None:
    words = ["--tokenizer", pipeline_folder / "tokenizer", "--data-dir", image_folder, "--num-tokens", C]
    words += ["--max-images", 3, "--num-workers", 0, "--device", "cpu", "--sheet-images", 0]
    words += ["--inception-weights", inception_weights, "--perceptual-weights", vgg_weights]
    done = scripts("benchmark.py", "reconstruction", *words, cwd=tmp_path)
    assert done.code == 0, done.err
    (row,) = json.loads((tmp_path / "runs" / "reconstruction" / "results.json").read_text())["rows"]
    listed = sorted((image_folder / "val").rglob("*.*"))
    originals = torch.stack([load_image(listed[i], SIZE) for i in (0, 2, 4)])
    extract = FeatureExtractor(inception_weights)
    decoded = pictures_of(tiny_tokenizer, originals, C)
    both = [extract(images).double().numpy() for images in (originals, decoded)]
    assert row["rfid"] == pytest.approx(low_rank_distance(*both), rel=1e-4)
    assert row["rfid"] > 1e-3
    assert row["lpips"] > 0


def test_everything_that_a_run_leaves(
    scripts: ScriptRunner, pipeline_folder: Path, photos: Path, tmp_path: Path, results: Results
) -> None:
    words = ["--tokenizer", pipeline_folder / "tokenizer", "--data-dir", photos, "--num-tokens", 5, C, 1]
    words += ["--batch-size", 4, "--curve-images", 5, "--sheet-images", 3, "--output-dir", "out"]
    done = scripts("benchmark.py", "reconstruction", *NO_WEIGHTS, *words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.err.count("skipped unreadable image") == 2
    pictures = ["channel_gain.png", "plots.png", "reconstructions.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*pictures, "results.json", "results.md"]
    for name in pictures:
        with Image.open(tmp_path / "out" / name) as picture:
            assert len(picture.convert("RGB").getcolors(maxcolors=10**6) or []) > 20

    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {frozenset(row) for row in found["rows"]} == {frozenset(FIELDS)}
    assert (found["images"], found["reference"]["available"], found["unreadable"]["count"]) == (13, 15, 2)
    for name in ("rows", "codebook", "reference", "unreadable"):
        assert found[name] == results[0][name]
    assert found["command"].startswith("benchmark.py reconstruction --perceptual none")

    text = (tmp_path / "out" / "results.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == "| k | PSNR, dB | SSIM | bits per pixel | codes used |"
    for line, row in zip(lines[2:], found["rows"], strict=True):
        assert line.startswith(f"| {row['num_tokens']} | {row['psnr']:.2f} | {row['ssim']:.4f} |")
    assert f"N = 13 images of 15, spread evenly ({found['reference']['name']})" in text
    assert (
        "Not measured: LPIPS (VGG), rFID, distance of features, nats per token, bits, distance of the prior's samples."
        in text
    )
    text = "".join(report(found | {"rows": [{**found["rows"][0], "rfid": 33.333}], "images": 50_000}))
    assert "| rFID, N = 50,000 |" in text
    assert "Below 10,000 images it is biased" in text


MISTAKES: list[tuple[list[object], str]] = [
    (["--num-tokens", 4, 17], "17; this model has 1..16"),
    (["--max-images", 1, "--inception", "auto"], "need at least 2"),
    (["--perceptual-weights", "a.pth"], "perceptual is none, but perceptual_weights"),
    (["--perceptual", "lpips", "--perceptual-weights", "a.pth"], "a.pth is missing"),
    (["--inception", "auto", "--inception-weights", "a.bin"], "a.bin ends in"),
    (["--data-dir", "nowhere"], "nowhere"),
    (["--tokenizer", "nowhere"], "nowhere"),
    (["--strict"], "unreadable image"),
    (["--refiner", "nowhere"], "nowhere"),
    (["--prior-images", 4, "--features", "nowhere"], "nowhere"),
    (["--prior-images", 4, "--data-dir", "other"], "have different classes"),
]


@pytest.mark.parametrize(("words", "named"), MISTAKES, ids=[" ".join(map(str, words)) for words, _ in MISTAKES])
def test_a_mistake_is_refused_in_one_line_and_nothing_is_written(
    scripts: ScriptRunner, pipeline_folder: Path, photos: Path, tmp_path: Path, words: list[object], named: str
) -> None:
    shutil.copytree(photos, tmp_path / "other")
    (tmp_path / "other" / "val" / "n03").rename(tmp_path / "other" / "val" / "n04")
    given = ["--tokenizer", pipeline_folder / "tokenizer", "--data-dir", photos, *NO_WEIGHTS, *words]
    done = scripts("benchmark.py", "reconstruction", *given, cwd=tmp_path)
    assert done.code == 2, done.err
    (line,) = [line for line in done.err.splitlines() if "error:" in line]
    assert line.startswith("benchmark.py: error: ")
    assert named in line
    assert "Traceback" not in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_no_readable_image_is_refused(tiny_tokenizer: ChannelTokenizer, tmp_path: Path) -> None:
    (tmp_path / "val" / "n01").mkdir(parents=True)
    (tmp_path / "val" / "n01" / "broken.png").touch()
    with pytest.raises(InputError, match="none of the 1 images"):
        measured(tiny_tokenizer, tmp_path)
    assert ReconstructionConfig(tokenizer="").token_counts(20) == [1, 4, 16, 20]
