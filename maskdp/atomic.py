"""Files that are either whole or absent: write aside, fsync, rename."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

PARTIAL = ".partial-"
"""In the name of whatever is not finished: `.NAME.partial-XXXXXXXX`."""


def _sync_folder(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The umask of this process: temporary files are private whatever it is, finished ones follow it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def writing(path: os.PathLike | str) -> Iterator[pathlib.Path]:
    """Yields a temporary path beside `path`; on a clean exit it is synced and renamed to `path`, else removed."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}{PARTIAL}", suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    aside = pathlib.Path(name)
    try:
        yield aside
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(aside, 0o666 & ~_umask())
        os.replace(aside, path)
        _sync_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_bytes(path: os.PathLike | str, data: bytes) -> None:
    """Writes `data` to `path` in one step."""
    with writing(path) as aside:
        aside.write_bytes(data)


def write_text(path: os.PathLike | str, text: str) -> None:
    """Writes `text` to `path` in one step."""
    write_bytes(path, text.encode())


def write_json(path: os.PathLike | str, value: Any) -> None:
    """Writes `value` as indented JSON; NaN and infinity become null, since JSON has neither."""
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value


@contextlib.contextmanager
def folder(path: os.PathLike | str) -> Iterator[pathlib.Path]:
    """Yields an empty folder beside `path`; on a clean exit its files are synced and it takes the name `path`.

    `path` must not exist yet: a finished folder is never overwritten.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}{PARTIAL}", dir=path.parent))
    try:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
        os.chmod(aside, 0o777 & ~_umask())
        os.rename(aside, path)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sweep(path: os.PathLike | str) -> None:
    """Removes what killed processes left half written in a folder; nobody else may be writing there."""
    for left in pathlib.Path(path).glob(f".*{PARTIAL}*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
