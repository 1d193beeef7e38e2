"""The ledger of a dataset: every run on its private layers is entered before its first step, finished or not.

The results of a discarded run may have influenced later choices. What publishing costs is therefore the
composition of all runs in the ledger, not of those that were kept.
"""

import collections
import datetime
import fcntl
import json
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from maskdp import layers
from maskdp.errors import UserError
from maskdp_jax.mechanism import Epsilon, Mechanism, compose, upward

FILE = "ledger.jsonl"


class Entry(NamedTuple):
    """One started run.

    Attributes:
        run: id of the run; a resumed run is entered once, since it repeats the same releases.
        started: time of its first start, ISO 8601, UTC.
        split: of the dataset.
        delta: of its claim.
        mechanism: as it was stored at the start.
    """

    run: str
    started: str
    split: str
    delta: float
    mechanism: Mechanism


class Account(NamedTuple):
    """What publishing runs costs that share a claim: those of one split, unit, adjacency and number of records.

    Attributes:
        runs: with noise, all of which `epsilon` covers.
        without_noise: runs that read private layers without protection (`sgd`). They have no ε and must never be
            published; `epsilon` does not count them.
        epsilon: of all `runs` together, at the largest δ of theirs; None where there is none.
    """

    split: str
    unit: str
    adjacency: str
    records: int
    runs: int
    without_noise: int
    epsilon: Epsilon | None


def charge(dataset: layers.Dataset, run: str, split: str, delta: float, mechanism: Mechanism) -> None:
    """Enters a run, once. The entry is on disk when this returns.

    Raises:
        UserError: the ledger cannot be written, or holds the run with another mechanism; a run that cannot be charged
            must not start.
    """
    if mechanism.sensitivity == 0:
        return
    path = dataset.folder / FILE
    entry = {
        "run": run,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "split": split,
        "delta": delta,
        "mechanism": mechanism.as_dict(),
    }
    try:
        with open(path, "a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read()
            for known in _parsed(path, text):
                if known.run == run:
                    if (known.mechanism, known.delta) != (mechanism, delta):
                        raise UserError(f"{path}: run {run} was entered with another mechanism, expected a new run")
                    return
            file.truncate(len(text[: text.rfind("\n") + 1].encode()))  # an entry cut off by a kill; its run never began
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a private run must be entered in the dataset's ledger") from None


def read(dataset: layers.Dataset) -> list[Entry]:
    """Every entry, in order.

    Raises:
        UserError: the ledger cannot be read.
    """
    path = dataset.folder / FILE
    return list(_parsed(path, path.read_text(encoding="utf-8"))) if path.exists() else []


def _parsed(path: pathlib.Path, text: str) -> Iterable[Entry]:
    for number, line in enumerate(text.split("\n")[:-1], 1):  # what follows the last newline was cut off by a kill
        try:
            fields: dict[str, Any] = json.loads(line)
            mechanism = Mechanism(**fields.pop("mechanism"))
            yield Entry(mechanism=mechanism, **fields)
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}: line {number} is not an entry of a ledger") from None


def accounts(entries: Iterable[Entry]) -> list[Account]:
    """The cost of publishing all runs, one account for each claim they share."""
    groups: dict[tuple, list[Entry]] = collections.defaultdict(list)
    for entry in entries:
        mechanism = entry.mechanism
        groups[entry.split, mechanism.unit, mechanism.adjacency, mechanism.num_units, mechanism.dataset].append(entry)
    made = []
    for (split, unit, adjacency, records, _), group in groups.items():
        noised = [entry for entry in group if entry.mechanism.noise_multiplier > 0]
        together = None
        if noised:
            together = compose([entry.mechanism for entry in noised], max(entry.delta for entry in noised))
        made.append(Account(split, unit, adjacency, records, len(noised), len(group) - len(noised), together))
    return made


def epsilon_words(epsilon: Epsilon) -> str:
    """ε to four digits, rounded up; `no ε` where it is infinite."""
    return upward(epsilon.value, 4) if math.isfinite(epsilon.value) else "no ε"


def _all_runs(count: int) -> str:
    return "the one private run" if count == 1 else f"all {count} private runs"


def sentences(account: Account) -> list[str]:
    """What publishing the runs of one account costs, in words."""
    said = []
    if account.epsilon is not None:
        claim = f"{'' if math.isinf(account.epsilon.value) else 'ε = '}{epsilon_words(account.epsilon)}"
        said.append(
            f"publishing {_all_runs(account.runs)} on split {account.split} costs {claim} at δ = "
            f"{account.epsilon.delta:g} for one {account.unit} of {account.records}, under {account.adjacency}"
        )
    if account.without_noise:
        said.append(
            f"{account.without_noise} runs on split {account.split} added no noise: they have no ε and must not be "
            "published"
        )
    return said
