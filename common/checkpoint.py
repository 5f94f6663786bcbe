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
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.config import Config, InputError
from common.files import read_json, write_text, written_whole

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as one safetensors file, whole or not at all; `metadata` goes into its header."""
    with written_whole(path) as temporary:
        try:
            save_file({name: value.detach().contiguous().cpu() for name, value in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            if number := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
            raise


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Map a safetensors file into memory of the CPU; a missing or damaged one is an `InputError`."""
    load_tensors_metadata(path)
    return load_file(path)


def load_tensors_metadata(path: str | Path) -> dict[str, str]:
    """Metadata in the header of a safetensors file; may be empty. A missing or damaged one is an `InputError`."""
    if not Path(path).is_file():
        raise InputError(f"{path} is missing; give a folder or file that holds weights")
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file ({error}); copy or train it again") from error


def load_foreign_state(path: str | Path, state_key: str | None = None) -> dict[str, Tensor]:
    """Read weights of another program: .safetensors, or .ckpt/.pt/.pth of which only tensors are unpickled.

    Raises:
        InputError: no such file, another ending, a damaged file, more than plain tensors, or no entry `state_key`.
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
    """Yield a temporary .pth file of these tensors, for a library that reads weights from a path only."""
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
    """A local folder as it is; otherwise a model of that name, owner/model, is fetched from the Hugging Face hub.

    `hub_options` are those of `huggingface_hub.snapshot_download`: revision, token, cache_dir, local_files_only, ...
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
        """Load a folder, or a model owner/model of the Hugging Face hub, to the CPU, in evaluation mode, as `dtype`.

        `hub_options` are those of `resolve_folder`.

        Raises:
            InputError: a missing or damaged file, another kind of model, or weights that do not fit config.json or
                are not finite.
        """
        folder = resolve_folder(name_or_path, **hub_options)
        content = read_json(folder / CONFIG_FILE)
        kind = content.pop("model_type", None)
        if kind != cls.model_type:
            raise InputError(
                f"{folder} holds a model of type {kind!r}, needed is {cls.model_type!r}; give another folder"
            )
        with torch.device("meta"):
            model = cls(cls.config_class.from_file(content, folder / CONFIG_FILE))
        state = load_tensors(folder / WEIGHTS_FILE)
        shapes = [{name: tuple(value.shape) for name, value in s.items()} for s in (state, model.state_dict())]
        if wrong := sorted(dict(shapes[0].items() ^ shapes[1].items())):
            found, expected = (shape.get(wrong[0], "absent") for shape in shapes)
            raise InputError(
                f"{folder}: weights do not fit {CONFIG_FILE}, {len(wrong)} differ, first {wrong[0]} "
                f"(file: {found}, config: {expected}); the folder mixes two models"
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
        """Write config.json, then model.safetensors with weights of `dtype`, or the model's; each appears whole."""
        content = {"model_type": self.model_type, **asdict(self.config)}
        write_text(Path(folder) / CONFIG_FILE, json.dumps(content, indent=1))
        state = {name: value.to(dtype or value.dtype) for name, value in self.state_dict().items()}
        save_tensors(Path(folder) / WEIGHTS_FILE, state)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model to owner/model of the Hugging Face hub, created if necessary; returns the commit's URL.

        `options` are those of `huggingface_hub.HfApi.upload_folder`: path_in_repo, revision, ..., and token.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=options.pop("token", None))
        api.create_repo(repo_id, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))
