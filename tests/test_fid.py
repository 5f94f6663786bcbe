"""Features and distances: against plain formulas; loading weights of other models."""

from pathlib import Path
from urllib.error import URLError

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import fid as oracle
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from common.checkpoint import load_foreign_state, load_tensors, save_tensors
from common.errors import InputError
from evaluation import features as fid
from evaluation.features import FeatureExtractor
from evaluation.frechet import RunningStatistics, frechet_distance

Features = npt.NDArray[np.float64]


def statistics(features: Features, pieces: int = 1) -> RunningStatistics:
    running = RunningStatistics(features.shape[1])
    for piece in np.array_split(features, pieces):
        running.update(torch.from_numpy(piece))
    return running


def draw(rng: np.random.Generator, count: int, dimensions: int) -> Features:
    """Correlated, of unequal scales, away from 0."""
    mixing = rng.normal(size=(dimensions, dimensions)) * rng.uniform(0.1, 3, dimensions)
    return rng.normal(size=(count, dimensions)) @ mixing + rng.normal(size=dimensions)


def by_torch_fidelity(first: Features, second: Features) -> float:
    found = [{"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)} for features in (first, second)]
    return fid_statistics_to_metric(*found, verbose=False)[KEY_METRIC_FID]


# ------------------------------------------------------------------------------------- statistics


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), count=st.integers(2, 40), cuts=st.lists(st.integers(0, 40), max_size=6))
def test_running_statistics_are_those_of_all_vectors_at_once(seed: int, count: int, cuts: list[int]) -> None:
    features = draw(np.random.default_rng(seed), count, 5) + 1000  # a mean far from 0 would show lost digits
    running = RunningStatistics(5)
    for piece in np.split(features, sorted(min(cut, count) for cut in cuts)):  # empty pieces among them
        running.update(torch.from_numpy(piece))
    assert running.count == count
    np.testing.assert_allclose(running.mean, features.mean(0), rtol=1e-12)
    expected = np.cov(features, rowvar=False)
    np.testing.assert_allclose(running.covariance, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())


def test_merged_statistics_are_those_of_the_whole() -> None:
    features = draw(np.random.default_rng(1), 50, 6)
    merged = RunningStatistics(6)
    for part in (features[:1], features[1:30], features[30:30], features[30:]):
        merged.merge(statistics(part, pieces=2))
    assert merged.count == 50
    np.testing.assert_allclose(merged.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(features, rowvar=False), rtol=1e-10)


def test_statistics_are_summed_in_float64_for_any_input_format() -> None:
    features = torch.from_numpy(draw(np.random.default_rng(2), 40, 3)) + 1e4
    for dtype in (torch.float32, torch.bfloat16):
        given_ = features.to(dtype)
        running = RunningStatistics(3)
        running.update(given_[:7])
        running.update(given_[7:])
        np.testing.assert_allclose(running.covariance, np.cov(given_.double().numpy(), rowvar=False), rtol=1e-9)


def test_new_vectors_change_a_distance_computed_before() -> None:
    first, second = (draw(np.random.default_rng(seed), 30, 4) for seed in (3, 4))
    running = statistics(first)
    before = frechet_distance(running, statistics(second))
    running.update(torch.from_numpy(second))
    after = frechet_distance(running, statistics(second))
    assert after == pytest.approx(oracle.frechet_distance(np.concatenate([first, second]), second), rel=1e-9)
    assert after < before


@pytest.mark.parametrize("count", [0, 1])
def test_a_covariance_needs_two_vectors(count: int) -> None:
    few, enough = statistics(np.ones((count, 3))), statistics(np.ones((2, 3)))
    with pytest.raises(InputError, match="at least 2"):
        frechet_distance(few, enough)
    with pytest.raises(InputError, match="at least 2"):
        frechet_distance(enough, few)


# ------------------------------------------------------------------------------------- the distance


@pytest.mark.parametrize("dimensions", [1, 2, 7, 64])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_distance_of_full_rank_sets_is_the_formula_s_and_torch_fidelity_s(dimensions: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = draw(rng, 300, dimensions), draw(rng, 200, dimensions)
    found = frechet_distance(statistics(first, 3), statistics(second, 5))
    if dimensions > 1:
        assert found == pytest.approx(oracle.frechet_distance(first, second), rel=1e-8)
        assert found == pytest.approx(by_torch_fidelity(first, second), rel=1e-8)
    else:
        shift, deviations = first.mean() - second.mean(), (first.std(ddof=1), second.std(ddof=1))
        assert found == pytest.approx(shift**2 + (deviations[0] - deviations[1]) ** 2, rel=1e-10)
    assert frechet_distance(statistics(second), statistics(first)) == pytest.approx(found, rel=1e-9)


@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.parametrize(("counts", "dimensions"), [((10, 7), 64), ((5, 100), 64), ((2, 2), 32), ((40, 40), 48)])
def test_the_distance_of_fewer_vectors_than_dimensions(counts: tuple[int, int], dimensions: int) -> None:
    rng = np.random.default_rng(5)
    first, second = draw(rng, counts[0], dimensions), draw(rng, counts[1], dimensions)
    found = frechet_distance(statistics(first), statistics(second))
    # the eigenvalues of the product that should be 0 are about 1e-13 of the largest, their roots 3e-7 of its root
    assert found == pytest.approx(by_torch_fidelity(first, second), rel=1e-4)
    assert found == pytest.approx(oracle.frechet_distance(first, second), rel=1e-4)


def test_the_distance_of_distributions_that_are_known_exactly() -> None:
    """Along axes: covariances diag(a), diag(b), so the distance is the sum of (sqrt(a) - sqrt(b))^2, zeros included."""
    axes = np.sqrt(1.5) * np.eye(4)
    cross = np.concatenate([axes, -axes])  # covariance 3/7 I

    def along(scales: list[float]) -> RunningStatistics:
        return statistics(cross * np.array(scales))

    unit = 3 / 7
    assert frechet_distance(along([1, 2, 0, 0]), along([3, 2, 0, 0])) == pytest.approx(4 * unit, rel=1e-12)
    assert frechet_distance(along([1, 2, 0, 0]), along([0, 0, 3, 4])) == pytest.approx(30 * unit, rel=1e-12)
    assert frechet_distance(along([0, 0, 0, 0]), along([0, 0, 3, 4])) == pytest.approx(25 * unit, rel=1e-12)
    assert frechet_distance(along([1e4, 1e-4, 0, 0]), along([1e4, 2e-4, 0, 0])) == pytest.approx(0, abs=1e-6)
    shifted = statistics(cross + np.array([3, 4, 0, 0]))
    assert frechet_distance(shifted, along([1, 1, 1, 1])) == pytest.approx(25, rel=1e-12)


@pytest.mark.parametrize(("count", "dimensions"), [(500, 64), (20, 64), (2, 64), (64, 64), (300, 512)])
def test_identical_sets_are_at_distance_zero(count: int, dimensions: int) -> None:
    features = draw(np.random.default_rng(6), count, dimensions) / dimensions**0.5
    shuffled = np.random.default_rng(7).permutation(features)
    found = frechet_distance(statistics(features, 1), statistics(shuffled, min(7, count)))
    assert abs(found) < 1e-6


# ------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_weights_come_from_a_file(inception_weights: Path, tmp_path: Path, ending: str) -> None:
    path = inception_weights
    state = load_foreign_state(path)
    if ending == "safetensors":
        path = tmp_path / "inception.safetensors"
        save_tensors(path, state)
        assert load_tensors(path).keys() == state.keys()
    extract = FeatureExtractor(path, "cpu")
    for name, value in extract._network.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert not extract._network.training
    assert not any(parameter.requires_grad for parameter in extract._network.parameters())


def test_features_of_pictures_of_any_size_one_by_one_or_together(inception_weights: Path) -> None:
    extract = FeatureExtractor(inception_weights)
    images = torch.randint(0, 256, (2, 3, 24, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(8))
    features = extract(images)
    assert features.shape == (2, fid.FEATURES)
    assert features.dtype == torch.float32
    torch.testing.assert_close(extract(images[1:]), features[1:], rtol=1e-4, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 0.01


def test_other_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(3, 2)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="holds no InceptionV3") as refusal:
        FeatureExtractor(tmp_path / "other.pth")
    assert str(tmp_path / "other.pth") in str(refusal.value)
    with pytest.raises(InputError, match="is missing"):
        FeatureExtractor(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("invalid hash value")])
def test_without_a_download_one_line_says_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def download(url: str, path: str, hash_prefix: str) -> None:
        assert Path(path).name in url
        assert Path(path).parent.is_dir()
        assert fid.WEIGHTS_SHA256.startswith("6726825d")
        assert hash_prefix == fid.WEIGHTS_SHA256
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(InputError, match=r"give a copy of weights-inception-2015-12-05-6726825d.pth with --inception-"):
        FeatureExtractor()


def test_a_cached_download_is_read_as_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({"weights": Path()}, folder / "weights-inception-2015-12-05-6726825d.pth")
    with pytest.raises(InputError, match="was not opened"):
        FeatureExtractor()
