"""`maskdp report DATASET`: the page on which a person looks at every clip before anything is released, and signs."""

import base64
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from maskdp import layers
from maskdp.errors import UserError
from maskdp.report import anonymization, page, pictures

AUDIT = "audit.json"
"""What `maskdp audit anonymization` leaves in the dataset's folder."""
COLUMNS = 6
"""Moments of a clip that are shown."""
HEIGHT = 104
"""Pixels of a picture."""
VERDICTS = {True: "holds", False: "fails", None: ""}


def is_dataset(path: str | pathlib.Path) -> bool:
    """Whether `path` is what `maskdp anonymize` wrote."""
    path = pathlib.Path(path)
    return (path / layers.SHARDS).is_dir() or (path / "dataset_info.json").exists()


def read_audit(folder: pathlib.Path, contents_tag: str) -> tuple[list[dict[str, Any]], str]:
    """The findings of the audit in `folder`, and what is to be said about them."""
    path = folder / AUDIT
    if not path.exists():
        return [], "No audit was made: maskdp audit anonymization looks for leaks and measures the fit."
    try:
        audit = json.loads(path.read_text())
        findings, audited = audit["findings"], audit["dataset"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: cannot be read, expected what `maskdp audit anonymization` wrote") from None
    if audited != contents_tag:
        return [], "The audit found here is of another state of this dataset and is not shown."
    failed = sum(finding["holds"] is False for finding in findings)
    checked = sum(finding["holds"] is not None for finding in findings)
    return findings, f"{checked - failed} of {checked} bounds hold." if checked else "Nothing in it has a bound."


def suspects(findings: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Clip → what the audit has against it."""
    marked: dict[str, list[str]] = {}
    for finding in findings:
        figures = finding["figures"]
        for clip in figures.get("seen_in", ()):
            marked.setdefault(clip, []).append("somebody is seen in the private layer")
        for clip in figures.get("nobody", ()):
            marked.setdefault(clip, []).append("a painted place looks like a person")
    return {clip: "; ".join(words) for clip, words in marked.items()}


def sheet(record: layers.Record, original: np.ndarray | None) -> tuple[str, list[str]]:
    """A picture as a `data:` address, COLUMNS moments wide, and the names of its rows."""
    times = np.unique(np.linspace(0, record.frames - 1, COLUMNS).round().astype(int))
    rgba, private = record.layers(times.tolist())
    rows = {"private layer": private, "as published": layers.composite(rgba, private)}
    if original is not None:
        rows = {"recording": original[times], **rows}
    picture = np.concatenate([np.concatenate(list(row), 1) for row in rows.values()])
    image = Image.fromarray(picture)
    scale = HEIGHT * len(rows) / image.height
    image = image.resize((round(image.width * scale), HEIGHT * len(rows)), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=70, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode(), list(rows)


def context(folder: str | pathlib.Path, videos: str | pathlib.Path | None, most: int) -> dict[str, Any]:
    """What `review.html` shows: the worst `most` clips by fit, first those without any."""
    dataset = layers.Dataset(folder)
    manifest = anonymization.read(dataset.path.parent)
    known = {record["clip_id"]: record for record in manifest if record["status"] == "written"}
    findings, word = read_audit(dataset.path.parent, dataset.contents_tag())
    marked = suspects(findings)

    def fit(entry: tuple[str, layers.Record]) -> float:
        value = known.get(entry[1].clip_id, {}).get("iou")
        return -1.0 if value is None else value

    entries = sorted(((split, record) for split in dataset.splits for record in dataset[split]), key=fit)
    shown = entries[:most]
    found = pictures.videos_by_source(dataset, videos, [record for _, record in shown])
    clips = [
        _clip(split, record, dataset.labels, known.get(record.clip_id, {}), marked.get(record.clip_id), found)
        for split, record in shown
    ]
    return {
        "title": "maskdp review of a dataset",
        "clips": clips,
        "count": len(entries),
        "originals": any("recording" in clip["rows"] for clip in clips),
        "findings": [finding | {"verdict": VERDICTS[finding["holds"]]} for finding in findings],
        "audit": word,
        "failed": any(finding["holds"] is False for finding in findings),
        "suspects": [clip for clip in clips if clip["suspect"]],
        "anonymization": anonymization.summary(manifest),
        "dataset_id": dataset.id,
        "context": dataset.metadata.get("context"),
    }


def _clip(split, record, labels, figures, suspect, found) -> dict[str, Any]:
    first = pictures.clip_number(record) == 0
    picture, rows = sheet(record, pictures.source_frames(found.get(record.source), record) if first else None)
    missing = [
        f"{figures[key]} frames {words}"
        for key, words in (("frames_without_pose", "with a person who has no avatar"), ("frames_blanked", "blanked"))
        if figures.get(key)
    ]
    overlap = figures.get("iou")
    return {
        "id": record.clip_id,
        "name": labels[record.label] if record.label >= 0 else "no label",
        "split": split,
        "fit": page.NONE if overlap is None else f"{overlap:.2f}",
        "people": figures.get("people"),
        "frames": record.frames,
        "missing": "; ".join(missing),
        "suspect": suspect,
        "sheet": picture,
        "rows": rows,
    }
