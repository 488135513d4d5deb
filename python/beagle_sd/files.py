"""The user's cache folder, and files and folders that appear whole or not at all."""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PARTIAL = re.compile(r"\.(?P<machine>.*)~(?P<process>\d+)~\d+\.partial\.(?P<name>.*)", re.S)
_numbers = itertools.count()


def cache_folder() -> Path:
    """Where converted models, calibrations and downloads are kept: $BEAGLE_CACHE, else `beagle_sd` in the user's cache
    folder; it may not exist yet. OSError where the user has none."""
    if folder := os.environ.get("BEAGLE_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "beagle_sd"
    try:
        return Path.home() / ".cache" / "beagle_sd"
    except RuntimeError as error:
        raise OSError(f"no folder is known to keep what is made once in ({error}); {_INSTEAD}") from error


_INSTEAD = "allowed: a folder that can be written, which BEAGLE_CACHE names"


@contextmanager
def kept_in_cache(what: str) -> Iterator[None]:
    """Around the writing of `what` to the cache folder: OSError names it, the folder, and how to choose another."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{what} cannot be kept in the cache folder {cache_folder()} ({reason}); {_INSTEAD}") from error


@contextmanager
def whole(path: str | Path, *, keep: Callable[[Path], bool] = lambda _: False) -> Iterator[Path]:
    """Gives a path to write a file or a folder to, which takes the name `path` when the block ends, in place of what
    had it, unless `keep(path)` says that what another process put there meanwhile is as good.

    If the block raises or the process is killed, `path` is as it was. What killed processes of this machine left beside
    it is removed. Missing folders above `path` are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_remains(path.parent)
    partial = path.with_name(f".{platform.node()}~{os.getpid()}~{next(_numbers)}.partial.{path.name}")
    try:
        yield partial
        if not (path.exists() and keep(path)):
            _replace(partial, path, keep)
    finally:
        _remove(partial)


def name_in_the_end(path: Path) -> Path:
    """The name that `whole` gives the path it gave in the end; any other path as it is."""
    partial = _PARTIAL.fullmatch(path.name)
    return path.with_name(partial["name"]) if partial else path


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to the file `path`, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def remove_remains(folder: Path) -> None:
    """Remove what `whole` left in `folder` where its process was killed."""
    for path in folder.glob(".*~*.partial.*"):
        named = _PARTIAL.fullmatch(path.name)
        if named and named["machine"] == platform.node() and not _alive(int(named["process"])):
            _remove(path)


def _replace(new: Path, path: Path, keep: Callable[[Path], bool]) -> None:
    """Give `new` the name `path`; a folder there goes first, since a rename replaces files and empty folders only."""
    try:
        os.replace(new, path)
    except OSError as error:
        if path.is_dir() and not new.is_dir():
            raise IsADirectoryError(f"{path} is a folder; allowed: the name of a file") from error
        if not (path.is_dir() and new.is_dir()):
            raise
        if keep(path):  # another process put it there just now
            return
        old = path.with_name(f"{new.name}.old")
        os.replace(path, old)
        os.replace(new, path)
        _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True
