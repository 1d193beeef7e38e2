"""What the stored layers themselves show: people left in the private layer, flicker, and how avatars lie on people."""

import dataclasses

import cv2
import numpy as np

from anonymize.audit.findings import Finding, interval
from anonymize.audit.footage import Archive, Footage, mask_iou
from anonymize.scene import look as detectors
from anonymize.vision import cues
from maskdp import layers, progress

DISTINCT = 40  # grey levels between a person and the empty room, in a pixel that can tell one from the other
SAME = 8  # grey levels, over 3 × 3 pixels; what JPEG makes of the same picture differs less
SHOWN = 0.02  # of a person's distinct pixels; more of them left is a person left
_AROUND = 0.03  # of the short side, about people, where their shadows and edges move


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """What one stored clip shows.

    Attributes:
        clip_id, video_id: its names.
        people: by detector, the frames looked at in which it sees somebody in the private layer.
        left: (frames with a person) the part of the person's distinct pixels that the private layer still shows; None
            without truth.
        overlap: (frames with a person) IoU of alpha and the people; None without truth.
        flicker: change of the private layer from frame to frame, in the free part of the picture, where people were,
            and of the recording in the free part; None without truth.
    """

    clip_id: str
    video_id: str
    people: dict[str, list[int]]
    left: np.ndarray | None = None
    overlap: np.ndarray | None = None
    flicker: np.ndarray | None = None


def look(record: layers.Record, footage: Footage | None, looks: int) -> Seen:
    """Looks at one clip; the detectors at `looks` of its frames."""
    rgba, private = record.layers(range(record.frames))
    people: dict[str, list[int]] = {}
    for t in cues.sample_times(len(private), looks).tolist():
        for name, found in detectors.default()(private[t]).items():
            people.setdefault(name, [])
            if found.any():
                people[name].append(t)
    if footage is None:
        return Seen(record.clip_id, record.video_id, people)
    shown = np.flatnonzero(footage.people.any((1, 2)))
    return Seen(
        record.clip_id,
        record.video_id,
        people,
        np.array([still_shown(footage, private, t) for t in shown]),
        mask_iou(rgba[shown, ..., 3] >= 128, footage.people[shown]),
        flicker(footage, private),
    )


def still_shown(footage: Footage, private: np.ndarray, t: int) -> float:
    """The part of the people's distinct pixels in frame t around which the private layer is still the recording."""
    recording, scene = footage.frames[t].astype(int), footage.truth.empty.astype(int)
    distinct = footage.people[t] & (np.abs(recording - scene).max(-1) > DISTINCT)
    changed = cv2.blur(np.abs(private[t] - recording).max(-1).astype(np.float32), (3, 3))
    return float((distinct & (changed < SAME)).sum() / max(distinct.sum(), 1))


def flicker(footage: Footage, private: np.ndarray) -> np.ndarray:
    """Mean change from frame to frame: private layer in the free part, private layer where people are, recording in the
    free part. Free is where nobody is near in either frame."""
    radius = max(2, round(_AROUND * min(private.shape[1:3])))
    near = np.stack([cues.dilated(mask, radius) for mask in footage.people])
    near = near[1:] | near[:-1]
    inside = footage.people[1:] & footage.people[:-1]
    change, own = (np.abs(np.diff(video.astype(int), axis=0)).mean(-1) for video in (private, footage.frames))
    return np.array([change[~near].mean(), change[inside].mean() if inside.any() else np.nan, own[~near].mean()])


def check(archive: Archive, looks: int) -> list[Finding]:
    """Every stored clip. Recordings, which show people, and empty rooms, which do not, tell what detectors see."""
    seen, control, false = [], [], []
    with progress.bar("stored layers", len(archive), "clips") as advance:
        for record in archive.records():
            footage = archive.footage(record)
            seen.append(look(record, footage, looks))
            if footage is not None and len(control) < 60:
                middle = len(footage.frames) // 2
                for frame, noted in ((footage.frames[middle], control), (footage.truth.empty, false)):
                    noted.append(any(mask.any() for mask in detectors.default()(frame).values()))
            advance()
    found = [one for one in seen if any(one.people.values())]  # what removal has painted may look like somebody
    real = [one for one in found if one.left is None or one.left.max(initial=0) > SHOWN]
    names = {name: sum(bool(one.people[name]) for one in seen) for name in sorted(seen[0].people)} if seen else {}
    controls = (
        f"; the same in {np.mean(control):.0%} of recordings and {np.mean(false):.0%} of empty rooms (one frame each)"
        if control
        else ""
    )
    findings = [
        Finding(
            f"nobody seen in the private layer ({looks} frames a clip)",
            not real,
            f"somebody in {len(real)} of {len(seen)} clips, shapes that the truth says are nobody in "
            f"{len(found) - len(real)} ({', '.join(f'{name} {n}' for name, n in names.items())})" + controls,
            {"clips": len(seen), "seen_in": [one.clip_id for one in real], "by": names}
            | {"nobody": [one.clip_id for one in found if one not in real]}
            | ({"recordings": float(np.mean(control)), "empty_rooms": float(np.mean(false))} if control else {}),
        )
    ]
    known = [one for one in seen if one.left is not None and len(one.left)]
    if not known:
        return findings
    return findings + _with_truth(known)


def _with_truth(seen: list[Seen]) -> list[Finding]:
    left = np.concatenate([one.left for one in seen])
    overlap = np.concatenate([one.overlap for one in seen])
    videos = np.concatenate([[one.video_id] * len(one.left) for one in seen])
    removed, iou = interval(left <= SHOWN, videos), interval(overlap, videos)
    leaking = sorted((one for one in seen if one.left.max() > SHOWN), key=lambda one: -one.left.max())
    worst = sorted(seen, key=lambda one: one.overlap.mean())[:5]
    free, inside, own = np.nanmean([one.flicker for one in seen], 0)
    return [
        Finding(
            f"people gone from the private layer: nowhere more than {SHOWN:.0%} of their distinct pixels left",
            not leaking,
            f"gone in {removed} of {len(left)} frames; left in {len(leaking)} of {len(seen)} clips"
            + "".join(f", {one.clip_id} ({one.left.max():.0%})" for one in leaking[:3]),
            dataclasses.asdict(removed) | {"frames": len(left), "seen_in": [one.clip_id for one in leaking]},
        ),
        Finding(
            "silhouette IoU of avatars and people: 0.80 or more on average",
            iou.mean >= 0.8,
            f"{iou} of {len(overlap)} frames; worst clips "
            + ", ".join(f"{one.clip_id} ({one.overlap.mean():.2f})" for one in worst[:3]),
            dataclasses.asdict(iou) | {"worst": {one.clip_id: float(one.overlap.mean()) for one in worst}},
        ),
        Finding(
            "flicker of the private layer, against the recording's own where nobody moves",
            None,
            f"{free / own:.2f} times in the free part, {inside / own:.2f} times where people were",
            {"free": free / own, "where_people_were": inside / own, "grey_levels": own},
        ),
    ]
