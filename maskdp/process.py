"""Our own commands run as child processes: the same command line a user would type, and none outlives its parent."""

import ctypes
import os
import pathlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence


def command_line(arguments: Sequence[str]) -> str:
    """`maskdp …` as one would type it."""
    return shlex.join(["maskdp", *arguments])


def run(arguments: Sequence[str], log: str | pathlib.Path | None = None) -> int:
    """Runs `maskdp …` and returns its exit status; its output goes to `log` (replaced) or straight through.

    On Linux the child is killed when this process dies, even by kill -9, so that a resumed run never meets its elder.
    """
    command = [sys.executable, "-m", "maskdp", *arguments]
    parent = os.getpid()
    end_with_parent = (lambda: _end_with(parent)) if sys.platform == "linux" else None
    if log is None:
        return _wait(subprocess.Popen(command, preexec_fn=end_with_parent))
    log = pathlib.Path(log)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        return _wait(subprocess.Popen(command, preexec_fn=end_with_parent, **streams))


def _end_with(parent: int) -> None:
    """In the child, before exec: asks the kernel for SIGKILL when the parent dies; leaves if it is dead already."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _wait(child: subprocess.Popen) -> int:
    try:
        return child.wait()
    except BaseException:  # Ctrl-C reaches the child too; give it a moment to close its files
        try:
            child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            child.kill()
        raise
