"""Who is kept visible on purpose: people named by a click or a box at a time.

Guarantees: fails closed. A person is kept in the frames around the click in which their track alone is near that place;
everywhere else, and wherever anybody else was found, the removal stays as it is.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from anonymize.people import People, Person
from anonymize.vision import cues
from maskdp.errors import UserError

MARGIN = 0.02  # of the short side; how far around the outline the original is shown
_PLACE = re.compile(r"([\d.]+)@([\d.]+),([\d.]+)(?:,([\d.]+),([\d.]+))?")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a person is at a time.

    Attributes:
        seconds: from the first frame of the video.
        box: x0, y0, x1, y1 in pixels of the upright video; a click is a box without area.
    """

    seconds: float
    box: tuple[float, float, float, float]

    def scaled(self, factor: float) -> "Place":
        """The same place in a picture of another size."""
        return Place(self.seconds, tuple(factor * side for side in self.box))


def places(key: str, text: str) -> tuple[Place, ...]:
    """Places of `SECONDS@X,Y` (a click) or `SECONDS@X0,Y0,X1,Y1` (a box), separated by semicolons.

    Raises:
        UserError: the text says something else.
    """
    found = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        match = _PLACE.fullmatch(part)
        try:
            seconds, x, y, *far = (float(number) for number in match.groups() if number is not None)
        except (AttributeError, ValueError):
            raise UserError(f"--{key}: {part!r}, expected SECONDS@X,Y or SECONDS@X0,Y0,X1,Y1") from None
        found.append(Place(seconds, (x, y, *(far or (x, y)))))
    return tuple(found)


def kept(people: People, keep: Sequence[tuple[int, Place]], only: Sequence[tuple[int, Place]]) -> np.ndarray:
    """In which frames each person is kept visible, (P, T) bool.

    Args:
        keep: frame and place of each person to be kept.
        only: frame and place of each person to go: all others who are there in that frame are kept.

    Raises:
        UserError: at one of the places there is no person, or more than one.
    """
    out = np.zeros((len(people.persons), len(people.removal)), bool)
    for frame, place in keep:
        who = _who(people.persons, frame, place)
        out[who] |= _apart(people, who, frame)
    gone: dict[int, set[int]] = {}
    for frame, place in only:
        gone.setdefault(frame, set()).add(_who(people.persons, frame, place))
    for frame, named in gone.items():
        for who, person in enumerate(people.persons):
            if person.present[frame] and who not in named:
                out[who] |= _apart(people, who, frame)
    named = set().union(*gone.values()) if gone else set()
    out[list(named)] = False
    return out


def _who(persons: Sequence[Person], frame: int, place: Place) -> int:
    """The person at a place: whose outline holds the click, or whose box has most in common with the given one."""
    x0, y0, x1, y1 = place.box
    found = []
    for who, person in enumerate(persons):
        if not person.present[frame]:
            continue
        a0, b0, a1, b1 = person.boxes[frame]
        if x1 > x0 and y1 > y0:
            common = max(min(a1, x1) - max(a0, x0), 0) * max(min(b1, y1) - max(b0, y0), 0)
            if common > 0.3 * ((a1 - a0) * (b1 - b0) + (x1 - x0) * (y1 - y0) - common):
                found.append(who)
        elif (a0 <= x0 <= a1 and b0 <= y0 <= b1) or _holds(person.masks[frame], x0, y0):
            found.append(who)
    if len(found) > 1 and x1 == x0:
        inside = [who for who in found if _holds(persons[who].masks[frame], x0, y0)]
        found = inside or found
    if len(found) != 1:
        who = "more than one person" if found else "no person"
        raise UserError(f"{who} at {place.seconds:g} s where --keep or --only says")
    return found[0]


def _holds(mask: np.ndarray, x: float, y: float) -> bool:
    column, row = int(x), int(y)
    return 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1] and bool(mask[row, column])


def _apart(people: People, who: int, frame: int) -> np.ndarray:
    """(T,) bool: the frames around `frame` in which a person is seen and their box meets no other person's.

    Where tracks meet, a tracker may take one for the other; what comes beyond is not believed to be the same person.
    """
    person = people.persons[who]
    sure = person.present & person.masks.any((1, 2))
    for other, neighbour in enumerate(people.persons):
        if other != who:
            a, b = person.boxes, neighbour.boxes
            with np.errstate(invalid="ignore"):
                meet = (np.minimum(a[:, 2:], b[:, 2:]) > np.maximum(a[:, :2], b[:, :2])).all(1)
            sure &= ~(meet & neighbour.present)
    breaks = np.flatnonzero(~sure)
    before, after = breaks[breaks <= frame], breaks[breaks > frame]
    first, last = (before[-1] + 1 if len(before) else 0), (after[0] if len(after) else len(sure))
    return (np.arange(len(sure)) >= first) & (np.arange(len(sure)) < last) & sure[frame]


def shown(people: People, kept: np.ndarray, blanked: np.ndarray) -> np.ndarray:
    """(T, H, W) bool: where the original is shown: around the person kept, outside the surroundings of others.

    Args:
        kept: (P, T) bool, of `kept`.
        blanked: (T,) bool, frames that show nothing.
    """
    margin = MARGIN * min(people.removal.shape[1:])
    out = np.zeros(people.removal.shape, bool)
    for t in np.flatnonzero(kept.any(0) & ~blanked):
        ours = [person.masks[t] for person, stays in zip(people.persons, kept) if stays[t]]
        others = [person for person, stays in zip(people.persons, kept) if person.present[t] and not stays[t]]
        near = cues.dilated(np.any(ours, 0), margin)
        for person in others:
            near &= ~cues.dilated(person.masks[t], 2 * margin)
            x0, y0, x1, y1 = person.boxes[t]
            near[max(int(y0), 0) : int(np.ceil(y1)), max(int(x0), 0) : int(np.ceil(x1))] = False
        out[t] = near
    return out
