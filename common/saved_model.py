"""Models saved as a folder: config.json, a `Config`, and model.safetensors."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import nn

from common.checkpoint import load_tensors, read_json, resolve_folder, save_tensors, write_text
from common.config import Config
from common.errors import InputError

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
TRANSFORMERS_KEYS = {"architectures", "dtype", "transformers_version"}  # in files that earlier versions wrote
C = TypeVar("C", bound=Config)


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
            InputError: a missing or damaged file, another kind of model, or weights that do not fit config.json.
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
        model.load_state_dict({name: value.to(dtype, copy=True) for name, value in state.items()}, assign=True)
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
