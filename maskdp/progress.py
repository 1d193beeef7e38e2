"""The progress bar of every long command: count, rate, time left. Where the output is no terminal, a line at times."""

import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
from rich.text import Text

LOG_EVERY_SECONDS = 15.0


class _Pace(ProgressColumn):
    def render(self, task) -> Text:
        return Text(task.fields["pace"]())


@contextlib.contextmanager
def bar(title: str, total: int, unit: str = "it") -> Iterator[Callable[..., None]]:
    """Yields `advance(n=1, note="", known=False)`; `known` work was there already and says nothing of the pace.

    On a terminal a live bar, elsewhere a plain line every 15 seconds.
    """
    start = last = time.monotonic()
    done = fresh = 0

    def pace() -> str:
        rate = fresh / max(time.monotonic() - start, 1e-9)
        if not rate:
            return ""
        left = datetime.timedelta(seconds=round((total - done) / rate))
        return f"{rate:.2f} {unit}/s, {left} left"

    def count(n: int, known: bool) -> None:
        nonlocal done, fresh
        done += n
        fresh += 0 if known else n

    console = Console(file=sys.stderr)
    if console.is_terminal:
        note = TextColumn("{task.fields[note]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Pace(), note)
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(title, total=total, pace=pace, note="")

            def advance(n: int = 1, note: str = "", known: bool = False) -> None:
                count(n, known)
                progress.update(task, advance=n, note=note)

            yield advance
        return

    def advance(n: int = 1, note: str = "", known: bool = False) -> None:
        nonlocal last
        count(n, known)
        if time.monotonic() - last > LOG_EVERY_SECONDS:
            last = time.monotonic()
            said = ", ".join(part for part in (f"{done}/{total}", pace(), note) if part)
            print(f"{title}: {said}", file=sys.stderr)

    yield advance
    print(f"{title}: {done}/{total} in {time.monotonic() - start:.0f} s", file=sys.stderr)
