"""What the tests of benchmark.py fid share: its command line, and how its results are read."""

import json
from pathlib import Path
from typing import Any

N = 23  # no multiple of the batch of 5, nor of 5 classes
NO_PLOTS = "import evaluation.fid.report as r; r.save_line_plot = lambda *arguments, **options: None\n"
TIMES = {"draw_seconds", "decode_seconds"}


def words(model: Path, photographs: Path, classifier: Path, output: Path) -> list[Any]:
    flags = ["fid", "--model", model, "--reference", photographs, "--features", classifier, "--output-dir", output]
    return [*flags, "--num-samples", N, "--batch-size", 5, "--num-tokens", 2, 7, 16, "--num-workers", 0]


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows without what a clock says."""
    return [{name: row[name] for name in row.keys() - TIMES} for row in results(folder)["rows"]]


def classes_of(count: int) -> list[int]:
    """The classes of the first samples of the tiny model's 5, as the run that is tested here has them."""
    return [[3, 1, 0, 4, 2][i % 5] for i in range(count)]


def measure(scripts: Any, *flags: Any, before: str = "", **options: Any) -> Any:
    """Run benchmark.py without the plot, which takes longer than the rest; `measured` of conftest draws it."""
    return scripts("benchmark.py", *flags, before=NO_PLOTS + before, **options)
