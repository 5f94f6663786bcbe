"""Distances, metrics and feature networks against plain formulas (tests/oracles/fid.py)."""

import hashlib
from pathlib import Path
from urllib.error import URLError

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import fid as oracle
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from common.checkpoint import load_foreign_state
from common.config import InputError
from evaluation import features as fid
from evaluation.features import FeatureExtractor, sample_metrics
from evaluation.frechet import RunningStatistics, frechet_distance
from tokenizer.classifier import PictureClassifier

Features = npt.NDArray[np.float64]


def statistics(features: Features, batches: int = 1) -> RunningStatistics:
    running = RunningStatistics(features.shape[1])
    for batch in np.array_split(features, batches):
        running.update(torch.from_numpy(batch))
    return running


def draw(seed: int, count: int, dimensions: int, shift: float = 0) -> Features:
    """Correlated vectors of unequal scales, away from 0."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(dimensions) + 0.3 * rng.normal(size=(dimensions, dimensions)) / dimensions**0.5
    return rng.normal(size=(count, dimensions)) * np.geomspace(0.5, 2, dimensions) @ mixing + 1 + shift


def repeated(features: Features, times: int) -> Features:
    return np.random.default_rng(times).permutation(np.repeat(features, times, axis=0))


def by_torch_fidelity(first: Features, second: Features) -> float:
    moments = [{"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)} for features in (first, second)]
    return float(fid_statistics_to_metric(*moments, verbose=False)[KEY_METRIC_FID])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16), count=st.integers(2, 40), cuts=st.lists(st.integers(0, 40), max_size=6),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_running_statistics_are_those_of_all_vectors(
    seed: int, count: int, cuts: list[int], dtype: torch.dtype
) -> None:
    vectors = torch.from_numpy(draw(seed, count, 5) + 1000).to(dtype)  # a mean far from 0 would show lost digits
    running = RunningStatistics(5)
    for batch in vectors.tensor_split(sorted(min(cut, count) for cut in cuts)):
        running.update(batch)
    assert running.count == count
    np.testing.assert_allclose(running.mean, vectors.double().mean(0), rtol=1e-12)
    expected = np.cov(vectors.double().numpy(), rowvar=False)
    np.testing.assert_allclose(running.covariance, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


# the eigenvalues of the product that should be 0 are about 1e-13 of the largest, their roots 3e-7 of its root
@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.parametrize(
    ("counts", "dimensions", "tolerance"),
    [((300, 200), 2, 1e-8), ((300, 200), 64, 1e-8), ((10, 7), 64, 1e-4), ((5, 100), 64, 1e-4), ((2, 2), 32, 1e-4)],
)
def test_the_distance_is_the_formula_s(counts: tuple[int, int], dimensions: int, tolerance: float) -> None:
    first, second = draw(5, counts[0], dimensions), draw(6, counts[1], dimensions, shift=0.3)
    one, other = statistics(first, 2), statistics(second)
    found = frechet_distance(one, other)
    assert found == pytest.approx(by_torch_fidelity(first, second), rel=tolerance)
    assert found == pytest.approx(oracle.frechet_distance(first, second), rel=tolerance)
    assert frechet_distance(other, one) == pytest.approx(found, rel=1e-9)
    copy = RunningStatistics.from_moments(one.mean, one.covariance)
    assert frechet_distance(copy, other) == pytest.approx(found, rel=1e-9)
    one.update(torch.from_numpy(second))  # the first distance is no longer that of these vectors
    together = np.concatenate([first, second])
    assert frechet_distance(one, other) == pytest.approx(oracle.frechet_distance(together, second), rel=tolerance)
    with pytest.raises(InputError, match="at least 2"):
        frechet_distance(one, statistics(second[:1]))


def test_the_distance_of_distributions_that_are_known_exactly() -> None:
    """Along axes: covariances diag(a), diag(b), so the distance is the sum of (sqrt(a) - sqrt(b))^2, zeros included."""
    axes = np.sqrt(1.5) * np.eye(4)
    cross, unit = np.concatenate([axes, -axes]), 3 / 7  # covariance 3/7 I

    def distance(first: list[float], second: list[float], shift: float = 0) -> float:
        return frechet_distance(statistics(cross * np.array(first) + shift), statistics(cross * np.array(second)))

    assert distance([1, 2, 0, 0], [3, 2, 0, 0]) == pytest.approx(4 * unit, rel=1e-12)
    assert distance([1, 2, 0, 0], [0, 0, 3, 4]) == pytest.approx(30 * unit, rel=1e-12)
    assert distance([0, 0, 0, 0], [0, 0, 3, 4]) == pytest.approx(25 * unit, rel=1e-12)
    assert distance([1e4, 1e-4, 0, 0], [1e4, 2e-4, 0, 0]) == pytest.approx(0, abs=1e-6)
    assert distance([1, 1, 1, 1], [1, 1, 1, 1], shift=3) == pytest.approx(36, rel=1e-12)


@pytest.mark.parametrize(("count", "dimensions", "copies"), [(500, 64, 1), (20, 64, 1), (300, 512, 1), (20, 256, 8)])
def test_a_set_equals_itself(count: int, dimensions: int, copies: int) -> None:
    features = repeated(draw(7, count, dimensions) / dimensions**0.5, copies)
    shuffled = np.random.default_rng(8).permutation(features)
    assert abs(frechet_distance(statistics(features), statistics(shuffled, 7))) < 1e-6
    found = metrics(features, shuffled)
    assert (found["precision"], found["recall"]) == (1, 1)
    assert found["kid"] < 0, "unbiased: without the kernel of a vector with itself"


SETS: dict[str, tuple[Features, Features]] = {  # samples, reference
    "as many": (draw(0, 40, 8), draw(1, 40, 8, shift=0.3)),
    "fewer samples": (draw(2, 17, 8), draw(3, 60, 8)),
    "one dimension": (draw(10, 30, 1), draw(11, 28, 1)),
    "copies": (repeated(draw(13, 6, 64), 5), repeated(draw(13, 6, 64), 7)),
    "constant apart": (np.full((12, 6), 0.3), np.full((30, 6), 0.4)),
    "far from 0": (draw(18, 40, 8) + 1e4, draw(19, 30, 8) + 1e4),
}


def metrics(samples: Features, reference: Features, logits: Features | None = None) -> dict[str, float]:
    scores = np.zeros((len(samples), 2)) if logits is None else logits
    return sample_metrics(*map(torch.from_numpy, (samples, scores, reference)))


@pytest.mark.parametrize("name", SETS)
def test_kid_precision_and_recall_are_the_papers(name: str) -> None:
    found, (samples, reference) = metrics(*SETS[name]), (features.astype(float) for features in SETS[name])
    assert found["kid_subset"] == min(len(samples), len(reference))
    # a difference of kernels loses digits where it is far below them
    scale = max(oracle.kernel(row, row[None])[0] for row in (*samples, *reference))
    expected = oracle.kernel_distance(samples, reference, int(found["kid_subset"]))
    assert found["kid"] == pytest.approx(expected, rel=1e-9, abs=1e-12 * scale)
    manifold = oracle.precision_and_recall(samples, reference)
    assert (found["precision"], found["recall"]) == pytest.approx(manifold, abs=1e-7)


@pytest.mark.parametrize(("count", "classes"), [(10, 2), (47, 10)])
def test_the_score_is_the_papers(count: int, classes: int) -> None:
    logits = 3 * draw(20, count, classes)
    found = metrics(draw(21, count, 2), draw(22, 12, 2), logits)["inception_score"]
    assert found == pytest.approx(oracle.inception_score(logits), rel=1e-9)


def test_metrics_worked_by_hand() -> None:
    """Radii of the reference: 3 2 2 2 3, so two samples are within one. KID of (0, 0) and (2, 0): 1 + 3^3 - 2."""
    reference, samples = np.array([[0.0], [1], [2], [3], [4]]), np.array([[-3.5], [0.5], [6.5], [7.5], [100]])
    found = metrics(samples, reference, np.ones((10, 3)))
    assert (found["precision"], found["recall"]) == pytest.approx((0.4, 1))
    assert found["inception_score"] == pytest.approx(1)
    apart = metrics(np.zeros((12, 2)), np.array([[2.0, 0]] * 11))
    assert (apart["kid"], apart["precision"], apart["recall"]) == pytest.approx((26, 0, 0))


def test_large_sets_use_subsets_and_the_fast_table(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, reference = SETS["fewer samples"]
    exact = metrics(samples, reference)
    monkeypatch.setattr(fid, "KID_SUBSET", 8)
    monkeypatch.setattr(fid, "EXACT_PAIRS", 0)
    fast = metrics(samples, reference)
    assert fast["kid"] == pytest.approx(oracle.kernel_distance(samples, reference, 8), rel=1e-9)
    assert (fast["precision"], fast["recall"]) == (exact["precision"], exact["recall"])


def pictures(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 24, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(8))


def test_inception_of_a_weights_file(inception_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, state = inception_weights, load_foreign_state(inception_weights)
    extractor = FeatureExtractor(path)
    assert (extractor.is_inception, extractor.name) == (True, "Inception of other weights")
    images = pictures(2)
    features, logits = extractor.extract(images)
    assert (features.shape, logits.shape, features.dtype) == ((2, fid.FEATURES), (2, 1008), torch.float32)
    torch.testing.assert_close(extractor(images[1:]), features[1:], rtol=1e-4, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 0.01
    torch.testing.assert_close(logits, features @ state["fc.weight"].T, rtol=1e-4, atol=1e-4)
    assert state["fc.bias"].abs().max() > 0.01, "a bias would be visible"
    monkeypatch.setattr(fid, "WEIGHTS_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert FeatureExtractor(path).name == "Inception"


def test_a_classifier_replaces_inception(classifier: Path, tmp_path: Path) -> None:
    extractor, model, images = FeatureExtractor(classifier=classifier), PictureClassifier.load(classifier), pictures(4)
    assert (extractor.is_inception, extractor.name, extractor.dimensions) == (False, "demo features", 16)
    assert extractor.class_names == model.class_names
    features, logits = extractor.extract(images)
    assert torch.equal(features, model.features(model.prepare(images)))
    assert torch.equal(logits, model(model.prepare(images)))
    assert extractor.accuracy(torch.eye(6)[[0, 2, 2, 3]], [model.class_names[i] for i in (0, 2, 3, 3)]) == 0.75
    assert extractor.accuracy(torch.eye(6)[:1], ["cock"]) is None
    model.head.bias[0] += 1
    model.save(tmp_path / "other.safetensors")
    assert FeatureExtractor(classifier=tmp_path / "other.safetensors").fingerprint != extractor.fingerprint


def test_other_weights_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"fc.weight": torch.zeros(3, 2)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other\.pth holds no InceptionV3"):
        FeatureExtractor(tmp_path / "other.pth")
    with pytest.raises(InputError, match="is missing"):
        FeatureExtractor(tmp_path / "nowhere.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save({"weights": Path()}, cache / "weights-inception-2015-12-05-6726825d.pth")
    with pytest.raises(InputError, match="was not opened"):
        FeatureExtractor()


def test_without_a_download_one_line_says_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(url: str, path: str, hash_prefix: str) -> None:
        assert Path(path).name in url
        assert Path(path).parent.is_dir()
        assert hash_prefix == fid.WEIGHTS_SHA256
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(InputError, match=r"give a copy of weights-inception-2015-12-05-6726825d.pth with --inception-"):
        FeatureExtractor()
