"""tokenizer/perceptual.py: LPIPS against its formula over torchvision's VGG-16, and weights from a file."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from oracles import pictures as oracle
from torch import Tensor, nn

from common.checkpoint import save_tensors
from common.config import InputError
from tokenizer.perceptual import PerceptualDistance


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


def pair(batch_size: int, size: int = 16) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(6)
    images = torch.rand(batch_size, 3, size, size, generator=rng) * 2 - 1
    noise = torch.randn(images.shape, generator=rng)
    return images, (images + 0.3 * noise).clamp(-1, 1)


@torch.no_grad()
@pytest.mark.parametrize("size", [16, 40])
def test_the_distance_is_the_formula_s_from_either_kind_of_file(
    vgg: nn.Module, distance: PerceptualDistance, tmp_path: Path, size: int
) -> None:
    images, others = pair(3, size)
    features = copy.deepcopy(vgg).double()
    weights = [layer.model[-1].weight.flatten() for layer in distance.network.lins]  # type: ignore[union-attr]
    assert all(bool((weight >= 0).all()) and float(weight.sum()) > 0 for weight in weights)  # trained, not random
    expected = [oracle.lpips(features, weights, *both) for both in zip(images, others, strict=True)]
    found = distance(images, others)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-6)
    assert min(expected) > 0.01
    assert distance(images, images).tolist() == [0, 0, 0]
    if size == 16:
        state = {f"features.{name}": value for name, value in vgg.state_dict().items()}
        save_tensors(tmp_path / "vgg.safetensors", state)
        assert torch.equal(PerceptualDistance(tmp_path / "vgg.safetensors")(images, others), found)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"28.bias": None}, "28.bias"), ({"31.weight": torch.zeros(1)}, "31.weight"),
     ({"0.weight": torch.zeros(64, 3, 5, 5)}, "0.weight")],
)  # fmt: skip
def test_a_file_that_does_not_hold_vgg_is_refused(
    vgg: nn.Module, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    state = {f"features.{name}": value for name, value in (vgg.state_dict() | change).items() if value is not None}
    save_tensors(tmp_path / "other.safetensors", state)
    with pytest.raises(InputError, match=r"holds no VGG-16 .* give vgg16-397923af\.pth") as refusal:
        PerceptualDistance(tmp_path / "other.safetensors")
    assert named in str(refusal.value)


def test_without_a_download_one_line_says_what_to_give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_network(*arguments: Any, **options: Any) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(InputError, match="--perceptual-weights, or --perceptual none"):
        PerceptualDistance()


def test_it_stays_frozen_in_evaluation_mode_and_float32_and_has_gradients_for_pictures_only(
    distance: PerceptualDistance,
) -> None:
    nn.Sequential(distance).train()
    assert not any(module.training for module in distance.modules())
    images, others = pair(2)
    expected = distance(images.requires_grad_(), others)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(distance(images, others), expected)
    expected.sum().backward()
    assert images.grad is not None
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(parameter.grad is None for parameter in distance.parameters())
