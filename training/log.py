"""The log of a run, log.jsonl: one JSON object a line, of which each appears once however often the run was resumed."""

import json
from pathlib import Path
from typing import Any

from common.files import write_text


class JsonlLog:
    """Lines {"step": n, "loss": ...} of training and {"step": n, "evaluation": {...}} of evaluations."""

    def __init__(self, output_dir: str | Path):
        self.path = Path(output_dir) / "log.jsonl"

    def append(self, record: dict[str, Any]) -> None:
        """Add a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """All whole lines; the last one may have been cut short by a kill or a full disk."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def evaluations(self) -> dict[int, dict[str, Any]]:
        """The figures of all evaluations, by step."""
        return {record["step"]: record["evaluation"] for record in self.records() if "evaluation" in record}

    def cut(self, step: int) -> None:
        """Remove the records after a step, from which the run continues."""
        if self.path.is_file():
            kept = [json.dumps(record) + "\n" for record in self.records() if record["step"] <= step]
            write_text(self.path, "".join(kept))

    def begin(self) -> None:
        """Forget all, of a run that ended before its first checkpoint."""
        self.path.unlink(missing_ok=True)
