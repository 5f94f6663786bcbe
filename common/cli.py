"""Command lines: flags are dataclass fields, a YAML file gives defaults, a mistake is one line and exit 2."""

import argparse
import dataclasses
import difflib
import errno
import logging
import multiprocessing
import os
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

from common.config import InputError

FILE_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT, errno.EFBIG,
)  # fmt: skip
LOGGERS = ("common", "evaluation", "generator", "page", "refiner", "tokenizer", "training")  # one for each package


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The allowed names most like `name`, as the end of an error message."""
    close = difflib.get_close_matches(name.lower(), list(allowed), cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else "see --help for those allowed"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            found = version("channeltok")
        except PackageNotFoundError:  # a script also runs from a folder that is not installed
            found = "(not installed)"
        sys.stdout.write(f"channeltok {found}\n")
        sys.exit(0)


def _boolean(word: str) -> bool:
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if word.lower() not in values:
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return values[word.lower()]


def _text(word: str) -> str:
    if "\0" in word:  # from a YAML file; no path may have one
        raise argparse.ArgumentTypeError("NUL is not allowed")
    return word


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _add_flag(parser: argparse._ActionsContainer, entry: dataclasses.Field[Any], hint: Any) -> None:
    """Add the flag of a dataclass field: a number, a string, a boolean, a Literal, a list of these, or None."""
    default = entry.default
    if entry.default_factory is not dataclasses.MISSING:
        default = entry.default_factory()
    shown = "" if any(default is value for value in (None, False, dataclasses.MISSING)) else " (default: %(default)s)"
    options: dict[str, Any] = {"help": f"{entry.metadata.get('help') or ''}{shown}".strip()}
    options |= {"required": True} if default is dataclasses.MISSING else {"default": default}
    if types.NoneType in typing.get_args(hint):
        (hint,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is list:
        (hint,) = typing.get_args(hint)
        options["nargs"] = "+"
    if typing.get_origin(hint) is typing.Literal:
        options |= {"type": type(typing.get_args(hint)[0]), "choices": typing.get_args(hint)}
    else:
        options["metavar"] = {int: "N", float: "X", bool: "true|false"}.get(hint, "TEXT")
        options["type"] = {bool: _boolean, str: _text}.get(hint, hint)
        options |= {"nargs": "?", "const": True} if hint is bool else {}
    parser.add_argument(_flag(entry.name), dest=entry.name, **options)


def _words(argv: Sequence[str] | None) -> list[str]:
    """The words after the program's name, or those of the process; flags with dashes in place of underscores."""
    parts = [word.partition("=") for word in (sys.argv[1:] if argv is None else argv)]
    return ["".join((_flag(p[0][2:]), *p[1:]) if p[0].startswith("--") else p) for p in parts]


def unset(kind: type, otherwise: str) -> type:
    """A dataclass with the fields of another, each None unless given; `otherwise` says in --help what holds then."""
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
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"config {path} is not readable YAML ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"config {path} must be a list of `key: value` lines")
    words: list[str] = []
    for key, value in content.items():
        if key not in allowed:
            raise InputError(f"config {path}: unknown key {key!r}; {nearest(str(key), allowed)}")
        entries = value if isinstance(value, list) and key in lists else [value]
        if any(isinstance(entry, dict | list) for entry in entries):  # not shown: it may be of any size
            raise InputError(f"config {path}: {key} takes {'a list of values' if key in lists else 'a single value'}")
        if not entries:
            parser.set_defaults(**{key: []})  # a flag with no words after it is refused
        elif entries is value:
            words += [_flag(key), *map(str, entries)]
        elif value is not None:
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
    program = f"{_program()} {command or ''}".strip()
    parser = _Parser(prog=program, usage="%(prog)s [FLAGS]", description=description, allow_abbrev=False)
    entries = [entry for kind in kinds for entry in dataclasses.fields(kind)]
    for kind in kinds:
        hints = typing.get_type_hints(kind)
        group = parser.add_argument_group((kind.__doc__ or kind.__name__).splitlines()[0].rstrip("."))
        for entry in dataclasses.fields(kind):
            _add_flag(group, entry, hints[entry.name])
    parser.add_argument("--config", type=Path, help="YAML file of defaults for any of these flags")
    parser.add_argument("--print-config", action="store_true", help="print all settings as YAML, and exit")
    parser.add_argument("--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="print the version")
    names = [entry.name for entry in entries]
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    words = _words(argv)
    if config := first.parse_known_args(words)[0].config:
        # --config again, because a list at the end of the defaults would take the first words of the command line
        words = [*_yaml_as_flags(config, parser, names), f"--config={config}", *words]
    known, rest = parser.parse_known_args(words)
    if rest:
        flags = [_flag(name) for name in [*names, "config", "print_config", "version"]]
        raise InputError(f"unknown argument {rest[0]!r}; {nearest(rest[0].split('=')[0], flags)}")
    values = vars(known)
    adapt(values)
    _check_folders(entries, values)
    made = tuple(kind(**{entry.name: values[entry.name] for entry in dataclasses.fields(kind)}) for kind in kinds)
    if values["print_config"]:
        settings = {name: value for config in made for name, value in vars(config).items()}
        sys.stdout.write(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
        sys.exit(0)
    return made


def _check_folders(entries: Iterable[dataclasses.Field[Any]], values: Mapping[str, Any]) -> None:
    """Refuse an output folder that is also an input, in whatever way the two are spelled."""
    output = values.get("output_dir")
    for entry in entries:
        given = values[entry.name]
        if entry.metadata.get("reads") and given and output and os.path.realpath(given) == os.path.realpath(output):
            raise InputError(f"output_dir {output} is also {entry.name}; choose another folder")


def parse_command(
    commands: Mapping[str, Sequence[type]], argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[str, tuple[Any, ...]]:
    """Parse a command line whose first word is one of the commands, and decides the classes that `parse` makes.

    Raises:
        InputError: no such command, or what `parse` refuses.
    """
    command, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if command in ("-h", "--help"):
        chooser = argparse.ArgumentParser(prog=_program(), description=description, usage="%(prog)s COMMAND [FLAGS]")
        chooser.add_argument("command", choices=list(commands), help="COMMAND --help lists its flags")
        chooser.parse_args([command])
    if not command or command.startswith("-"):
        raise InputError(f"the first word must be a command: {' or '.join(commands)}")
    if command not in commands:
        raise InputError(f"unknown command {command!r}; {nearest(command, commands)}")
    return command, parse(*commands[command], argv=rest, description=description, command=command)


def has_flag(name: str) -> bool:
    """Return whether a flag is on the command line."""
    return f"--{name}" in [word.split("=")[0] for word in _words(None)]


def command_line() -> str:
    """The words this program was started with, as one would type them; of the program only its name."""
    return shlex.join([_program(), *sys.argv[1:]])


def _program() -> str:
    return Path(sys.argv[0]).name


def set_up_logging() -> None:
    """Write warnings to stderr, one line each, and in the first of several processes also this project's messages."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if os.environ.get("RANK", "0") == "0":
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.INFO)


def _end_loader_workers() -> None:
    """Kill workers of data loaders, which ignore the SIGTERM after which multiprocessing waits without limit."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises an error where a worker ends by a signal
    for worker in workers:
        worker.kill()


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script's main function; a user's mistake or a full disk ends in one line and exit code 2."""
    set_up_logging()
    try:
        main()
    except InputError as error:
        _complain(str(error))
    except OSError as error:
        if isinstance(error, shutil.Error) and isinstance(error.args[0], list):
            _complain(f"{error.args[0][0][-1]}; free some space or choose another folder")
        if error.errno not in FILE_ERRORS:
            raise
        where = f" at {error.filename}" if error.filename else ""
        _complain(f"{error.strerror}{where}; free some space or choose another folder")
    except (MemoryError, RuntimeError) as error:
        from common.runtime import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        _complain(f"out of memory ({str(error)[:120]}); use smaller sizes or batches")
    except KeyboardInterrupt:
        sys.stderr.write(f"{_program()}: interrupted\n")
        sys.exit(130)
    finally:
        _end_loader_workers()
    sys.exit(0)


def _complain(message: str) -> NoReturn:
    sys.stderr.write(f"{_program()}: error: {' '.join(message.split())}\n")
    sys.exit(2)
