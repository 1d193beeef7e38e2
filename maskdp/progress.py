"""The progress bar of every long command: count, rate, time left. Where the output is no terminal, a line at times."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

LOG_EVERY_SECONDS = 15.0


class _Rate(ProgressColumn):
    def render(self, task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.2f} {task.fields['unit']}/s")


@contextlib.contextmanager
def bar(title: str, total: int, unit: str = "it") -> Iterator[Callable[..., None]]:
    """Yields `advance(n=1, note="")`. On a terminal a live bar, elsewhere a plain line every 15 seconds."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield from _plain(title, total, unit)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, unit=unit, note="")

        def advance(n: int = 1, note: str = "") -> None:
            progress.update(task, advance=n, note=note)

        yield advance


def _plain(title: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
    start = last = time.monotonic()
    done = 0

    def line(note: str) -> None:
        spent = time.monotonic() - start
        rate = done / max(spent, 1e-9)
        left = (total - done) / rate if rate > 0 else float("inf")
        print(f"{title}: {done}/{total}, {rate:.2f} {unit}/s, {left:.0f} s left {note}".rstrip(), file=sys.stderr)

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += n
        if time.monotonic() - last > LOG_EVERY_SECONDS:
            last = time.monotonic()
            line(note)

    yield advance
    print(f"{title}: {done}/{total} in {time.monotonic() - start:.0f} s", file=sys.stderr)
