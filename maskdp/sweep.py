"""`maskdp sweep`: a grid of training runs, each its own process, resumable.

The folder of a sweep holds `sweep.json` (what is done), `runs/NAME` (run folders), `logs/NAME.log` and `summary.json`.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import pathlib
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from maskdp import atomic, config, layers, process, progress
from maskdp.errors import UserError
from maskdp.report import page
from maskdp.report import runs as run_folders

MANIFEST = "sweep.json"
SUMMARY = "summary.json"


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """A base config and the points at which it is run.

    Attributes:
        base: config of one run: a file, or the name of one shipped with the project (`demo.yaml`).
        out: folder of the sweep; the same command continues what is there.
        fixed: dotted keys set in every run.
        grid: dotted key → values; every combination is a run. A value may be a mapping of dotted keys set together.
        runs: further runs, each a mapping of dotted keys to values.
        jobs: runs at a time.
    """

    base: str = ""
    out: str = ""
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    grid: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    runs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    jobs: int = 1

    def __post_init__(self):
        for name in ("base", "out"):
            if not getattr(self, name):
                raise UserError(f"{name}: missing, expected a path")
        config.positive(self, "jobs")
        if not self.grid and not self.runs:
            raise UserError("grid, runs: both empty, expected at least one run")
        for key, values in self.grid.items():
            if not values:
                raise UserError(f"grid.{key}: no values, expected at least one")


def points(grid: Mapping[str, Sequence[Any]], runs: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """The Cartesian product of `grid`, then `runs`; the last key varies fastest, a point that recurs is kept once.

    A value of the grid that is a mapping sets its own dotted keys, all together, and not the key it stands under.
    """
    combinations = [
        {name: one for key, value in zip(grid, values) for name, one in _keys(key, value).items()}
        for values in (itertools.product(*grid.values()) if grid else ())
    ]
    unique = {_canonical(point): dict(point) for point in [*combinations, *runs]}
    return list(unique.values())


def _keys(key: str, value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {key: value}


def run_name(point: Mapping[str, Any]) -> str:
    """Folder name of a point: its values, readable, and eight digits of its hash, unique."""
    words = [f"{key.rsplit('.', 1)[-1]}={value}" for key, value in point.items()]
    readable = re.sub(r"[^\w=.+-]+", "_", "-".join(words))[:80]
    return f"{readable}-{hashlib.sha256(_canonical(point).encode()).hexdigest()[:8]}"


def _canonical(point: Mapping[str, Any]) -> str:
    return json.dumps(point, sort_keys=True)


def overrides(point: Mapping[str, Any]) -> list[str]:
    """`{"a.b": v}` as the command-line words `--a.b v`."""
    return [
        word
        for key, value in point.items()
        for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]


def _base_path(base: str) -> pathlib.Path:
    for path in (pathlib.Path(base), config.bundled(base)):
        if path.is_file():
            return path
    raise UserError(f"{base}: no such config file")


class Manifest:
    """`sweep.json`: the state of every run, rewritten whole after each change."""

    def __init__(self, folder: pathlib.Path, base: pathlib.Path):
        self._path = folder / MANIFEST
        digest = hashlib.sha256(base.read_bytes()).hexdigest()
        self.runs: dict[str, dict[str, Any]] = {}
        self._header = {"base_sha256": digest}
        if self._path.exists():
            try:
                stored = json.loads(self._path.read_text())
                known, self.runs = stored["base_sha256"], stored["runs"]
            except (ValueError, KeyError) as error:
                raise UserError(f"{self._path}: not a sweep's manifest ({error})") from None
            if known != digest:
                raise UserError(f"{folder}: holds a sweep of another base config; name another --out")

    def update(self, name: str, **entry: Any) -> None:
        """Records the state of run `name`."""
        self.runs[name] = entry
        atomic.write_json(self._path, self._header | {"runs": self.runs})


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """Holds the folder for this process; the kernel lets go of it when the process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{folder}: another sweep is at work there") from None
        yield


def run_points(folder: pathlib.Path, base: pathlib.Path, todo: Sequence[dict[str, Any]], jobs: int) -> list[str]:
    """Runs the points that are not done yet, `jobs` at a time, and returns one line for each that failed."""
    manifest = Manifest(folder, base)

    def one(point: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        name = run_name(point)
        log = folder / "logs" / f"{name}.log"
        start = time.monotonic()
        status = process.run(
            ["train", "--config_path", str(base), *overrides(point), "--out", str(run_folder(folder, point))], log
        )
        entry = {"set": point, "state": "failed" if status else "done", "seconds": round(time.monotonic() - start, 1)}
        if status:
            entry["error"] = _last_line(log) or f"exit status {status}"
        return name, entry

    missing = [point for point in todo if manifest.runs.get(run_name(point), {}).get("state") != "done"]
    if len(missing) < len(todo):
        print(f"sweep: {len(todo) - len(missing)} of {len(todo)} runs were done before", file=sys.stderr)
    with (
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
        progress.bar("sweep", len(missing), "runs") as advance,
    ):
        try:
            for finished in concurrent.futures.as_completed([pool.submit(one, point) for point in missing]):
                name, entry = finished.result()
                manifest.update(name, **entry)
                advance(1, note=f"{name} {entry['state']}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    entries = {name: manifest.runs[name] for name in map(run_name, todo)}
    return [f"{name}: {entry['error']}" for name, entry in entries.items() if entry["state"] == "failed"]


def run_folder(folder: pathlib.Path, point: Mapping[str, Any]) -> pathlib.Path:
    """Where the run of `point` lies in the sweep's `folder`."""
    return folder / "runs" / run_name(point)


def _last_line(log: pathlib.Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def summarize(folders: Sequence[pathlib.Path]) -> dict[str, Any]:
    """Mean and sample standard deviation over the runs of each configuration, and what publishing them all costs."""
    runs = [run_folders.load(folder) for folder in folders]
    configurations = [
        {
            "name": row.name,
            "runs": len(row.runs),
            "epsilon": row.epsilon,
            "delta": None if row.epsilon is None else row.delta,
            "composite": None if row.composite is None else dataclasses.asdict(row.composite),
            "public_view": None if row.public_view is None else dataclasses.asdict(row.public_view),
        }
        for row in page.rows(runs)
    ]
    return {"configurations": configurations, "publishing": _publishing(folders), "ledger": _ledger(runs)}


def _ledger(runs: Sequence[run_folders.Run]) -> list[str]:
    """What publishing every run ever started on the datasets of `runs` costs, in words."""
    from maskdp_jax import ledger

    paths = sorted({run.config["data"]["path"] for run in runs if pathlib.Path(run.config["data"]["path"]).exists()})
    return [
        line
        for path in paths
        for account in ledger.accounts(ledger.read(layers.Dataset(path)))
        for line in ledger.sentences(account)
    ]


def _publishing(folders: Sequence[pathlib.Path]) -> dict[str, Any] | None:
    """What publishing all private runs costs together; None where they share no claim.

    The δ of the claim is the largest of theirs. Runs of `sgd` have no ε: publishing one gives its records away.
    """
    from maskdp_jax.mechanism import Mechanism, compose

    cards = [json.loads((folder / run_folders.CARD).read_text()) for folder in folders]
    private = [card for card in cards if card["objective"] != "sgd"]
    if not private:
        return None
    delta = max(card["delta"] or 0.0 for card in private)
    if not delta:
        return None
    try:
        claim = compose([Mechanism(**card["mechanism"]) for card in private], delta)
    except UserError:
        return None
    return {"runs": len(private), "epsilon": claim.value if math.isfinite(claim.value) else None, "delta": delta}


def _table(summary: Mapping[str, Any]) -> Table:
    table = Table("configuration", "runs", "composite", "public view", "ε", "δ", box=None, pad_edge=False)
    for one in summary["configurations"]:
        shares = [page.spread_words(one[view] and run_folders.Spread(**one[view])) for view in page.VIEWS]
        epsilon = "no ε" if one["epsilon"] is None else page.number(one["epsilon"])
        table.add_row(one["name"], str(one["runs"]), *shares, epsilon, page.number(one["delta"]))
    return table


def main(arguments: list[str]) -> int:
    """`maskdp sweep --config_path FILE --out DIR [--jobs N]`; exit status 1 if a run failed."""
    sweep = config.parse(SweepConfig, arguments, "sweep")
    folder, base = pathlib.Path(sweep.out), _base_path(sweep.base)
    todo = [sweep.fixed | point for point in points(sweep.grid, sweep.runs)]
    with _alone(folder):
        failures = run_points(folder, base, todo, sweep.jobs)
        folders = [run_folder(folder, point) for point in todo]
        done = [path for path in folders if (path / run_folders.RESULT).exists()]
        if done:
            summary = summarize(done)
            atomic.write_json(folder / SUMMARY, summary)
            Console().print(_table(summary))
            if (cost := summary["publishing"]) is not None:
                bound = "no ε" if cost["epsilon"] is None else f"ε = {page.number(cost['epsilon'])}"
                print(f"publishing all {cost['runs']} private runs costs {bound} at δ = {page.number(cost['delta'])}")
            for line in summary["ledger"]:
                print(f"ledger of the dataset: {line}")
    for line in failures:
        print(f"maskdp sweep: failed: {line}", file=sys.stderr)
    return 1 if failures else 0
