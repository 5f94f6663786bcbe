import dataclasses
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Literal

import pytest

from common import cli
from common.errors import InputError
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


@pytest.mark.parametrize(("word", "value"), [("true", True), ("false", False), ("YES", True), ("0", False)])
def test_switches_accept_a_value(word, value):
    assert cli.parse(Run, argv=["--fast", word])[0].fast is value


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
        ("output_dir: -old-\nrate: -0.5\nmode: two\n", {"output_dir": "-old-", "rate": -0.5, "mode": "two"}),
    ],
)
def test_yaml_values(config, text, expected):
    assert cli.parse(Run, argv=config(text)) == (Run(**expected),)
    run, needed = cli.parse(Run, Needed, argv=config(f"{text}data_dir: somewhere\n"))
    assert (run, needed) == (Run(**expected), Needed(data_dir="somewhere"))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--stesp", "3"], "--steps"),
        (["--stesp=3"], "--steps"),
        (["--outputdir", "x"], "--output-dir"),
        (["--step", "3"], "--steps"),
        (["--confg", "x"], "--config"),
    ],
)
def test_an_unknown_flag_is_named_with_the_nearest(argv, expected):
    message = refusal(Run, argv=argv)
    assert argv[0] in message
    assert f"did you mean {expected}" in message


def test_words_without_a_flag_are_refused(config):
    assert "'stray'" in refusal(Run, argv=["stray"])
    assert "'5'" in refusal(Run, argv=["5", *config("sizes: [3]")])


def test_an_unknown_key_is_named_with_the_nearest(config):
    message = refusal(Run, argv=config("stesp: 3\n"))
    assert "'stesp'" in message
    assert "did you mean steps" in message
    assert "config.yaml" in message


@pytest.mark.parametrize(
    "argv",
    [
        ["--steps", "many"],
        ["--steps", "1.5"],
        ["--rate", "fast"],
        ["--sizes", "1", "x"],
        ["--mode", "three"],
        ["--fast", "perhaps"],
        ["--limit", "x"],
        ["--steps"],
    ],
)
def test_a_value_of_the_wrong_type_names_flag_and_value(config, argv):
    message = refusal(Run, argv=argv)
    assert argv[0] in message
    assert argv[-1] in message
    if len(argv) == 2:
        from_file = refusal(Run, argv=config(f"{argv[0][2:]}: {argv[1]}\n"))
        assert argv[0][2:] in from_file
        assert argv[1] in from_file


def test_values_refused_by_the_dataclass_and_missing_ones_are_named(config):
    assert refusal(Run, argv=["--steps", "0"]) == "steps is 0; it must be at least 1"
    assert "steps is [1, 2]; it takes a single value" in refusal(Run, argv=config("steps: [1, 2]\n"))
    assert "--data-dir" in refusal(Needed, argv=[])


def test_a_missing_yaml_file_is_named(tmp_path):
    assert str(tmp_path / "no.yaml") in refusal(Run, argv=["--config", str(tmp_path / "no.yaml")])
    assert str(tmp_path) in refusal(Run, argv=["--config", str(tmp_path)])
    assert "--config" in refusal(Run, argv=["--config"])


@pytest.mark.parametrize("text", ["- 1\n", "{", "steps", "a: b: c", "\x00"])
def test_a_file_that_is_no_yaml_of_keys_is_named(config, text):
    assert "config.yaml" in refusal(Run, argv=config(text))


def test_fields_of_an_unset_class_are_none_unless_given(config):
    flags = cli.unset(TokenizerLossConfig, "default: the model's own")
    (found,) = cli.parse(flags, argv=["--l1-weight", "0.5", "--perceptual", "none"])
    given = {name: value for name, value in vars(found).items() if value is not None}
    assert given == {"l1_weight": 0.5, "perceptual": "none"}
    (found,) = cli.parse(flags, argv=config("l2_weight: 3"))
    assert found.l2_weight == 3
    assert found.l1_weight is None
    with pytest.raises(InputError, match="invalid choice: 'some'"):
        cli.parse(flags, argv=["--perceptual", "some"])
    with pytest.raises(InputError, match="l1"):
        cli.parse(flags, argv=["--l1-weight", "much"])


def test_help_shows_every_flag_with_its_help(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.parse(Run, Needed, argv=["--help"], description="What it does.")
    assert not caught.value.code
    shown = capsys.readouterr().out
    assert "What it does." in shown
    assert "folder for everything" in shown
    for name in [one.name for kind in (Run, Needed) for one in dataclasses.fields(kind)]:
        assert f"--{name.replace('_', '-')} " in shown
    assert "--output-dir TEXT" in shown
    assert "(default: out)" in shown
    assert "None" not in shown


def test_settings_can_be_printed_as_a_config_file(capsys, config):
    with pytest.raises(SystemExit) as caught:
        cli.parse(Run, Needed, argv=["--print-config", "--steps", "3", "--data-dir", "d", "--sizes", "4"])
    assert not caught.value.code
    printed = capsys.readouterr().out
    assert cli.parse(Run, Needed, argv=config(printed)) == (Run(steps=3, sizes=[4]), Needed(data_dir="d"))


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.parse(Run, argv=["--version"])
    assert not caught.value.code
    assert capsys.readouterr().out == f"channeltok {version('channeltok')}\n"


COMMANDS = {"walk": (Run,), "draw": (Run, Needed)}


def test_the_first_word_decides_which_flags_follow():
    assert cli.parse_command(COMMANDS, argv=["walk", "--steps", "3"]) == ("walk", (Run(steps=3),))
    expected = ("draw", (Run(), Needed(data_dir="d")))
    assert cli.parse_command(COMMANDS, argv=["draw", "--data-dir", "d"]) == expected


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["wlak"], "unknown command 'wlak'; did you mean walk?"),
        (["x"], "unknown command 'x'; see --help for those allowed"),
        ([], "the first word must be a command: walk or draw"),
        (["--steps", "3", "walk"], "the first word must be a command: walk or draw"),
        (["walk", "--data-dir", "d"], "unknown argument '--data-dir'"),
        (["walk", "walk"], "unknown argument 'walk'"),
    ],
)
def test_a_wrong_command_or_a_flag_of_another_one_is_refused(argv, line):
    with pytest.raises(InputError) as caught:
        cli.parse_command(COMMANDS, argv=argv)
    assert line in str(caught.value)


def test_help_names_the_commands_and_each_has_its_own(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/little.py"])
    shown = []
    for argv in (["--help"], ["-h"], ["draw", "--help"]):
        with pytest.raises(SystemExit) as caught:
            cli.parse_command(COMMANDS, argv=argv, description="What it does.")
        assert not caught.value.code
        shown.append(capsys.readouterr().out)
    general, short, draw = shown
    assert general == short
    assert "usage: little.py COMMAND [FLAGS]" in general
    assert "What it does." in general
    assert "walk" in general
    assert "--steps" not in general
    assert "usage: little.py draw" in draw
    assert "--data-dir" in draw


def test_the_command_line_is_reported_without_the_folder_of_the_program(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/little.py", "walk", "--output-dir", "a b"])
    assert cli.command_line() == "little.py walk --output-dir 'a b'"
    assert cli.parse_command(COMMANDS) == ("walk", (Run(output_dir="a b"),))


SCRIPT = """
import sys
from dataclasses import dataclass

from common import cli
from common.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Settings:
    do: str = "nothing"


def main():
    (settings,) = cli.parse(Settings)
    if settings.do == "input":
        raise InputError("this is\\nnot allowed")
    if settings.do == "full":
        raise OSError(28, "No space left on device", "/some/file")
    if settings.do == "interrupt":
        raise KeyboardInterrupt
    if settings.do == "bug":
        raise ValueError("a bug")
    sys.stdout.write("done")


cli.run(main)
"""


@pytest.fixture
def run_script(tmp_path, scripts):
    (tmp_path / "little.py").write_text(SCRIPT)
    return lambda *arguments: scripts(tmp_path / "little.py", *arguments)


def test_a_run_without_errors_ends_with_0_and_prints_nothing(run_script):
    done = run_script()
    assert (done.code, done.out, done.err) == (0, "done", "")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--do", "input"], "this is not allowed"),
        (["--od", "x"], "unknown argument '--od'; did you mean --do"),
        (["--config", "no.yaml"], "config no.yaml is missing"),
        (["--do", "full"], "No space left on device at /some/file"),
    ],
)
def test_a_mistake_of_the_user_ends_with_2_and_one_line(run_script, arguments, line):
    done = run_script(*arguments)
    assert done.code == 2
    assert done.err.startswith(f"little.py: error: {line}")
    assert done.err.count("\n") == 1
    assert done.out == ""


def test_a_bug_keeps_its_traceback(run_script):
    done = run_script("--do", "bug")
    assert done.code == 1
    assert "Traceback" in done.err
    assert "ValueError: a bug" in done.err


def test_an_interrupt_ends_with_130_and_no_traceback(run_script):
    done = run_script("--do", "interrupt")
    assert (done.code, done.err) == (130, "little.py: interrupted\n")
