"""The tests' own way to run scripts in several processes, and to kill them."""

import os
import signal
import time
from pathlib import Path

import pytest
from conftest import ScriptRunner

SLEEPER = "import time; time.sleep(60)"
MEET = """
import os, torch.distributed as dist
dist.init_process_group("gloo")
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_USE_CPU")
print([os.environ[name] for name in names], dist.get_world_size(), flush=True)
dist.barrier()
os._exit({"0": 0, "1": 5, "2": 6}[os.environ["RANK"]])
"""


def test_several_processes_meet_and_the_first_failure_counts(scripts: ScriptRunner) -> None:
    done = scripts("sample.py", processes=3, before=MEET)
    assert done.out == "".join(f"['{rank}', '{rank}', '3', 'true'] 3\n" for rank in range(3))
    assert done.code == 5, done.err
    assert scripts("sample.py", before="import os; print('RANK' in os.environ)").out.startswith("False\n")


def test_a_run_can_be_killed_while_others_are_served(scripts: ScriptRunner) -> None:
    sleeper = scripts.start("sample.py", before=SLEEPER, processes=2)
    assert len(set(sleeper.pids)) == 2
    assert scripts("sample.py", "--help").code == 0
    assert sleeper.poll() is None
    os.kill(sleeper.pids[1], signal.SIGKILL)
    while Path(f"/proc/{sleeper.pids[1]}").exists():  # reaped without being asked for
        time.sleep(0.01)
    assert sleeper.poll() is None
    sleeper.kill(signal.SIGTERM)
    assert sleeper.wait().code == -signal.SIGTERM
    sleeper.kill()  # nothing is left to kill: no error, and nobody else is hit


def test_a_run_that_hangs_is_ended(scripts: ScriptRunner) -> None:
    sleeper = scripts.start("sample.py", before=SLEEPER)
    with pytest.raises(TimeoutError):
        sleeper.wait(seconds=0.2)
    assert sleeper.wait().code == -signal.SIGKILL
