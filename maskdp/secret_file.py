"""Files that hold a secret: mode 0600, whole or absent, never overwritten by accident, never readable by others."""

import os
import pathlib
import stat
import tempfile

from maskdp import atomic
from maskdp.errors import UserError


def create(path: os.PathLike | str, data: bytes) -> None:
    """Writes `data` to the new file `path`.

    Raises:
        FileExistsError: `path` exists; a secret is never overwritten.
    """
    path = pathlib.Path(path)
    aside = _aside(path, data)
    try:
        os.link(aside, path)
    finally:
        os.unlink(aside)


def replace(path: os.PathLike | str, data: bytes) -> None:
    """Writes `data` to `path` in one step, whatever was there."""
    os.replace(_aside(pathlib.Path(path), data), path)


def read(path: os.PathLike | str, owner: str) -> bytes:
    """The bytes of `path`; `owner` says in errors whose secret is expected.

    Raises:
        UserError: `path` is missing, a link, or readable by others.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}, expected {owner}") from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or stat.S_IMODE(status.st_mode) & 0o077:
            raise UserError(f"{path}: mode {stat.S_IMODE(status.st_mode):04o}, expected a file of mode 0600")
        return file.read()


def _aside(path: pathlib.Path, data: bytes) -> str:
    """A synced temporary file of mode 0600 beside `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}{atomic.PARTIAL}", dir=path.parent)  # mode 0600
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return aside
