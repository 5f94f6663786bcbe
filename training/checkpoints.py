"""Files of a run: checkpoints, folders that are complete or absent; its log; and the card of its model."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from common.checkpoint import load_tensors, save_tensors
from common.config import InputError
from common.files import folder_written_whole, read_json, write_text

# settings that a resumed run may change; with other `steps` the schedule is the new one from there on
MAY_CHANGE = frozenset(
    {"steps", "output_dir", "resume", "num_workers", "evaluate_every", "checkpoint_every", "keep_checkpoints"}
    | {"data_dir", "tokens", "tokenizer", "class_names", "strict", "compile", "validation_images", "trackers"}
    | {"gradient_checkpointing", "micro_batch_size", "save_dtype", "init_from"}
    | {"learning_rate", "min_learning_rate", "max_grad_norm"}  # to continue a run whose loss became NaN
)
CARD = "README.md"


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"model": {"num_bits": 4}} -> {"model.num_bits": 4}, so that a message can name the one that differs."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def write_card(folder: Path, kind: str, step: int, settings: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Write a model card, README.md in the form of the Hugging Face hub.

    Args:
        folder: of the run.
        kind: name of the trainer.
        step: of the saved weights.
        settings: of the run, by name; paths and unset ones are omitted.
        figures: of the last evaluation, by name; only numbers are shown.
    """
    shown = {
        name.rpartition(".")[2]: value
        for name, value in _flat(settings).items()
        if value is not None and not isinstance(value, dict) and "/" not in str(value) and len(str(value)) < 80
    }
    lines = [
        "---", "tags:", "- channeltok", "- image-generation", "---", "",
        f"# ChannelTok {kind.removesuffix('Trainer').lower()}", "",
        f"Weights after step {step:,} of a training with ChannelTok. The method: "
        "[arXiv 2606.04461](https://arxiv.org/abs/2606.04461).", "",
        "## Evaluation on held-out data", "",
        *(f"- {name}: {value}" for name, value in figures.items() if isinstance(value, int | float)), "",
        "## Settings", "",
        *(f"- {name}: {value}" for name, value in shown.items()), "",
        "## Before you publish", "",
        "Add the data set, its license and that of these weights, what the model is for, and where it fails: classes "
        "that are drawn badly, and what the data does not show. The figures above compare runs on the same data only.",
        "",
    ]  # fmt: skip
    write_text(folder / CARD, "\n".join(lines))


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
        """Step and tensors of the newest checkpoint; an `InputError` if it is damaged or its settings differ."""
        found = self.all()
        if not found:
            raise InputError(f"nothing to resume in {self.folder}; omit --resume to start a new run")
        record = read_json(found[-1] / "training.json")
        if not isinstance(record.get("settings"), dict) or record.get("step") != int(found[-1].name[5:]):
            raise InputError(f"{found[-1]} is damaged; remove it to resume from an older one")
        then, now = _flat(record["settings"]), _flat(settings)
        if changed := then.keys() ^ now.keys():
            raise InputError(
                f"{found[-1]} is of another version of this program, in which the setting {min(changed)} differs; "
                "start a new run in another output_dir"
            )
        for name, value in now.items():
            if then[name] != value:
                raise InputError(
                    f"{found[-1]} was trained with {name} = {then[name]}, now it is {value}; "
                    "resume with the same settings or choose another output_dir"
                )
        return record["step"], load_tensors(found[-1] / "training.safetensors")


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
