"""`benchmark.py features`: a classifier of two colours, what is written of it, and runs that are killed or refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Finished, ScriptRunner
from PIL import Image
from torch.nn import functional as F

from common.images import load_image, to_float
from tokenizer.classifier import PictureClassifier

SIZE = 16
Run = Callable[..., Finished]
FLAGS = [
    *("--classifier-size", SIZE, "--widths", 8, 16, "--steps", 30, "--batch-size", 8, "--warmup-steps", 3),
    *("--learning-rate", 0.01, "--ema-decay", 0.8, "--evaluate-every", 15, "--checkpoint-every", 10),
    *("--num-workers", 0, "--mixed-precision", "no", "--seed", 3),
]
# SIGKILL some steps after the first checkpoint
KILL_IN_STEP = """
import os, signal
from training.trainer import Trainer
step = Trainer._step
def killed(self, *arguments):
    if self.step == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self, *arguments)
Trainer._step = killed
"""


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy red pictures in n01/, blue ones in n02/: 24 to train on, 10 held out."""
    folder = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(9)
    for split, count in (("train", 12), ("val", 5)):
        for name, colour in (("n01", (190, 40, 40)), ("n02", (40, 40, 190))):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.array(colour) + rng.integers(-40, 41, (18, 22 + i, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def train(scripts: ScriptRunner, colours: Path) -> Run:
    names = colours / "names.json"
    names.write_text(json.dumps({"n01": "a red one", "n09": "none of these"}))

    def run(output_dir: Path, *more: object, data_dir: Path = colours, before: str = "") -> Finished:
        words = ["--data-dir", data_dir, "--output-dir", output_dir, "--class-names", names, *FLAGS, *more]
        return scripts("benchmark.py", "features", *words, before=before)

    return run


@pytest.fixture(scope="module")
def unbroken(train: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    done = train(folder)
    assert (done.code, "Traceback" in done.err) == (0, False), done.err
    return folder


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_two_colours_are_distinguished(unbroken: Path) -> None:
    assert {path.name for path in unbroken.iterdir()} == {
        "README.md", "features.safetensors", "checkpoints", "log.jsonl",
    }  # fmt: skip
    evaluations = {entry["step"]: entry["evaluation"] for entry in log(unbroken) if "evaluation" in entry}
    assert evaluations.keys() == {15, 30}
    assert evaluations[30]["accuracy"] == 1
    assert evaluations[30]["nats"] < 0.3  # 0.69 is that of guesses
    losses = [entry for entry in log(unbroken) if "loss" in entry]
    assert losses[-1]["accuracy"] == 1
    # labels of 0.95 and 0.05: the default smoothing leaves no less than their entropy, and it is part of the loss
    assert 0.198 < losses[-1]["loss"] < 0.35


def test_the_figures_are_those_of_the_held_out_pictures(unbroken: Path, colours: Path) -> None:
    model = PictureClassifier.load(unbroken / "features.safetensors")
    paths = sorted((colours / "val").glob("*/*"))
    logits = model(to_float(torch.stack([load_image(path, SIZE) for path in paths])))
    nats = F.cross_entropy(logits, torch.tensor([0] * 5 + [1] * 5))
    figures = log(unbroken)[-1]["evaluation"]
    assert figures["nats"] == pytest.approx(float(nats), rel=0.05, abs=2e-3)  # the file's weights are rounded
    assert model.class_names == ["a red one", "n02"]  # a folder without a name keeps its own


def test_a_killed_and_resumed_run_gives_the_bits_of_an_unbroken_one(train: Run, unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train(folder, before=KILL_IN_STEP).code == -9
    done = train(folder, "--resume", "--num-workers", 1)
    assert done.code == 0, done.err
    assert "resumed at step 10 of 30" in done.err
    for name in ("features.safetensors", "log.jsonl", "checkpoints/step-00000030/training.safetensors"):
        assert (folder / name).read_bytes() == (unbroken / name).read_bytes(), name
    done = train(folder, "--resume", "--widths", 8)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "with model.widths = " in done.err


def test_unreadable_pictures_are_named_once(train: Run, colours: Path, tmp_path: Path) -> None:
    shutil.copytree(colours, tmp_path / "data")
    broken = [tmp_path / "data" / name for name in ("train/n01/03.png", "val/n02/04.png")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    done = train(tmp_path / "run", data_dir=tmp_path / "data")
    assert done.code == 0, done.err
    for path in broken:
        assert done.err.count(f"skipped unreadable image {path}") == 1
    assert "2 unreadable images were skipped" in done.err
    assert log(tmp_path / "run")[-1]["evaluation"]["accuracy"] == 1
