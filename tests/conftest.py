"""Small models, images, a token store and the runner of scripts: shared by all tests."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measurement import words
from PIL import Image
from runner import REPO, Finished, ScriptRunner
from torch import nn
from torchvision.models import vgg16

from common.files import folder_written_whole
from generator.config import ChannelGPTConfig
from generator.decode import CachedDecoder
from generator.engine import Batch, Engine
from generator.model import ChannelGPT
from generator.tokens import StoreHeader, TokenStore
from tokenizer import ChannelTokenizer, TokenizerConfig
from tokenizer.classifier import PictureClassifier
from tokenizer.settings import ClassifierConfig

__all__ = ["REPO", "Finished", "ScriptRunner"]
torch.set_num_threads(1)  # tiny models gain nothing from a second one, and would wait for it on a busy machine
CLASS_NAMES = [
    *("goldfish, Carassius auratus", "tench, Tinca tinca", "great white shark, white shark, man-eater"),
    *("hen", "ostrich, Struthio camelus"),
]


@pytest.fixture(scope="session")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptRunner]:
    runner = ScriptRunner(tmp_path_factory.mktemp("scripts"))
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> ChannelTokenizer:
    """32 x 32 pixels, 16 tokens of 6 bits; random weights."""
    sizes = {"image_size": 32, "num_channels": 16, "patch_size": 2, "num_bits": 6, "num_heads": 4}
    config = TokenizerConfig(**sizes, encoder_widths=[32, 32], decoder_widths=[32])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return ChannelTokenizer(config).eval()


def tiny_config(tokenizer: ChannelTokenizer, num_layers: int = 2, **changes: Any) -> ChannelGPTConfig:
    """Of a generator with the tokens of the tiny tokenizer."""
    size = {"num_layers": num_layers, "num_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    tokens = {"num_channels": 16, "num_bits": 6, "tokenizer_fingerprint": tokenizer.token_fingerprint()}
    return ChannelGPTConfig(**size | tokens | {"class_names": CLASS_NAMES, "has_null_label": True} | changes)


def sharp_generator(config: ChannelGPTConfig) -> ChannelGPT:
    """A random generator with large weights everywhere, so that its odds are far from even and depend on all inputs."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        model = ChannelGPT(config).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name == "prior.weight":
                parameter.normal_(std=0.15)
            elif "prior" in name:
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(std=1.0 if "vectors" in name else 0.2)
    return model


@pytest.fixture(scope="session")
def tiny_generator(tiny_tokenizer: ChannelTokenizer) -> ChannelGPT:
    return sharp_generator(tiny_config(tiny_tokenizer))


@pytest.fixture(scope="session")
def tiny_decoder(tiny_generator: ChannelGPT) -> CachedDecoder:
    return CachedDecoder.from_model(tiny_generator)


@pytest.fixture(scope="session")
def tiny_engine(tiny_decoder: CachedDecoder) -> Engine:
    return Engine(tiny_decoder)


@pytest.fixture
def watch_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[Engine], list[tuple[int, int, bool]]]:
    """A function that notes (rows, position, whether odds are computed) of every later step of an engine."""

    def watch(engine: Engine) -> list[tuple[int, int, bool]]:
        steps: list[tuple[int, int, bool]] = []
        blocks, odds = engine._blocks, engine._odds

        def noted_blocks(batch: Batch, length: int) -> torch.Tensor:
            steps.append((batch.cache.entries.shape[2], int(batch.position), False))
            return blocks(batch, length)

        def noted_odds(batch: Batch, *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
            steps[-1] = (*steps[-1][:2], True)
            return odds(batch, *arguments, **options)

        monkeypatch.setattr(engine, "_blocks", noted_blocks)
        monkeypatch.setattr(engine, "_odds", noted_odds)
        return steps

    return watch


def save_pipeline(folder: Path, tokenizer: ChannelTokenizer, generator: ChannelGPT) -> Path:
    """Write a model folder, tokenizer/ and generator/."""
    tokenizer.save_pretrained(folder / "tokenizer")
    generator.save_pretrained(folder / "generator")
    return folder


@pytest.fixture(scope="session")
def pipeline_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: ChannelTokenizer, tiny_generator: ChannelGPT
) -> Path:
    """A model folder. Tests that change it work on a copy."""
    return save_pipeline(tmp_path_factory.mktemp("model"), tiny_tokenizer, tiny_generator)


@pytest.fixture(scope="session")
def slow_pipeline_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: ChannelTokenizer) -> Path:
    """As `pipeline_folder`, with so many layers that an image takes a while."""
    model = sharp_generator(tiny_config(tiny_tokenizer, num_layers=40))
    return save_pipeline(tmp_path_factory.mktemp("slow-model"), tiny_tokenizer, model)


def save_noise(path: Path, rng: np.random.Generator, cells: int, size: tuple[int, int]) -> None:
    """Write a smooth random picture; the folder is created if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ of three classes, PNG and JPEG of several sizes. Tests that change it work on a copy."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in ("n01", "n02", "n03"):
            for i in range(count):
                save_noise(folder / split / name / f"{i}.{'png' if i % 2 else 'jpg'}", rng, 4, (32 + 8 * i, 40))
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, 24 pictures to train on and 6 to look at; half PNG, half JPEG. Tests change only copies."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3)):
        for name in ("hen", "tench"):
            for i in range(count):
                save_noise(folder / split / name / f"{i:02d}.{'png' if i % 2 else 'jpg'}", rng, 3, (16 + i, 20))
    return folder


@pytest.fixture(scope="session")
def token_store(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: ChannelTokenizer) -> Path:
    """64 random sequences in two shards, the same for val; the first token is unique, its first bits give the class."""
    folder = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(3)
    tokens = torch.from_numpy(rng.integers(0, 64, (64, 1, 16)))
    tokens[:, 0, 0] = torch.arange(64)
    labels = torch.arange(5).repeat_interleave(torch.tensor([16, 16, 16, 8, 8]))
    header = StoreHeader(
        tokenizer_fingerprint=tiny_tokenizer.token_fingerprint(),
        num_channels=16,
        num_bits=6,
        class_names=CLASS_NAMES,
        views="none",
        shard_size=40,
        split_files={"train": 64, "val": 64},
        listings={"train": "a", "val": "b"},
    )
    store = TokenStore.create(folder, header)
    with folder_written_whole(store.tokenizer_folder) as temporary:
        tiny_tokenizer.save_pretrained(temporary)
    for split in ("train", "val"):
        store.write_shard(split, 0, tokens[:40], labels[:40], [])
        store.write_shard(split, 1, tokens[40:], labels[40:], [])
    return folder


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of torch-fidelity's InceptionV3 with random weights, scaled so that signals pass through."""
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    class Random(inception.FeatureExtractorInceptionV3):
        """As it is before any weights are loaded."""

        def load_state_dict(self, state_dict: Any, *arguments: Any, **options: Any) -> Any:
            return None

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(4)
        network = Random("inception", ["2048"], str(folder / "empty.pth"))
        for parameter in network.parameters():
            if parameter.ndim == 4:
                parameter.normal_(std=(2 / parameter[0].numel()) ** 0.5)
    torch.save(network.state_dict(), folder / "inception.pth")
    return folder / "inception.pth"


@pytest.fixture(scope="session")
def vgg() -> nn.Module:
    """The convolutions of torchvision's VGG-16, random, scaled so that signals pass through."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        with torch.device("meta"):
            features = vgg16(weights=None).features
        features = features.to_empty(device="cpu")
        for parameter in features.parameters():
            parameter.normal_(std=(2 / parameter[0].numel()) ** 0.5 if parameter.ndim == 4 else 0.1)
    return features.eval()


@pytest.fixture(scope="session")
def vgg_weights(vgg: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As torchvision stores them: the convolutions, and a classifier that LPIPS has no use for."""
    state = {f"features.{name}": value for name, value in vgg.state_dict().items()}
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({**state, "classifier.0.weight": torch.zeros(2, 2)}, path)
    return path


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random classifier of 32 x 32 pictures that knows the tiny model's classes, in another order, and one more."""
    path = tmp_path_factory.mktemp("classifier") / "features.safetensors"
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(6)
        config = ClassifierConfig(classifier_size=32, widths=[8, 16])
        model = PictureClassifier(config, ["something else", *reversed(CLASS_NAMES)])
        for parameter in model.parameters():  # a fresh one says the same of every picture
            parameter.normal_(std=0.4)
    model.save(path)
    return path


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 pictures in 5 class folders, of several sizes."""
    folder, rng = tmp_path_factory.mktemp("reference"), np.random.default_rng(7)
    for i in range(12):
        save_noise(folder / f"class{i % 5}" / f"{i:02d}.png", rng, 4, (40 + i, 36))
    return folder


@pytest.fixture(scope="session")
def class_names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the folders of `photographs` are called: the tiny model's classes, the other way round."""
    path = tmp_path_factory.mktemp("names") / "names.json"
    path.write_text(json.dumps({f"class{i}": name for i, name in enumerate(reversed(CLASS_NAMES))}))
    return path


@pytest.fixture(scope="session")
def measured(
    tmp_path_factory: pytest.TempPathFactory,
    scripts: ScriptRunner,
    pipeline_folder: Path,
    photographs: Path,
    classifier: Path,
    class_names: Path,
) -> Path:
    """One run with everything on."""
    folder = tmp_path_factory.mktemp("measured")
    flags = ["--anchors", "--save-npz", "--class-names", class_names]
    done = scripts("benchmark.py", *words(pipeline_folder, photographs, classifier, folder), *flags)
    assert done.code == 0, done.err
    return folder
