"""Checkpoints of a run, folders that are complete or absent, and its log."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from common.checkpoint import load_tensors, save_tensors
from common.errors import InputError
from common.files import folder_written_whole, read_json, write_text

# settings that a resumed run may change; with other `steps` the schedule is the new one from there on
MAY_CHANGE = frozenset(
    {"steps", "output_dir", "resume", "num_workers", "evaluate_every", "checkpoint_every", "keep_checkpoints"}
    | {"data_dir", "tokens", "tokenizer", "class_names", "strict", "compile", "validation_images", "trackers"}
    | {"gradient_checkpointing", "micro_batch_size", "save_dtype", "init_from"}
    | {"learning_rate", "min_learning_rate", "max_grad_norm"}  # to continue a run whose loss became NaN
)


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """{"model": {"num_bits": 4}} -> {"model.num_bits": 4}, so that a message can name the one that differs."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


class CheckpointTensors(dict[str, Tensor]):
    """Tensors of a checkpoint; a missing name is an `InputError`."""

    def __missing__(self, name: str) -> Tensor:
        raise InputError(f"the checkpoint has no tensor {name}; remove it to resume from an older one")


class Checkpoints:
    """The folders checkpoints/step-NNNNNNNN of a run, of which the newest `keep` stay."""

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
            # renamed first: a kill while its files are removed must not leave an incomplete checkpoint
            shutil.rmtree(old.rename(self.folder / f".{old.name}.partial"))

    def load(self, settings: dict[str, Any]) -> tuple[int, dict[str, Tensor]]:
        """Step and tensors of the newest checkpoint.

        Raises:
            InputError: there is none, it is damaged, or its settings differ from these.
        """
        found = self.all()
        if not found:
            raise InputError(f"nothing to resume in {self.folder}; omit --resume to start a new run")
        record = read_json(found[-1] / "training.json")
        if not isinstance(record.get("settings"), dict) or record.get("step") != int(found[-1].name[5:]):
            raise InputError(
                f"{found[-1]}/training.json is damaged; remove this checkpoint to resume from an older one"
            )
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
        return record["step"], CheckpointTensors(load_tensors(found[-1] / "training.safetensors"))


class RunLog:
    """log.jsonl: lines {"step": n, "loss": ...} of training and {"step": n, "evaluation": {...}} of evaluations."""

    def __init__(self, output_dir: str | Path):
        self.path = Path(output_dir) / "log.jsonl"

    def append(self, record: dict[str, Any]) -> None:
        """Add a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """All complete lines; the last one may have been cut short by a kill or a full disk."""
        if not self.path.is_file():
            return []
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            records = [json.loads(line) for line in lines if line.endswith("\n")]
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path} is damaged ({error}); restore or remove it") from error
        if not all(isinstance(record, dict) and isinstance(record.get("step"), int) for record in records):
            raise InputError(f"{self.path} has a line that is not a record with a step; restore or remove it")
        return records

    def evaluations(self) -> dict[int, dict[str, Any]]:
        """The figures of all evaluations, by step."""
        return {record["step"]: record["evaluation"] for record in self.records() if "evaluation" in record}

    def cut(self, step: int) -> None:
        """Remove the records after a step, from which the run continues; 0 removes all."""
        if self.path.is_file():
            write_text(self.path, "".join(json.dumps(r) + "\n" for r in self.records() if r["step"] <= step))
