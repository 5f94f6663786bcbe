"""docs/demo/make.sh, which makes a demo model from photographs, with a substitute for Python that records its calls."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from test_configs import COMMANDS

import benchmark
from common import cli
from tokenizer.settings import VerificationConfig

REPO = Path(__file__).resolve().parents[1]
STAGES = ["tokenizer", "tokens", "generator", "refiner", "reconstruction", "sweep", "fid", "sheet"]
# records its arguments and writes what make.sh needs of the real script; $FAILS is the stage that fails
SUBSTITUTE = """#!{python}
import json, os, signal, sys, time
from pathlib import Path
output = Path(sys.argv[sys.argv.index("--output-dir") + 1])
with open(os.environ["NOTES"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
(output / "generator").mkdir(parents=True, exist_ok=True)
(output / "refiner").mkdir(exist_ok=True)
(output / "model.safetensors").write_text(output.name)
if output.name == os.environ.get("WAITS"):
    def save(number, frame):
        (output / "checkpoints/step-00000002").mkdir(parents=True)
        (output / "signals").open("a").write(f"{number} ")
    signal.signal(signal.SIGTERM, save)
    (output / "waits").touch()
    while not (output / "checkpoints").exists():
        time.sleep(0.05)
sys.exit(2 if output.name == os.environ.get("FAILS") else 0)
"""
Run = Callable[..., tuple[int, str, list[list[str]]]]


@pytest.fixture
def make(tmp_path: Path) -> Run:
    """Run it with a KIND and further environment: exit code, stderr and the calls, each a list of words."""
    python, photos, names = tmp_path / "python", tmp_path / "photos", tmp_path / "names.json"
    python.write_text(SUBSTITUTE.replace("{python}", sys.executable))
    python.chmod(0o755)
    for split in ("train", "val"):
        for label in range(100):
            (photos / split / str(label)).mkdir(parents=True)
    names.write_text("{}")

    def run(*words: str, **environment: str) -> tuple[int, str, list[list[str]]]:
        notes = tmp_path / "notes"
        notes.unlink(missing_ok=True)
        given = (
            [*words, *[str(photos), str(names), str(tmp_path / "out")][len(words) - 1 :]] if len(words) < 4 else words
        )
        script = subprocess.Popen(
            ["bash", REPO / "docs" / "demo" / "make.sh", *given], cwd=REPO, text=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, env={**os.environ, "PYTHON": str(python), "NOTES": str(notes), **environment},
            # a shell that runs in the background ignores Ctrl-C, and so would all that it starts
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        (tmp_path / "pid").write_text(str(script.pid))
        _, err = script.communicate(timeout=60)
        calls = [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []
        return script.returncode, err, calls

    return run


def stages(calls: list[list[str]]) -> list[str]:
    return [Path(call[call.index("--output-dir") + 1]).name for call in calls]


@pytest.mark.parametrize("kind", ["cpu", "gpu", "tiny"])
def test_every_stage_is_a_command_that_its_script_accepts(make: Run, kind: str, tmp_path: Path) -> None:
    code, err, calls = make(kind)
    assert (code, stages(calls)) == (0, STAGES), err
    for script, *words in calls:
        if script == "benchmark.py":
            cli.parse_command({name: flags for name, (_, flags) in benchmark.COMMANDS.items()}, argv=words)
        else:
            cli.parse(*(kind for kind in COMMANDS[script] if kind is not VerificationConfig), argv=words)
    labels = calls[-1][calls[-1].index("--class-labels") + 1 : calls[-1].index("--seed")]
    assert labels == [str(label) for label in range(0, 100, 5)]
    # the input of a stage is the output of an earlier one
    made = tmp_path / "out"
    for i, call in enumerate(calls):
        for word in call[: call.index("--output-dir")]:
            if word.startswith(str(made)):
                assert word.removeprefix(f"{made}/").split("/")[0] in STAGES[:i]
    assert [line.split(":")[0] for line in (made / "times.txt").read_text().splitlines()] == STAGES
    if kind != "tiny":
        configs = [yaml.safe_load((REPO / "configs" / f"{kind}-{part}.yaml").read_text()) for part in STAGES[:3:2]]
        assert configs[0]["num_channels"] == 256  # the largest k that is measured and shown
        assert [config["save_dtype"] for config in configs] == ["bfloat16"] * 2


def test_completed_stages_are_skipped_and_an_unfinished_one_is_resumed(make: Run, tmp_path: Path) -> None:
    code, _, calls = make("tiny", FAILS="generator")
    assert (code, stages(calls)) == (2, STAGES[:3])
    assert "--resume" not in calls[-1]
    (tmp_path / "out/generator/checkpoints/step-00000002").mkdir(parents=True)
    code, _, calls = make("tiny")
    assert (code, stages(calls)) == (0, STAGES[2:])
    assert ["--resume" in call for call in calls] == [True, *[False] * 5]
    assert make("tiny")[::2] == (0, [])


def test_it_stops_at_its_time_limit(make: Run) -> None:
    code, err, calls = make("tiny", MINUTES="0")
    assert (code, calls) == (3, [])
    assert err == "out of time in stage tokenizer; the same command continues\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_forwarded_once_and_the_stage_is_resumed_later(make: Run, tmp_path: Path, number: int) -> None:
    def send() -> None:
        end = time.monotonic() + 50
        while not (tmp_path / "out/tokenizer/waits").exists() and time.monotonic() < end:
            time.sleep(0.05)
        (script,) = [int(pid) for pid in (tmp_path / "pid").read_text().split()]
        os.kill(script, number)

    sender = threading.Thread(target=send)
    sender.start()
    code, _, calls = make("tiny", WAITS="tokenizer")
    sender.join()
    assert (code, stages(calls)) == (130, STAGES[:1])
    assert (tmp_path / "out/tokenizer/signals").read_text() == f"{signal.SIGTERM.value} "
    assert not (tmp_path / "out/tokenizer.done").exists()
    code, _, calls = make("tiny")
    assert (code, stages(calls), "--resume" in calls[0]) == (0, STAGES, True)


def test_mistakes_are_one_line(make: Run, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    for words, line in (
        (("tpu",), "KIND is tpu; allowed: cpu, gpu, tiny"),
        (("cpu", missing), f"{missing} has no train/ and val/"),
        (("cpu", str(tmp_path / "photos"), missing), f"{missing} is no file"),
    ):
        code, err, calls = make(*words)
        assert (code, calls, err.count("\n")) == (2, [], 1)
        assert err.startswith(line)
    assert make("cpu", MINUTES="0.5")[:2] == (2, "MINUTES is 0.5; give a whole number\n")
    assert not (tmp_path / "out").exists()
    assert re.match(
        "bash docs/demo/make.sh KIND PHOTOS NAMES OUTPUT", make("cpu", "a", "b", "c", "d")[1].splitlines()[2].strip()
    )
