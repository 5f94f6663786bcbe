"""Runs of train_ar.py as a cluster treats them: several processes, shards, kills, a full disk, a polite end (law 8)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Finished, ScriptRunner
from safetensors.numpy import load_file

FLAGS: list[object] = [
    *("--num-layers", 2, "--num-heads", 2, "--hidden-size", 32, "--intermediate-size", 64),
    *("--steps", 12, "--batch-size", 16, "--warmup-steps", 3, "--learning-rate", 0.01, "--ema-decay", 0.9),
    *("--checkpoint-every", 2, "--evaluate-every", 6, "--validation-images", 8, "--dropout", 0.1),
    *("--num-workers", 0, "--mixed-precision", "no", "--seed", 3),
]
RESULTS = ("generator/model.safetensors", "log.jsonl", "checkpoints/step-00000012/training.safetensors")
Train = Callable[..., Finished]


@pytest.fixture(scope="module")
def train(scripts: ScriptRunner, token_store: Path) -> Train:
    def run(output_dir: Path, *more: object, **how: Any) -> Finished:
        done = scripts("train_ar.py", "--tokens", token_store, "--output-dir", output_dir, *FLAGS, *more, **how)
        assert "Traceback" not in done.err, done.err
        return done

    return run


@pytest.fixture(scope="module")
def unbroken(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert train(folder).code == 0
    return folder


def curve(folder: Path) -> list[dict[str, Any]]:
    """Figures of training, without the evaluations."""
    return [r for r in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in r]


def same(found: Path, expected: Path) -> None:
    for name in RESULTS:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    assert not list(found.rglob(".*"))


# ------------------------------------------------------------------------------------- several processes

# accelerate takes FSDP up on GPUs only; from here on it goes the same way on the CPU
SHARDED = """
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
real = Accelerator.__init__
def start(self, *arguments, **options):
    real(self, *arguments, **options)
    self.state.distributed_type = DistributedType.FSDP
    self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    )
Accelerator.__init__ = start
"""
WITHOUT_DROPOUT = ("--dropout", 0, "--attention-dropout", 0)  # whose draws are each process's own


@pytest.fixture(scope="module")
def alone(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert train(folder, *WITHOUT_DROPOUT).code == 0
    return folder


@pytest.mark.parametrize(
    ("processes", "before", "flags"),
    [
        (2, "", ()),
        (4, "", ("--micro-batch-size", 2)),
        (2, SHARDED, ()),
        (2, SHARDED, ("--micro-batch-size", 4, "--gradient-checkpointing", "true", "--loss-chunk", 32)),
    ],
)
def test_many_processes_give_the_losses_of_one(
    train: Train, alone: Path, tmp_path: Path, processes: int, before: str, flags: tuple[object, ...]
) -> None:
    done = train(tmp_path / "many", *WITHOUT_DROPOUT, *flags, processes=processes, before=before)
    assert done.code == 0, done.err
    found, expected = curve(tmp_path / "many"), curve(alone)
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4), theirs["step"]
    one, many = (load_file(folder / RESULTS[0]) for folder in (alone, tmp_path / "many"))
    assert one.keys() == many.keys()
    assert all(np.allclose(one[name], many[name], atol=2e-3) for name in one)
    assert any((one[name] != many[name]).any() for name in one)  # it was another sum, not another copy
    # whoever goes on with it does not need as many processes
    checkpoints = [load_file(folder / RESULTS[2]) for folder in (alone, tmp_path / "many")]
    assert {name: value.shape for name, value in checkpoints[0].items()} == {
        name: value.shape for name, value in checkpoints[1].items()
    }
