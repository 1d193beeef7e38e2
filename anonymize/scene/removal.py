"""Taking people out of a scene: what stood behind them, seen when the place was free, else painted from around it."""

import dataclasses
from collections.abc import Callable

import cv2
import numpy as np

from anonymize.people import People
from anonymize.scene import look, stabilise
from anonymize.scene.look import Look, everywhere
from anonymize.scene.stabilise import Shot
from anonymize.vision import cues

Inpaint = Callable[[np.ndarray, np.ndarray], np.ndarray]

MOST_REMOVED = 0.92  # of a frame; beyond it nothing of the scene is left to show
BLANK = cues.GREY
HOLDS = (3, 15, 10**6)  # frames before and after for which what is still seen is removed, round by round
MOST_PAINTED = 0.5  # of what looks like a person; with more of it painted, it is a false positive of the painting
SAMPLES = 60  # frames of a shot that its scene is made from
LEAST_FRAMES = 3  # of a shot that can fill its own holes
MISFIT = 10  # grey levels; a frame that differs more from the scene, on average, was laid onto it wrongly
ALIKE = 26  # grey levels; more is another thing, not another light
FAINT = 5  # grey levels; the least shadow that is removed with what casts it
MOST_SHADOW = 0.4  # of a frame
SEAM = 0.05  # part of the short side; how far the light at a hole's rim reaches into it


@dataclasses.dataclass(frozen=True)
class Removal:
    """The scene without its people.

    Attributes:
        frames: (T, H, W, 3) uint8.
        blanked: (T,) bool, frames that are one flat grey because the removal failed there.
        doubt: why the clip should be quarantined, in one line, or None.
        repairs: how often what was still seen in the finished frames was removed as well.
    """

    frames: np.ndarray
    blanked: np.ndarray
    doubt: str | None
    repairs: int = 0


def remove(
    frames: np.ndarray,
    people: People,
    most_blanked: float = 0.2,
    inpaint: Inpaint = cues.inpainted,
    inpaint_alone: Inpaint = cues.inpainted,
) -> Removal:
    """Removes everything that `people.removal` covers, and the shadows and reflections that touch it.

    A removed pixel becomes the temporal median of the frames in which its place was free, adjusted to the light at the
    rim of the hole. The frames are laid over each other as they are (static camera) or by `stabilise`. Where a place
    was never free long enough, the scene is painted (`inpaint`) once for all the frames that see it. A frame that
    cannot be laid over others with confidence borrows nothing and lends nothing: it is painted alone. One that is
    removed almost whole is blanked.

    Detectors then look at every finished frame. What they still take for a person is removed as well and everything
    is filled again, for `HOLDS` rounds; each round removes it for longer before and after. A person seen even
    then is a failure reason.

    Guarantees: the result is a function of the pixels outside `people.removal` and of the mask itself. Whatever the
    removed pixels held, the output's bytes are the same (`people.background` is not read).

    Args:
        frames: (T, H, W, 3) uint8.
        most_blanked: the part of the clip that may be blanked without a doubt.
        inpaint: paints the hole (H, W) bool of a picture (H, W, 3) uint8 from what surrounds it: once for a scene.
        inpaint_alone: the same for each frame that is painted alone.
    """
    removal = people.removal.copy()
    looks = (look.default(), *((people.look,) if people.look else ()))
    margin = 0.015 * min(frames.shape[1:3])
    repairs = 0
    paint = inpaint
    while True:
        out, blanked, painted = _filled(frames, removal, people.static_camera, paint, inpaint_alone)
        share = blanked.mean()
        if share > most_blanked:
            return Removal(out, blanked, f"{share:.0%} of the frames had to be blanked", repairs)
        seen = _still_seen(out, blanked, painted, looks)
        if not seen.any() and paint is inpaint:
            return Removal(out, blanked, None, repairs)
        if seen.any() and repairs == len(HOLDS):
            times = np.flatnonzero(seen.any((1, 2)))
            doubt = f"a person may still be seen in {len(times)} frames, the first is {times[0]}"
            return Removal(out, blanked, doubt, repairs)
        if seen.any():
            removal |= _held(seen, HOLDS[repairs], margin)
            repairs += 1
        paint = inpaint_alone if seen.any() and repairs < len(HOLDS) else inpaint  # the scene's own only at the end


def _filled(
    frames: np.ndarray, removal: np.ndarray, static_camera: bool, inpaint: Inpaint, inpaint_alone: Inpaint
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The frames with what is to be removed filled; which of them are blanked; what was painted, (T, H, W) bool."""
    busy = removal.copy()
    blanked = busy.mean((1, 2)) > MOST_REMOVED
    out = np.where(busy[..., None], 0, frames).astype(np.uint8)
    painted = busy.copy()
    if static_camera:
        shots = [Shot.static(out, np.flatnonzero(~blanked))]
    else:
        shots = list(stabilise.shots(out, busy, ~blanked))
    alone = ~blanked
    for shot in shots:
        alone[_fill(out, busy, painted, shot, inpaint)] = False
    for t in np.flatnonzero(alone):
        out[t] = inpaint_alone(out[t], busy[t])
    out[blanked] = BLANK
    return out, blanked, painted


def _fill(out: np.ndarray, busy: np.ndarray, painted: np.ndarray, shot: Shot, inpaint: Inpaint) -> np.ndarray:
    """Fills what is `busy` in a shot from its scene, in place; returns the numbers of the frames that were filled.

    `busy` grows by shadows; what other frames showed is taken out of `painted`.
    """
    if shot.moves and len(shot.times) >= LEAST_FRAMES:
        shot = _settled(out, busy, shot, *_scene(out, busy, shot))
    if len(shot.times) < LEAST_FRAMES:
        return shot.times[:0]
    scene, known = _scene(out, busy, shot)
    reach = max(0.01 * min(out.shape[1:3]), 1.5)
    before = busy[shot.times].sum()
    for t, place in zip(shot.times, shot.to_scene):
        busy[t] |= _shadows(out[t], busy[t], shot.seen(place, scene), shot.known(place, known), reach)
    if busy[shot.times].sum() > before:
        scene, known = _scene(out, busy, shot)
    scene = inpaint(scene, ~known)
    for t, place in zip(shot.times, shot.to_scene):
        view, seen = shot.seen(place, scene), shot.known(place, known)
        difference, light, steady = _compared(out[t], view, seen & ~busy[t])
        light = light + _smooth(difference - light, steady, SEAM * min(out.shape[1:3]))
        out[t][busy[t]] = (view + light).round().clip(0, 255).astype(np.uint8)[busy[t]]
        painted[t] = busy[t] & ~seen
    return shot.times


def _scene(frames: np.ndarray, busy: np.ndarray, shot: Shot) -> tuple[np.ndarray, np.ndarray]:
    """The empty scene of a shot and where it is known; see `cues.background_model`."""
    if not shot.moves:
        return cues.background_model(frames[shot.times], busy[shot.times], SAMPLES)
    chosen = cues.sample_times(len(shot.times), SAMPLES)
    laid = [shot.laid(place, frames[t], ~busy[t]) for t, place in zip(shot.times[chosen], shot.to_scene[chosen])]
    pictures, free = map(np.stack, zip(*laid))
    return cues.background_model(pictures, ~free, SAMPLES)


def _settled(frames: np.ndarray, busy: np.ndarray, shot: Shot, scene: np.ndarray, known: np.ndarray) -> Shot:
    """The shot without the frames that do not look like its scene where both are seen.

    Each is tried as the chain of motions places it and as it follows from the scene alone, which ends what errors add
    up to along the chain.
    """
    gray = cv2.cvtColor(scene, cv2.COLOR_RGB2GRAY)

    def misfit(t: int, place: np.ndarray) -> float:
        both = shot.known(place, known) & ~busy[t]
        difference, light, _ = _compared(frames[t], shot.seen(place, scene), both)
        return float(np.abs(difference - light)[both].clip(max=ALIKE).mean()) if both.any() else np.inf

    kept, to_scene = [], []
    for t, place in zip(shot.times, shot.to_scene):
        frame = cv2.cvtColor(frames[t], cv2.COLOR_RGB2GRAY)
        step = stabilise.motion(frame, shot.seen(place, gray), ~busy[t], shot.known(place, known))
        places = [place] if step is None else [place, place @ step]
        errors = [misfit(t, place) for place in places]
        if min(errors) <= MISFIT:
            kept.append(t)
            to_scene.append(places[int(np.argmin(errors))])
    return dataclasses.replace(shot, times=np.array(kept, int), to_scene=np.array(to_scene).reshape(-1, 3, 3))


def _shadows(frame: np.ndarray, busy: np.ndarray, view: np.ndarray, known: np.ndarray, reach: float) -> np.ndarray:
    """(H, W) bool: what touches the removed and faintly differs from the empty scene; only what is darker than it
    where the scene is in doubt, as it is where a shadow lay for long. Empty where it would be most of the frame: then
    the light has changed."""
    difference, light, _ = _compared(frame, view, known & ~busy)
    free = ~busy & (cv2.inRange(view, (0, 0, 0), (0, 0, 0)) == 0)
    faint = _smooth(difference - light, free, reach)
    other = cv2.inRange(faint, (-FAINT,) * 3, (FAINT,) * 3) == 0
    darker = cv2.inRange(faint, (-np.inf,) * 3, (-FAINT,) * 3) > 0
    shade = free & cues.touching(free & np.where(known, other, darker), busy)
    return free & cues.dilated(shade, reach) if shade.mean() < MOST_SHADOW else np.zeros_like(busy)


def _compared(frame: np.ndarray, view: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frame minus view (H, W, 3) float32, the light in it (3,), and where nothing but the light differs (H, W) bool."""
    difference = cv2.subtract(frame, view, dtype=cv2.CV_32F)
    some = difference[::2, ::2][free[::2, ::2]]
    light = np.median(some, axis=0) if len(some) else np.zeros(3, np.float32)
    return difference, light, free & (cv2.inRange(difference, light - ALIKE, light + ALIKE) > 0)


def _smooth(values: np.ndarray, where: np.ndarray, sigma: float) -> np.ndarray:
    """Values (H, W, 3) float32 of the places `where`, blurred, and carried on into the others; 0 far away from any."""
    height, width = where.shape
    step = max(round(sigma / 1.5), 1)  # a blur needs no more pixels than this
    both = np.dstack([values, np.ones_like(where, np.float32)]) * where[..., None]
    small = cv2.resize(both, (-(-width // step), -(-height // step)), interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), sigma / step)
    return cv2.resize(small[..., :3] / (small[..., 3:] + 0.01), (width, height))


def _still_seen(out: np.ndarray, blanked: np.ndarray, painted: np.ndarray, looks: tuple[Look, ...]) -> np.ndarray:
    """(T, H, W) bool: what looks like a person in the finished frames. What was mostly `painted` does not count."""
    found = np.zeros(painted.shape, bool)
    for masks in everywhere(out, ~blanked, looks).values():
        for t in np.flatnonzero(masks.any((1, 2))):
            count, labels = cv2.connectedComponents(masks[t].astype(np.uint8))
            sizes = np.bincount(labels.ravel(), minlength=count)
            invented = np.bincount(labels[painted[t]], minlength=count)
            real = invented < MOST_PAINTED * sizes
            real[0] = False
            found[t] |= real[labels]
    return found


def _held(found: np.ndarray, frames: int, margin: float) -> np.ndarray:
    """What was found (T, H, W), grown, and held for that number of frames before and after."""
    held = np.zeros_like(found)
    for t in np.flatnonzero(found.any((1, 2))):
        held[max(t - frames, 0) : t + frames + 1] |= cues.dilated(found[t], margin)
    return held
