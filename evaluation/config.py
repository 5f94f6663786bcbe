"""Settings of `benchmark.py`; imports no torch."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from common.config import Config, Dtype, InputError, Refinement, report_lengths, setting
from generator.config import SamplingConfig, Size

MIN_IMAGES = 10  # of a reference of fid, and of samples
FULL = 50_000  # samples below which a distance is not called FID


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(Config):
    """Flags of every measurement."""

    usual: ClassVar[tuple[int, ...]]  # each k by default, if it is below C

    num_tokens: list[int] | None = setting(None, "each k; default: a few below C, and C", ge=1, unique=True)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 or mps")

    def token_counts(self, num_channels: int) -> list[int]:
        """Each k to measure, in increasing order.

        Raises:
            InputError: a k above num_channels.
        """
        return report_lengths(self.num_tokens, num_channels, self.usual)


@dataclass(frozen=True, kw_only=True)
class ImageBenchmarkConfig(BenchmarkConfig):
    """Flags of the measurements of images."""

    features: str | None = setting(None, "classifier of `benchmark.py features`, for distances in its features")
    inception_weights: str | None = setting(None, "weights-inception-2015-12-05-6726825d.pth; default: download")
    num_workers: int = setting(1, "processes that read images", ge=0, le=256)


@dataclass(frozen=True, kw_only=True)
class FidConfig(ImageBenchmarkConfig):
    """Flags of `benchmark.py fid` beside those of sampling; `features` replace Inception."""

    usual: ClassVar[tuple[int, ...]] = (1, 4, 16, 32, 64, 128, 256, 512)

    model: str = setting(help="folder with tokenizer/ and generator/, or a hub name", reads=True)
    reference: str = setting(help="folder of images, or .npz of guided-diffusion or of --save-reference", reads=True)
    num_samples: int = setting(FULL, "N, split evenly over the classes", ge=MIN_IMAGES, le=10**8)
    refine: int | None = setting(None, "refiner's steps, for a second row of each k; 0: none", ge=0, le=1000)
    refine_cfg_scale: float | None = setting(None, "guidance of the refiner; default: 3", ge=0, le=100)
    refine_temperature: float | None = setting(None, "of the refiner's noise; default: the model's", ge=0, le=2)
    seed: int = setting(0, "sample i is drawn with seed + i", ge=0, lt=2**63)
    batch_size: int = setting(64, "samples drawn together; an interruption loses one batch", ge=1, le=2**16)
    class_names: str | None = setting(None, "anchors: JSON file, class folder -> class name")
    save_reference: str | None = setting(None, "write the reference's features to this .npz")
    anchors: bool = setting(False, "measure the reference's images: halves, reconstructions, shuffled classes")
    save_npz: bool = setting(False, "write samples-k0032.npz for the guided-diffusion evaluator")
    dtype: Dtype = setting("float32", "number format of the generator's weights")
    compile: bool = setting(False, "compile drawing and decoding first")
    sweep: list[str] | None = setting(None, "measure all combinations, as in cfg_scale=1,2 temperature=0.85,1")
    write_settings: bool = setting(False, "write the best settings of each k of a sweep to the model's sampling.json")
    output_dir: str = setting("runs/fid", "folder for results.json, results.md and images")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not os.path.exists(self.reference):  # noqa: PTH110 - false for names that are too long, too
            raise InputError(f"reference {self.reference} is missing; give a folder of images or a .npz file")
        if self.anchors and not Path(self.reference).is_dir():
            raise InputError(f"anchors need a folder of images, and reference {self.reference} is a file")
        if self.features is not None and self.inception_weights is not None:
            raise InputError("features and inception_weights are both given; omit one")
        if self.write_settings:
            if self.sweep is None:
                raise InputError("write_settings needs a sweep; give --sweep, or omit it")
            if not os.access(Path(self.model) / "generator", os.W_OK):
                raise InputError(f"write_settings cannot write to {self.model}/generator; give a folder of your own")


def sweep_settings(words: Sequence[str]) -> list[dict[str, Any]]:
    """Expand "cfg_scale=1,2 temperature=0.9,1" to all combinations, the last name changing fastest.

    Raises:
        InputError: an unknown name or a value of the wrong type or range.
    """
    types: dict[str, type] = {name: type(value) for name, value in asdict(SamplingConfig()).items()}
    combinations: list[dict[str, Any]] = [{}]
    for word in words:
        name, _, values = word.partition("=")
        name = name.replace("-", "_")
        if name not in types or not values:
            raise InputError(f"sweep has {word!r}; give name=value,value,... with one of {', '.join(types)}")
        try:
            parsed = dict.fromkeys(types[name](value) for value in values.split(","))
        except ValueError as error:
            raise InputError(f"sweep has {word!r}; {name} takes values of type {types[name].__name__}") from error
        combinations = [settings | {name: value} for settings in combinations for value in parsed]
    return combinations


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig(ImageBenchmarkConfig):
    """Flags of `benchmark.py reconstruction` beside those of the data."""

    usual: ClassVar[tuple[int, ...]] = tuple(4**i for i in range(8))

    tokenizer: str = setting(help="tokenizer folder, or its name on the Hugging Face hub", reads=True)
    max_images: int | None = setting(None, "number of images, spread evenly over the data; default: all", ge=1)
    strict: bool = setting(False, "stop at an unreadable image instead of skipping it")
    batch_size: int = setting(32, "images a pass; changes no result", ge=1, le=2**16)
    dtype: Dtype = setting("float32", "number format of the decoder; encoding is float32")
    perceptual: Literal["lpips", "none"] = setting("lpips", "lpips needs VGG weights")
    perceptual_weights: str | None = setting(None, "torchvision's vgg16-397923af.pth; default: download")
    inception: Literal["auto", "none"] = setting("auto", "auto: rFID; needs Inception weights")
    refiner: str | None = setting(None, "refiner folder, for a second row of each k", reads=True)
    refine: int = setting(Refinement.steps, "with --refiner: its steps", ge=1, le=1000)
    curve_images: int = setting(0, "images decoded at every k from 1 to C, for the gain of each channel; slow", ge=0)
    sheet_images: int = setting(8, "rows of reconstructions.png; 0: no such picture", ge=0, le=1000)
    prior_images: int = setting(0, "training images to fit a prior to, for the rate of tokens; 0: no rate", ge=0)
    output_dir: str = setting("runs/reconstruction", "folder for results and plots")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("perceptual", "inception"):
            if getattr(self, name) == "none" and getattr(self, f"{name}_weights") is not None:
                raise InputError(f"{name} is none, but {name}_weights is given; omit one of them")
        if self.max_images == 1 and (self.inception != "none" or self.features is not None):
            raise InputError("max_images is 1; rFID and features need at least 2 images; omit them (--inception none)")


Sampler = Literal["uncached", "transformers", "eager", "compiled"]


@dataclass(frozen=True, kw_only=True)
class SpeedConfig(BenchmarkConfig):
    """Flags of `benchmark.py speed`; every combination of number format, batch size and guidance is measured."""

    usual: ClassVar[tuple[int, ...]] = (32, 64, 128, 192)

    generator: Size | None = setting(None, "size, with random weights; default: B")
    tokenizer: Literal["paper-256", "paper-512", "none"] | None = setting(
        None, "architecture, with random weights; none: 256 tokens of 14 bits, no images; default: paper-256"
    )
    model: str | None = setting(None, "instead: a folder with tokenizer/ and generator/", reads=True)
    batch_size: list[int] = setting([1], "images drawn together", ge=1, le=2**16, unique=True)
    dtype: list[Dtype] = setting(["float32", "bfloat16"], "number formats", unique=True)
    cfg_scale: list[float] = setting([1.0], "guidance; 1 = off, others cost two passes", ge=0, unique=True)
    samplers: list[Sampler] = setting(list(get_args(Sampler)), "what is compared", unique=True)
    repeats: int = setting(3, "rounds; their median is reported", ge=1, le=1000)
    seed: int = setting(0, "of random weights and of drawing")
    output_dir: str = setting("runs/speed", "folder for speed.json and speed.md")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is not None and (self.generator is not None or self.tokenizer is not None):
            raise InputError("model is given, and so is generator or tokenizer; give either the one or the others")
