"""Settings of `benchmark.py fid`."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.config import Config, Dtype, report_lengths, setting
from common.errors import InputError
from generator.config import SamplingConfig

MIN_IMAGES = 10  # of a reference, and of samples
FULL = 50_000  # samples below which a distance is not called FID


@dataclass(frozen=True, kw_only=True)
class FidConfig(Config):
    """Flags of `benchmark.py fid` beside those of sampling."""

    model: str = setting(help="folder with tokenizer/ and generator/, or a hub name", reads=True)
    reference: str = setting(help="folder of images, or .npz of guided-diffusion or of --save-reference", reads=True)
    num_tokens: list[int] | None = setting(None, "each k; default: 1 4 16 32 64 ... and all C", ge=1, unique=True)
    num_samples: int = setting(FULL, "N, split evenly over the classes", ge=MIN_IMAGES, le=10**8)
    refine: int | None = setting(
        None, "steps of the refiner, for a second row of each k; default: as in sample.py", ge=0, le=1000
    )
    refine_cfg_scale: float | None = setting(None, "guidance of the refiner; default: 3", ge=0, le=100)
    refine_temperature: float | None = setting(
        None, "standard deviation of the refiner's noise; default: the model's", ge=0, le=2
    )
    seed: int = setting(0, "sample i is drawn with seed + i", ge=0, lt=2**63)
    batch_size: int = setting(64, "samples drawn together; an interruption loses one batch", ge=1, le=2**16)
    features: str | None = setting(None, "classifier whose features replace Inception's")
    inception_weights: str | None = setting(
        None, "torch-fidelity's weights-inception-2015-12-05-6726825d.pth; default: download"
    )
    classifier: str | None = setting(None, "for class accuracy; default: that of --features")
    class_names: str | None = setting(None, "anchors: JSON file, class folder -> class name")
    save_reference: str | None = setting(None, "write the reference's features to this .npz")
    anchors: bool = setting(
        False, "also measure the reference's images: halves, reconstructions, right and shuffled classes"
    )
    save_images: bool = setting(False, "write each image as images/k0032/000000.png")
    save_npz: bool = setting(False, "write samples-k0032.npz for the guided-diffusion evaluator")
    num_workers: int = setting(1, "processes that read the reference's images", ge=0, le=256)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 or mps")
    dtype: Dtype = setting("float32", "number format of the generator's weights")
    compile: bool = setting(False, "compile drawing and decoding first")
    sweep: list[str] | None = setting(
        None, "measure all combinations, for example cfg_scale=1,1.5,2 temperature=0.85,1"
    )
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

    def token_counts(self, num_channels: int) -> list[int]:
        """Each k to measure, in increasing order."""
        return report_lengths(self.num_tokens, num_channels, (1, 4, 16, 32, 64, 128, 256, 512))


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
