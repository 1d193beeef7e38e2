"""The joined models: two people crossing with oracles for models, every way to fail closed, and real tiny models."""

import dataclasses

import numpy as np
import pytest
import torch

from anonymize import command, pipeline
from anonymize.config import AnonymizeConfig, AutoConfig, PipelineConfig
from anonymize.fitting.fit import FitConfig
from anonymize.people.blazepose import wheel
from anonymize.people.blazepose.finder import BlazePoseConfig
from anonymize.people.embedded.finder import EmbeddedConfig
from anonymize.people.models.finder import ModelFinder, ModelsConfig
from anonymize.vision import cues
from maskdp.errors import UserError

TOTAL, HEIGHT, WIDTH = 25, 60, 100
CONFIG = ModelsConfig(weights="unused", every=3)


def crossing() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two people who walk past each other, the first in front: frames, visible masks (2, T, H, W), full boxes."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    full = np.zeros((2, TOTAL, HEIGHT, WIDTH), bool)
    for t in range(TOTAL):
        for i, centre in enumerate((20 + 2.5 * t, 80 - 2.5 * t)):
            full[i, t] = (abs(x - centre) < 6) & (abs(y - 30) < 18)
    visible = full.copy()
    visible[1] &= ~full[0]
    room = np.random.default_rng(0).integers(60, 200, (HEIGHT // 4, WIDTH // 4, 3), np.uint8)
    frames = np.repeat(room.repeat(4, 0).repeat(4, 1)[None], TOTAL, 0)
    frames[full[1]] = (40, 40, 200)
    frames[full[0]] = (200, 40, 40)
    return frames, visible, full


FRAMES, VISIBLE, FULL = crossing()


@pytest.fixture(scope="module")
def anonymizer() -> pipeline.Anonymizer:
    torch.set_num_threads(1)
    fit = FitConfig(library=300, steps=2, iou_floor=0.05)  # the people are rectangles
    return pipeline.Anonymizer(PipelineConfig(finder=EmbeddedConfig(), fit=fit), b"\1" * 32)


def box(mask: np.ndarray) -> list[float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def at(frame: np.ndarray) -> int:
    """Which frame of the film it is."""
    return int(np.flatnonzero((frame == FRAMES).all((1, 2, 3)))[0])


def detect(frames: np.ndarray, threshold: float) -> list[np.ndarray]:
    """An oracle: whole boxes of who is seen by at least a third; nobody in other pictures than the film's."""
    found = []
    for frame in frames:
        here = [t for t in range(TOTAL) if (FRAMES[t] == frame).all()]
        found.append(
            np.array(
                [[*box(FULL[i, t]), 0.9] for t in here for i in (0, 1) if VISIBLE[i, t].sum() * 3 > FULL[i, t].sum()],
                np.float32,
            ).reshape(-1, 5)
        )
    return found


def follow(frames: np.ndarray, start: int, boxes: np.ndarray) -> np.ndarray:
    """An oracle: whoever fills the box best at the start, wherever visible."""
    logits = []
    for x0, y0, x1, y1 in boxes.astype(int):
        who = max((0, 1), key=lambda i: VISIBLE[i, start, y0:y1, x0:x1].mean())
        logits.append(np.where(VISIBLE[who], 5, -5))
    return np.array(logits, np.float16)


def joints(frames: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Every joint in the middle of the box but the first, which is far outside."""
    found = np.ones((len(frames), 14, 3), np.float32)
    found[..., :2] = ((boxes[:, :2] + boxes[:, 2:]) / 2)[:, None]
    found[:, 0, :2] = (1, 1)
    return found


def nearness(frame: np.ndarray) -> np.ndarray:
    return FULL[0, at(frame)] * 2.0 + FULL[1, at(frame)] * 1.0


def found(**parts):
    oracles = dict(detect=detect, follow=follow, joints=joints, nearness=nearness)
    config = parts.pop("config", CONFIG)
    return ModelFinder(config, **{**oracles, **parts}).find(FRAMES, 12.0)


def test_two_people_crossing_keep_their_outlines_numbers_and_order():
    people = found()
    assert people.doubt is None
    assert len(people.persons) == 2
    truth = [0, 1] if (people.persons[0].masks[0] & VISIBLE[0, 0]).any() else [1, 0]
    for person, who in zip(people.persons, truth):
        assert np.array_equal(person.present, VISIBLE[who].any((1, 2)))
        assert not (person.masks & ~VISIBLE[who]).any()
        clear = VISIBLE[who].sum((1, 2)) == FULL[who].sum((1, 2))
        assert np.array_equal(person.masks[clear], VISIBLE[who][clear])
        for t in np.flatnonzero(person.present):
            assert person.boxes[t].tolist() == box(VISIBLE[who, t])
    near, far = (people.persons[truth.index(who)].nearness for who in (0, 1))
    assert (near > far).all()
    for mask, removed in zip(FULL.any(0), people.removal):
        assert removed[cues.dilated(mask, 1)].all()
    assert people.removal.mean() < 0.6
    assert people.static_camera


def test_a_joint_outside_of_ones_own_outline_does_not_count():
    for person in found().persons:
        assert (person.joints[:, 0, 2] == 0).all()
        clear = person.masks.sum((1, 2)) == FULL[0, 0].sum()
        assert (person.joints[clear, 1:, 2] == 1).all()


def test_somebody_whom_the_tracker_does_not_follow_is_a_doubt_and_removed():
    """The tracker loses whoever is on the right at the start."""

    def one(frames, start, boxes):
        logits = follow(frames, start, boxes)
        logits[(logits[:, 0] * VISIBLE[1, 0] > 0).any((1, 2))] = -5
        return logits

    people = found(follow=one)
    assert "whom the tracker does not follow" in people.doubt
    assert people.removal[VISIBLE.any(0)].all()


def test_somebody_whom_the_detector_hardly_sees_is_a_doubt_and_removed():
    def once(frames, threshold):
        return [people[: 2 if at(frame) == 0 else 1] for frame, people in zip(frames, detect(frames, threshold))]

    people = found(detect=once)
    assert "whom the detector does not see" in people.doubt
    assert people.removal[VISIBLE.any(0)].all()
    outlined = sorted(person.masks.any((1, 2)).sum() for person in people.persons)
    assert outlined[0] < 5  # not to be trusted where the detector disagrees
    assert outlined[1] == TOTAL


def test_two_tracks_of_one_person_are_a_doubt():
    """The tracker takes the one in front for everybody, wherever the two are close."""

    def same(frames, start, boxes):
        logits = follow(frames, start, boxes)
        logits[:, 6:18] = np.where(VISIBLE[0], 5, -5)[6:18]
        return logits

    def blind(frames, threshold):
        return [p[:1] if 6 <= at(frame) < 18 else p for frame, p in zip(frames, detect(frames, threshold))]

    assert "whom the tracker does not follow" in found(follow=same).doubt
    assert found(follow=same, detect=blind).doubt == "two tracks follow one person"


def test_a_faint_detection_is_removed_until_the_next_look_without_a_doubt():
    def faint(frames, threshold):
        extra = np.array([[2, 2, 12, 12, 0.4]], np.float32)
        return [np.concatenate([p, extra]) if at(f) == 12 else p for f, p in zip(frames, detect(frames, threshold))]

    people = found(detect=faint)
    assert people.doubt is None
    covered = people.removal[:, 2:12, 2:12].all((1, 2))
    assert covered[9:16].all()
    assert not covered[:9].any()
    assert not covered[16:].any()


def test_where_an_outline_leaves_out_a_part_of_a_detection_the_whole_of_it_is_removed():
    """The tracker outlines people without their heads, arms and legs."""

    def trunks(frames, start, boxes):
        logits = follow(frames, start, boxes)
        logits[:, :, :17] = logits[:, :, 42:] = -5
        return logits

    people = found(follow=trunks)
    assert people.doubt is None
    assert people.removal[VISIBLE.any(0)].all()


def test_a_gap_within_an_outline_is_removed():
    def belts(frames, start, boxes):
        logits = follow(frames, start, boxes)
        logits[:, :, 24:36] = -5
        return logits

    people = found(follow=belts)
    assert people.doubt is None
    assert people.removal[VISIBLE.any(0)].all()


@pytest.mark.parametrize(
    ("change", "doubt"),
    [
        ({"detect": lambda frames, threshold: [np.zeros((0, 5), np.float32)] * len(frames)}, "no person found"),
        ({"config": dataclasses.replace(CONFIG, max_people=1)}, "2 people, more than can be told apart"),
        ({"config": dataclasses.replace(CONFIG, max_removed=0.1)}, "of the picture would be removed"),
    ],
)
def test_other_doubts(change, doubt):
    assert doubt in found(**change).doubt


def test_a_duplicate_detection_starts_no_second_track():
    def twice(frames, threshold):
        return [np.concatenate([p, p + np.float32([1, 0, 1, 0, -0.1])]) for p in detect(frames, threshold)]

    people = found(detect=twice)
    assert (people.doubt, len(people.persons)) == (None, 2)


def test_a_person_detected_after_the_removal_is_removed_too(anonymizer):
    """A detector that sees a person in one corner of the finished frames, whatever the finder's detector saw before."""

    def stubborn(frames, threshold):
        return [p if len(p) else np.float32([[5, 5, 20, 20, 0.9]]) for p in detect(frames, threshold)]

    anonymizer.finder = ModelFinder(CONFIG, stubborn, follow, joints, nearness)
    result = anonymizer.clip(FRAMES, 12.0, "v")
    assert result.status == "written"
    assert (np.abs(result.private[:, 8:16, 8:16].astype(int) - FRAMES[:, 8:16, 8:16]).max((1, 2, 3)) > 20).all()
    assert not found().look(np.zeros_like(FRAMES[0]))["detector"].any()


def test_two_people_crossing_become_two_avatars_in_their_order(anonymizer):
    """Through the whole pipeline; turning the depth model's answer round changes nothing but who hides whom."""
    clips = []
    for turn in (1, -1):
        anonymizer.finder = ModelFinder(CONFIG, detect, follow, joints, lambda frame, turn=turn: turn * nearness(frame))
        clips.append(anonymizer.clip(FRAMES, 12.0, "v"))
    one, two = clips
    assert (one.status, one.people, one.reason) == (two.status, two.people, two.reason) == ("written", 2, None)
    changed = (one.rgba[..., :3] != two.rgba[..., :3]).any(-1)
    assert changed[9:16].any()
    assert not changed[[0, -1]].any()
    assert np.abs(one.rgba[..., 3].astype(int) - two.rgba[..., 3]).mean() < 0.1
    assert not (np.abs(one.private.astype(int) - (200, 40, 40)).max(-1) < 20)[VISIBLE[0]].any()


# ------------------------------------------------------------------------------------------ real models, tiny, random


def test_random_models_end_in_quarantine_and_not_in_a_crash(anonymizer, folder):
    """Loaded from the folder and run through the pipeline; the random detector's nonsense is doubted."""
    anonymizer.finder = pipeline._finder(ModelsConfig(weights=str(folder), threshold=0.05, sure=0.06))
    assert any(map(len, anonymizer.finder._look(FRAMES[:6]).values()))
    result = anonymizer.clip(FRAMES[:6], 12.0, "v")
    assert result.status == "quarantined"
    assert "whom the tracker does not follow" in result.reason


def test_auto_takes_blazepose_where_its_models_are_and_the_fingerprint_follows(monkeypatch, tmp_path):
    monkeypatch.setenv("MASKDP_WEIGHTS", str(tmp_path))
    settings = AnonymizeConfig(out="x")
    assert settings.finder.chosen() == EmbeddedConfig()
    fixed = dataclasses.replace(settings, finder=EmbeddedConfig())
    assert settings.pipeline_fingerprint == fixed.pipeline_fingerprint
    monkeypatch.setattr(wheel, "complete", lambda folder: folder == tmp_path / "blazepose")
    assert settings.finder.chosen() == BlazePoseConfig()
    assert settings.pipeline_fingerprint != fixed.pipeline_fingerprint
    with pytest.raises(UserError, match="models are not here"):
        AutoConfig(weights=str(tmp_path / "elsewhere")).chosen()


def test_auto_says_in_one_line_what_it_takes_and_what_that_costs(monkeypatch, tmp_path, capfd):
    command._chosen(EmbeddedConfig())
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("MASKDP_WEIGHTS", str(tmp_path))
    command._chosen(AutoConfig())
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert f"embedded, as BlazePose's models are not in {tmp_path}/blazepose" in said
    assert "maskdp weights fetch blazepose" in said
    assert "quarantined" in said
    monkeypatch.setattr(wheel, "complete", lambda folder: True)
    command._chosen(AutoConfig())
    assert capfd.readouterr().err == f"maskdp anonymize: finder: blazepose, with the models in {tmp_path}/blazepose\n"


def test_weights_that_were_named_must_be_there(tmp_path):
    with pytest.raises(UserError, match="detector: no model here"):
        ModelsConfig(weights=str(tmp_path)).chosen()
    with pytest.raises(UserError, match=r"finder\.sure"):
        ModelsConfig(threshold=0.6, sure=0.5)
