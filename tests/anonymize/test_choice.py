"""Who is kept visible: found by a click or a box, kept only where no other person is near, and recorded."""

import numpy as np
import pytest

from anonymize import pipeline
from anonymize.config import PipelineConfig
from anonymize.fitting.fit import FitConfig
from anonymize.people import People, Person, choice
from maskdp.errors import UserError

TOTAL, HEIGHT, WIDTH = 12, 64, 96


def person(track: int, lefts, absent=()) -> Person:
    """A person 14 pixels wide and 44 high, whose left edge is at `lefts` (T,)."""
    present = ~np.isin(np.arange(TOTAL), absent)
    boxes = np.stack([lefts, np.full(TOTAL, 12), np.add(lefts, 14), np.full(TOTAL, 56)], 1).astype(np.float32)
    masks = np.zeros((TOTAL, HEIGHT, WIDTH), bool)
    for t in np.flatnonzero(present):
        masks[t, 12:56, int(lefts[t]) : int(lefts[t]) + 14] = True
    boxes[~present] = np.nan
    return Person(track, present, boxes, masks, np.zeros((TOTAL, 14, 3), np.float32))


def scene(*persons: Person) -> People:
    any_part = np.any([p.masks for p in persons], 0)
    removal = any_part.copy()
    for shift in (-2, 2):
        removal |= np.roll(any_part, shift, 2) | np.roll(any_part, shift, 1)
    return People(persons, removal, True, None, None, None, {})


LEFT, RIGHT = person(0, [8] * TOTAL), person(1, [70] * TOTAL)
COMING = person(1, np.linspace(70, 4, TOTAL).round())  # meets the one on the left from frame 9 on


def click(seconds=0.0, x=15, y=30):
    return choice.Place(seconds, (x, y, x, y))


def test_clicks_and_boxes_are_read():
    assert choice.places("keep", "3.2@410,220; 5@10,20,200,300") == (
        choice.Place(3.2, (410, 220, 410, 220)),
        choice.Place(5.0, (10, 20, 200, 300)),
    )
    assert choice.places("keep", "") == ()
    assert click().scaled(0.5).box == (7.5, 15, 7.5, 15)
    for text in ("3.2", "a@1,2", "3@1", "3@1,2,3", "3@1..2,4"):
        with pytest.raises(UserError, match=r"--only: .*expected SECONDS@X,Y"):
            choice.places("only", text)


@pytest.mark.parametrize("box", [(15, 30, 15, 30), (5, 10, 25, 58)])
def test_only_the_person_at_a_place_is_kept(box):
    kept = choice.kept(scene(LEFT, RIGHT), [(3, choice.Place(0, box))], [])
    assert kept[0].all()
    assert not kept[1].any()


def test_all_who_are_there_but_one_are_kept():
    late = person(2, [40] * TOTAL, absent=range(6))
    kept = choice.kept(scene(LEFT, RIGHT, late), [], [(3, click())])
    assert not kept[0].any()
    assert kept[1].all()
    assert not kept[2].any()  # not there when it was said who goes
    assert not choice.kept(scene(LEFT, RIGHT), [], [(3, click()), (3, click(x=77))]).any()


def test_a_person_who_meets_another_is_not_kept_from_there_on():
    kept = choice.kept(scene(LEFT, COMING), [(0, click())], [])
    meeting = next(t for t in range(TOTAL) if COMING.boxes[t, 0] < LEFT.boxes[t, 2])
    assert kept[0].tolist() == [t < meeting for t in range(TOTAL)]
    gone = person(0, [8] * TOTAL, absent=[4])
    assert choice.kept(scene(gone, RIGHT), [(6, click())], [])[0].tolist() == [t > 4 for t in range(TOTAL)]


@pytest.mark.parametrize(
    ("place", "message"), [(click(x=50), "no person"), (choice.Place(0, (0, 0, 90, 60)), "no person")]
)
def test_an_empty_place_is_an_error(place, message):
    with pytest.raises(UserError, match=f"{message} at 0 s"):
        choice.kept(scene(LEFT, RIGHT), [(0, place)], [])
    with pytest.raises(UserError, match="more than one person"):
        choice.kept(scene(LEFT, person(1, [10] * TOTAL)), [(0, click())], [])


def test_nothing_is_shown_of_who_is_not_kept_however_near(monkeypatch):
    monkeypatch.setattr(choice, "MARGIN", 0.1)
    near = person(1, [24] * TOTAL)  # two pixels from the one on the left
    people = scene(LEFT, near)
    kept = np.array([[True] * TOTAL, [False] * TOTAL])
    blanked = np.arange(TOTAL) == 5
    shown = choice.shown(people, kept, blanked)
    assert not shown[near.masks].any()
    assert not shown[:, :, 24:].any()
    assert not shown[5].any()
    assert shown[0, 12:56, :14].any()
    assert not choice.shown(people, ~kept & False, blanked).any()


@pytest.fixture(scope="module")
def anonymizer():
    config = PipelineConfig(fit=FitConfig(library=300, steps=4))
    return pipeline.Anonymizer(config, b"\1" * 32)


def test_the_original_returns_around_the_person_kept_alone(anonymizer):
    """Two red figures; the left one stays. The other's pixels change nothing of what is written."""
    frames = np.tile(np.linspace(60, 150, WIDTH, dtype=np.uint8)[:, None], (TOTAL, HEIGHT, 1, 3))
    people = scene(LEFT, RIGHT)
    frames[people.persons[0].masks] = (220, 20, 20)
    frames[people.persons[1].masks] = (20, 20, 220)
    other = frames.copy()
    other[people.persons[1].masks] = np.random.default_rng(0).integers(0, 256, (people.persons[1].masks.sum(), 3))
    results = [anonymizer.clip(film, 10.0, "v", people=people, keep=[(2, click())]) for film in (frames, other)]
    removed = anonymizer.clip(frames, 10.0, "v", people=people)
    one, two = results
    assert one.people_kept == 1
    assert removed.people_kept == 0
    assert np.array_equal(one.private, two.private)
    assert np.array_equal(one.rgba, two.rgba)
    left = people.persons[0].masks
    assert (one.private[left] == (220, 20, 20)).all()
    assert not (one.private[..., 2].astype(int) - one.private[..., 0] > 60).any()
    assert not (removed.private[..., 0].astype(int) - removed.private[..., 2] > 60).any()
    assert not one.rgba[:, :, :36].any()  # no avatar where a person stays
    assert np.array_equal(one.rgba[:, :, 60:], removed.rgba[:, :, 60:])
    assert np.array_equal(one.private[:, :, 60:], removed.private[:, :, 60:])
