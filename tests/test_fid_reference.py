"""References of benchmark.py fid: folders, archives and saved features."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ScriptRunner
from measurement import measure, results, rows, words

from common.config import InputError
from common.images import load_image
from evaluation.config import FidConfig
from evaluation.fid import reference as module
from evaluation.fid.reference import Reference, read_reference
from evaluation.frechet import RunningStatistics
from tokenizer.classifier import PictureClassifier
from tokenizer.settings import ClassifierConfig

SIZE = 16


class Means:
    """A feature network: the mean of each colour."""

    dimensions = 3

    def __init__(self, is_inception: bool):
        self.is_inception = is_inception

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))

    def statistics(self) -> RunningStatistics:
        return RunningStatistics(3)


def read(path: Path, is_inception: bool = False) -> Reference:
    network: Any = Means(is_inception)
    return read_reference(FidConfig(model="m", reference=str(path), batch_size=5, num_workers=0), SIZE, network)


def images(count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 6, 5, 3), dtype=np.uint8))


def test_a_folder_s_statistics_are_those_of_its_readable_images(
    photographs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(photographs, tmp_path / "copy")
    for number in range(5):  # a whole batch among them
        (folder / "class0" / f"00{number}.png").write_bytes(b"no image")
    found = read(folder)
    expected = torch.stack([load_image(path, SIZE) for path in sorted(photographs.rglob("*.png"))]).float().mean((2, 3))
    torch.testing.assert_close(found.features, expected)
    np.testing.assert_allclose(found.statistics.mean, expected.double().mean(0))
    np.testing.assert_allclose(found.statistics.covariance, np.cov(expected.double().numpy(), rowvar=False))
    assert [found.about[name] for name in ("count", "kept", "unreadable")] == [12, 12, 5]
    assert "004.png" in caplog.text
    assert found.about["fingerprint"] == read(photographs).about["fingerprint"]


def test_of_many_images_features_at_even_intervals_are_kept(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = read(photographs)
    monkeypatch.setattr(module, "MAX_FEATURES", 5)
    found = read(photographs)
    assert torch.equal(found.features, everything.features[[0, 2, 4, 7, 9]])
    assert (found.about["count"], found.about["kept"]) == (12, 5)


def test_a_folder_of_too_few_images_is_refused(photographs: Path, tmp_path: Path) -> None:
    for path in list(photographs.rglob("*.png"))[:9]:
        shutil.copy(path, tmp_path)
    with pytest.raises(InputError, match="holds 9 readable images; a reference needs at least 10"):
        read(tmp_path)


def test_an_archive_of_the_evaluator_gives_its_moments_to_inception_alone(tmp_path: Path) -> None:
    path, pixels = tmp_path / "VIRTUAL.npz", images(20)
    mean, covariance = np.array([1.0, 2.0, 3.0]), np.diag([4.0, 5.0, 6.0])
    np.savez_compressed(path, arr_0=pixels.numpy(), mu=mean, sigma=covariance)
    found = read(path, is_inception=True)
    np.testing.assert_allclose(found.statistics.mean, mean)
    np.testing.assert_allclose(found.statistics.covariance, covariance)
    assert found.about["count"] is None
    assert "mu, sigma" in found.about["preparation"]
    torch.testing.assert_close(found.features, pixels.float().mean((1, 2)))
    other = read(path)
    np.testing.assert_allclose(other.statistics.mean, pixels.double().mean((0, 1, 2)), rtol=1e-6)
    assert other.about["count"] == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": np.zeros(3)}, "needed is uint8"),
        ({"arr_0": np.zeros((12, 4, 4, 3), np.float32)}, "needed is uint8"),
        ({"arr_0": np.zeros((12, 3, 4, 4), np.uint8)}, "needed is uint8"),
        ({"arr_0": np.array([None])}, "not a .npz file, or is damaged"),
        ({"arr_0": np.zeros((12, 4, 4, 3), np.uint8), "mu": np.zeros(4), "sigma": np.eye(4)}, r"than \(3,\)"),
    ],
)
def test_another_archive_is_refused_in_one_line(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.npz", is_inception=True)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_archive_is_refused_in_one_line_or_read(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "a.npz"
    save(path, arr_0=images(12).numpy())
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(100):
        damaged = bytearray(whole)
        start = int(rng.integers(len(whole)))
        damaged[start : start + 8] = rng.bytes(8)
        path.write_bytes(damaged)
        try:
            read(path)
        except InputError:
            refused += 1
    assert refused > 30


def test_a_model_s_own_samples_are_at_distance_0(
    measured: Path, scripts: ScriptRunner, pipeline_folder: Path, classifier: Path, tmp_path: Path
) -> None:
    done = measure(scripts, *words(pipeline_folder, measured / "samples-k0007.npz", classifier, tmp_path))
    assert done.code == 0, done.err
    row = next(row for row in rows(tmp_path) if row["num_tokens"] == 7)
    assert abs(row["frechet_distance"]) < 1e-6
    assert row["precision"] == row["recall"] == 1


def test_saved_features_give_the_same_numbers_without_the_images(
    measured: Path, scripts: ScriptRunner, pipeline_folder: Path, photographs: Path, classifier: Path, tmp_path: Path
) -> None:
    saved, other = tmp_path / "val.npz", tmp_path / "other.safetensors"
    flags = words(pipeline_folder, photographs, classifier, tmp_path / "first")
    assert measure(scripts, *flags, "--save-reference", saved).code == 0
    flags = words(pipeline_folder, saved, classifier, tmp_path / "second")
    done = measure(scripts, *flags)
    assert done.code == 0, done.err
    assert rows(tmp_path / "second") == rows(measured)
    assert results(tmp_path / "second")["reference"] == results(measured)["reference"]
    PictureClassifier(ClassifierConfig(classifier_size=32, widths=[8, 16]), ["hen"]).save(other)
    done = measure(scripts, *words(pipeline_folder, saved, other, tmp_path / "third"))
    assert done.code == 2
    assert "val.npz has features of demo features" in done.err
    done = measure(scripts, *flags, "--anchors")
    assert done.code == 2
    assert "anchors need a folder of images" in done.err
