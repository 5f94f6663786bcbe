"""What samples are compared with (folders, archives, saved names), and the settings that a sweep writes."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ScriptRunner
from measurement import N, classes_of, measure, results, rows, words
from PIL import Image

from common.classifier import PictureClassifier
from common.config import ClassifierConfig
from common.errors import InputError
from common.images import load_image
from evaluation.features import FeatureExtractor
from evaluation.fid.config import QualityConfig
from evaluation.fid.npz import NpzPictures, write_npz
from evaluation.fid.reference import KEPT, Collector, FolderImages, folder_reference, npz_reference
from evaluation.frechet import RunningStatistics, frechet_distance
from generator.config import SamplingConfig
from generator.pipeline import ChannelTokPipeline
from generator.settings import ModelSettings
from generator.token_file import TokenFile


class Means:
    """Stands in for a network: a picture's mean colour, and its logarithm's."""

    def __init__(self, is_inception: bool):
        self.is_inception, self.dimensions, self.device = is_inception, 3, torch.device("cpu")

    def see(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images.float().mean((2, 3)), images.float().mean((2, 3)).log1p()


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 3, 6, 5), dtype=np.uint8))


def config(folder: Path, **changes: Any) -> QualityConfig:
    return QualityConfig(model="m", reference=str(folder), batch_size=5, num_workers=0, **changes)


# ------------------------------------------------------------------------------------- folders


def test_a_folder_s_statistics_are_those_of_its_images(photographs: Path) -> None:
    found = folder_reference(FolderImages(photographs, 16, None), Means(False), config(photographs), None, None)  # type: ignore[arg-type]
    paths = sorted(photographs.rglob("*.png"))
    expected = torch.stack([load_image(path, 16) for path in paths]).float().mean((2, 3))
    torch.testing.assert_close(found.features, expected)
    np.testing.assert_allclose(found.statistics.mean, expected.double().mean(0))
    np.testing.assert_allclose(found.statistics.covariance, np.cov(expected.double().numpy(), rowvar=False))
    assert found.about.count == found.about.kept == 12


def test_fewer_images_of_a_folder_are_spread_over_all_classes(photographs: Path) -> None:
    images = FolderImages(photographs, 16, 10)
    assert len(images) == 10
    assert {path.parent.name for path in images.paths} == {f"class{i}" for i in range(5)}


def test_classes_of_a_folder_are_known_by_name_only(photographs: Path, tmp_path: Path) -> None:
    images = FolderImages(photographs, 16, None)
    names = ["class3", "hen", "class1", "class0", "class2"]
    folders = [names.index(path.parent.name.replace("class4", "hen")) for path in images.paths]
    assert images.labels(names, {"class4": "hen"}) == folders
    assert images.labels(names, {}) is None
    assert images.labels([f"class{i}" for i in range(5)], {}) is not None
    for i, path in enumerate(sorted(photographs.rglob("*.png"))):
        shutil.copy(path, tmp_path / f"{i}.PNG")
    flat = FolderImages(tmp_path, 16, None)
    assert len(flat) == 12
    assert flat.labels([tmp_path.name], {}) is None


def test_unreadable_images_are_logged_counted_and_omitted(
    photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    folder = tmp_path / "copy"
    shutil.copytree(photographs, folder)
    (folder / "class0" / "broken.png").write_bytes(b"no picture")
    seen: list[int] = []
    found = folder_reference(
        FolderImages(folder, 16, None), Means(False), config(folder), None, lambda places, images: seen.extend(places)  # type: ignore[arg-type]
    )  # fmt: skip
    assert found.about.unreadable == 1
    assert found.about.count == 12
    assert "broken.png" in caplog.text
    broken = sorted(path.name for path in (folder / "class0").iterdir()).index("broken.png")
    assert seen == [place for place in range(13) if place != broken]


def test_a_folder_of_too_few_images_is_refused(photographs: Path, tmp_path: Path) -> None:
    for path in list(photographs.rglob("*.png"))[:9]:
        shutil.copy(path, tmp_path)
    with pytest.raises(InputError, match="holds 9 images; a reference needs at least 10"):
        FolderImages(tmp_path, 16, None)


def test_a_reference_decoded_by_the_tokenizer_is_labelled_so(
    scripts: ScriptRunner, pipeline_folder: Path, photographs: Path, classifier: Path, tmp_path: Path
) -> None:  # fmt: skip
    flags = words(pipeline_folder, photographs, classifier, tmp_path)
    assert measure(scripts, *flags, "--decode-reference").code == 0
    found = results(tmp_path)
    label = f"Fréchet distance (demo features, N = {N}, M = 12, reference decoded by the tokenizer)"
    assert found["model"]["fingerprint"].split("-")[0] in found["reference"]["preparation"]
    assert found["labels"]["frechet_distance"] == label
    assert label in (tmp_path / "results.md").read_text()
    pipeline = ChannelTokPipeline.from_pretrained(pipeline_folder, "cpu")
    extractor = FeatureExtractor(classifier=classifier)
    images = torch.stack([load_image(path, 32) for path in sorted(photographs.rglob("*.png"))])
    decoded = pipeline.pictures(pipeline.tokenizer.tokenize(images / 127.5 - 1))
    reference, samples = (RunningStatistics(16) for _ in range(2))
    reference.update(extractor(decoded))
    drawn = pipeline(classes_of(N), seed=0).images
    samples.update(extractor(torch.from_numpy(np.stack([np.asarray(p) for p in drawn])).permute(0, 3, 1, 2)))
    assert found["rows"][-1]["frechet_distance"] == pytest.approx(frechet_distance(samples, reference), rel=1e-3)


# ------------------------------------------------------------------------------------- archives


def test_an_archive_is_read_by_numpy_and_by_us(tmp_path: Path) -> None:
    path, images = tmp_path / "a.npz", pictures(12)
    square = images[..., :5, :5]
    write_npz(path, 12, 5, square.split(5), list(range(12)), "us")
    with np.load(path) as archive:
        np.testing.assert_array_equal(archive["arr_0"], square.permute(0, 2, 3, 1).numpy())
        assert archive["arr_0"].flags["C_CONTIGUOUS"]
        assert archive["arr_1"].tolist() == list(range(12))
    found = NpzPictures(path)
    assert (found.count, found.height, found.width, found.drawn_by, found.moments) == (12, 5, 5, "us", None)
    for size in (1, 5, 12, 100):
        torch.testing.assert_close(torch.cat(list(found.batches(size))), square)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_of_the_evaluator_gives_its_moments_to_inception_alone(tmp_path: Path, save: Any) -> None:
    path, images = tmp_path / "VIRTUAL.npz", pictures(20)
    mean, covariance = np.array([1.0, 2.0, 3.0]), np.diag([4.0, 5.0, 6.0])
    save(path, arr_0=images.permute(0, 2, 3, 1).numpy(), mu=mean, sigma=covariance)
    found = npz_reference(path, Means(True), batch_size=7)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.statistics.mean, mean)
    np.testing.assert_allclose(found.statistics.covariance, covariance)
    assert found.about.count is None
    assert "mu, sigma" in found.about.preparation
    torch.testing.assert_close(found.features, images.float().mean((2, 3)))
    other = npz_reference(path, Means(False), batch_size=7)  # type: ignore[arg-type]
    np.testing.assert_allclose(other.statistics.mean, images.double().mean((0, 2, 3)), rtol=1e-6)
    assert other.about.count == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": np.zeros(3)}, "no .npz with pictures"),
        ({"arr_0": np.zeros((12, 4, 4, 3), np.float32)}, "needed is uint8"),
        ({"arr_0": np.zeros((12, 3, 4, 4), np.uint8)}, "needed is uint8"),
        ({"arr_0": np.zeros((9, 4, 4, 3), np.uint8)}, "at least 10"),
        ({"arr_0": np.zeros((12, 4, 4, 3), np.uint8), "mu": np.zeros(4), "sigma": np.eye(4)}, r"needed are \(3,\)"),
    ],
)  # fmt: skip
def test_another_archive_is_refused_in_one_line(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(InputError, match=message):
        npz_reference(tmp_path / "a.npz", Means(True), batch_size=4)  # type: ignore[arg-type]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_archive_is_refused_in_one_line_or_read(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "a.npz"
    save(path, arr_0=pictures(12).permute(0, 2, 3, 1).numpy())
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for content in (whole[:-200], b"text"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"no \.npz with pictures"):
            npz_reference(path, Means(False), batch_size=4)  # type: ignore[arg-type]
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        place = int(rng.integers(len(whole)))
        damaged[place : place + 8] = rng.bytes(8)
        path.write_bytes(damaged)
        try:
            npz_reference(path, Means(False), batch_size=4)  # type: ignore[arg-type]
        except InputError:
            refused += 1
    assert refused > 50


def test_a_model_s_own_samples_are_at_distance_0_and_never_a_plain_reference(
    measured: Path, scripts: ScriptRunner, pipeline_folder: Path, classifier: Path, tmp_path: Path
) -> None:  # fmt: skip
    whole = FolderImages(measured, 32, None)
    assert whole.drawn_by is not None, "the whole output folder"
    assert FolderImages(measured / "images", 32, None).drawn_by == whole.drawn_by
    for name, own in (("archive", measured / "samples-k0007.npz"), ("folder", measured / "images" / "k0007")):
        done = measure(scripts, *words(pipeline_folder, own, classifier, tmp_path / name))
        assert done.code == 0, done.err
        found = results(tmp_path / name)
        row = next(row for row in found["rows"] if row["num_tokens"] == 7)
        assert abs(row["frechet_distance"]) < 1e-6
        assert row["precision"] == row["recall"] == 1
        assert "reference drawn by a model" in found["labels"]["frechet_distance"]
        assert str(pipeline_folder) in found["reference"]["drawn_by"]


# ------------------------------------------------------------------------------------- saved names


def test_a_saved_reference_gives_the_same_numbers_without_its_images(
    measured: Path, scripts: ScriptRunner, pipeline_folder: Path, photographs: Path, classifier: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    cache = f"import os; os.environ['XDG_CACHE_HOME'] = {str(tmp_path / 'cache')!r}"
    flags = words(pipeline_folder, photographs, classifier, tmp_path / "first")
    assert measure(scripts, *flags, "--save-reference", "val-12", before=cache).code == 0
    flags = words(pipeline_folder, Path("val-12"), classifier, tmp_path / "second")
    done = measure(scripts, *flags, before=cache)
    assert done.code == 0, done.err
    assert rows(tmp_path / "second") == rows(measured)
    assert results(tmp_path / "second")["reference"] == results(measured)["reference"]
    other = tmp_path / "other.safetensors"
    PictureClassifier(ClassifierConfig(classifier_size=32, widths=[8, 16]), ["hen"]).save(other)
    done = measure(scripts, *words(pipeline_folder, Path("val-12"), other, tmp_path / "third"), before=cache)
    assert done.code == 2
    assert "val-12 was seen by demo features" in done.err
    done = measure(scripts, *words(pipeline_folder, Path("val"), other, tmp_path / "third"), before=cache)
    assert done.code == 2
    assert "saved are: val-12" in done.err
    done = measure(scripts, *flags, "--anchors", before=cache)
    assert done.code == 2
    assert "anchors is given, but reference val-12 is no folder" in done.err


def test_of_many_pictures_features_at_even_intervals_are_kept() -> None:
    vectors = torch.arange(2 * KEPT + 2, dtype=torch.float32)[:, None]
    found = Collector(1, len(vectors), torch.device("cpu"))
    for batch in vectors.split(777):
        found.add(batch)
    assert len(found.features()) == KEPT
    steps = found.features().flatten().diff()
    assert set(steps.tolist()) <= {2.0, 3.0}
    assert found.statistics.count == 2 * KEPT + 2


# ------------------------------------------------------------------------------------- settings


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
    assert [entry["settings"] for entry in found["combinations"]] == [
        {"cfg_scale": scale, "temperature": heat} for scale in (1, 3) for heat in (0.5, 1)
    ]
    plain = found["combinations"][1]["rows"]
    assert [row["frechet_distance"] for row in plain] == [row["frechet_distance"] for row in rows(measured)]
    pipeline = ChannelTokPipeline.from_pretrained(model, "cpu")
    settings = pipeline.settings
    assert settings.fingerprint == pipeline.fingerprint
    text = (folder / "sweep.md").read_text()
    for place, k in enumerate((2, 7, 16)):
        values = [entry["rows"][place]["frechet_distance"] for entry in found["combinations"]]
        assert len(set(values)) == 4
        best = found["combinations"][values.index(min(values))]["settings"]
        assert found["best"][str(k)] == best
        assert settings.by_num_tokens[k] == SamplingConfig(**best)
        assert f"**{min(values):.3f}**" in text
    with Image.open(folder / "sweep.png") as picture:
        picture.load()
    assert (folder / "sweep" / "cfg_scale=3.0,temperature=0.5" / "results.json").is_file()
    assert settings.measured["num_samples"] == N
    for words_ in ("N = 23, against", "12 images", "network demo features", "Fréchet distance (demo features, N = 23"):
        assert words_ in text


def test_settings_are_those_of_the_next_larger_k() -> None:
    cold, warm = SamplingConfig(temperature=0.5), SamplingConfig(temperature=0.9)
    settings = ModelSettings(by_num_tokens={4: cold, 16: warm}, fingerprint="", measured={})
    assert [settings.of(k) for k in (1, 4, 5, 16, 17)] == [cold, cold, warm, warm, warm]
    assert ModelSettings(by_num_tokens={}, fingerprint="", measured={}).of(3) == SamplingConfig()


@pytest.fixture
def with_settings(pipeline_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(pipeline_folder, tmp_path / "model")
    chosen = {4: SamplingConfig(temperature=0.5), 16: SamplingConfig(cfg_scale=2, cfg_schedule="linear", top_k=9)}
    model = ChannelTokPipeline.from_pretrained(tmp_path / "model", "cpu").fingerprint
    ModelSettings(by_num_tokens=chosen, fingerprint=model, measured={}).save(tmp_path / "model" / "generator")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--num-tokens", 4], {"temperature": 0.5}),
        (["--num-tokens", 5], {"cfg_scale": 2.0, "cfg_schedule": "linear", "top_k": 9}),
        ([], {"cfg_scale": 2.0, "cfg_schedule": "linear", "top_k": 9}),
        (["--temperature", 1], {"cfg_scale": 2.0, "cfg_schedule": "linear", "top_k": 9}),
        (["--cfg-scale", 1], {"top_k": 9}),
        (["--top-k", 0, "--cfg-scale", 3], {"cfg_scale": 3.0}),
    ],
)
def test_sample_py_draws_with_the_model_s_settings_unless_others_are_given(
    scripts: ScriptRunner, with_settings: Path, tmp_path: Path, flags: list[Any], expected: dict[str, Any]
) -> None:
    output = tmp_path / "drawn"
    done = scripts("sample.py", "--model", with_settings, "--class-labels", 1, "--output-dir", output, *flags)
    assert done.code == 0, done.err
    drawing = TokenFile.load(output / "tokens.npz")
    assert drawing.sampling == SamplingConfig(**expected)
    pipeline = ChannelTokPipeline.from_pretrained(with_settings, "cpu")
    alone = pipeline([1], drawing.tokens.shape[1], 0, **(vars(SamplingConfig()) | expected))
    assert alone.tokens.tolist() == drawing.tokens.tolist()


def test_images_of_several_lengths_have_the_settings_of_whole_drawings(
    scripts: ScriptRunner, with_settings: Path, tmp_path: Path
) -> None:
    flags = ["--model", with_settings, "--class-labels", 1, 1, "--output-dir", tmp_path, "--num-tokens", 4, 5]
    assert scripts("sample.py", *flags).code == 0
    drawing = TokenFile.load(tmp_path / "tokens.npz")
    assert drawing.sampling == SamplingConfig(cfg_scale=2, cfg_schedule="linear", top_k=9)


def test_settings_of_other_weights_are_not_used(scripts: ScriptRunner, with_settings: Path, tmp_path: Path) -> None:
    path = with_settings / "generator" / "sampling.json"
    path.write_text(path.read_text().replace('"model": "', '"model": "0'))
    done = scripts("sample.py", "--model", with_settings, "--class-labels", 1, "--output-dir", tmp_path / "drawn")
    assert done.code == 0
    assert "measured for other weights" in done.err
    assert TokenFile.load(tmp_path / "drawn" / "tokens.npz").sampling == SamplingConfig()


def test_given_guidance_replaces_all_fields_of_guidance() -> None:
    base = SamplingConfig(temperature=0.5, cfg_scale=3, cfg_schedule="interval", cfg_end=0.5)
    assert base.override({}) == base
    assert base.override({"cfg_schedule": "constant"}) == SamplingConfig(temperature=0.5)
    assert base.override({"top_k": 3, "cfg_scale": 2}) == SamplingConfig(temperature=0.5, top_k=3, cfg_scale=2)
    with pytest.raises(InputError):
        base.override({"cfg_end": 0.5})


def test_in_python_a_model_s_settings_keep_the_prefix_law(with_settings: Path) -> None:
    pipeline = ChannelTokPipeline.from_pretrained(with_settings, "cpu")
    assert pipeline([0, 3], 4, seed=5).tokens.tolist() == pipeline([0, 3], seed=5).tokens[:, :4].tolist()
    assert pipeline([0], seed=5).tokens.tolist() == pipeline([0], seed=5, **vars(pipeline.sampling(16))).tokens.tolist()


def test_a_drawing_continues_with_its_own_settings(scripts: ScriptRunner, with_settings: Path, tmp_path: Path) -> None:
    output = tmp_path / "drawn"
    flags = ["--model", with_settings, "--output-dir", output]
    assert scripts("sample.py", *flags, "--class-labels", 1, 2, "--num-tokens", 4).code == 0
    assert scripts("sample.py", *flags, "--continue-from", output / "tokens.npz").code == 0
    assert TokenFile.load(output / "tokens.npz").sampling == SamplingConfig(temperature=0.5)


@pytest.mark.parametrize("content", ["{", "[]", '{"by_num_tokens": {"4": {"temp": 1}}, "measured": {}}', "{}"])
def test_damaged_settings_are_refused_in_one_line(scripts: ScriptRunner, with_settings: Path, content: str) -> None:
    (with_settings / "generator" / "sampling.json").write_text(content)
    done = scripts("sample.py", "--model", with_settings)
    assert done.code == 2
    assert "sampling.json" in done.err
    assert done.err.strip().count("\n") == 0
