"""Flags, YAML files and the ends of a script."""

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Literal

import pytest
from conftest import REPO

from common import cli
from common.config import InputError
from tokenizer.settings import TokenizerLossConfig


@dataclass(frozen=True, kw_only=True)
class Run:
    """Settings of a run."""

    output_dir: str = field(default="out", metadata={"help": "folder for everything"})
    steps: int = 10
    rate: float = 0.5
    fast: bool = False
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    mode: Literal["one", "two"] = "one"
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps is {self.steps}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Needed:
    """A setting without a default."""

    data_dir: str
    colour: str = "red"


COMMANDS = {"walk": (Run,), "draw": (Run, Needed)}


def refusal(*kinds, argv):
    with pytest.raises(InputError) as caught:
        cli.parse(*kinds, argv=argv)
    return str(caught.value)


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


def test_flags_of_several_dataclasses_with_dashes_or_underscores():
    assert cli.parse(Run, argv=[]) == (Run(),)
    argv = ["--data-dir", "d", "--output_dir=o", "--steps", "3", "--sizes", "4", "5", "6", "--fast", "--limit", "7"]
    run, needed = cli.parse(Run, Needed, argv=argv)
    assert run == Run(output_dir="o", steps=3, sizes=[4, 5, 6], fast=True, limit=7)
    assert needed == Needed(data_dir="d")
    for word, value in (("true", True), ("false", False), ("YES", True), ("0", False)):
        assert cli.parse(Run, argv=["--fast", word])[0].fast is value


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.parse(Run, argv=["--version"])
    assert not caught.value.code
    assert capsys.readouterr().out == f"channeltok {version('channeltok')}\n"


def test_flags_have_priority_over_the_yaml_file_and_the_file_over_defaults(config):
    words = config("steps: 7\nrate: 1.0e-3\nsizes: [3]\nfast: true\nlimit: 5\n")
    assert cli.parse(Run, argv=words) == (Run(steps=7, rate=1e-3, sizes=[3], fast=True, limit=5),)
    flags = ["--steps", "9", "--sizes", "8", "9", "--fast", "false"]
    expected = (Run(steps=9, rate=1e-3, sizes=[8, 9], fast=False, limit=5),)
    assert cli.parse(Run, argv=flags + words) == expected
    assert cli.parse(Run, argv=words + flags) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# nothing\n", {}),
        ("steps:\n", {}),
        ("sizes: []\n", {"sizes": []}),
        ("sizes: 3\nrate: 1e-3\n", {"sizes": [3], "rate": 1e-3}),
        ("output_dir: -old-\nrate: -0.5\nmode: two\n", {"output_dir": "-old-", "rate": -0.5, "mode": "two"}),
    ],
)
def test_yaml_values(config, text, expected):
    run, needed = cli.parse(Run, Needed, argv=config(f"{text}data_dir: somewhere\n"))
    assert (run, needed) == (Run(**expected), Needed(data_dir="somewhere"))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--stesp=3"], "'--stesp=3'; did you mean --steps"),
        (["--outputdir", "x"], "'--outputdir'; did you mean --output-dir"),
        (["--step", "3"], "'--step'; did you mean --steps"),
        (["--confg", "x"], "'--confg'; did you mean --config"),
        (["stray"], "'stray'"),
        (["--steps", "0"], "steps is 0; it must be at least 1"),
        (["--data-dir", "d"], "--data-dir"),
        (["--config", "no.yaml"], "config no.yaml is missing"),
        (["--config", "."], "config . is missing"),
        (["--config"], "--config: expected one argument"),
        (["--steps"], "--steps: expected one argument"),
    ],
)
def test_a_wrong_word_is_named(argv, expected):
    assert expected in refusal(Run, argv=argv)
    assert "--data-dir" in refusal(Needed, argv=[])


@pytest.mark.parametrize(
    ("flag", "value"),
    [("steps", "many"), ("steps", "1.5"), ("rate", "fast"), ("mode", "three"), ("fast", "perhaps"), ("limit", "x")],
)
def test_a_value_of_the_wrong_type_names_flag_and_value(config, flag, value):
    for message in (refusal(Run, argv=[f"--{flag}", value]), refusal(Run, argv=config(f"{flag}: {value}\n"))):
        assert flag in message
        assert value in message


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("stesp: 3\n", "unknown key 'stesp'; did you mean steps"),
        ("steps: [1, 2]\n", "steps takes a single value"),
        ("a: &a [1, 1]\nb: &b [*a, *a]\n", "unknown key 'a'"),
        ("sizes: [[1, 1], [1, 1]]\n", "sizes takes a list of values"),
        ("steps: " + "[" * 5_000, "is not readable YAML"),
        ("steps: !!python/object/apply:os.system [ls]\n", "is not readable YAML"),
        ("\x00", "is not readable YAML"),
        ("- 1\n", "must be a list of `key: value` lines"),
    ],
)
def test_a_file_that_is_no_yaml_of_keys_and_values_is_refused(config, text, line):
    message = refusal(Run, argv=config(text))
    assert "config.yaml" in message
    assert line in message


def test_fields_of_an_unset_class_are_none_unless_given(config):
    flags = cli.unset(TokenizerLossConfig, "default: the model's own")
    for argv, expected in (
        (["--l1-weight", "0.5", "--perceptual", "none"], {"l1_weight": 0.5, "perceptual": "none"}),
        (config("l2_weight: 3"), {"l2_weight": 3}),
    ):
        (found,) = cli.parse(flags, argv=argv)
        assert {name: value for name, value in vars(found).items() if value is not None} == expected
    assert "invalid choice: 'some'" in refusal(flags, argv=["--perceptual", "some"])


def test_help_shows_every_flag_with_its_help(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.parse(Run, Needed, argv=["--help"], description="What it does.")
    assert not caught.value.code
    shown = capsys.readouterr().out
    assert "What it does." in shown
    assert "--output-dir TEXT" in shown
    assert "folder for everything (default: out)" in shown
    assert "None" not in shown
    for name in [one.name for kind in (Run, Needed) for one in dataclasses.fields(kind)]:
        assert f"--{name.replace('_', '-')} " in shown


def test_settings_can_be_printed_as_a_config_file(capsys, config):
    with pytest.raises(SystemExit) as caught:
        cli.parse(Run, Needed, argv=["--print-config", "--steps", "3", "--data-dir", "d", "--sizes", "4"])
    assert not caught.value.code
    printed = capsys.readouterr().out
    assert cli.parse(Run, Needed, argv=config(printed)) == (Run(steps=3, sizes=[4]), Needed(data_dir="d"))


def test_the_first_word_decides_what_flags_follow(monkeypatch):
    assert cli.parse_command(COMMANDS, argv=["walk", "--steps", "3"]) == ("walk", (Run(steps=3),))
    monkeypatch.setattr("sys.argv", ["/somewhere/little.py", "draw", "--data-dir", "a b"])
    assert cli.parse_command(COMMANDS) == ("draw", (Run(), Needed(data_dir="a b")))
    assert cli.command_line() == "little.py draw --data-dir 'a b'"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["wlak"], "unknown command 'wlak'; did you mean walk?"),
        (["x"], "unknown command 'x'; see --help for those allowed"),
        ([], "the first word must be a command: walk or draw"),
        (["--steps", "3", "walk"], "the first word must be a command: walk or draw"),
        (["walk", "--data-dir", "d"], "unknown argument '--data-dir'"),
    ],
)
def test_a_wrong_command_or_a_flag_of_another_one_is_refused(argv, line):
    with pytest.raises(InputError) as caught:
        cli.parse_command(COMMANDS, argv=argv)
    assert line in str(caught.value)


def test_help_names_the_commands_and_each_has_its_own(capsys):
    for argv, there, absent in ((["--help"], "walk", "--steps"), (["draw", "-h"], "--data-dir", "walk")):
        with pytest.raises(SystemExit) as caught:
            cli.parse_command(COMMANDS, argv=argv, description="What it does.")
        assert not caught.value.code
        shown = capsys.readouterr().out
        assert "What it does." in shown
        assert there in shown
        assert absent not in shown


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        *(
            (OSError(number, os.strerror(number), "/some/file"), 2, f"error: {os.strerror(number)} at /some/file")
            for number in (errno.ENOSPC, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EACCES)
        ),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2, "error: No space left"),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]), 2, "No space left"),
        (InputError("this is\nnot allowed"), 2, "error: this is not allowed"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 2, "error: out of memory"),
        (MemoryError(), 2, "error: out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (None, 0, ""),
    ],
)
def test_mistakes_of_a_user_and_limits_of_the_machine_are_one_line(capsys, monkeypatch, error, code, line):
    def main():
        if error is not None:
            raise error

    monkeypatch.setattr("sys.argv", ["/somewhere/little.py"])
    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    shown = capsys.readouterr().err
    assert (caught.value.code, shown.count("\n")) == (code, int(code > 0))
    assert shown.startswith("little.py: " if code else "")
    assert line in shown


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(errno.ECONNRESET, "reset"), ValueError("a bug")])
def test_other_errors_keep_their_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        cli.run(main)


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


def test_a_failed_script_does_not_wait_for_its_readers():
    """They ignore SIGTERM, which multiprocessing sends before it joins them."""
    found = subprocess.run(
        [sys.executable, "-c", FAILS_WITH_A_READER], cwd=REPO, capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 1
    assert found.stderr.rstrip().endswith("RuntimeError: no such kernel")
