"""How processes end, and versions of packages."""

import subprocess
import sys

import pytest
from conftest import REPO

from evaluation.reports import versions

# the names in a traceback keep the loader referenced until the process ends
FAILS_WITH_A_READER = """
from torch.utils.data import DataLoader
from common import cli
from common.runtime import leave_signals_to_the_trainer

def main():
    stream = iter(DataLoader([1, 2, 3], num_workers=1, worker_init_fn=leave_signals_to_the_trainer))
    next(stream)
    raise RuntimeError("no such kernel")

cli.run(main)
"""


def test_a_failed_script_does_not_wait_for_its_readers() -> None:
    """They ignore SIGTERM, which multiprocessing sends before it joins them."""
    found = subprocess.run(
        [sys.executable, "-c", FAILS_WITH_A_READER], cwd=REPO, capture_output=True, text=True, timeout=60, check=False
    )
    assert found.returncode == 1
    assert found.stderr.rstrip().endswith("RuntimeError: no such kernel")


def test_other_child_processes_are_not_killed() -> None:
    """A pool whose workers are killed at exit waits without end for their locks."""
    script = """
import multiprocessing
import common.cli

pool = multiprocessing.get_context("fork").Pool(2)
assert pool.map(abs, [-1, 2]) == [1, 2]
"""
    found = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, timeout=60, check=False)
    assert found.returncode == 0


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts also run from a folder that is not installed."""
    monkeypatch.setattr("evaluation.reports.PACKAGES", ("torch", "no-such-package"))
    found = versions(("pillow",))
    assert found["no-such-package"] == "(not installed)"
    assert found["torch"][0].isdigit()
    assert found["pillow"][0].isdigit()
