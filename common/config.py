"""Base of all configurations: dataclasses whose fields state help text, bounds and choices; imports no torch."""

import difflib
import math
import operator
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that says what was given, what is allowed and what to do. Scripts print it
    and exit with code 2; any other exception is a bug and keeps its traceback.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[str, ...] = get_args(Dtype)


def setting(
    default: Any = MISSING,
    help: str | None = None,
    *,
    unique: bool = False,
    reads: bool = False,
    **bounds: float,
) -> Any:
    """A field of a `Config`.

    Args:
        default: a list is copied for each instance; omitted: the field is required.
        help: shown by --help.
        unique: the list must have at least one entry, and each once.
        reads: the setting is a folder or file that is read, so that it cannot be the output folder.
        bounds: of a number, or of each entry of a list, as `check_range` takes them.
    """
    metadata = {"help": help, "bounds": bounds, "unique": unique, "reads": reads}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


def check_range(
    name: str,
    value: float,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> None:
    """Refuse a number outside an interval by an `InputError`; any bound excludes infinity and NaN."""
    bounds = [(operator.ge, ge), (operator.gt, gt), (operator.le, le), (operator.lt, lt)]
    if all(bound is None for _, bound in bounds):
        return
    finite = isinstance(value, int) or math.isfinite(value)  # integers may be too large for a float
    if finite and all(bound is None or check(value, bound) for check, bound in bounds):
        return
    if le is None and lt is None:
        allowed = f"at least {ge}" if gt is None else f"above {gt}"
    else:
        low = f"[{ge}" if gt is None else f"({gt}"
        allowed = f"in {low}, {le}]" if lt is None else f"in {low}, {lt})"
    raise InputError(f"{name} is {value}; it must be {'' if finite else 'finite and '}{allowed}")


def _checked(name: str, value: Any, hint: Any, bounds: dict[str, Any]) -> Any:
    """A value of the type of `hint`; numbers of NumPy become Python's."""
    if NoneType in get_args(hint):
        if value is None:
            return None
        (hint,) = (part for part in get_args(hint) if part is not NoneType)
    if get_origin(hint) is list:
        if not isinstance(value, list | tuple):
            raise InputError(f"{name} is {value!r}; it must be a list")
        return [_checked(name, entry, get_args(hint)[0], bounds) for entry in value]
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise InputError(f"{name} is {value!r}; it must be a mapping")
        return {key: _checked(f"{name} of {key}", entry, get_args(hint)[1], bounds) for key, entry in value.items()}
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise InputError(f"{name} is {value!r}; allowed: {', '.join(map(str, get_args(hint)))}")
        return value
    if hint in (int, float) and not isinstance(value, bool):
        if isinstance(value, Integral):
            value = int(value)
        elif isinstance(value, Real) and hint is float:
            value = float(value)
    if not isinstance(value, (int, float) if hint is float else hint) or (hint is not bool and isinstance(value, bool)):
        raise InputError(f"{name} is {value!r}; it must be of type {hint.__name__}")
    if hint in (int, float):
        check_range(name, value, **bounds)
    return value


@dataclass(frozen=True)
class Config:
    """Base of frozen dataclasses whose fields (`setting`) are checked: types, choices and bounds, or `InputError`."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for entry in fields(self):
            bounds = entry.metadata.get("bounds", {})
            value = _checked(entry.name, getattr(self, entry.name), hints[entry.name], bounds)
            if entry.metadata.get("unique") and value is not None and (not value or len(set(value)) < len(value)):
                raise InputError(f"{entry.name} is {value}; give one or more values, each once")
            object.__setattr__(self, entry.name, value)

    @classmethod
    def from_file(cls, content: Any, path: str | Path) -> Self:
        """Build from the content of a file; error messages show `path`.

        Raises:
            InputError: content that is not a mapping, unknown or missing keys, or values that are not allowed.
        """
        if not isinstance(content, dict):
            raise InputError(f"{path} holds no object with named values; restore it or create it again")
        known = {entry.name: entry.default is MISSING and entry.default_factory is MISSING for entry in fields(cls)}
        if unknown := [name for name in content if name not in known]:
            close = difflib.get_close_matches(str(unknown[0]), known, n=2) or sorted(known)
            raise InputError(f"{path}: unknown key {unknown[0]!r}; did you mean {' or '.join(close)}?")
        if missing := [name for name, required in known.items() if required and name not in content]:
            raise InputError(f"{path}: key {missing[0]!r} is missing; restore the file or create it again")
        try:
            return cls(**content)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


def integers(name: str, values: Sequence[int]) -> list[int]:
    """Integers of any kind (Python, NumPy, PyTorch) as Python's; other values are an `InputError`."""
    try:
        return [operator.index(value) for value in values]
    except TypeError as error:
        raise InputError(f"{name} has a value that is not an integer ({error}); give integers") from error


def report_lengths(given: Sequence[int] | None, num_channels: int, usual: Sequence[int]) -> list[int]:
    """Each k of a report, in increasing order: the given ones, or the usual ones below num_channels and that."""
    lengths = sorted(given or {*(k for k in usual if k < num_channels), num_channels})
    if lengths[-1] > num_channels:
        raise InputError(f"num_tokens has {lengths[-1]}; this model has 1..{num_channels}")
    return lengths


@dataclass(frozen=True, kw_only=True)
class LoopConfig(Config):
    """Settings of all training scripts. A step is one optimizer step over `batch_size` images."""

    output_dir: str = setting(help="folder for the model, checkpoints, pictures and log.jsonl")
    resume: bool = setting(False, "continue from the newest checkpoint in output_dir")
    steps: int = setting(100_000, "optimizer steps in all", ge=1, le=10**9)
    batch_size: int = setting(256, "images a step, over all processes together", ge=1, le=2**20)
    micro_batch_size: int | None = setting(
        None, "images a process handles at a time, adding up gradients; default: all its own", ge=1, le=2**20
    )
    learning_rate: float = setting(4e-4, "peak learning rate", gt=0)
    min_learning_rate: float = setting(0.0, "learning rate at the last step of a cosine", ge=0)
    schedule: Literal["cosine", "constant"] = setting("cosine", "of the learning rate, after the warm-up")
    warmup_steps: int = setting(1000, "steps of linear warm-up", ge=0)
    weight_decay: float = setting(0.05, "AdamW weight decay, on matrices only", ge=0)
    beta1: float = setting(0.9, "AdamW beta1", ge=0, lt=1)
    beta2: float = setting(0.95, "AdamW beta2", ge=0, lt=1)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", gt=0)
    ema_decay: float = setting(0.9999, "decay of the averaged weights; 0 = the last ones", ge=0, lt=1)
    mixed_precision: Literal["auto", "no", "bf16"] = setting("auto", "auto = bf16 where the device has it in hardware")
    seed: int = setting(0, "decides initial weights, data order and every draw", ge=0, lt=2**63)
    num_workers: int = setting(1, "processes that read data, for each training process", ge=0, le=256)
    evaluate_every: int = setting(1000, "steps between evaluations, each with a picture", ge=1)
    checkpoint_every: int = setting(1000, "steps between checkpoints", ge=1)
    keep_checkpoints: int = setting(2, "how many of the newest checkpoints stay", ge=1)
    trackers: list[str] = setting([], "accelerate's trackers to log to, for example tensorboard or wandb")
    compile: bool = setting(False, "compile the network with torch.compile")


@dataclass(frozen=True, kw_only=True)
class ModelTrainingConfig(LoopConfig):
    """Settings of the training of a tokenizer, a generator or a refiner."""

    init_from: str | None = setting(None, "folder of a trained model of the same kind to start from", reads=True)
    save_dtype: Dtype = setting("float32", "number format of the exported weights")
    validation_images: int = setting(2000, "held-out images that an evaluation uses", ge=1)


@dataclass(frozen=True)
class Refinement(Config):
    """How images are refined.

    Attributes:
        steps: of the integration; each costs two passes of the network, the last one a single pass.
        cfg_scale: classifier-free guidance; 1 = off.
        temperature: standard deviation of the noise; below 1 less detail is drawn, and with it fewer errors.
    """

    steps: int = setting(4, ge=1, le=10**9)
    cfg_scale: float = setting(1.0, ge=0, le=100)
    temperature: float = setting(1.0, ge=0, le=2)
