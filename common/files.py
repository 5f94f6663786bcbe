"""Files: whole or absent, JSON objects, NumPy archives, and the lock of an output folder."""

import fcntl
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config import InputError

READABLE = 0o644  # safetensors makes its files readable by their owner alone


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends without an error, it is flushed and renamed to `path`.

    When the block raises, nothing is left behind and what was at `path` stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        yield temporary
        temporary.chmod(READABLE)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(path: str | Path) -> Iterator[Path]:
    """As `written_whole`, for a new folder; `path` must not exist."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        temporary.chmod(0o755)
        temporary.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a small text file whole."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object; a missing or damaged file is an `InputError` that names it."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is missing; the folder is not what was expected, or not complete")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); restore it or create it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object; restore it or create it again")
    return value


@contextmanager
def exclusive_folder(path: str | Path) -> Iterator[None]:
    """Lock an output folder until the block or the process ends, and remove partial files of killed processes.

    The folder is created if necessary; if another process has locked it, an `InputError` is raised.
    """
    folder, lock = Path(path), Path(path) / ".lock"
    folder.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(file.fileno()), lock.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise InputError(f"another process writes to {path}; wait for it, or choose another folder")
        for partial in folder.glob(".*.partial"):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def load_arrays(path: str | Path) -> dict[str, NDArray[Any]]:
    """Read all arrays of a .npz file.

    Raises:
        InputError: no such file, a damaged one, pickled objects, or arrays larger than half of the machine's memory.
    """
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(member.file_size for member in archive.infolist())
        if total > most:
            raise InputError(f"{path} holds arrays of {total:,} bytes; allowed are {most:,} on this machine")
        with np.load(path, allow_pickle=False) as content:
            return dict(content)
    except InputError:
        raise
    except Exception as error:  # the parsers of NumPy and zipfile raise whatever their code runs into
        raise InputError(f"{path} is not a .npz file, or is damaged ({error}); copy or create it again") from error
