"""Runs of train_ar.py on a cluster: several processes, shards, kills, signals, a full disk (law 8)."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPO, Finished, ScriptRunner
from safetensors.numpy import load_file

FLAGS: list[object] = [
    *("--num-layers", 2, "--num-heads", 2, "--hidden-size", 32, "--intermediate-size", 64),
    *("--steps", 12, "--batch-size", 16, "--warmup-steps", 3, "--learning-rate", 0.01, "--ema-decay", 0.9),
    *("--checkpoint-every", 2, "--evaluate-every", 6, "--validation-images", 8, "--dropout", 0.1),
    *("--num-workers", 0, "--mixed-precision", "no", "--seed", 3, "--prior-steps", 20),
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


# accelerate uses FSDP on GPUs only; the rest of it works on the CPU as well
SHARDED = """
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
real = Accelerator.__init__
def start(self, *arguments, **options):
    real(self, *arguments, **options)
    self.state.distributed_type = DistributedType.FSDP
    self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
    )
Accelerator.__init__ = start
"""
WITHOUT_DROPOUT = ("--dropout", 0)  # dropout differs between processes


@pytest.fixture(scope="module")
def alone(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert train(folder, *WITHOUT_DROPOUT).code == 0
    return folder


@pytest.mark.parametrize(
    ("processes", "before", "flags"),
    [
        (4, "", ("--micro-batch-size", 2)),
        (2, SHARDED, ("--micro-batch-size", 4, "--gradient-checkpointing", "true")),
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
    assert any((one[name] != many[name]).any() for name in one)  # computed as another sum
    # so that any number of processes can resume it
    checkpoints = [load_file(folder / RESULTS[2]) for folder in (alone, tmp_path / "many")]
    assert {name: value.shape for name, value in checkpoints[0].items()} == {
        name: value.shape for name, value in checkpoints[1].items()
    }


def test_the_two_process_command_of_the_docs_runs(token_store: Path, tmp_path: Path) -> None:
    lines = (REPO / "docs" / "training.md").read_text().splitlines()
    (command,) = [line for line in lines if line.startswith("ACCELERATE_USE_CPU=true torchrun") and "train_ar" in line]
    for name in ("train_ar.py", "configs"):
        (tmp_path / name).symlink_to(REPO / name)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tokens").symlink_to(token_store)
    smaller = "--prior-steps 2 --steps 2 --batch-size 4 --num-layers 1 --num-workers 0 --warmup-steps 1"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        f"{command} {smaller}",
        shell=True, cwd=tmp_path, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "two" / "loss.png").is_file()


@pytest.mark.parametrize(
    ("before", "named"),
    [
        ("import os; os.environ['ACCELERATE_USE_FSDP'] = 'true'", "omit --use_fsdp"),
        (SHARDED.replace('"transformer_based_wrap"', '"size_based_wrap"'), "auto_wrap_policy SIZE_BASED_WRAP"),
        (SHARDED.replace("_version=2", "_version=2, activation_checkpointing=True"), "activation_checkpointing"),
        (SHARDED.replace("_version=2", "_version=2, cpu_offload=True"), "offload_params"),
    ],
)
def test_unsupported_sharding_is_refused(train: Train, tmp_path: Path, before: str, named: str) -> None:
    done = train(tmp_path / "run", before=before)
    assert done.code == 2, done.err
    assert named in done.err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_sharded_run_is_resumed_by_shards_exactly(train: Train, tmp_path: Path) -> None:
    """In bfloat16, with weights sent from the first process to the others, as accelerate's launcher does."""
    sharded = SHARDED.replace("fsdp_version=2", "fsdp_version=2, cpu_ram_efficient_loading=True")
    flags = ("--mixed-precision", "bf16", "--steps", 6)
    assert train(tmp_path / "whole", *flags, processes=2, before=sharded).code == 0
    stop = sharded + STOP.format(step=3, who="0")
    done = train(tmp_path / "stopped", *flags, processes=2, before=stop)
    assert "stopped at step 3 of 6" in done.err
    assert train(tmp_path / "stopped", *flags, "--resume", processes=2, before=sharded).code == 0
    for name in ("generator/model.safetensors", "log.jsonl", "checkpoints/step-00000006/training.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    found = load_file(tmp_path / "whole/generator/model.safetensors")
    assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in found.values())


# stops the process of a rank after a step
STOP = """
import os, signal
from training.trainer import Trainer
step = Trainer._step
def stopping(self, *arguments):
    step(self, *arguments)
    if self.step == {step} and os.environ.get("RANK", "0") == "{who}":
        os.kill(os.getpid(), signal.SIGTERM)
Trainer._step = stopping
"""


def test_a_sharded_run_is_resumed_by_one_process(train: Train, alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stop = SHARDED + STOP.format(step=7, who="1")
    assert train(folder, *WITHOUT_DROPOUT, processes=2, before=stop).code == 0
    assert (folder / "checkpoints" / "step-00000007").is_dir()
    assert train(folder, *WITHOUT_DROPOUT, "--resume").code == 0
    for ours, theirs in zip(curve(folder), curve(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 7))])
def test_sigkill_at_random_times_does_not_change_the_result(
    scripts: ScriptRunner, train: Train, token_store: Path, unbroken: Path, tmp_path: Path, seed: int
) -> None:
    """Two real kills each, from outside, a moment after a checkpoint begins or ends."""
    rng, folder = random.Random(seed), tmp_path / "run"
    checkpoints = folder / "checkpoints"
    for kill in range(2):
        wanted = 1 + 3 * kill + rng.randrange(3)  # of the six checkpoints
        # a run without a complete checkpoint starts again
        resume = ("--resume",) if list(checkpoints.glob("step-*")) else ()
        words = [*FLAGS, "--keep-checkpoints", 6, *resume]
        run = scripts.start("train_ar.py", "--tokens", token_store, "--output-dir", folder, *words, before=SLOW_STEPS)
        # half of the kills happen while a checkpoint is written
        pattern = "*step-*" if rng.random() < 0.5 else "step-*"
        while run.poll() is None and len(list(checkpoints.glob(pattern))) < wanted:
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.03))
        run.kill()
        assert run.wait().code == -signal.SIGKILL
        for path in checkpoints.glob("step-*"):
            assert {file.name for file in path.iterdir()} == {"training.safetensors", "training.json"}
    done = train(folder, "--keep-checkpoints", 6, "--resume")
    assert done.code == 0, done.err
    assert "resumed at step" in done.err
    same(folder, unbroken)


# slow steps and a slow disk, so that a kill can be timed
SLOW_STEPS = """
import time
from common import files
from training.trainer import Trainer
step, sync = Trainer._step, files._sync
Trainer._step = lambda self, *arguments: (time.sleep(0.02), step(self, *arguments))[1]
files._sync = lambda path: (time.sleep(0.01), sync(path))[1]
"""


# a launcher sends signals one after the other: to this process when all are saving already
LATE = """
from training import checkpoints as resuming
save = resuming.Checkpoints.save
def signalled(self, *arguments):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
    save(self, *arguments)
resuming.Checkpoints.save = signalled
"""


@pytest.mark.parametrize(("step", "processes", "who"), [(5, 1, 0), (7, 2, 1), (12, 1, 0)])
def test_sigterm_saves_a_checkpoint(
    train: Train, unbroken: Path, alone: Path, tmp_path: Path, step: int, processes: int, who: int
) -> None:
    """Whichever process receives it, and receives it again: all stop after the same step."""
    folder = tmp_path / "run"
    flags = ("--checkpoint-every", 12, *WITHOUT_DROPOUT) if processes > 1 else ()
    stop = STOP.format(step=step, who=who) + (LATE if processes > 1 else "")
    done = train(folder, *flags, processes=processes, before=stop)
    assert done.code == 0, done.err
    assert f"stopped at step {step} of 12" in done.err
    assert (folder / "checkpoints" / f"step-{step:08d}").is_dir()
    assert not (folder / "loss.png").exists()
    done = train(folder, *flags, "--resume", processes=processes)
    assert done.code == 0, done.err
    assert (folder / "loss.png").exists()
    if processes == 1:
        same(folder, unbroken)
    else:
        expected = {record["step"]: record for record in curve(alone)}
        assert [record["step"] for record in curve(folder)] == [6, 12]
        for record in curve(folder):
            assert record == pytest.approx(expected[record["step"]], rel=2e-4)


def test_the_loss_plot_is_removed_when_a_finished_run_continues(train: Train, unbroken: Path, tmp_path: Path) -> None:
    """docs/cluster/slurm.sh takes it as the sign of a complete run."""
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    assert train(folder, "--resume").code == 0
    assert (folder / "loss.png").is_file()
    stop = STOP.format(step=13, who="0")
    assert "stopped at step 13 of 14" in train(folder, "--resume", "--steps", 14, before=stop).err
    assert not (folder / "loss.png").exists()


def test_sigterm_ends_an_evaluation_which_is_repeated_on_resume(
    scripts: ScriptRunner, train: Train, token_store: Path, unbroken: Path, tmp_path: Path
) -> None:
    folder, mark = tmp_path / "run", tmp_path / "evaluating"
    slow = f"""
import pathlib, time
from generator import training
def sheet(*arguments):
    pathlib.Path({str(mark)!r}).touch()
    time.sleep(300)
training.draw_sheet = sheet
"""
    run = scripts.start("train_ar.py", "--tokens", token_store, "--output-dir", folder, *FLAGS, before=slow)
    while not mark.exists():
        assert run.poll() is None
        time.sleep(0.01)
    run.kill(signal.SIGTERM)
    done = run.wait(60)
    assert done.code == 0, done.err
    assert "evaluation at step 6 was interrupted" in done.err
    assert "stopped at step 6 of 12" in done.err
    assert train(folder, "--resume").code == 0
    same(folder, unbroken)
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step-00000006.png", "step-00000012.png"]


def test_workers_ignore_signals(scripts: ScriptRunner, token_store: Path, tmp_path: Path) -> None:
    """The trainer decides what a signal to all of its processes means."""
    folder = tmp_path / "run"
    words = ["--tokens", token_store, "--output-dir", folder, *FLAGS, "--num-workers", 1, "--steps", 100_000]
    run = subprocess.Popen(scripts.command("train_ar.py", words), env=scripts.environment, stderr=subprocess.DEVNULL)
    try:
        while not list((folder / "checkpoints").glob("step-*")):
            assert run.poll() is None
            time.sleep(0.01)
        workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        assert workers
        for worker in workers:
            os.kill(int(worker), signal.SIGTERM)
        last = max((folder / "checkpoints").glob("step-*"))
        while max((folder / "checkpoints").glob("step-*")) == last:
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 0
    finally:
        run.kill()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2200k", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_stops_a_run_with_one_line_and_keeps_the_last_checkpoint(
    train: Train, small_disk: Path, unbroken: Path
) -> None:
    folder = small_disk / "run"
    done = train(folder, "--keep-checkpoints", 6, "--evaluate-every", 12)
    assert done.code == 2, done.err
    assert "No space left" in done.err.splitlines()[-1]
    saved = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert 1 <= len(saved) < 6
    for name in saved:
        assert {path.name for path in (folder / "checkpoints" / name).iterdir()} == {
            "training.safetensors",
            "training.json",
        }
    # with more space the run continues
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    resumed = train(folder, "--keep-checkpoints", 1, "--resume", "--evaluate-every", 12)
    assert resumed.code == 0, resumed.err
    assert (folder / RESULTS[2]).read_bytes() == (unbroken / RESULTS[2]).read_bytes()
