"""Checkpoints of a run: folders that are complete or absent, of which the newest few are kept."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from common.checkpoint import load_tensors, save_tensors
from common.errors import InputError
from common.files import folder_written_whole, read_json, write_text


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """{"model": {"num_bits": 4}} -> {"model.num_bits": 4}, so that a message can name the one that differs."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


class Checkpoints:
    """The folders checkpoints/step-NNNNNNNN of a run; each is complete or absent."""

    def __init__(self, output_dir: str | Path, keep: int):
        self.folder = Path(output_dir) / "checkpoints"
        self.keep = keep

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))

    def save(self, step: int, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
        """Write the state after `step` steps and remove those beyond the newest `keep`."""
        with folder_written_whole(self.folder / f"step-{step:08d}") as temporary:
            save_tensors(temporary / "training.safetensors", tensors)
            write_text(temporary / "training.json", json.dumps({"step": step, "settings": settings}, indent=1))
        for partial in self.folder.glob(".step-*.partial"):
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it wrote
        for old in self.all()[: -self.keep]:
            # out of sight first: a kill while its files go must not leave a part under the name of a whole
            shutil.rmtree(old.rename(self.folder / f".{old.name}.partial"))

    def load(self, settings: dict[str, Any]) -> tuple[int, dict[str, Tensor]]:
        """The newest state; its settings must be those of this run."""
        found = self.all()
        if not found:
            raise InputError(f"nothing to resume in {self.folder}; omit --resume to start a new run")
        record = read_json(found[-1] / "training.json")
        then, now = _flat(record["settings"]), _flat(settings)
        for name, value in now.items():
            if name not in then:
                raise InputError(
                    f"{found[-1]} has no setting {name}: it was trained with another version of this program; "
                    "start a new run in another output_dir"
                )
            if then[name] != value:
                raise InputError(
                    f"{found[-1]} was trained with {name} = {then[name]}, now it is {value}; "
                    "resume with the same settings or choose another output_dir"
                )
        return record["step"], load_tensors(found[-1] / "training.safetensors")
