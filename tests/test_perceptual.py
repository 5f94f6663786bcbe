"""tokenizer/perceptual.py: LPIPS against its formula over torchvision's VGG-16, and weights from a file."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from oracles import pictures as oracle
from torch import Tensor, nn

from common.checkpoint import save_tensors
from common.errors import InputError
from tokenizer.classifier import PictureClassifier
from tokenizer.perceptual import ClassifierDistance, PerceptualDistance


@pytest.fixture(scope="module", autouse=True)
def no_initial_values() -> Iterator[None]:
    """VGG's 138 million initial values take seconds to draw, and are all replaced by those of the file."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("normal_", "kaiming_normal_", "uniform_", "kaiming_uniform_"):
            patch.setattr(torch.nn.init, name, lambda tensor, *arguments, **options: tensor)
        yield


@pytest.fixture(scope="module")
def distance(vgg_weights: Path) -> PerceptualDistance:
    return PerceptualDistance(vgg_weights)


def pair(batch_size: int, size: int = 32) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(6)
    images = torch.rand(batch_size, 3, size, size, generator=rng) * 2 - 1
    noise = torch.randn(images.shape, generator=rng)
    return images, (images + 0.3 * noise).clamp(-1, 1)


@pytest.mark.parametrize("size", [16, 40])
def test_the_distance_is_the_formula_s(vgg: nn.Module, distance: PerceptualDistance, size: int) -> None:
    images, others = pair(3, size)
    features = copy.deepcopy(vgg).double()
    weights = [layer.model[-1].weight.flatten() for layer in distance.network.lins]  # type: ignore[union-attr]
    assert all(bool((weight >= 0).all()) and float(weight.sum()) > 0 for weight in weights)  # trained, not random
    with torch.no_grad():
        expected = [oracle.lpips(features, weights, *both) for both in zip(images, others, strict=True)]
        found = distance(images, others)
    assert found.shape == (3,)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert len({round(value, 6) for value in expected}) == 3
    assert min(expected) > 0.01


def test_equal_pictures_are_at_distance_zero_and_order_does_not_matter(distance: PerceptualDistance) -> None:
    images, others = pair(2)
    with torch.no_grad():
        assert distance(images, images).tolist() == [0, 0]
        torch.testing.assert_close(distance(images, others), distance(others, images))


def test_weights_from_either_kind_of_file_give_the_same(
    distance: PerceptualDistance, vgg: nn.Module, tmp_path: Path
) -> None:
    save_tensors(tmp_path / "vgg.safetensors", {f"features.{name}": value for name, value in vgg.state_dict().items()})
    other = PerceptualDistance(tmp_path / "vgg.safetensors")
    with torch.no_grad():
        assert torch.equal(other(*pair(2)), distance(*pair(2)))


def without(state: dict[str, Tensor]) -> None:
    del state["features.28.bias"]


def added(state: dict[str, Tensor]) -> None:
    state["features.31.weight"] = torch.zeros(1)


def misshapen(state: dict[str, Tensor]) -> None:
    state["features.0.weight"] = torch.zeros(64, 3, 5, 5)


def empty(state: dict[str, Tensor]) -> None:
    state.clear()


@pytest.mark.parametrize(
    ("change", "named"),
    [(without, "28.bias"), (added, "31.weight"), (misshapen, "0.weight"), (empty, "26 weights")],
)
def test_a_file_that_does_not_hold_vgg_is_refused(vgg: nn.Module, tmp_path: Path, change: Any, named: str) -> None:
    state = {f"features.{name}": value for name, value in vgg.state_dict().items()}
    change(state)
    save_tensors(tmp_path / "other.safetensors", state)
    with pytest.raises(InputError, match="holds no VGG-16") as refusal:
        PerceptualDistance(tmp_path / "other.safetensors")
    assert named in str(refusal.value)
    assert "vgg16-397923af.pth" in str(refusal.value)


def test_without_a_download_one_line_says_what_to_give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_network(*arguments: Any, **options: Any) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(InputError, match="--perceptual-weights, or --perceptual none"):
        PerceptualDistance()


def test_it_stays_in_evaluation_mode_and_frozen(distance: PerceptualDistance) -> None:
    model = nn.Sequential(distance)
    model.train()
    assert not any(module.training for module in distance.modules())
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_gradients_are_those_of_the_pictures_only(distance: PerceptualDistance) -> None:
    images, others = pair(2)
    images.requires_grad_()
    distance(images, others).sum().backward()
    assert images.grad is not None
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(parameter.grad is None for parameter in distance.parameters())


def test_it_computes_in_float32_also_under_autocast(distance: PerceptualDistance) -> None:
    images, others = pair(1)
    with torch.no_grad():
        expected = distance(images, others)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(distance(images, others), expected)
        assert distance(images.bfloat16(), others.bfloat16()).dtype == torch.float32


# ------------------------------------------------------------------------------------- the classifier in VGG's place


def test_the_classifier_s_distance_is_its_formula(classifier: Path) -> None:
    rng = np.random.default_rng(11)
    one, other = (torch.from_numpy(rng.uniform(-1, 1, (3, 3, 32, 32)).astype(np.float32)) for _ in range(2))
    model = PictureClassifier.load(classifier)
    expected = []
    for first, second in zip(one, other, strict=True):
        found = []
        for maps in zip(model.maps(first[None]), model.maps(second[None]), strict=True):
            a, b = (x[0].double().numpy() for x in maps)
            a, b = (x / np.sqrt((x**2).sum(0, keepdims=True)) for x in (a, b))
            found.append(((a - b) ** 2).sum(0).mean())
        expected.append(np.mean(found))
    distance = ClassifierDistance(classifier)
    np.testing.assert_allclose(distance(one, other), expected, rtol=1e-4)
    assert distance(one, one).abs().max() == 0


@pytest.mark.parametrize("size", [(40, 36), (33, 47), (4, 5)])
def test_the_classifier_s_distance_takes_pictures_of_any_size(classifier: Path, size: tuple[int, int]) -> None:
    images = torch.linspace(-1, 1, 2 * 3 * size[0] * size[1]).reshape(2, 3, *size)
    assert ClassifierDistance(classifier)(images, -images).shape == (2,)


def test_the_classifier_s_distance_has_gradients_for_pictures_only(classifier: Path) -> None:
    distance = ClassifierDistance(classifier)
    images = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = distance(images, images.detach().flip(-1))
    assert value.dtype == torch.float32
    value.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in distance.parameters())
