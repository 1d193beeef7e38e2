"""The anonymizer's audit finds what was leaked on purpose, and is silent where nothing was."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from anonymize.audit import REPORT, accuracy, canary, findings, reidentify, stored, treatments, utility
from anonymize.audit.footage import Archive, Footage
from anonymize.avatar.body import Body
from anonymize.avatar.wardrobe import Wardrobe
from anonymize.config import AnonymizeConfig
from anonymize.fitting.fit import Fit
from anonymize.people import People, Person
from anonymize.pipeline import Anonymizer
from anonymize.studio import film
from anonymize.vision import video
from maskdp import cli, config, layers

torch.set_num_threads(1)
FILMED = film.StudioConfig(
    out="", videos=4, identities=4, rooms=4, frames=4, fps=4.0, size=64, second_person=0.0, test_fraction=0.5
)


@pytest.fixture(scope="module")
def filmed(tmp_path_factory):
    """Four studio videos with their truth."""
    folder = tmp_path_factory.mktemp("studio")
    film.generate(dataclasses.replace(FILMED, out=str(folder)))
    return folder


def write(filmed, folder, private):
    """A dataset of these videos: avatars in grey, and what `private` (frames, truth → layer) makes of the scene."""
    clips = []
    for path in sorted((filmed / "videos").iterdir()):
        frames = next(video.clips(path, max_frames=99)).frames
        truth = film.read_truth(filmed / "truth" / f"{path.stem}.npz")
        alpha = truth.masks.any(0)[..., None] * np.uint8(255)
        rgba = np.concatenate([np.where(alpha, np.uint8(90), 0).repeat(3, -1), alpha], -1)
        name = path.stem.rsplit("-", 1)[1]
        clip = layers.TwoLayerClip(
            rgba, private(frames, truth), 0, f"{name}-000", name, name, (name,), video.sha256(path), 4.0
        )
        clips.append(clip)
    layers.write_dataset(folder, {"train": clips}, ["act"])
    (folder / "config.yaml").write_text(config.dump(AnonymizeConfig(out="out")))
    return folder


def empty_room(frames, truth):
    return np.broadcast_to(truth.empty, frames.shape)


def untouched(frames, truth):
    return frames


def by_check(found):
    return {finding.check.split(":")[0].split(",")[0]: finding for finding in found}


@pytest.fixture(scope="module")
def clean(filmed, tmp_path_factory):
    return write(filmed, tmp_path_factory.mktemp("clean"), empty_room)


@pytest.fixture(scope="module")
def leaking(filmed, tmp_path_factory):
    return write(filmed, tmp_path_factory.mktemp("leaking"), untouched)


@pytest.fixture
def take(filmed) -> Footage:
    archive = Archive.__new__(Archive)
    archive.settings = AnonymizeConfig(out="out")
    return archive.film(sorted((filmed / "videos").iterdir())[0])


def test_people_in_the_private_layer_break_the_bounds_and_empty_rooms_keep_them(filmed, clean, leaking, capfd):
    arguments = ["--originals", str(filmed), "--checks", "[stored]", "--looks", "2"]
    assert cli.main(["audit", "anonymization", str(clean), *arguments]) == 0
    assert cli.main(["audit", "anonymization", str(leaking), *arguments]) == 1
    said = capfd.readouterr()
    assert "holds" in said.out
    assert "FAILS" in said.out
    verdicts = {
        folder: by_check(findings.Finding(**one) for one in json.loads((folder / REPORT).read_text())["findings"])
        for folder in (clean, leaking)
    }
    gone = "people gone from the private layer"
    assert verdicts[clean][gone].figures["mean"] == 1
    assert verdicts[leaking][gone].figures["mean"] == 0
    seen = "nobody seen in the private layer (2 frames a clip)"
    assert verdicts[clean][seen].holds
    assert not verdicts[leaking][seen].holds
    overlap = verdicts[clean]["silhouette IoU of avatars and people"]
    assert overlap.figures["mean"] == 1  # the avatars here are the true silhouettes
    flicker = [verdicts[folder]["flicker of the private layer"].figures["free"] for folder in (clean, leaking)]
    assert flicker[0] == 0 < 0.8 < flicker[1]


def test_without_originals_what_cannot_be_checked_is_said(leaking, tmp_path, capfd):
    assert cli.main(["audit", "anonymization", str(leaking), "--out", str(tmp_path / "a.json"), "--looks", "1"]) == 1
    assert capfd.readouterr().out.count("not checked") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to do"),
        (["--looks", "2"], "expected the dataset first"),
        (["NONE"], "NONE: not a two-layer dataset"),
        (["NONE", "--checks", "[smell]"], "checks: smell"),
        (["CLEAN", "--originals", "NONE"], "NONE: no such folder"),
        (["CLEAN", "--originals", "CLEAN"], "holds no recording of this dataset"),
        (["CLEAN", "--canary.videos", "0"], "CanaryConfig.videos: 0"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(clean, arguments, message, capfd):
    given = [str(clean) if word == "CLEAN" else word for word in arguments]
    assert cli.main(["audit", "anonymization", *given]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error


# ------------------------------------------------------------------------------------------------------------- canary


def correlated(take, coins, layer, settings):
    place = canary.Correlator(settings)
    place.add(coins, layer.astype(float).mean(-1), take.people)
    return place


def test_a_canary_is_found_where_it_is_and_nowhere_else(take):
    """In the recording; in a private layer that holds a part of it, moved by three pixels, after JPEG; not in an empty
    room."""
    settings = canary.CanaryConfig(amplitude=80, shift=3)
    coins = np.random.default_rng(0).choice([-1.0, 1.0], [side // 2 for side in take.frames.shape[1:3]])
    painted = canary.painted(take, coins, settings)
    assert (painted[~take.people] == take.frames[~take.people]).all()
    scene = take.truth.empty.astype(float)
    assert correlated(take, coins, painted - scene, settings).false_alarm < settings.false_alarm
    rgba = np.zeros((*take.frames.shape[:3], 4), np.uint8)
    for part, found in ((0.0, False), (0.5, True)):
        mixed = scene + part * (np.roll(painted - scene, (3, -3), (1, 2)))
        kept = canary.stored(rgba, mixed.round().clip(0, 255).astype(np.uint8), 4.0, "jpeg")
        assert (correlated(take, coins, kept.private - scene, settings).false_alarm < settings.false_alarm) == found


def test_false_alarms_are_no_more_frequent_than_stated(take):
    """Over 300 patterns that were never painted."""
    settings = canary.CanaryConfig(shift=1)
    rng = np.random.default_rng(1)
    shape = [side // 2 for side in take.frames.shape[1:3]]
    bounds = [correlated(take, rng.choice([-1.0, 1.0], shape), take.frames, settings).false_alarm for _ in range(300)]
    for level in (0.5, 0.1, 0.02):
        assert np.mean(np.array(bounds) <= level) <= level + 3 * np.sqrt(level / 300)


class Naive:
    """Stands for an anonymizer whose avatars take the recording's colour, or do not."""

    def __init__(self, reads_the_scene):
        self.finder, self.reads_the_scene = None, reads_the_scene

    def clip(self, frames, fps, key):
        rgba = np.zeros((*frames.shape[:3], 4), np.uint8)
        rgba[:, 8:24, 8:24] = (50, 60, 70, 255)
        if self.reads_the_scene:
            rgba[:, 8:24, 8:24, :3] = frames[:, 8:24, 8:24].mean((1, 2), keepdims=True)
        private = np.full(frames.shape, 90, np.uint8)
        return type("Result", (), {"status": "written", "rgba": rgba, "private": private})


@pytest.mark.parametrize("reads_the_scene", [False, True])
def test_an_avatar_in_the_colours_of_the_scene_breaks_non_interference(take, monkeypatch, reads_the_scene):
    monkeypatch.setattr(canary, "Anonymizer", lambda settings, secret: Naive(reads_the_scene))
    found = canary.check([take], 1, None, "jpeg", b"", canary.CanaryConfig(), 0)
    same = next(finding for finding in found if "the same public bytes" in finding.check)
    assert same.holds == (not reads_the_scene)


# ---------------------------------------------------------------------------------------------------------- networks


def people(count=12, each=4, marked=("original",), seed=0):
    """Crops of people who wear colours of their own in the treatments `marked`, and all the same in the others."""
    rng = np.random.default_rng(seed)
    shades = rng.integers(0, 256, (count, 2, 3))
    clips = []
    for who in range(count):
        for number in range(each):
            person = {}
            for name in treatments.TREATMENTS:
                picture = rng.integers(90, 110, (1, 32, 32, 3)).astype(np.uint8)
                if name in marked:
                    picture[:, 4:16, 8:24], picture[:, 16:28, 8:24] = shades[who]
                person[name] = picture
            action = {name: np.repeat(person[name][:1], 4, 0) for name in person}
            for moving in action.values():
                for t in range(4):
                    moving[t, 4 + 6 * (t if number % 2 else 0) :][:4] = 255
            split = "test" if number < 2 else "train"
            clips.append(
                treatments.Crops(person, action, (f"p{who}",), f"v{who}-{number}", f"r{number}", number % 2, split)
            )
    return clips


SMALL = reidentify.ReIDConfig(repeats=1, steps=12, batch=24, pictures=1, margin=0.25)


@pytest.mark.parametrize(("marked", "holds"), [(("original",), True), (("original", "anonymized"), False)])
def test_avatars_that_keep_the_clothes_are_re_identified(marked, holds):
    found = by_check(reidentify.check(people(marked=marked), SMALL, 0))
    verdict = found["avatars re-identified no better than black silhouettes (rank-1"]
    assert verdict.holds == holds
    assert verdict.figures["people"] == 12


def test_an_attack_that_fails_on_recordings_proves_nothing():
    found = by_check(reidentify.check(people(marked=()), SMALL, 0))
    verdict = found["avatars re-identified no better than black silhouettes (rank-1"]
    assert not verdict.holds
    assert "proves nothing" in verdict.seen


def test_chance_is_the_mean_over_random_orders():
    rng = np.random.default_rng(0)
    right = rng.uniform(size=(3, 12)) < 0.3
    right[:, 0] = True
    allowed = rng.uniform(size=(3, 12)) < 0.8
    allowed[:, 0] = True
    drawn = np.mean([reidentify.ranked(rng.uniform(size=(3, 12)), right, allowed) for _ in range(20000)], 0)
    np.testing.assert_allclose(drawn, reidentify.chance(right, allowed), atol=0.01)


def test_gallery_shares_neither_video_nor_room_with_the_query():
    clips = people(2, 2)
    same_room = [dataclasses.replace(clip, scene="hall") for clip in clips]
    assert reidentify._pairs(clips)[1].sum() == 8  # r0 against r1, both ways
    assert not reidentify._pairs(same_room)[1].any()


def test_action_is_learnt_from_what_shows_it():
    settings = utility.UtilityConfig(frames=4, steps=25, batch=10)
    found = by_check(utility.check(people(8), 2, settings, 0))
    assert found["action accuracy"].figures["box to original"]["mean"] > 0.9
    still = [
        dataclasses.replace(clip, action={name: np.zeros_like(value) for name, value in clip.action.items()})
        for clip in people(8)
    ]
    blind = by_check(utility.check(still, 2, dataclasses.replace(settings, steps=5), 0))
    assert blind["action accuracy"].figures["box to original"]["mean"] == 0.5


# ---------------------------------------------------------------------------------------------------------- measures


def test_procrustes_error_forgets_rotation_scale_and_place_but_no_mirror():
    joints = np.random.default_rng(0).normal(size=(5, 22, 3))
    turned = 0.7 * joints @ Rotation.from_rotvec([0.3, -1.2, 0.5]).as_matrix() + [1, 2, 3]
    np.testing.assert_allclose(accuracy.procrustes_error(turned, joints), 0, atol=1e-9)
    assert (accuracy.procrustes_error(joints * [-1, 1, 1], joints) > 0.1).all()
    moved = joints.copy()
    moved[:, 0] += [0.5, 0, 0]
    assert (accuracy.procrustes_error(moved, joints) <= 0.5).all()


@pytest.mark.parametrize("missed", [False, True])
def test_a_perfect_finder_and_fit_score_perfectly_and_a_missed_person_counts(take, missed):
    """The second of two people is either found, too, or missed."""
    both = dataclasses.replace(
        take.truth,
        masks=np.concatenate([take.truth.masks, take.truth.masks[..., ::-1] & ~take.truth.masks]),
        poses=take.truth.poses * 2,
        betas=np.repeat(take.truth.betas, 2, 0),
    )
    total = len(take.frames)
    persons = tuple(
        Person(k, mask.any((1, 2)), np.zeros((total, 4)), mask, np.zeros((total, 14, 3)))
        for k, mask in enumerate(both.masks[: 1 if missed else 2])
    )
    removal = np.any([person.masks for person in persons], 0)
    found = People(persons, removal, True, None, None, "a doubt" if missed else None, {})
    anonymizer = Anonymizer.__new__(Anonymizer)
    anonymizer.config, anonymizer.body, anonymizer.wardrobe = AnonymizeConfig(out="out"), Body(), Wardrobe(b"7" * 16)
    anonymizer.finder = type("Fixed", (), {"find": lambda self, frames, fps: found})()
    anonymizer.fitter = lambda person, camera, avatar, fps: Fit(both.poses[0], np.ones(total, bool), np.ones(total))
    scores = accuracy.score(anonymizer, dataclasses.replace(take, truth=both))
    expected = [1.0] * total + [0.0 if missed else 1.0] * total
    assert scores.removed == scores.tracked == expected
    assert scores.iou == [1.0] * len(persons) * total
    assert max(scores.error) < 0.03  # the same pose; only the body's shape is another
    assert scores.doubt == missed


def test_interval_covers_the_mean_and_widens_with_dependent_values():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 25)
    dependent = np.repeat(rng.uniform(size=20) < 0.5, 25).astype(float)
    independent = (rng.uniform(size=500) < 0.5).astype(float)
    wide, narrow = findings.interval(dependent, groups), findings.interval(independent, groups)
    assert wide.low < wide.mean < wide.high
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)
    covered = [
        (one := findings.interval(rng.uniform(size=60) < 0.3, np.arange(60), draws=400)).low <= 0.3 <= one.high
        for _ in range(200)
    ]
    assert 0.88 < np.mean(covered) <= 1


def test_what_a_person_left_counts_and_a_painted_place_does_not(take):
    private = np.broadcast_to(take.truth.empty, take.frames.shape).copy()
    assert stored.still_shown(take, private, 1) < 0.02
    arm = take.people[1] & (np.arange(take.frames.shape[1]) % 64 < 32)[:, None]
    private[1][arm] = take.frames[1][arm]
    assert stored.still_shown(take, private, 1) > 0.1
    private[1][take.people[1]] = take.frames[1][take.people[1]].mean(0)
    assert stored.still_shown(take, private, 1) < 0.1
