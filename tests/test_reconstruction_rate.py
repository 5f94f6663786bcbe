"""benchmark.py reconstruction --prior-images: rate under a refitted linear prior, and images that it draws."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, ScriptRunner
from oracles import bit_prior as oracle
from oracles import fid as fid_oracle
from PIL import Image
from torch import Tensor

from common.bit_prior import BitPrior
from common.images import load_image, to_float
from common.plots import Panel
from evaluation.features import FeatureExtractor
from evaluation.reconstruction import rate as rate_module
from evaluation.reconstruction import report
from evaluation.reconstruction.config import ReconstructionConfig
from evaluation.reconstruction.measure import ReconstructionResults, measure_reconstruction
from tokenizer import ChannelTokenizer, PictureDecoder
from tokenizer.bsq import pack_bits, unpack_bits
from tokenizer.settings import DataConfig

C, BITS, SIZE = 16, 6, 32
FLAGS = ["--perceptual", "none", "--inception", "none", "--num-workers", 0, "--device", "cpu", "--curve-images", 0]


def images_of(folder: Path, split: str) -> Tensor:
    return torch.stack([load_image(path, SIZE) for path in sorted((folder / split).rglob("*.*"))])


def known_prior(prior: BitPrior) -> BitPrior:
    rng = torch.Generator().manual_seed(0)
    for parameter in prior.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) * 0.1
    return prior


@pytest.fixture(scope="module")
def fitted_to() -> list[tuple[Tensor, Tensor]]:
    """Bits and labels that the prior was fitted to, in `results`."""
    return []


@pytest.fixture(scope="module")
def results(
    tiny_tokenizer: ChannelTokenizer,
    image_folder: Path,
    classifier: Path,
    fitted_to: list[tuple[Tensor, Tensor]],
) -> ReconstructionResults:
    """With a prior of known weights in place of the fitted one."""

    def fit(prior: BitPrior, batches: Any, *, steps: int) -> None:
        fitted_to.extend(next(batches) for _ in range(steps))
        known_prior(prior)

    config = ReconstructionConfig(
        tokenizer="tiny", perceptual="none", inception="none", num_workers=0, device="cpu", curve_images=0,
        batch_size=4, num_tokens=[1, 5, C], sheet_images=2,
        prior_images=9, prior_steps=30, prior_samples=10, features=str(classifier),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rate_module, "fit_bit_prior", fit)
        return measure_reconstruction(tiny_tokenizer, DataConfig(data_dir=str(image_folder)), config)


def test_the_rate_is_the_prior_s_on_held_out_images(
    results: ReconstructionResults, tiny_tokenizer: ChannelTokenizer, image_folder: Path
) -> None:
    bits = unpack_bits(tiny_tokenizer.tokenize(to_float(images_of(image_folder, "val"))), BITS).sign()
    prior, labels = known_prior(BitPrior(C, BITS, 3)), [0, 0, 1, 1, 2, 2]
    nats = [oracle.nats(prior, image.flatten().tolist(), label) for image, label in zip(bits, labels, strict=True)]
    for row in results.rows:
        k = row["num_tokens"]
        mean = math.fsum(math.fsum(image[: k * BITS]) for image in nats) / len(nats)
        assert row["nats_per_token"] == pytest.approx(mean / k, rel=1e-5)
        assert row["bits"] == pytest.approx(mean / math.log(2), rel=1e-5)


def test_the_prior_is_fitted_to_training_images_and_their_mirror_images(
    fitted_to: list[tuple[Tensor, Tensor]],
    results: ReconstructionResults,
    tiny_tokenizer: ChannelTokenizer,
    image_folder: Path,
) -> None:
    chosen = images_of(image_folder, "train")[[i * 12 // 9 for i in range(9)]]
    labels = [i * 12 // 9 // 4 for i in range(9)]
    expected = set()
    for view in (chosen, chosen.flip(-1)):
        tokens = tiny_tokenizer.tokenize(to_float(view)).tolist()
        expected |= {(*row, label) for row, label in zip(tokens, labels, strict=True)}
    found = {
        (*row, label)
        for bits, classes in fitted_to
        for row, label in zip(pack_bits(bits).tolist(), classes.tolist(), strict=True)
    }
    assert found == expected
    assert results.rate is not None
    assert results.rate.train_images == 9


def test_the_distance_is_that_of_the_prior_s_samples_from_the_images(
    results: ReconstructionResults, tiny_tokenizer: ChannelTokenizer, image_folder: Path, classifier: Path
) -> None:
    tokens = pack_bits(known_prior(BitPrior(C, BITS, 3)).sample(torch.arange(10) % 3, range(10)))
    features = FeatureExtractor(device="cpu", classifier=classifier)
    real = features(images_of(image_folder, "val")).double().numpy()
    for row in results.rows:
        drawn = PictureDecoder(tiny_tokenizer, dtype=torch.float32)(tokens[:, : row["num_tokens"]])
        expected = fid_oracle.frechet_distance(features(drawn).double().numpy(), real)
        assert row["prior_distance"] == pytest.approx(expected, rel=1e-3)
    assert results.rate is not None
    shown = PictureDecoder(tiny_tokenizer, dtype=torch.float32)(tokens[:2, :5])
    assert torch.equal(torch.stack([row[1] for row in results.rate.sheet]), shown)


@pytest.fixture
def measure(scripts: ScriptRunner, pipeline_folder: Path, image_folder: Path, tmp_path: Path) -> Any:
    def run(*words: object, before: str = "") -> Finished:
        given = ["--tokenizer", pipeline_folder / "tokenizer", "--data-dir", image_folder, *FLAGS, *words]
        return scripts("benchmark.py", "reconstruction", *given, cwd=tmp_path, before=before)

    return run


def test_tokenizers_are_compared_in_one_plot(measure: Any, tmp_path: Path) -> None:
    words = ("--prior-images", 12, "--prior-steps", 20, "--num-tokens", 1, C)
    done = measure(*words, "--output-dir", "one")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "one" / "results.json").read_text())
    assert len(found["prior"]["nats"]) == C
    assert found["rows"][-1]["bits"] < C * BITS  # fewer than the tokens as they are
    assert found["rows"][-1]["prior_distance"] is None
    assert "| nats per token | bits |" in (tmp_path / "one" / "results.md").read_text()
    for name in ("prior_samples.png", "rate_distortion.png"):
        with Image.open(tmp_path / "one" / name) as picture:
            assert len(picture.convert("RGB").getcolors(maxcolors=10**6) or []) > 20

    again = measure(*words, "--output-dir", "one", "--compare", "one/results.json")
    assert again.code == 0, again.err


def test_curves_of_equal_names_are_labelled_with_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(name: str, psnr: float, images: int) -> dict[str, Any]:
        return {
            "tokenizer": {"name": name}, "rows": [{"bits": 10.0, "psnr": psnr}], "images": images,
            "reference": {"fingerprint": "ab", "available": 9, "name": "val"}, "prior": {"train_images": 7},
        }  # fmt: skip

    compared = []
    for name, psnr, images in (("a", 2.0, 5), ("b", 3.0, 6)):
        (tmp_path / f"{name}.json").write_text(json.dumps(found(name, psnr, images)))
        compared.append(report.read_curve(tmp_path / f"{name}.json"))
    panels: list[Panel] = []
    monkeypatch.setattr(report, "save_line_plot", lambda given, *_, **__: panels.extend(given))
    warnings: list[str] = []
    monkeypatch.setattr(report.logger, "warning", lambda text, path: warnings.append(text % path))
    report._plot_rate_distortion(found("a", 1.0, 5), compared, tmp_path)
    lines = {name: list(points) for name, points in panels[0].lines.items()}
    assert lines == {"a": [(10.0, 1.0)], f"a ({tmp_path / 'a.json'})": [(10.0, 2.0)], "b": [(10.0, 3.0)]}
    assert warnings == [f"{tmp_path / 'b.json'} was measured on other images or with a prior fitted to others"]


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--prior-images", -1], "prior_images is -1"), (["--prior-steps", 0], "prior_steps is 0"),
     (["--features", "a"], "features needs a rate"), (["--compare", "a.json"], "compare needs a rate"),
     (["--prior-images", 4, "--max-images", 1, "--features", "a"], "needs at least 2 images"),
     (["--prior-images", 4, "--compare", "a.json"], "a.json is missing"),
     (["--prior-images", 4, "--compare", "without.json"], "without.json has no rates"),
     (["--prior-images", 4, "--data-dir", "other"], "have different classes"),
     (["--prior-images", 4, "--features", "nowhere"], "nowhere")],
)  # fmt: skip
def test_a_mistake_is_refused_before_anything_is_measured(
    measure: Any, image_folder: Path, tmp_path: Path, words: list[object], named: str
) -> None:
    shutil.copytree(image_folder, tmp_path / "other")
    (tmp_path / "other" / "val" / "n03").rename(tmp_path / "other" / "val" / "n04")
    (tmp_path / "without.json").write_text('{"rows": [{"psnr": 20.0, "bits": null}]}')
    never = "import tokenizer.extraction, tokenizer.tokenizer as t; t.ChannelTokenizer.tokenize = None"
    done = measure(*words, before=never)
    assert done.code == 2, done.err
    assert done.err.count("\n") == 1, done.err
    assert named in done.err
    assert not (tmp_path / "runs").exists()
