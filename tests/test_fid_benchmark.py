"""benchmark.py fid on the command line: laws of the measurement, results, images, labels and errors."""

import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES, ScriptRunner
from measurement import N, classes_of, measure, results, rows, words
from oracles import fid as oracle
from PIL import Image
from torch import Tensor

from common.checkpoint import load_tensors
from common.images import load_image
from evaluation.config import FidConfig, sweep_settings
from evaluation.features import FeatureExtractor
from evaluation.fid.measure import measure_fid, sample_labels
from evaluation.fid.report import metric_labels
from generator.config import SamplingConfig
from generator.engine import Engine
from generator.pipeline import ChannelTokPipeline
from generator.settings import ModelSettings
from tokenizer.classifier import PictureClassifier
from tokenizer.settings import ClassifierConfig

OUTPUTS = ["something else", *reversed(CLASS_NAMES)]  # of the classifier


def drawn(pipeline: ChannelTokPipeline, count: int, k: int) -> Tensor:
    """Samples as the pipeline draws them alone, (count 3 32 32) uint8."""
    images = [pipeline([label], num_tokens=k, seed=i).images[0] for i, label in enumerate(classes_of(count))]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def test_a_row_is_what_plain_formulas_give_for_images_drawn_one_by_one(
    measured: Path, pipeline_folder: Path, photographs: Path, classifier: Path
) -> None:
    pipeline, extractor = (
        ChannelTokPipeline.from_pretrained(pipeline_folder, "cpu"),
        FeatureExtractor(classifier=classifier),
    )
    reference = extractor(torch.stack([load_image(path, 32) for path in sorted(photographs.rglob("*.png"))]))
    for row in rows(measured):
        features, logits = extractor.extract(drawn(pipeline, N, row["num_tokens"]))
        expected = oracle.frechet_distance(features.double().numpy(), reference.double().numpy())
        assert row["frechet_distance"] == pytest.approx(expected, rel=1e-4)
        asked = [CLASS_NAMES[label] for label in classes_of(N)]
        right = [OUTPUTS[int(best)] == name for best, name in zip(logits.argmax(1), asked, strict=True)]
        assert row["class_accuracy"] == pytest.approx(sum(right) / N)
        assert all(math.isfinite(row[name]) for name in ("kid", "precision", "recall", "inception_score"))


def test_k_tokens_of_a_longer_run_score_exactly_as_a_run_of_k(
    measured: Path, scripts: ScriptRunner, pipeline_folder: Path, photographs: Path, classifier: Path, tmp_path: Path
) -> None:
    done = measure(scripts, *words(pipeline_folder, photographs, classifier, tmp_path), "--num-tokens", 7)
    assert done.code == 0, done.err
    assert rows(tmp_path) == [row for row in rows(measured) if row["num_tokens"] == 7]


def test_several_processes_measure_what_one_does(
    measured: Path, scripts: ScriptRunner, pipeline_folder: Path, photographs: Path, classifier: Path, tmp_path: Path
) -> None:
    done = measure(scripts, *words(pipeline_folder, photographs, classifier, tmp_path), processes=2)
    assert done.code == 0, done.err
    assert rows(tmp_path) == rows(measured)
    assert "3/3" in done.err, "the first process has parts 0, 2 and 4"
    assert "5/5" not in done.err


def test_a_killed_run_continues_and_ends_with_the_same_numbers(
    measured: Path, scripts: ScriptRunner, pipeline_folder: Path, photographs: Path, classifier: Path, tmp_path: Path
) -> None:
    flags = words(pipeline_folder, photographs, classifier, tmp_path)
    kept = tmp_path / "parts" / "part-000001.safetensors"
    running = scripts.start("benchmark.py", *flags)
    while not kept.is_file():
        assert running.poll() is None
        time.sleep(0.001)
    running.kill()
    assert running.wait().code == -9
    assert not (tmp_path / "results.json").exists()
    before = kept.stat().st_mtime_ns
    assert measure(scripts, *flags).code == 0
    assert kept.stat().st_mtime_ns == before, "complete parts are not drawn again"
    assert rows(tmp_path) == rows(measured)


def test_more_samples_add_to_earlier_ones_and_other_settings_do_not(
    measured: Path, scripts: ScriptRunner, pipeline_folder: Path, photographs: Path, classifier: Path, tmp_path: Path
) -> None:
    flags = words(pipeline_folder, photographs, classifier, tmp_path)
    assert measure(scripts, *flags, "--num-samples", 13).code == 0
    first = tmp_path / "parts" / "part-000000.safetensors"
    before = first.stat().st_mtime_ns
    assert measure(scripts, *flags).code == 0
    assert first.stat().st_mtime_ns == before
    assert rows(tmp_path) == rows(measured)
    assert load_tensors(first)["tokens"].shape == (5, 16)
    assert first.stat().st_size < 10_000, "features only: 5 images at 3 k would be 46 kB"
    done = measure(scripts, *flags, "--temperature", 0.5)
    assert done.code == 2
    assert "measured with sampling" in done.err
    assert "another --output-dir" in done.err


def test_five_k_take_as_many_steps_as_the_largest(
    pipeline_folder: Path, photographs: Path, classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    advance = Engine.advance

    def counted(*arguments: Any, **options: Any) -> None:
        nonlocal steps
        steps += 1
        advance(*arguments, **options)

    monkeypatch.setattr(Engine, "advance", counted)
    for counts in ([2, 4, 7, 12, 16], [16]):
        steps = 0
        config = FidConfig(
            model=str(pipeline_folder), reference=str(photographs), features=str(classifier), num_tokens=counts,
            num_samples=10, batch_size=5, num_workers=0, device="cpu", output_dir=str(tmp_path / str(len(counts))),
        )  # fmt: skip
        measure_fid(config, {}, "")
        assert steps == 1 + 2 * 16, "one step to warm up, then two batches"


def test_classes_are_balanced() -> None:
    for count in (10, 23, 1000):
        counts = np.bincount(sample_labels(count, 10))
        assert counts.max() - counts.min() <= 1
    assert sample_labels(23, 5) == classes_of(23)
    assert 400 < np.mean(sample_labels(500, 1000)) < 600, "fewer samples than classes are of any of them"


@pytest.fixture(scope="module")
def swept(
    tmp_path_factory: pytest.TempPathFactory, scripts: ScriptRunner, pipeline_folder: Path,
    photographs: Path, classifier: Path,
) -> tuple[Path, Path]:  # fmt: skip
    """A model's folder after a sweep with --write-settings, and the sweep's folder."""
    folder = tmp_path_factory.mktemp("sweep")
    shutil.copytree(pipeline_folder, folder / "model")
    flags = words(folder / "model", photographs, classifier, folder / "out")
    done = measure(scripts, *flags, "--sweep", "cfg_scale=1,3", "temperature=0.5,1", "--write-settings")
    assert done.code == 0, done.err
    return folder / "model", folder / "out"


def test_a_sweep_finds_the_lowest_distance_of_each_k(swept: tuple[Path, Path], measured: Path) -> None:
    model, folder = swept
    found = json.loads((folder / "sweep.json").read_text())
    expected = [{"cfg_scale": scale, "temperature": heat} for scale in (1, 3) for heat in (0.5, 1)]
    assert [entry["settings"] for entry in found["combinations"]] == expected
    assert [row["frechet_distance"] for row in found["combinations"][1]["rows"]] == [
        row["frechet_distance"] for row in rows(measured)
    ]
    pipeline = ChannelTokPipeline.from_pretrained(model, "cpu")
    text = (folder / "sweep.md").read_text()
    for j, k in enumerate((2, 7, 16)):
        values = [entry["rows"][j]["frechet_distance"] for entry in found["combinations"]]
        assert len(set(values)) == 4
        best = expected[values.index(min(values))]
        assert found["best"][str(k)] == best
        assert pipeline.settings.by_num_tokens[k] == SamplingConfig(**best)
        assert f"**{min(values):.3f}**" in text
    assert results(folder / "sweep" / "cfg_scale=3.0,temperature=0.5")["sampling"]["temperature"] == 0.5
    assert pipeline.settings.measured["num_samples"] == N
    assert "Fréchet distance (demo features, N = 23, M = 12)" in text


def test_the_settings_are_the_model_s_own_for_the_largest_k(
    scripts: ScriptRunner, pipeline_folder: Path, photographs: Path, classifier: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(pipeline_folder, tmp_path / "model")
    chosen = {7: SamplingConfig(cfg_scale=2.0, top_k=9), 16: SamplingConfig(top_k=3)}
    fingerprint = ChannelTokPipeline.from_pretrained(model, "cpu").fingerprint
    ModelSettings(by_num_tokens=chosen, fingerprint=fingerprint, measured={}).save(model / "generator")
    common = [*words(model, photographs, classifier, tmp_path / "out"), "--num-tokens", 2, 7, "--num-samples", 10]
    done = measure(scripts, *common)
    assert done.code == 0, done.err
    assert results(tmp_path / "out")["sampling"] == vars(chosen[7])
    assert "sampling: temperature 1.0, top_k 9, top_p 1.0, autoguidance 1.0, cfg_scale 2.0" in done.err
    pipeline = ChannelTokPipeline.from_pretrained(model, "cpu")
    alone = pipeline(classes_of(5), 7, seed=range(5), cfg_scale=2.0, top_k=9).tokens
    assert torch.equal(load_tensors(tmp_path / "out" / "parts" / "part-000000.safetensors")["tokens"].long(), alone)


def test_a_sweep_is_every_combination_in_order() -> None:
    assert sweep_settings(["cfg_scale=1,2", "top-k=0,5"]) == [
        {"cfg_scale": 1.0, "top_k": 0}, {"cfg_scale": 1.0, "top_k": 5},
        {"cfg_scale": 2.0, "top_k": 0}, {"cfg_scale": 2.0, "top_k": 5},
    ]  # fmt: skip


def test_every_image_is_kept_in_an_archive(measured: Path, pipeline_folder: Path) -> None:
    pipeline = ChannelTokPipeline.from_pretrained(pipeline_folder, "cpu")
    for k in (2, 7, 16):
        with np.load(measured / f"samples-k{k:04d}.npz") as archive:
            images, labels = archive["arr_0"], archive["arr_1"]
        assert (images.dtype, images.shape, labels.tolist()) == (np.uint8, (N, 32, 32, 3), classes_of(N))
        alone = drawn(pipeline, 10, k).permute(0, 2, 3, 1).numpy()
        assert abs(alone.astype(int) - images[:10].astype(int)).max() <= 1  # decoded in another batch


def test_results_name_their_settings(measured: Path, photographs: Path, classifier: Path) -> None:
    found, network = results(measured), FeatureExtractor(classifier=classifier)
    assert (found["num_samples"], found["seed"], found["sampling"]["temperature"]) == (N, 0, 1)
    assert (found["reference"]["name"], found["reference"]["count"]) == (photographs.as_posix(), 12)
    assert found["network"] == {"name": "demo features", "fingerprint": network.fingerprint}
    assert set(found["versions"]) >= {"torch", "torch-fidelity", "python", "channeltok"}
    assert found["command"].startswith("benchmark.py fid --model")
    assert all(row[name] > 0 for row in found["rows"] for name in ("draw_seconds", "decode_seconds"))
    text = (measured / "results.md").read_text()
    assert "| k | Fréchet distance (demo features, N = 23, M = 12) |" in text
    assert "FID" not in text
    with Image.open(measured / "quality.png") as plot:
        assert len(plot.convert("RGB").getcolors(maxcolors=10**6) or []) > 20


@pytest.mark.parametrize(
    ("network", "samples", "reference", "label"),
    [
        ("Inception", 50_000, 10_000, "FID"),
        ("Inception", 50_000, None, "FID"),  # an archive with moments
        ("Inception", 49_999, 50_000, "Fréchet distance (Inception, N = 49,999)"),
        ("Inception", 50_000, 9_999, "Fréchet distance (Inception, M = 9,999)"),
        ("Inception of other weights", 50_000, 50_000, "Fréchet distance (Inception of other weights)"),
        ("demo features", 500, 20, "Fréchet distance (demo features, N = 500, M = 20)"),
    ],
)
def test_only_plain_fid_is_called_fid(network: str, samples: int, reference: int | None, label: str) -> None:
    labels = metric_labels(network, samples, {"count": reference})
    field = "fid" if label == "FID" else "frechet_distance"
    assert labels[field] == label
    assert next(iter(labels)) == field
    for name, other in labels.items():
        assert label == "FID" or "FID" not in other
        assert network == "Inception" or name == "class_accuracy" or network in other
        assert network != "demo features" or "Inception" not in other
        assert samples == 50_000 or f"N = {samples:,}" in other


def test_anchors_are_scores_of_real_images(measured: Path, photographs: Path, classifier: Path) -> None:
    anchors, extractor = results(measured)["anchors"], FeatureExtractor(classifier=classifier)
    paths = sorted(photographs.rglob("*.png"))
    features, logits = extractor.extract(torch.stack([load_image(path, 32) for path in paths]))
    vectors = features.double().numpy()
    expected = oracle.frechet_distance(vectors[::2], vectors[1::2])
    assert anchors["real"]["distance"] == pytest.approx(expected, rel=1e-4)
    assert (anchors["images"], anchors["real"]["images"]) == (12, [6, 6])
    names = [CLASS_NAMES[4 - int(path.parent.name[-1])] for path in paths]
    right = [OUTPUTS[int(best)] == name for best, name in zip(logits.argmax(1), names, strict=True)]
    assert anchors["real"]["class_accuracy"] == pytest.approx(sum(right) / 12)
    assert [row["distance"] > 0 for row in anchors["reconstructions"]] == [True] * 3
    assert "| reconstructed from 7 tokens |" in (measured / "results.md").read_text()


def test_inception_is_used_with_its_flag(
    scripts: ScriptRunner, pipeline_folder: Path, photographs: Path, inception_weights: Path, tmp_path: Path
) -> None:
    done = measure(
        scripts, "fid", "--model", pipeline_folder, "--reference", photographs, "--num-tokens", 16,
        "--inception-weights", inception_weights, "--num-samples", 10, "--batch-size", 10, "--num-workers", 0,
        "--output-dir", tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    found = results(tmp_path)
    assert "fid" not in found["rows"][0]
    assert found["labels"]["inception_score"] == "Inception score (Inception of other weights, N = 10, M = 12)"
    samples = drawn(ChannelTokPipeline.from_pretrained(pipeline_folder, "cpu"), 2, 16).contiguous()
    kept = load_tensors(tmp_path / "parts" / "part-000000.safetensors")["features.k0016"]
    torch.testing.assert_close(kept[:2], FeatureExtractor(inception_weights)(samples), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--num-tokens", 17], "this model has 1..16"),
        (["--reference", "nowhere"], "reference nowhere is missing"),
        (["--inception-weights", "x.pth"], "omit one"),
        (["--write-settings"], "give --sweep"),
        (["--sweep", "cfg=1,2"], "with one of temperature"),
        (["--sweep", "cfg_scale=a"], "values of type float"),
        (["--sweep", "cfg_scale=-1"], "cfg_scale is -1.0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    scripts: ScriptRunner, pipeline_folder: Path, photographs: Path, classifier: Path, tmp_path: Path,
    change: list[Any], message: str,
) -> None:  # fmt: skip
    done = measure(scripts, *words(pipeline_folder, photographs, classifier, tmp_path / "out"), *change)
    assert done.code == 2
    assert message in done.err
    assert done.err.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_without_the_model_s_classes_accuracy_is_not_measured(
    scripts: ScriptRunner, pipeline_folder: Path, photographs: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.safetensors"
    PictureClassifier(ClassifierConfig(classifier_size=32, widths=[8, 16]), ["hen", "cock"]).save(path)
    done = measure(scripts, *words(pipeline_folder, photographs, path, tmp_path / "out"))
    assert done.code == 0, done.err
    assert "class accuracy is not measured" in done.err
    assert [row["class_accuracy"] for row in results(tmp_path / "out")["rows"]] == [None] * 3
