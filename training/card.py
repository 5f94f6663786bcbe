"""Model card: README.md in a run's folder, in the form of the Hugging Face hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import write_text

CARD = "README.md"


def write_card(folder: Path, kind: str, step: int, settings: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Write the card of a model that is saved.

    Args:
        folder: of the run.
        kind: name of the trainer.
        step: of the saved weights.
        settings: of the run, by name; paths and unset ones are omitted.
        figures: of the last evaluation, by name; only numbers are shown.
    """
    flat = {**settings, **{k: v for group in settings.values() if isinstance(group, dict) for k, v in group.items()}}
    shown = {
        name: value
        for name, value in flat.items()
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
