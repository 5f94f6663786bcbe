"""Runs scripts of the repository as a user's shell would, without importing torch and transformers for each run.

multiprocessing's fork server has them imported; each run is a fork of it, in which a test may replace functions, and
which it may kill.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

REPO = Path(__file__).resolve().parents[1]
PRELOADED = [
    *("accelerate", "torchvision", "torch_fidelity", "evaluation.fid.measure", "evaluation.speed.measure"),
    *("generator.session", "generator.training", "refiner.training", "tokenizer.extraction", "runner"),
]


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A finished run: exit code (negative: the signal that ended it), stdout and stderr.

    Of several processes, the first code that is not 0, and their output one after the other.
    """

    code: int
    out: str
    err: str


class Running:
    """A script that runs in one process or several; `pids` are theirs, by rank."""

    def __init__(self, processes: list[Any], outputs: list[tuple[Path, Path]]):
        self._processes, self._outputs = processes, outputs
        self.pids = [process.pid for process in processes]

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to each process that has not ended."""
        for process in self._processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def poll(self) -> Finished | None:
        """The finished run, or None while one of its processes is alive."""
        codes = [process.exitcode for process in self._processes]
        if None in codes:
            return None
        out, err = ("".join(path.read_text() for path in paths) for paths in zip(*self._outputs, strict=True))
        return Finished(code=next((code for code in codes if code), 0), out=out, err=err)

    def wait(self, seconds: float = 600) -> Finished:
        """The finished run; one that takes longer than this is killed, and the test fails."""
        end = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(0, end - time.monotonic()))
        finished = self.poll()
        if finished is None:
            self.kill()
            raise TimeoutError("\n".join(err.read_text() for _, err in self._outputs))
        return finished


class ScriptRunner:
    """Runs scripts of the repository, each in a fresh fork of one process; `environment` is that of all of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        paths = os.pathsep.join([str(REPO), str(REPO / "tests")])
        self.environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._runs: list[Running] = []

    def command(self, script: str, arguments: Sequence[object]) -> list[str]:
        """The words a user would type, for tests that want a process of their own."""
        return [sys.executable, str(REPO / script), *map(str, arguments)]

    def __call__(self, script: str | Path, *arguments: object, **how: Any) -> Finished:
        """Run a script to its end, as `start` does."""
        return self.start(script, *arguments, **how).wait()

    def start(
        self, script: str | Path, *arguments: object, processes: int = 1, before: str = "", cwd: Path | None = None
    ) -> Running:
        """Start a script; several processes find each other on the CPU as those of torchrun do.

        `before` is Python code that each process executes first.
        """
        together = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        started: list[Any] = []
        outputs: list[tuple[Path, Path]] = []
        for rank in range(processes):
            out, err = (self.folder / f"{len(self._runs)}-{rank}.{name}" for name in ("out", "err"))
            outputs.append((out, err))
            several = together | {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
            environment = several if processes > 1 else {}
            words = [str(REPO / script), *map(str, arguments)]
            process = self._context.Process(
                target=run_script, args=(words, before, environment, cwd or self.folder, outputs[-1])
            )
            with patch.dict(os.environ, self.environment):  # of the fork server, which the first process starts
                process.start()
            started.append(process)
        self._runs.append(Running(started, outputs))
        return self._runs[-1]

    def close(self) -> None:
        """Kill what still runs."""
        for run in self._runs:
            run.kill()


def run_script(
    words: list[str], before: str, environment: dict[str, str], cwd: Path, outputs: tuple[Path, Path]
) -> None:
    """Run in a fork: `before`, then a script's file as __main__; ends the process with the script's exit code."""
    for number, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    os.chdir(cwd)
    os.environ.update(environment)
    code: Any = 0
    try:
        sys.argv = words
        exec(before, {})
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
