"""What `maskdp anonymize` did, summed over the records it left in `manifest.jsonl`."""

import json
import pathlib
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

MANIFEST = "manifest.jsonl"


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The records of `manifest.jsonl` in `folder`; none where there is no such file."""
    path = folder / MANIFEST
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Counts for the template; None without records."""
    if not records:
        return None
    written = [record for record in records if record["status"] == "written"]
    refused = [record for record in records if record["status"] != "written"]
    frames = sum(record.get("frames", 0) for record in written)
    without = sum(record.get("frames_without_pose", 0) for record in written)
    overlaps = [record["silhouette_iou"] for record in written if record.get("silhouette_iou") is not None]
    tally = [
        (len(written), "clips written"),
        (len(refused), "quarantined"),
        (sum(record.get("people", 0) for record in written), "people replaced"),
        (f"{100 * without / frames:.1f} %" if frames else "–", "of frames without a pose (no avatar, person removed)"),
    ]
    if overlaps:
        tally.append((f"{statistics.fmean(overlaps):.2f}", "mean overlap (IoU) of avatar and person"))
    return {
        "tally": [{"value": value, "text": text} for value, text in tally],
        "quarantined": Counter(str(record.get("reason") or "unknown") for record in refused).most_common(),
    }
