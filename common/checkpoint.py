"""Reading and writing of weights and models."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.config import Config
from common.errors import InputError
from common.files import read_json, write_text, written_whole

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
TRANSFORMERS_KEYS = {"architectures", "dtype", "transformers_version"}  # in files that earlier versions wrote
C = TypeVar("C", bound=Config)


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Raise write errors of safetensors as OSError with their error number."""
    try:
        yield
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as one safetensors file, whole or not at all; `metadata` goes into its header."""
    with written_whole(path) as temporary, _disk_errors():
        save_file({name: value.detach().contiguous().cpu() for name, value in tensors.items()}, temporary, metadata)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file to the CPU; a missing or damaged one is an `InputError`."""
    _check_safetensors(Path(path))
    return load_file(path)


def load_tensor(path: str | Path, name: str) -> Tensor:
    """Read one tensor of a safetensors file; KeyError if it has no tensor of that name."""
    _check_safetensors(Path(path))
    with safe_open(path, "pt") as file:
        if name not in file.keys():  # noqa: SIM118 - it is no dictionary
            raise KeyError(name)
        tensor: Tensor = file.get_tensor(name)
        return tensor


def load_tensors_metadata(path: str | Path) -> dict[str, str]:
    """Metadata in the header of a safetensors file; may be empty."""
    _check_safetensors(Path(path))
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def _check_safetensors(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{path} is missing; give a folder or file that holds weights")
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file ({error}); copy or train it again") from error


def load_foreign_state(path: str | Path, state_key: str | None = None) -> dict[str, Tensor]:
    """Read weights of another program: .safetensors, or .ckpt/.pt/.pth of which only tensors are unpickled.

    Raises:
        InputError: no such file, another ending, a damaged file, one that holds more than plain
            tensors (it is refused, never run), or no entry `state_key`.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_tensors(path)
    if path.suffix not in (".ckpt", ".pt", ".pth"):
        raise InputError(f"{path} ends in {path.suffix!r}; allowed are .safetensors, .ckpt, .pt and .pth")
    if not path.is_file():
        raise InputError(f"{path} is missing; give the checkpoint's path")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - the one allowed place
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} is damaged or holds more than tensors and was not opened ({reason})") from error
    state = content if state_key is None else content.get(state_key) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        entries = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise InputError(
            f"{path}: state_key {state_key!r} holds no dictionary of weights; the file holds {entries}"[:300]
        )
    return state


@contextmanager
def as_torch_file(tensors: dict[str, Tensor]) -> Iterator[Path]:
    """Yield a temporary .pth file of these tensors, for a library that reads weights from a path and from nothing else.

    Its folder is open to this user alone, and gone when the block ends.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(tensors, path)
        yield path


def fingerprint(model: nn.Module) -> str:
    """Hash of a model's weights, their names, shapes and types: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def files_fingerprint(folder: str | Path) -> str:
    """Hash of the weight files of a folder: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def resolve_folder(name_or_path: str | Path, **hub_options: Any) -> Path:
    """A local folder as it is; otherwise a model of that name is fetched from the Hugging Face hub.

    Args:
        name_or_path: the folder, or owner/model.
        hub_options: of `huggingface_hub.snapshot_download`: revision, cache_dir, token, local_files_only, ...

    Raises:
        InputError: neither a folder, nor a model that the hub gives.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    name = str(name_or_path)
    if name.count("/") != 1 or name.startswith(("/", ".")):
        raise InputError(f"{name} is no folder; give a model folder, or a hub name like owner/model")
    # here, because most commands do not need it and it takes a second to import
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, **hub_options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{name} is no folder here and the hub did not give it ({reason})") from error


class SavedModel(nn.Module):
    """A network that is saved as a folder of config.json and model.safetensors.

    Subclasses define `config_class`, a `Config`, and `model_type`, which config.json names.
    """

    config_class: ClassVar[type[Config]]
    model_type: ClassVar[str]

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return next(self.parameters()).dtype

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, dtype: torch.dtype = torch.float32, **hub_options: Any
    ) -> Self:
        """Load a folder, or a model of that name from the Hugging Face hub, to the CPU, in evaluation mode.

        Args:
            name_or_path: the folder, or owner/model.
            dtype: number format of the weights, whatever the file has.
            hub_options: see `resolve_folder`.

        Raises:
            InputError: a missing or damaged file, another kind of model, or weights that do not fit config.json or
                are not finite.
        """
        folder = resolve_folder(name_or_path, **hub_options)
        config = read_config(folder / CONFIG_FILE, cls.config_class, cls.model_type)
        with torch.device("meta"):
            model = cls(config)
        state = load_tensors(folder / WEIGHTS_FILE)
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        if wrong:
            raise InputError(
                f"{folder}: weights do not fit {CONFIG_FILE}, {len(wrong)} differ, first {wrong[0]} "
                f"(file: {found.get(wrong[0], 'absent')}, config: {expected.get(wrong[0], 'absent')}); "
                "the folder mixes two models"
            )
        # a copy: the file's own tensors are a map of it, and would change or fail with the file
        state = {name: value.to(dtype, copy=True) for name, value in state.items()}
        for name, value in state.items():
            # a sum takes a third of the time of isfinite().all()
            if not bool(value.sum(dtype=torch.float32).isfinite()):
                raise InputError(f"{folder}: {name} has entries that are not finite; copy or train the model again")
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(True).eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json, then model.safetensors; each appears whole.

        Args:
            folder: created if necessary.
            dtype: number format of the weights in the file; None keeps the model's.
        """
        write_text(Path(folder) / CONFIG_FILE, config_text(self.config, self.model_type))
        state = {name: value.to(dtype or value.dtype) for name, value in self.state_dict().items()}
        save_tensors(Path(folder) / WEIGHTS_FILE, state)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model to the Hugging Face hub and return the commit's URL.

        Args:
            repo_id: owner/model; created if necessary.
            options: of `huggingface_hub.HfApi.upload_folder`, for example path_in_repo, revision, token.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=options.pop("token", None))
        api.create_repo(repo_id, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))


def config_text(config: Any, model_type: str) -> str:
    """The content of config.json for a dataclass."""
    return json.dumps({"model_type": model_type, **asdict(config)}, indent=1)


def read_config(path: Path, kind: type[C], model_type: str) -> C:
    """Read a config.json into a dataclass.

    Raises:
        InputError: a missing or damaged file, another kind of model, unknown or missing keys, or values that the
            dataclass refuses.
    """
    content = read_json(path)
    found = content.pop("model_type", None)
    if found != model_type:
        raise InputError(
            f"{path.parent} holds a model of type {found!r}, needed is {model_type!r}; "
            "give another folder, or train the model again if an earlier version wrote it"
        )
    return kind.from_file({name: value for name, value in content.items() if name not in TRANSFORMERS_KEYS}, path)
