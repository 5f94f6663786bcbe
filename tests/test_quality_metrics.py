"""KID, precision, recall and Inception score: against plain formulas; the classifier in torch-fidelity."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from oracles import fid as oracle
from oracles.fid import Features
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity.metric_fid import KEY_METRIC_FID
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL

from common.checkpoint import load_foreign_state
from common.classifier import PictureClassifier
from common.config import ClassifierConfig
from common.errors import InputError
from evaluation import features as fid
from evaluation.features import (
    CLASSIFIER,
    FeatureExtractor,
    kernel_distance,
    kid_subset,
    precision_and_recall,
    register_classifier,
    score_of_logits,
)
from evaluation.frechet import RunningStatistics, frechet_distance

NAMES = ["hen", "tench", "dam", "lion", "koala"]


def draw(seed: int, count: int, dimensions: int, shift: float = 0) -> Features:
    """Of unequal scales, away from 0."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, dimensions)) * np.geomspace(0.5, 2, dimensions) + 1 + shift


def repeated(features: Features, times: int) -> Features:
    """Each row so many times, in another order."""
    return np.random.default_rng(times).permutation(np.repeat(features, times, axis=0))


def constant(count: int, value: float) -> Features:
    return np.full((count, 6), value)


# samples, reference
SETS: dict[str, tuple[Features, Features]] = {
    "as many": (draw(0, 40, 8), draw(1, 40, 8, shift=0.3)),
    "fewer samples": (draw(2, 17, 8), draw(3, 60, 8)),
    "fewer reference": (draw(4, 53, 5), draw(5, 11, 5, shift=1)),
    "fewer than dimensions": (draw(6, 12, 64), draw(7, 9, 64)),
    "the fewest": (draw(8, 10, 3), draw(9, 10, 3)),
    "one dimension": (draw(10, 30, 1), draw(11, 28, 1)),
    "part of the reference": (draw(12, 40, 6)[:15], draw(12, 40, 6)),
    "copies": (repeated(draw(13, 6, 64), 5), repeated(draw(13, 6, 64), 7)),
    "copies among others": (np.concatenate([repeated(draw(14, 4, 7), 6), draw(15, 20, 7)]), draw(16, 40, 7)),
    "constant": (constant(40, 0.3), constant(30, 0.3)),
    "constant apart": (constant(12, 0.3), constant(30, 0.4)),
    "constant samples": (constant(20, 1.0), draw(17, 30, 6)),
    "far from 0": (draw(18, 40, 8) + 1e4, draw(19, 30, 8) + 1e4),
}


def tensors(*sets: Features) -> list[Tensor]:
    return [torch.from_numpy(features) for features in sets]


def frechet(samples: Tensor, reference: Tensor) -> float:
    found = []
    for features in (samples, reference):
        found.append(RunningStatistics(features.shape[1]))
        found[-1].update(features)
    return frechet_distance(*found)


# ------------------------------------------------------------------------------------- against the formulas


@pytest.mark.parametrize("name", SETS)
def test_kernel_distance_is_the_papers(name: str) -> None:
    samples, reference = SETS[name]
    expected = oracle.kernel_distance(samples, reference, min(len(samples), len(reference)))
    # a difference of kernels: digits are lost where it is far below them
    scale = max(oracle.kernel(row, row[None])[0] for row in (*samples, *reference))
    assert kernel_distance(*tensors(samples, reference)) == pytest.approx(expected, rel=1e-9, abs=1e-12 * scale)


@pytest.mark.parametrize("name", SETS)
def test_precision_and_recall_are_the_papers(name: str) -> None:
    samples, reference = SETS[name]
    expected = oracle.precision_and_recall(samples, reference)
    assert precision_and_recall(*tensors(samples, reference)) == pytest.approx(expected, abs=1e-12)


def test_the_sets_above_differ_in_precision_and_recall() -> None:
    """So that the test before notices if they are exchanged."""
    found = [oracle.precision_and_recall(*SETS[name]) for name in SETS]
    assert sum(0 < precision < 1 and 0 < recall < 1 and precision != recall for precision, recall in found) >= 3


@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.parametrize("name", [name for name in SETS if name != "one dimension"])
def test_frechet_distance_of_the_same_sets(name: str) -> None:
    samples, reference = SETS[name]
    found = frechet(*tensors(samples, reference))
    # where a covariance does not have full rank, the root in the formula loses half of the digits
    scale = samples.var(0).sum() + reference.var(0).sum()
    assert found == pytest.approx(oracle.frechet_distance(samples, reference), rel=1e-6, abs=1e-6 * scale + 1e-12)


@pytest.mark.parametrize("classes", [2, 10, 1008])
@pytest.mark.parametrize("count", [10, 47, 200])
def test_score_is_the_papers(count: int, classes: int) -> None:
    logits = 3 * draw(20, count, classes)
    assert score_of_logits(torch.from_numpy(logits)) == pytest.approx(oracle.inception_score(logits), rel=1e-9)


# ------------------------------------------------------------------------------------- known results


@pytest.mark.parametrize(
    ("count", "dimensions", "copies"), [(30, 8, 1), (12, 64, 1), (200, 16, 1), (6, 64, 5), (20, 256, 8)]
)
def test_a_set_equals_itself(count: int, dimensions: int, copies: int) -> None:
    features = repeated(draw(21, count, dimensions), copies)
    samples, reference = tensors(features, np.random.default_rng(22).permutation(features))
    assert abs(frechet(samples, reference)) < 1e-6
    assert precision_and_recall(samples, reference) == (1, 1)
    # unbiased: without the kernel of a vector with itself, so below 0
    assert kernel_distance(samples, reference) < 0


@pytest.mark.parametrize(("count", "times", "dimensions"), [(6, (5, 7), 64), (11, (13, 9), 48)])
def test_copies_are_within_each_other_s_radius(count: int, times: tuple[int, int], dimensions: int) -> None:
    """Radii are 0; rounding errors of distances between copies must not matter."""
    for seed in range(20):
        features = draw(100 + seed, count, dimensions)
        samples, reference = tensors(*(repeated(features, number) for number in times))
        assert precision_and_recall(samples, reference) == (1, 1)


def test_distant_sets_have_no_precision_or_recall() -> None:
    samples, reference = tensors(draw(23, 40, 8), draw(24, 30, 8, shift=1000))
    assert precision_and_recall(samples, reference) == (0, 0)
    assert frechet(samples, reference) == pytest.approx(8 * 1000**2, rel=0.01)


def test_precision_and_recall_worked_by_hand() -> None:
    """Radii of the reference: 3 2 2 2 3; so of the samples only 0.5 and 6.5 are within one."""
    reference = torch.tensor([[0.0], [1], [2], [3], [4]])
    samples = torch.tensor([[-3.5], [0.5], [6.5], [7.5], [100]])
    assert precision_and_recall(samples, reference) == (0.4, 1)
    assert precision_and_recall(reference, samples) == (1, 0.4)


def test_kernel_distance_worked_by_hand() -> None:
    """Between (0, 0) and (2, 0): 1 + (4 / 2 + 1)^3 - 2 x 1."""
    nothing, something = torch.zeros(4, 2), torch.tensor([[2.0, 0]]).repeat(5, 1)
    assert kernel_distance(nothing, something) == pytest.approx(26, rel=1e-12)


def test_score_of_uniform_and_of_certain_logits() -> None:
    assert score_of_logits(torch.ones(50, 7)) == pytest.approx(1, rel=1e-12)
    assert score_of_logits(torch.from_numpy(draw(25, 10, 7))) == pytest.approx(1, rel=1e-12)  # one picture a split
    sure = 100.0 * torch.eye(5).repeat(400, 1)  # so many that each split has nearly as many of every class
    assert score_of_logits(sure) == pytest.approx(5, rel=0.02)


# ------------------------------------------------------------------------------------- sizes and digits


def test_subsets_of_the_kernel_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kid_subset(50_000, 1001) == kid_subset(1000, 50_000) == 1000
    assert (kid_subset(999, 50_000), kid_subset(300, 17)) == (999, 17)
    samples, reference = SETS["fewer samples"]
    monkeypatch.setattr(fid, "KID_SUBSET", 8)
    expected = oracle.kernel_distance(samples, reference, 8)
    assert kernel_distance(*tensors(samples, reference)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_precision_and_recall_in_pieces_of_any_size(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = [SETS[name] for name in ("fewer samples", "as many")]  # copies are for small tables alone
    whole = [precision_and_recall(*tensors(*pair)) for pair in sets]
    monkeypatch.setattr(fid, "EXACT_PAIRS", 0)
    monkeypatch.setattr(fid, "FAST_TABLE", rows)
    assert [precision_and_recall(*tensors(*pair)) for pair in sets] == whole


def test_everything_is_computed_in_float64() -> None:
    """float32 features so far from one another or from 0 that float32 arithmetic would lose small differences."""
    clusters = torch.tensor([-3000.0, 3000]).repeat(20)[:, None]
    samples, reference = (torch.from_numpy(features).float() + clusters for features in SETS["as many"])
    doubles = [features.double().numpy() for features in (samples, reference)]
    assert precision_and_recall(samples, reference) == pytest.approx(oracle.precision_and_recall(*doubles), abs=1e-12)
    samples, reference = (torch.from_numpy(features).float() + 3000 for features in SETS["as many"])
    doubles = [features.double().numpy() for features in (samples, reference)]
    scale = 3000.0**6
    found, expected = kernel_distance(samples, reference), oracle.kernel_distance(*doubles, subset=40)
    assert found == pytest.approx(expected, abs=1e-12 * scale)
    logits = torch.from_numpy(draw(26, 40, 5)).float() * 20
    expected = oracle.inception_score(logits.double().numpy())
    assert score_of_logits(logits) == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------------------------- the classifier


def pictures(seed: int, count: int, low: int, high: int) -> Tensor:
    """(count 3 20 24) uint8, of colours between two levels."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randint(low, high, (count, 3, 3, 3), generator=rng).float()
    return F.interpolate(coarse, (20, 24), mode="bilinear").to(torch.uint8)


@pytest.fixture(scope="module")
def classifier_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, so that features and logits depend on the picture; new ones give all classes equal odds."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(6)
        model = PictureClassifier(ClassifierConfig(classifier_size=16, widths=[8, 16]), NAMES)
        for parameter in model.parameters():
            parameter.normal_(std=1.0 if parameter.ndim < 2 else (2 / parameter[0].numel()) ** 0.5)
        nn.init.normal_(model.head.weight, std=3)
    path = tmp_path_factory.mktemp("classifier") / "features.safetensors"
    model.save(path)
    return path


def test_an_extractor_with_the_classifier(classifier_file: Path) -> None:
    extract = FeatureExtractor(classifier=classifier_file)
    assert (extract.is_inception, extract.name, extract.dimensions) == (False, "demo features", 16)
    assert extract.class_names == NAMES
    images = pictures(0, 4, 0, 256)
    features, logits = extract.see(images)
    model = PictureClassifier.load(classifier_file)
    assert torch.equal(features, model.features(model.prepare(images)))
    assert torch.equal(logits, model(model.prepare(images)))
    assert (features.shape, logits.shape) == ((4, 16), (4, len(NAMES)))
    assert features.dtype == logits.dtype == torch.float32
    assert torch.equal(extract(images), features)
    assert logits.std(0).min() > 0.1


def test_the_fingerprint_is_that_of_the_weights(classifier_file: Path, tmp_path: Path) -> None:
    one = FeatureExtractor(classifier=classifier_file).fingerprint
    model = PictureClassifier.load(classifier_file)
    model.save(tmp_path / "same.safetensors")
    assert FeatureExtractor(classifier=tmp_path / "same.safetensors").fingerprint == one
    model.head.bias[0] += 1
    model.save(tmp_path / "other.safetensors")
    assert FeatureExtractor(classifier=tmp_path / "other.safetensors").fingerprint != one


def test_torch_fidelity_finds_the_same_with_the_classifier(classifier_file: Path, tmp_path: Path) -> None:
    sets = {"samples": pictures(1, 40, 30, 256), "reference": pictures(2, 33, 0, 220)}
    for name, images in sets.items():
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{i:02d}.png")
    assert register_classifier() is register_classifier()  # torch-fidelity takes a name but once
    found = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "samples"),
        input2=str(tmp_path / "reference"),
        feature_extractor=CLASSIFIER,
        feature_extractor_weights_path=str(classifier_file),
        **{"isc": True, "fid": True, "kid": True, "prc": True},
        kid_subset_size=kid_subset(40, 33),
        batch_size=16,
        cuda=False,
        save_cpu_ram=True,  # as well no workers, which take longer to start than the pictures to read
        verbose=False,
    )
    extract = FeatureExtractor(classifier=classifier_file)
    (samples, logits), (reference, _) = (extract.see(images) for images in sets.values())
    # torch-fidelity computes in float32, and batches of another size round differently
    assert found[KEY_METRIC_FID] == pytest.approx(frechet(samples, reference), rel=1e-4)
    assert found[KEY_METRIC_ISC_MEAN] == pytest.approx(score_of_logits(logits), rel=1e-5)
    assert found[KEY_METRIC_KID_MEAN] == pytest.approx(kernel_distance(samples, reference), rel=1e-4)
    precision, recall = precision_and_recall(samples, reference)
    assert (found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]) == pytest.approx((precision, recall), abs=1e-6)
    # no value is trivial
    assert 0 < precision < 1
    assert 0 < recall < 1
    assert precision != pytest.approx(recall, abs=0.05)
    assert found[KEY_METRIC_ISC_MEAN] > 1.2
    assert found[KEY_METRIC_KID_MEAN] > 1e-3


def test_torch_fidelity_without_the_classifier_s_weights_names_the_argument(tmp_path: Path) -> None:
    register_classifier()
    with pytest.raises(InputError, match="give feature_extractor_weights_path"):
        torch_fidelity.calculate_metrics(
            input1=str(tmp_path), feature_extractor=CLASSIFIER, isc=True, cuda=False, verbose=False
        )


# ------------------------------------------------------------------------------------- Inception


def test_inception_gives_features_and_logits_without_bias(inception_weights: Path) -> None:
    extract = FeatureExtractor(inception_weights)
    assert (extract.is_inception, extract.name, extract.dimensions) == (True, "Inception of other weights", 2048)
    assert extract.class_names is None
    features, logits = extract.see(pictures(3, 2, 0, 256))
    assert (features.shape, logits.shape) == ((2, 2048), (2, 1008))
    assert features.dtype == logits.dtype == torch.float32
    last = load_foreign_state(inception_weights)
    torch.testing.assert_close(logits, features @ last["fc.weight"].T, rtol=1e-4, atol=1e-4)
    assert last["fc.bias"].abs().max() > 0.01  # it would have been seen
