"""tokenizer/classifier.py: its file, features and logits of pictures, and settings that are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

import benchmark
from common import cli
from common.checkpoint import load_tensors, load_tensors_metadata, save_tensors
from common.config import InputError
from evaluation.features import FeatureExtractor
from tokenizer.classifier import KIND, PictureClassifier
from tokenizer.settings import ClassifierConfig

REPO = Path(__file__).resolve().parents[1]
NAMES = ["hen, a bird", "poêle", "tench"]
SIZE = 16


def random_classifier(config: ClassifierConfig) -> PictureClassifier:
    """Random weights throughout, also where training begins with zeros."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        model = PictureClassifier(config, NAMES)
        for parameter in model.parameters():
            parameter.normal_(std=1.0 if parameter.ndim < 2 else (2 / parameter[0].numel()) ** 0.5)
    return model


@pytest.fixture(scope="module")
def model() -> PictureClassifier:
    return random_classifier(ClassifierConfig(classifier_size=SIZE, widths=[8, 16, 24]))


@pytest.fixture
def written(model: PictureClassifier, tmp_path: Path) -> Path:
    model.save(tmp_path / "features.safetensors")
    return tmp_path / "features.safetensors"


def noise(count: int, height: int, width: int) -> Tensor:
    rng = torch.Generator().manual_seed(8)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=rng)


def test_a_file_gives_back_the_weights_rounded_to_bfloat16(
    model: PictureClassifier, written: Path, tmp_path: Path
) -> None:
    loaded = PictureClassifier.load(written)
    assert (loaded.config, loaded.class_names) == (model.config, NAMES)
    with safe_open(written, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.state_dict()[name].bfloat16().float()), name
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == written.read_bytes()


def test_the_published_size_stays_below_5_megabytes(tmp_path: Path) -> None:
    words = ["--config", str(REPO / "configs" / "features.yaml"), "--data-dir", "photos", "--output-dir", "run"]
    config = cli.parse(*benchmark.COMMANDS["features"][1], argv=words)[-1]
    model = PictureClassifier(config, [f"class {i}, with a name of some length" for i in range(100)])
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(1.2e6, rel=0.05)
    model.save(tmp_path / "features.safetensors")
    assert (tmp_path / "features.safetensors").stat().st_size <= 5_000_000


def without_a_weight(path: Path) -> None:
    tensors = load_tensors(path)
    del tensors["blocks.1.conv1.weight"]
    save_tensors(path, tensors, load_tensors_metadata(path))


def with_header(**changes: str | None) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        about = {name: json.dumps(value) for name, value in json.loads(load_tensors_metadata(path)[KIND]).items()}
        entries = [f'"{name}": {value}' for name, value in (about | changes).items() if value is not None]
        save_tensors(path, load_tensors(path), {KIND: f"{{{', '.join(entries)}}}"})

    return change


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "damaged"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: save_tensors(path, load_tensors(path)), "holds no classifier"),
        (without_a_weight, "blocks.1.conv1.weight"),
        (with_header(config=None), "not a complete classifier"),
        (with_header(config='{"depth": 3}'), "depth"),
        (with_header(class_names='["only one"]'), "head.weight"),
    ],
)
def test_a_file_that_is_no_whole_classifier_is_refused_in_one_line(
    written: Path, damage: Callable[[Path], None], reason: str
) -> None:
    damage(written)
    for load in (PictureClassifier.load, lambda path: FeatureExtractor(classifier=path)):
        with pytest.raises(InputError, match=reason) as refusal:
            load(written)
        assert str(written) in str(refusal.value)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("height", "width"), [(SIZE, SIZE), (40, 23), (7, 9)])
def test_pictures_are_resized_as_pillow_resizes_them(model: PictureClassifier, height: int, width: int) -> None:
    images = noise(2, height, width)
    prepared = model.prepare(images)
    assert (prepared.shape, prepared.dtype) == ((2, 3, SIZE, SIZE), torch.float32)
    for found, image in zip(prepared, images, strict=True):
        # a colour at a time, in floats: Pillow rounds bytes after each direction
        planes = [Image.fromarray(plane.numpy().astype(np.float32)) for plane in image]
        resized = np.stack([plane.resize((SIZE, SIZE), Image.Resampling.BILINEAR) for plane in planes])
        np.testing.assert_allclose((found.numpy() + 1) * 127.5, resized, atol=0.01)


def test_maps_halve_from_block_to_block_and_features_are_means_of_the_last(model: PictureClassifier) -> None:
    images, maps = model.prepare(noise(2, SIZE, SIZE)), list[Tensor]()
    hooks = [block.register_forward_hook(lambda *found: maps.append(found[-1])) for block in model.blocks]
    with torch.no_grad():
        features = model.features(images)
        for hook in hooks:
            hook.remove()
        assert torch.equal(model(images), F.linear(features, model.head.weight, model.head.bias))
    assert [tuple(found.shape) for found in maps] == [(2, 8, 8, 8), (2, 16, 4, 4), (2, 24, 2, 2)]
    torch.testing.assert_close(features, maps[-1].flatten(2).mean(2))


def test_the_features_of_a_picture_do_not_depend_on_the_batch(written: Path) -> None:
    extract, images = FeatureExtractor(classifier=written), noise(9, 20, 24)
    images[3] = 255  # would change any mean over the batch
    features, logits = extract.extract(images)
    for i in range(9):
        alone = extract.extract(images[i : i + 1])
        torch.testing.assert_close(alone[0], features[i : i + 1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone[1], logits[i : i + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"widths": []}, "widths"),
        ({"widths": [12]}, "widths"),
        (
            {"classifier_size": 20, "widths": [8, 8, 8]},
            "classifier_size is 20; with 3 widths it must be a multiple of 8",
        ),
        (
            {"classifier_size": 8, "widths": [8, 8, 8]},
            "classifier_size is 8; with 3 widths it must be a multiple of 8, and larger",
        ),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        ClassifierConfig(**settings)
