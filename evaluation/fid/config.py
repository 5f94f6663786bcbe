"""What is measured, against what and with what."""

from dataclasses import dataclass, field, fields, replace
from typing import Literal

from common.errors import InputError, check_num_tokens
from generator.config import SamplingConfig

FEWEST = 10  # images of a reference, and samples
FULL = 50_000  # samples below which a distance is not called FID


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """Flags of `benchmark.py fid` beside those of sampling."""

    model: str = field(metadata={"help": "folder with tokenizer/ and generator/, or a hub name"})
    reference: str = field(
        metadata={"help": "what samples are compared with: a folder of images, with or without class folders; a .npz "
                  "of the guided-diffusion evaluator; or the name that an earlier reference was saved under"},
    )  # fmt: skip
    num_tokens: list[int] | None = field(
        default=None, metadata={"help": "each k to measure; default: 1 4 16 32 64 ... as far as the model goes"}
    )
    num_samples: int = field(default=FULL, metadata={"help": "N, split evenly over the classes"})
    seed: int = field(default=0, metadata={"help": "sample i is drawn with seed + i"})
    batch_size: int = field(default=64, metadata={"help": "samples side by side; an interruption loses one batch"})
    features: str | None = field(
        default=None,
        metadata={"help": "compare as the small classifier of this file sees pictures, not as Inception does"},
    )
    inception_weights: str | None = field(
        default=None,
        metadata={"help": "torch-fidelity's weights-inception-2015-12-05-6726825d.pth; default: torch's cache, or a "
                  "download"},
    )  # fmt: skip
    classifier: str | None = field(
        default=None, metadata={"help": "classifier that tells class accuracy; default: the one of --features"}
    )
    class_names: str | None = field(
        default=None,
        metadata={"help": "JSON file: class folder of the reference -> name of the class; default: the folder's"},
    )
    max_reference: int | None = field(
        default=None, metadata={"help": "use this many images of a folder, spread evenly; default: all"}
    )
    decode_reference: bool = field(
        default=False,
        metadata={"help": "pass the images of a folder through the tokenizer first: what is left is the generator's"},
    )
    save_reference: str | None = field(
        default=None, metadata={"help": "keep the reference's features under this name, for --reference NAME"}
    )
    anchors: bool = field(
        default=False,
        metadata={"help": "also measure one half of the reference against the other, its reconstructions from k tokens "
                  "and its class accuracy, with the right classes and with shuffled ones"},
    )  # fmt: skip
    save_images: bool = field(default=False, metadata={"help": "keep every picture, as images/k0032/000000.png"})
    save_npz: bool = field(
        default=False, metadata={"help": "write samples-k0032.npz for each k, for the guided-diffusion evaluator"}
    )
    sheet_samples: int = field(default=8, metadata={"help": "rows of samples.png; 0: no such picture"})
    num_workers: int = field(default=1, metadata={"help": "processes that read the reference's images"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1 or mps"})
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "number format of the generator's weights"}
    )
    compile: bool = field(default=False, metadata={"help": "compile drawing and decoding first"})
    sweep: list[str] | None = field(
        default=None,
        metadata={"help": "measure every combination of settings instead, for example cfg_scale=1,1.5,2 "
                  "temperature=0.85,1, and draw a heat map of the distance by k"},
    )  # fmt: skip
    write_settings: bool = field(
        default=False, metadata={"help": "after a sweep: the best settings of each k become the model's own defaults"}
    )
    output_dir: str = field(default="runs/fid", metadata={"help": "folder for results.json, results.md and pictures"})

    def __post_init__(self) -> None:
        if self.num_tokens is not None:
            check_num_tokens(self.num_tokens)
        least = {
            "num_samples": FEWEST, "batch_size": 1, "seed": 0,
            "max_reference": FEWEST, "num_workers": 0, "sheet_samples": 0,
        }  # fmt: skip
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise InputError(f"{name} is {value}; it must be at least {smallest}")
        if self.features is not None and self.inception_weights is not None:
            raise InputError("features and inception_weights are given, but one network looks; leave one out")
        if self.write_settings and self.sweep is None:
            raise InputError("write_settings is given, but only a sweep finds settings; give --sweep, or leave it out")
        for name in ("anchors", "save_images", "save_npz") if self.sweep is not None else ():
            if getattr(self, name):
                raise InputError(f"{name} does not go with sweep; leave it out, and measure the best settings with it")

    def budgets(self, num_channels: int) -> list[int]:
        """Each k to measure, rising.

        Raises:
            InputError: a k that the model does not have.
        """
        usual = [k for k in (1, 4, 16, 32, 64, 128, 256, 512) if k < num_channels]
        budgets = sorted(self.num_tokens or [*usual, num_channels])
        if budgets[-1] > num_channels:
            raise InputError(f"num_tokens has {budgets[-1]}; this model has 1..{num_channels}")
        return budgets


def sweep_settings(words: list[str], base: SamplingConfig) -> list[dict[str, float | int | str]]:
    """The combinations that "cfg_scale=1,2 temperature=0.9,1" asks for, in that order, the last name changing fastest.

    Args:
        words: a name of `SamplingConfig` and its values each.
        base: what the other fields are.

    Raises:
        InputError: an unknown or repeated name, or a value that it does not take.
    """
    plain = SamplingConfig()
    types: dict[str, type] = {entry.name: type(getattr(plain, entry.name)) for entry in fields(SamplingConfig)}
    combinations: list[dict[str, float | int | str]] = [{}]
    for word in words:
        name, _, listed = word.partition("=")
        name = name.replace("-", "_")
        values = [value for value in listed.split(",") if value]
        if name not in types or not values:
            raise InputError(f"sweep has {word!r}; give name=value,value,... with one of {', '.join(types)}")
        if name in combinations[0]:
            raise InputError(f"sweep names {name} twice; give all its values at once")
        try:
            parsed = [types[name](value) for value in values]
        except ValueError as error:
            raise InputError(f"sweep has {word!r}; {name} takes numbers of type {types[name].__name__}") from error
        if len(set(parsed)) < len(parsed):
            raise InputError(f"sweep has {word!r}; give each value once")
        combinations = [found | {name: value} for found in combinations for value in parsed]
    for found in combinations:
        replace(base, **found)  # type: ignore[arg-type]  # checks the values
    return combinations
