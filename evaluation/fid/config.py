"""Settings of `benchmark.py fid`."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from common.errors import InputError, check_num_tokens
from generator.config import SamplingConfig

MIN_IMAGES = 10  # of a reference, and of samples
FULL = 50_000  # samples below which a distance is not called FID


@dataclass(frozen=True, kw_only=True)
class FidConfig:
    """Flags of `benchmark.py fid` beside those of sampling."""

    model: str = field(metadata={"help": "folder with tokenizer/ and generator/, or a hub name"})
    reference: str = field(metadata={"help": "folder of images, or .npz of guided-diffusion or of --save-reference"})
    num_tokens: list[int] | None = field(default=None, metadata={"help": "each k; default: 1 4 16 32 64 ... and all C"})
    num_samples: int = field(default=FULL, metadata={"help": "N, split evenly over the classes"})
    refine: int | None = field(
        default=None,
        metadata={"help": "steps of the refiner, for a second row of each k; default: as in sample.py"},
    )
    refine_cfg_scale: float | None = field(default=None, metadata={"help": "guidance of the refiner; default: 1"})
    refine_temperature: float | None = field(
        default=None, metadata={"help": "standard deviation of the refiner's noise; default: 1"}
    )
    seed: int = field(default=0, metadata={"help": "sample i is drawn with seed + i"})
    batch_size: int = field(default=64, metadata={"help": "samples drawn together; an interruption loses one batch"})
    features: str | None = field(default=None, metadata={"help": "classifier whose features replace Inception's"})
    inception_weights: str | None = field(
        default=None, metadata={"help": "torch-fidelity's weights-inception-2015-12-05-6726825d.pth; default: download"}
    )
    classifier: str | None = field(default=None, metadata={"help": "for class accuracy; default: that of --features"})
    class_names: str | None = field(default=None, metadata={"help": "anchors: JSON file, class folder -> class name"})
    save_reference: str | None = field(default=None, metadata={"help": "write the reference's features to this .npz"})
    anchors: bool = field(
        default=False,
        metadata={"help": "also measure the reference's images: halves, reconstructions, right and shuffled classes"},
    )
    save_images: bool = field(default=False, metadata={"help": "write each image as images/k0032/000000.png"})
    save_npz: bool = field(
        default=False, metadata={"help": "write samples-k0032.npz for the guided-diffusion evaluator"}
    )
    num_workers: int = field(default=1, metadata={"help": "processes that read the reference's images"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1 or mps"})
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "number format of the generator's weights"}
    )
    compile: bool = field(default=False, metadata={"help": "compile drawing and decoding first"})
    sweep: list[str] | None = field(
        default=None, metadata={"help": "measure all combinations, for example cfg_scale=1,1.5,2 temperature=0.85,1"}
    )
    write_settings: bool = field(
        default=False, metadata={"help": "write the best settings of each k of a sweep to the model's sampling.json"}
    )
    output_dir: str = field(default="runs/fid", metadata={"help": "folder for results.json, results.md and images"})

    def __post_init__(self) -> None:
        if self.num_tokens is not None:
            check_num_tokens(self.num_tokens)
        minima = {"num_samples": MIN_IMAGES, "batch_size": 1, "seed": 0, "num_workers": 0}
        for name, minimum in minima.items():
            if getattr(self, name) < minimum:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {minimum}")
        if not Path(self.reference).exists():
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

    def token_counts(self, num_channels: int) -> list[int]:
        """Each k to measure, in increasing order.

        Raises:
            InputError: a k above num_channels.
        """
        usual = [k for k in (1, 4, 16, 32, 64, 128, 256, 512) if k < num_channels]
        token_counts = sorted(self.num_tokens or [*usual, num_channels])
        if token_counts[-1] > num_channels:
            raise InputError(f"num_tokens has {token_counts[-1]}; this model has 1..{num_channels}")
        return token_counts


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
