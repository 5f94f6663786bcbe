"""Command lines: flags are dataclass fields, a YAML file gives defaults, a mistake is one line and exit 2."""

import argparse
import atexit
import dataclasses
import difflib
import errno
import logging
import multiprocessing.util  # which registers its exit function, to run after the one registered below
import os
import re
import shlex
import shutil
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from common.errors import InputError

OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory")
# of paths that cannot be written, whose cause is outside of this program
FILE_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT, errno.EFBIG,
)  # fmt: skip
LOGGERS = ("common", "evaluation", "generator", "page", "refiner", "tokenizer", "training")  # one for each package


def nearest(name: str, allowed: Iterable[str], count: int = 3) -> str:
    """The allowed names most like `name`, as the end of an error message."""
    close = difflib.get_close_matches(name.lower(), list(allowed), n=count, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else "see --help for those allowed"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _boolean(word: str) -> bool:
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if word.lower() not in values:
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return values[word.lower()]


def _text(word: str) -> str:
    if "\0" in word:  # from a YAML file; no path may have one
        raise argparse.ArgumentTypeError("NUL is not allowed")
    return word


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the default of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if any(action.default is value for value in (None, False, argparse.SUPPRESS)):
            return action.help
        return super()._get_help_string(action)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            found = version("channeltok")
        except PackageNotFoundError:  # a script also runs from a folder that is not installed
            found = "(not installed)"
        sys.stdout.write(f"channeltok {found}\n")
        sys.exit(0)


def _add_flag(parser: argparse._ActionsContainer, entry: dataclasses.Field[Any], hint: Any) -> None:
    """Add the flag of a dataclass field: a number, a string, a boolean, a Literal, a list of these, or None."""
    options: dict[str, Any] = {"help": entry.metadata.get("help"), "default": entry.default}
    if entry.default_factory is not dataclasses.MISSING:
        options["default"] = entry.default_factory()
    if options["default"] is dataclasses.MISSING:
        del options["default"]
        options["required"] = True
    if types.NoneType in typing.get_args(hint):
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is list:
        (hint,) = typing.get_args(hint)
        options["nargs"] = "+"
    if typing.get_origin(hint) is typing.Literal:
        options |= {"type": type(typing.get_args(hint)[0]), "choices": typing.get_args(hint)}
    elif hint is bool:
        options |= {"type": _boolean, "nargs": "?", "const": True}
    else:
        options["type"] = _text if hint is str else hint
    if "choices" not in options:
        options["metavar"] = {int: "N", float: "X", bool: "true|false"}.get(hint, "TEXT")
    parser.add_argument(_flag(entry.name), dest=entry.name, **options)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _dashed(word: str) -> str:
    """A flag with dashes in place of underscores; other words as they are."""
    flag, sign, value = word.partition("=")
    return f"{flag.replace('_', '-')}{sign}{value}" if word.startswith("--") else word


def _words(argv: Sequence[str] | None) -> list[str]:
    """The words after the program's name, or those of the process."""
    return [_dashed(word) for word in (sys.argv[1:] if argv is None else argv)]


def unset(kind: type, otherwise: str) -> type:
    """A dataclass with the fields of another, each None unless it is given on the command line.

    Args:
        kind: a dataclass.
        otherwise: what happens to a field that is not given, for --help.
    """
    hints = typing.get_type_hints(kind)
    fresh: list[Any] = []
    for field in dataclasses.fields(kind):
        metadata = {"help": f"{field.metadata['help']}; {otherwise}"}
        fresh.append((field.name, hints[field.name] | None, dataclasses.field(default=None, metadata=metadata)))
    return dataclasses.make_dataclass(f"{kind.__name__}Flags", fresh, kw_only=True, frozen=True)


def _yaml_as_flags(path: Path, parser: argparse.ArgumentParser, allowed: Sequence[str]) -> list[str]:
    """The keys of a YAML file as command-line words, so that both are checked by the same parser."""
    lists = {action.dest for action in parser._actions if action.nargs == "+"}  # noqa: SLF001
    if not path.is_file():
        raise InputError(f"config {path} is missing; the ones that come with the project are in configs/")
    try:
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text):  # aliases and nested lists can take any time and memory
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > 2:
                raise InputError(f"config {path} has aliases or nested values; give lines `key: value`")
        content = yaml.safe_load(text) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config {path} is not readable YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise InputError(f"config {path} must be a list of `key: value` lines")
    words: list[str] = []
    for key, value in content.items():
        if key not in allowed:
            raise InputError(f"config {path}: unknown key {key!r}; {nearest(str(key), allowed)}")
        if value is None:
            continue
        if isinstance(value, dict) or (isinstance(value, list) and key not in lists):
            raise InputError(f"config {path}: {key} is {value}; it takes a single value")
        if value == []:
            parser.set_defaults(**{key: []})  # a flag with no words after it is refused
        elif isinstance(value, list):
            words += [_flag(key), *(str(entry) for entry in value)]
        else:
            words.append(f"{_flag(key)}={value}")
    return words


def parse(
    *kinds: type,
    argv: Sequence[str] | None = None,
    description: str | None = None,
    command: str | None = None,
    adapt: Callable[[dict[str, Any]], None] = lambda values: None,
) -> tuple[Any, ...]:
    """Parse the command line into one instance of each class.

    Args:
        kinds: dataclasses; every field is a flag, of a repeated one the last value counts. Names differ.
        argv: the words after the program's name; None reads the process's own.
        description: shown by --help.
        command: the sub-command that these flags belong to, shown by --help.
        adapt: changes the values by name, in place, before they are checked.

    Raises:
        InputError: an unknown name, a value of the wrong type, or what the classes refuse.
    """
    program = None if command is None else f"{_program()} {command}"
    options: dict[str, Any] = {"usage": "%(prog)s [FLAGS]", "description": description, "formatter_class": _Help}
    parser = _Parser(prog=program, allow_abbrev=False, **options)
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        group = parser.add_argument_group((kind.__doc__ or kind.__name__).splitlines()[0].rstrip("."))
        for entry in dataclasses.fields(kind):
            _add_flag(group, entry, hints[entry.name])
    parser.add_argument("--config", type=Path, help="YAML file of defaults for any of these flags")
    parser.add_argument("--print-config", action="store_true", help="print all settings as YAML, and exit")
    parser.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="print the version, and exit"
    )
    fields = [entry.name for kind in kinds for entry in dataclasses.fields(kind)]
    words = _words(argv)

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", type=Path)
    try:
        config = first.parse_known_args(words)[0].config
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from error
    # --config again, because a list at the end of the defaults would take the first words of the command line
    defaults = [*_yaml_as_flags(config, parser, fields), f"--config={config}"] if config else []

    known, rest = parser.parse_known_args(defaults + words)
    if rest:
        flags = [_flag(name) for name in [*fields, "config", "print_config", "version"]]
        raise InputError(f"unknown argument {rest[0]!r}; {nearest(rest[0].split('=')[0], flags)}")
    values = vars(known)
    adapt(values)
    _check_folders(kinds, values)
    made = tuple(kind(**{entry.name: values[entry.name] for entry in dataclasses.fields(kind)}) for kind in kinds)
    if values["print_config"]:
        settings = {name: value for config in made for name, value in vars(config).items()}
        sys.stdout.write(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        sys.exit(0)
    return made


def _check_folders(kinds: Sequence[type], values: Mapping[str, Any]) -> None:
    """Refuse an output folder that is also an input, in whatever way the two are spelled."""
    fields = [entry for kind in kinds for entry in dataclasses.fields(kind)]
    for entry in fields:
        given = values[entry.name]
        inside = entry.metadata.get("reads") and given is not None and values.get("output_dir") is not None
        if inside and os.path.realpath(given) == os.path.realpath(values["output_dir"]):
            raise InputError(f"output_dir {values['output_dir']} is also {entry.name}; choose another folder")


def parse_command(
    commands: Mapping[str, Sequence[type]], argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[str, tuple[Any, ...]]:
    """Parse a command line whose first word says what to do and decides which flags follow.

    Args:
        commands: for each command, the classes whose fields are its flags, as `parse` takes them.
        argv: the words after the program's name; None reads the process's own.
        description: shown by --help.

    Returns:
        The command, and one instance of each of its classes.

    Raises:
        InputError: no such word first, or what `parse` refuses.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["-h"], ["--help"]):
        chooser = argparse.ArgumentParser(prog=_program(), description=description, usage="%(prog)s COMMAND [FLAGS]")
        chooser.add_argument("command", choices=list(commands), help="COMMAND --help lists its flags")
        chooser.parse_args(words[:1])
    if not words or words[0].startswith("-"):
        raise InputError(f"the first word must be a command: {' or '.join(commands)}")
    command, *rest = words
    if command not in commands:
        raise InputError(f"unknown command {command!r}; {nearest(command, commands)}")
    return command, parse(*commands[command], argv=rest, description=description, command=command)


def has_flag(name: str, argv: Sequence[str] | None = None) -> bool:
    """Return whether a flag is on the command line."""
    return f"--{name}" in [word.split("=")[0] for word in _words(argv)]


def command_line() -> str:
    """The words this program was started with, as one would type them; of the program only its name."""
    return shlex.join([_program(), *sys.argv[1:]])


def _program() -> str:
    return Path(sys.argv[0]).name


def set_up_logging() -> None:
    """Write messages of this project to stderr, one line each, and only warnings of libraries.

    Of several processes (torchrun, accelerate launch) only the first one reports progress.
    """
    is_main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO if is_main_process else logging.WARNING)


def end_readers_at_exit() -> None:
    """Kill data readers when a script ends after an error.

    multiprocessing would send them SIGTERM, which they ignore, and wait for them without limit. Not for programs that
    have other child processes.
    """
    # functions registered later run earlier: this one before multiprocessing's own
    atexit.register(_end_children, os.getpid())


def _end_children(script: int) -> None:
    if os.getpid() != script:  # a fork of it
        return
    children = [child for child in multiprocessing.active_children() if child.daemon]
    if children and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises an error where a reader ends by a signal
    for child in children:
        child.kill()


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's main function; a user's mistake or a full disk ends in one line and exit code 2."""
    set_up_logging()
    end_readers_at_exit()
    try:
        main()
    except InputError as error:
        sys.exit(_complain(str(error)))
    except OSError as error:
        number, reason = error.errno, error.strerror
        if isinstance(error, shutil.Error):  # a copy of a folder, with a list of (source, target, reason)
            number, reason = errno.ENOSPC, str(error.args[0][-1][-1])
        if number not in FILE_ERRORS:
            raise
        where = f" at {error.filename}" if error.filename else ""
        sys.exit(_complain(f"{reason}{where}; free some space or choose another folder"))
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error))):
            raise
        sys.exit(_complain(f"out of memory ({str(error).strip().splitlines()[0][:120]}); use smaller sizes or batches"))
    except KeyboardInterrupt:
        sys.stderr.write(f"{_program()}: interrupted\n")
        sys.exit(130)
    sys.exit(0)


def _complain(message: str) -> int:
    sys.stderr.write(f"{_program()}: error: {' '.join(message.split())}\n")
    return 2
