"""benchmark.py fid as a user runs it: laws of the measurement, results, pictures, labels and mistakes."""

import hashlib
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES, REPO, Finished, ScriptRunner
from measurement import N, classes_of, measure, results, rows, words
from oracles import fid as oracle
from PIL import Image

from common.checkpoint import load_tensor
from common.classifier import PictureClassifier
from common.config import ClassifierConfig
from common.errors import InputError
from common.images import load_image
from common.team import team
from evaluation import features as fid
from evaluation.features import FeatureExtractor
from evaluation.fid.config import QualityConfig, sweep_settings
from evaluation.fid.labels import distance_field, measure_labels
from evaluation.fid.measure import measure_quality, open_subject
from evaluation.fid.parts import Parts
from evaluation.fid.reference import About
from evaluation.fid.samples import labels_of
from generator.config import SamplingConfig
from generator.engine import Engine
from generator.pipeline import ChannelTokPipeline

# ------------------------------------------------------------------------------------- the pass


def test_a_row_is_what_plain_formulas_give_for_pictures_drawn_one_by_one(
    measured: Path, pipeline_folder: Path, photographs: Path, classifier: Path
) -> None:
    """The whole measurement without its code: other batches, the pipeline's own pictures, numpy's sums."""
    pipeline = ChannelTokPipeline.from_pretrained(pipeline_folder, "cpu")
    extractor = FeatureExtractor(classifier=classifier)
    reference = extractor(torch.stack([load_image(path, 32) for path in sorted(photographs.rglob("*.png"))]))
    for row in rows(measured):
        k = row["num_tokens"]
        drawn = [pipeline([label], num_tokens=k, seed=i).images[0] for i, label in enumerate(classes_of(N))]
        samples = torch.from_numpy(np.stack([np.asarray(picture) for picture in drawn])).permute(0, 3, 1, 2)
        features, logits = extractor.see(samples)
        one, other = features.double().numpy(), reference.double().numpy()
        assert row["frechet_distance"] == pytest.approx(oracle.frechet_distance(one, other), rel=1e-4)
        named = ["something else", *reversed(CLASS_NAMES)]
        asked = [CLASS_NAMES[label] for label in classes_of(N)]
        right = [named[int(best)] == name for best, name in zip(logits.argmax(1), asked, strict=True)]
        assert row["class_accuracy"] == pytest.approx(sum(right) / N)
        for name in ("kid", "precision", "recall", "inception_score"):
            assert math.isfinite(row[name])


@pytest.mark.parametrize("guidance", [[], ["--cfg-scale", 2, "--cfg-schedule", "interval", "--cfg-end", 0.5]])
def test_k_tokens_of_a_longer_run_score_exactly_as_a_run_of_k(
    measured: Path, scripts: ScriptRunner, pipeline_folder: Path, photographs: Path, classifier: Path,
    tmp_path: Path, guidance: list[Any],
) -> None:  # fmt: skip
    whole = tmp_path / "all" if guidance else measured
    if guidance:
        assert measure(scripts, *words(pipeline_folder, photographs, classifier, whole), *guidance).code == 0
    flags = words(pipeline_folder, photographs, classifier, tmp_path / "alone")
    place = flags.index("--num-tokens")
    done = measure(scripts, *flags[: place + 1], 7, *flags[place + 4 :], *guidance)
    assert done.code == 0, done.err
    assert rows(tmp_path / "alone") == [row for row in rows(whole) if row["num_tokens"] == 7]


def test_several_processes_measure_what_one_does(
    measured: Path, scripts: ScriptRunner, pipeline_folder: Path, photographs: Path, classifier: Path, tmp_path: Path
) -> None:
    done = measure(scripts, *words(pipeline_folder, photographs, classifier, tmp_path), processes=2)
    assert done.code == 0, done.err
    assert rows(tmp_path) == rows(measured)
    assert "13/13" in done.err, "the first has parts 0, 2 and 4"
    assert "23/23" not in done.err


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


def test_more_samples_add_to_earlier_ones(
    measured: Path, scripts: ScriptRunner, pipeline_folder: Path, photographs: Path, classifier: Path, tmp_path: Path
) -> None:
    flags = words(pipeline_folder, photographs, classifier, tmp_path)
    flags[flags.index(N)] = 13
    assert measure(scripts, *flags).code == 0
    first = tmp_path / "parts" / "part-000000.safetensors"
    before = first.stat().st_mtime_ns
    flags[flags.index(13)] = N
    assert measure(scripts, *flags).code == 0
    assert first.stat().st_mtime_ns == before
    assert rows(tmp_path) == rows(measured)


def test_other_settings_do_not_mix_with_earlier_parts(
    measured: Path, scripts: ScriptRunner, pipeline_folder: Path, photographs: Path, classifier: Path
) -> None:
    flags = words(pipeline_folder, photographs, classifier, measured)
    done = measure(scripts, *flags, "--temperature", 0.5)
    assert done.code == 2
    assert "measured with sampling" in done.err
    assert "another --output-dir" in done.err


def test_parts_belong_to_settings(measured: Path, tmp_path: Path) -> None:
    for _ in range(2):  # each process begins before its first part
        Parts(tmp_path, {"a": 1}, [2], 5, 5).begin()
    with pytest.raises(InputError, match="measured with a = 1, now it is 2"):
        Parts(tmp_path, {"a": 2}, [2], 5, 5).begin()
    (tmp_path / "settings.json").unlink()
    shutil.copy(measured / "parts" / "part-000000.safetensors", tmp_path)
    with pytest.raises(InputError, match=r"has parts and no settings\.json"):
        Parts(tmp_path, {}, [2], 5, 5).begin()


def test_pictures_of_two_drawings_do_not_mix(
    measured: Path, scripts: ScriptRunner, pipeline_folder: Path, photographs: Path, classifier: Path, tmp_path: Path
) -> None:
    shutil.copytree(measured / "images", tmp_path / "images")
    flags = [*words(pipeline_folder, photographs, classifier, tmp_path), "--save-images"]
    done = measure(scripts, *flags, "--temperature", 0.5)
    assert done.code == 2
    assert "pictures of another drawing" in done.err
    shutil.rmtree(tmp_path / "parts")
    flags[flags.index(N)] = 13
    done = measure(scripts, *flags)
    assert done.code == 2
    assert "more than 13 pictures" in done.err


def test_fewer_samples_than_classes_are_warned_of(
    scripts: ScriptRunner, photographs: Path, classifier: Path, tmp_path: Path
) -> None:
    done = measure(scripts, *words(REPO / "weights" / "demo", photographs, classifier, tmp_path), "--num-tokens", 1)
    assert done.code == 0, done.err
    assert "23 samples are fewer than the 100 classes" in done.err


def test_five_budgets_take_as_many_steps_as_the_largest(
    pipeline_folder: Path, photographs: Path, classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    advance = Engine.advance

    def counted(*arguments: Any, **options: Any) -> None:
        nonlocal steps
        steps += 1
        advance(*arguments, **options)

    monkeypatch.setattr(Engine, "advance", counted)
    taken = {}
    for budgets in ([2, 4, 7, 12, 16], [16]):
        steps = 0
        config = QualityConfig(
            model=str(pipeline_folder), reference=str(photographs), features=str(classifier), num_tokens=budgets,
            num_samples=10, batch_size=5, num_workers=0, device="cpu", output_dir=str(tmp_path / str(len(budgets))),
        )  # fmt: skip
        with team("cpu") as alone:
            measure_quality(open_subject(config, alone), SamplingConfig(), config, alone)
        taken[len(budgets)] = steps
    assert taken == {5: 1 + 2 * 16, 1: 1 + 2 * 16}, "one step to warm up, then two batches"


def test_classes_are_balanced() -> None:
    for count in (10, 23, 1000):
        counts = np.bincount(labels_of(range(count), 10))
        assert counts.max() - counts.min() <= 1
    assert labels_of(range(23), 5) == classes_of(23)
    assert labels_of(range(9, 14), 5) == classes_of(14)[9:]
    few = labels_of(range(500), 1000)
    assert 400 < np.mean(few) < 600, "fewer samples than classes are of any of them"


def test_parts_hold_features_and_no_pictures(measured: Path) -> None:
    part = measured / "parts" / "part-000000.safetensors"
    assert load_tensor(part, "tokens").shape == (5, 16)
    assert load_tensor(part, "features.7").shape == (5, 16)
    assert part.stat().st_size < 10_000, "5 samples at 3 k: their pictures alone would be 46 kB"


# ------------------------------------------------------------------------------------- pictures


def test_every_picture_is_kept_as_a_file_and_in_an_archive(measured: Path, pipeline_folder: Path) -> None:
    pipeline = ChannelTokPipeline.from_pretrained(pipeline_folder, "cpu")
    for k in (2, 7, 16):
        with np.load(measured / f"samples-k{k:04d}.npz") as archive:
            pictures, labels = archive["arr_0"], archive["arr_1"]
        assert pictures.dtype == np.uint8
        assert pictures.shape == (N, 32, 32, 3)
        assert labels.tolist() == classes_of(N)
        files = sorted((measured / "images" / f"k{k:04d}").glob("*.png"))
        assert [path.name for path in files] == [f"{i:06d}.png" for i in range(N)]
        for i, path in enumerate(files):
            np.testing.assert_array_equal(np.asarray(Image.open(path)), pictures[i])
        alone = np.asarray(pipeline(classes_of(10)[9:], num_tokens=k, seed=9).images[0]).astype(int)
        assert abs(alone - pictures[9].astype(int)).max() <= 1  # decoded in another batch


def test_the_sheet_and_the_plots_are_complete(measured: Path) -> None:
    for name in ("samples.png", "quality.png", "time.png"):
        with Image.open(measured / name) as picture:
            picture.load()
            assert picture.width > 300


# ------------------------------------------------------------------------------------- results and labels


def test_results_name_their_settings(measured: Path, photographs: Path, classifier: Path) -> None:
    found = results(measured)
    assert [row["num_tokens"] for row in found["rows"]] == [2, 7, 16]
    assert found["num_samples"] == N
    assert found["reference"]["name"] == photographs.as_posix()
    assert found["reference"]["count"] == 12
    assert found["network"] == {
        "name": "demo features",
        "fingerprint": FeatureExtractor(classifier=classifier).fingerprint,
    }
    assert set(found["versions"]) >= {"torch", "torch-fidelity", "python", "channeltok"}
    assert found["sampling"]["temperature"] == 1
    assert found["seed"] == 0
    assert found["model"]["fingerprint"]
    assert found["machine"]["cpu"]
    assert found["pass_seconds"]["draw"] > 0
    assert all(row[name] > 0 for row in found["rows"] for name in ("draw_seconds", "decode_seconds"))
    text = (measured / "results.md").read_text()
    assert "| k | Fréchet distance (demo features, N = 23, M = 12) |" in text
    assert "| class accuracy (N = 23) |" in text
    assert "5 samples side by side, 1 process" in text
    assert "FID" not in text.replace("torch-fidelity", "").replace("benchmark.py fid", "")
    assert f"{photographs.as_posix()}, 12 images" in text


def about(**changes: Any) -> About:
    values: dict[str, Any] = {"name": "val", "fingerprint": "0", "count": 50_000, "kept": 10_000, "preparation": ""}
    return About(**values | changes)


@pytest.mark.parametrize(
    ("network", "count", "reference", "label"),
    [
        ("Inception", 50_000, about(), "FID"),
        ("Inception", 50_000, about(count=None), "FID"),
        ("Inception", 49_999, about(), "Fréchet distance (Inception, N = 49,999)"),
        ("Inception", 50_000, about(count=9_999), "Fréchet distance (Inception, M = 9,999)"),
        ("Inception", 50_000, about(decoded=True), "Fréchet distance (Inception, reference decoded by the tokenizer)"),
        ("Inception", 50_000, about(drawn_by="x"), "Fréchet distance (Inception, reference drawn by a model)"),
        ("Inception of other weights", 50_000, about(), "Fréchet distance (Inception of other weights)"),
        ("demo features", 50_000, about(), "Fréchet distance (demo features)"),
        ("demo features", 500, about(count=20), "Fréchet distance (demo features, N = 500, M = 20)"),
    ],
)
def test_only_plain_fid_is_called_fid(network: str, count: int, reference: About, label: str) -> None:
    field = distance_field(network, count, reference)
    assert field == ("fid" if label == "FID" else "frechet_distance")
    labels = measure_labels(network, count, reference)
    assert labels[field] == label
    for name, other in labels.items():
        assert label == "FID" or "FID" not in other
        assert network == "Inception" or name == "class_accuracy" or network in other
        assert network != "demo features" or "Inception" not in other
        assert count == 50_000 or f"N = {count:,}" in other


def test_only_the_published_weights_are_called_inception(
    inception_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert FeatureExtractor(inception_weights).name == "Inception of other weights"
    monkeypatch.setattr(fid, "WEIGHTS_SHA256", hashlib.sha256(inception_weights.read_bytes()).hexdigest())
    assert FeatureExtractor(inception_weights).name == "Inception"


def test_anchors_are_scores_of_real_pictures(measured: Path, photographs: Path, classifier: Path) -> None:
    anchors = results(measured)["anchors"]
    extractor = FeatureExtractor(classifier=classifier)
    paths = sorted(photographs.rglob("*.png"))
    features, logits = extractor.see(torch.stack([load_image(path, 32) for path in paths]))
    halves = features.double().numpy()
    assert anchors["real"]["distance"] == pytest.approx(oracle.frechet_distance(halves[::2], halves[1::2]), rel=1e-4)
    assert anchors["real"]["images"] == [6, 6]
    assert anchors["images"] == 12
    named = ["something else", *reversed(CLASS_NAMES)]
    right = [
        named[int(best)] == CLASS_NAMES[4 - int(path.parent.name[-1])]
        for best, path in zip(logits.argmax(1), paths, strict=True)
    ]
    assert anchors["real"]["class_accuracy"] == pytest.approx(sum(right) / 12)
    assert 0 <= anchors["shuffled"]["class_accuracy"] <= 1
    assert [row["num_tokens"] for row in anchors["reconstructions"]] == [2, 7, 16]
    assert all(row["distance"] > 0 for row in anchors["reconstructions"])
    text = (measured / "results.md").read_text()
    assert "real, one half against the other (6 and 6)" in text
    assert "real, classes shuffled (12 images)" in text
    assert "rebuilt from 7 tokens, against the same 12 images" in text


# ------------------------------------------------------------------------------------- Inception


def test_inception_is_used_with_its_flag(
    scripts: ScriptRunner, pipeline_folder: Path, photographs: Path, inception_weights: Path, classifier: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    done = measure(
        scripts, "fid", "--model", pipeline_folder, "--reference", photographs, "--num-tokens", 16,
        "--inception-weights", inception_weights, "--classifier", classifier, "--num-samples", 10, "--batch-size", 10,
        "--max-reference", 10, "--num-workers", 0, "--output-dir", tmp_path, "--sheet-samples", 0,
    )  # fmt: skip
    assert done.code == 0, done.err
    found = results(tmp_path)
    (row,) = found["rows"]
    assert "fid" not in row
    notes = "Inception of other weights, N = 10, M = 10"
    assert found["labels"]["frechet_distance"] == f"Fréchet distance ({notes})"
    assert found["labels"]["inception_score"] == f"Inception score ({notes})"
    assert found["labels"]["kid"] == f"KID ({notes})"
    assert 0 <= row["class_accuracy"] <= 1
    pipeline, extractor = (
        ChannelTokPipeline.from_pretrained(pipeline_folder, "cpu"),
        FeatureExtractor(inception_weights),
    )
    drawn = pipeline(classes_of(10), seed=0).images
    samples = torch.from_numpy(np.stack([np.asarray(picture) for picture in drawn])).permute(0, 3, 1, 2).contiguous()
    kept = load_tensor(tmp_path / "parts" / "part-000000.safetensors", "features.16")
    torch.testing.assert_close(kept[:2], extractor(samples[:2]), rtol=1e-3, atol=1e-3)
    assert load_tensor(tmp_path / "parts" / "part-000000.safetensors", "logits.16").shape == (10, 1008)


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--num-tokens", 17], "this model has 1..16"),
        (["--num-samples", 9], "at least 10"),
        (["--reference", "nowhere"], "no saved name; saved are: none"),
        (["--reference", "no/name"], "not allowed"),
        (["--features", "nowhere.safetensors"], "is missing"),
        (["--inception-weights", "x.pth"], "leave one out"),
        (["--write-settings"], "give --sweep"),
        (["--sweep", "cfg=1,2"], "with one of temperature"),
        (["--sweep", "cfg_scale=1,1"], "each value once"),
        (["--sweep", "cfg_scale=-1"], "it must be 0 or above"),
        (["--sweep", "cfg_scale=1", "--save-npz"], "save_npz does not go with sweep"),
        (["--device", "tpu"], "is unknown"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    scripts: ScriptRunner, pipeline_folder: Path, photographs: Path, classifier: Path, tmp_path: Path,
    change: list[Any], message: str,
) -> None:  # fmt: skip
    flags = [*words(pipeline_folder, photographs, classifier, tmp_path / "out"), *change]
    cache = f"import os; os.environ['XDG_CACHE_HOME'] = {str(tmp_path)!r}"
    done: Finished = measure(scripts, *flags, before=cache)
    assert done.code == 2
    assert message in done.err
    assert done.err.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_a_sweep_is_every_combination_in_order() -> None:
    found = sweep_settings(["cfg_scale=1,2", "top-k=0,5"], SamplingConfig())
    assert found == [
        {"cfg_scale": 1.0, "top_k": 0}, {"cfg_scale": 1.0, "top_k": 5},
        {"cfg_scale": 2.0, "top_k": 0}, {"cfg_scale": 2.0, "top_k": 5},
    ]  # fmt: skip
    with pytest.raises(InputError, match="twice"):
        sweep_settings(["top_k=1", "top-k=2"], SamplingConfig())


def test_a_classifier_must_know_the_model_s_classes_by_name(
    scripts: ScriptRunner, pipeline_folder: Path, photographs: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.safetensors"
    PictureClassifier(ClassifierConfig(classifier_size=32, widths=[8, 16]), ["hen", "cock"]).save(path)
    flags = words(pipeline_folder, photographs, path, tmp_path / "out")
    done = measure(scripts, *flags, "--classifier", path)
    assert done.code == 2
    assert "does not know 4 classes" in done.err
    done = measure(scripts, *flags)
    assert done.code == 0, done.err
    assert "no class accuracy is measured" in done.err
    assert [row["class_accuracy"] for row in results(tmp_path / "out")["rows"]] == [None] * 3
    shutil.rmtree(tmp_path / "out")
