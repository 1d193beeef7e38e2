"""What `maskdp anonymize` did, summed over the records it left in `manifest.jsonl`."""

import json
import pathlib
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from maskdp.errors import UserError

MANIFEST = "manifest.jsonl"

_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_FOLDER = re.compile(r"(?:[A-Za-z]:\\|/)\S*[/\\]")


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The records of `manifest.jsonl` in `folder`; none where there is no such file."""
    path = folder / MANIFEST
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def reasons(refused: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Why clips were not written, most frequent first; those that differ in figures alone are one; no folders."""
    alike: dict[str, list[str]] = {}
    for record in refused:
        reason = _FOLDER.sub("", record.get("reason") or "no reason recorded")
        alike.setdefault(_NUMBER.sub("…", reason), []).append(reason)
    named = [(pattern if len(set(texts)) > 1 else texts[0], len(texts)) for pattern, texts in alike.items()]
    return sorted(named, key=lambda item: -item[1])


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Counts for the template; None without records."""
    if not records:
        return None
    written = [record for record in records if record["status"] == "written"]
    quarantined = [record for record in records if record["status"] == "quarantined"]
    failed = [record for record in records if record["status"] not in ("written", "quarantined")]
    frames = sum(record["frames"] for record in written)
    overlaps = [record["iou"] for record in written if record["iou"] is not None]
    tally = [
        (len(written), "clips written"),
        (len(quarantined), "clips quarantined"),
        (sum(record["people"] - record.get("people_kept", 0) for record in written), "people replaced"),
    ]
    if kept := sum(record.get("people_kept", 0) for record in written):
        tally.append((kept, "people kept visible on purpose: they are real in the private layer"))
    if failed:
        tally.append((len(failed), "files that could not be read"))
    if frames:
        for key, text in (
            ("frames_without_pose", "of frames with somebody removed who has no avatar"),
            ("frames_blanked", "of frames blanked, the removal being in doubt"),
        ):
            tally.append((f"{100 * sum(record[key] for record in written) / frames:.1f}\N{NO-BREAK SPACE}%", text))
    if overlaps:
        tally.append((f"{statistics.fmean(overlaps):.2f}", "mean overlap (IoU) of avatar and silhouette"))
    return {
        "tally": [{"value": value, "text": text} for value, text in tally],
        "refused": reasons([*quarantined, *failed]),
    }
