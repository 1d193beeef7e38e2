"""`maskdp demo`: the whole job on generated videos, each stage the public command a user would type.

A stage that finished is not run again: `DIR/demo.json` says which did, and for which settings.
"""

import argparse
import dataclasses
import json
import pathlib
import shlex
import time
from collections.abc import Sequence

from maskdp import atomic, config, process
from maskdp.errors import UserError

OBJECTIVES = ("maskdp", "maskdp_residual", "maskdp_two_step", "dp_sgd", "public_only", "sgd")
EMBEDDED = ("--finder.type", "embedded")  # the demo takes as long with weights in the cache as without
VIDEOS = 120
STATE = "demo.json"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One numbered step: what it does, and the words after `maskdp`."""

    title: str
    words: tuple[str, ...]


def stages(out: pathlib.Path, videos: int) -> list[Stage]:
    """The job in order.

    Args:
        out: folder of the demo.
        videos: private videos to film.
    """
    filmed, private, runs = (str(out / name) for name in ("filmed", "private", "runs"))
    train = ("train", "--config_path", str(config.bundled("demo.yaml")))
    flagship = f"{runs}/maskdp"
    return [
        Stage("film the private videos", ("studio", "--out", filmed, "--videos", str(videos))),
        Stage("anonymize", ("anonymize", f"{filmed}/manifest.csv", "--out", private, "--workers", "2", *EMBEDDED)),
        *(
            Stage(
                f"train: {objective}",
                (*train, "--objective.type", objective, "--data.path", private, "--out", f"{runs}/{objective}"),
            )
            for objective in OBJECTIVES
        ),
        Stage("evaluate maskdp, class by class", ("eval", flagship, "--data", private)),
        Stage("audit the dataset", ("audit", private)),
        Stage("audit maskdp", ("audit", flagship)),
        Stage(
            "report",
            (
                *("report", *(f"{runs}/{objective}" for objective in OBJECTIVES)),
                *("--data", private, "--videos", f"{filmed}/videos", "--out", str(out / "report.html")),
            ),
        ),
    ]


class State:
    """Which stages of a demo folder are finished, by the words of their commands."""

    def __init__(self, path: pathlib.Path, videos: int):
        self._path = path
        self._stored = {"videos": videos, "done": []}
        if not path.exists():
            return
        try:
            stored = json.loads(path.read_text())
            same = stored["videos"] == videos
            self._stored["done"] = list(stored["done"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: not a demo's state file; name another --out") from None
        if not same:
            raise UserError(f"{path.parent}: holds a demo of {stored['videos']} videos; name another --out")

    def done(self, stage: Stage) -> bool:
        """Whether this very command has finished here."""
        return shlex.join(stage.words) in self._stored["done"]

    def finish(self, stage: Stage) -> None:
        """Records it."""
        self._stored["done"].append(shlex.join(stage.words))
        atomic.write_json(self._path, self._stored)


def run(todo: Sequence[Stage], state: State) -> int:
    """Runs the stages in order and returns the first exit status that is not 0.

    Once a stage had to be run, so must all that follow it: they read what it wrote.
    """
    begin = time.monotonic()
    fresh = False
    for number, stage in enumerate(todo, 1):
        label = f"[{number}/{len(todo)}]"
        if not fresh and state.done(stage):
            print(f"{label} {stage.title}: done before", flush=True)
            continue
        fresh = True
        print(f"{label} {stage.title}\n      $ {process.command_line(stage.words)}", flush=True)
        start = time.monotonic()
        status = process.run(stage.words)
        if status:
            print(f"maskdp demo: stopped at {label} {stage.title}; the same command continues here", flush=True)
            return status
        state.finish(stage)
        now = time.monotonic()
        print(f"      {_clock(now - start)}, {_clock(now - begin)} in all", flush=True)
    return 0


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def main(arguments: list[str]) -> int:
    """`maskdp demo [--out DIR] [--videos N]`"""
    parser = argparse.ArgumentParser(prog="maskdp demo", description="The whole job on generated videos.")
    parser.add_argument("--out", default="out/demo", metavar="DIR", help="default: out/demo; continues what is there")
    parser.add_argument("--videos", type=int, default=VIDEOS, metavar="N", help=f"private videos, default {VIDEOS}")
    options = parser.parse_args(arguments)
    if options.videos < 20:
        raise UserError(f"--videos: {options.videos}, expected at least 20")
    out = pathlib.Path(options.out)
    status = run(stages(out, options.videos), State(out / STATE, options.videos))
    if not status:
        print(
            f"{out / 'report.html'}: the clips in two layers, what each objective learns from them and at which ε, "
            "and what that promise covers"
        )
    return status
