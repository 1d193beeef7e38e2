"""The diffusion backends of the refinement: real pipelines with tiny random weights, saved and loaded from a folder."""

import dataclasses

import numpy as np
import pytest
import torch

from anonymize.avatar.wardrobe import Wardrobe
from anonymize.config import AnonymizeConfig
from anonymize.refine import wan
from anonymize.refine.refiner import AnimateConfig, ControlNetConfig, Drawing, NoRefinement, Refiner, VaceConfig, prompt
from maskdp import config, layers
from maskdp.errors import UserError

WARDROBE = Wardrobe(b"\1" * 32)
ANN, BOB = WARDROBE.identity("ann"), WARDROBE.identity("bob")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def refiners(tiny):
    """A refiner of each kind, by name."""
    small = {"steps": 2, "size": 64}
    one = {**small, "strength": 1.0}
    return {
        "sd": ControlNetConfig(folder=tiny("sd_control"), **one).load(),
        "sd_three": ControlNetConfig(folder=tiny("sd_controls"), controls=("pose", "depth", "canny"), **one).load(),
        "sdxl": ControlNetConfig(folder=tiny("sdxl_control"), **one).load(),
        "wan_vace": VaceConfig(folder=tiny("vace"), length=17, **small).load(),
        "wan_animate": AnimateConfig(folder=tiny("animate"), length=17, **small).load(),
    }


KINDS = ("sd", "sd_three", "sdxl", "wan_vace", "wan_animate")


def drawn(frames=3, people=1) -> Drawing:
    """Discs with a soft rim, each person's a step from the other's, and their depth; the last frame is empty."""
    y, x = np.mgrid[:48, :48]
    rgba = np.zeros((frames, 48, 48, 4), np.uint8)
    person = np.full((frames, 48, 48), -1, np.int16)
    keypoints = np.full((frames, people, 18, 2), np.nan)
    for t in range(frames - 1):
        for number in range(people):
            cover = np.clip(9 - np.hypot(x - 14 - t - 18 * number, y - 24), 0, 1)
            mine = (cover > 0) & (person[t] < 0)
            rgba[t, mine, :3], rgba[t, mine, 3], person[t, mine] = (180, 90, 40), (cover[mine] * 255), number
            middle = 14 + t + 18 * number
            keypoints[t, number, :3] = (middle, 18), (middle, 22), (middle - 3, 22)
    rgba[rgba[..., 3] == 0] = 0
    depth = np.where(rgba[..., 3] > 0, 3 + x / 48, np.inf).astype(np.float32)
    return Drawing(rgba, depth, person, keypoints)


@pytest.mark.parametrize("kind", KINDS)
def test_alpha_stays_as_rendered_and_the_avatar_is_redrawn(refiners, kind):
    drawing = drawn()
    out = refiners[kind](drawing, [ANN])
    assert np.array_equal(out[..., 3], drawing.rgba[..., 3])
    layers.check_layers(out, np.zeros_like(out[..., :3]), "clip")  # RGB is 0 where alpha is 0
    assert not np.array_equal(out[0], drawing.rgba[0])
    assert np.array_equal(out, refiners[kind](drawing, [ANN]))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_scene_context_looks_at_the_scene(refiners, kind):
    drawing = drawn()
    dark, light = (np.full((3, 48, 48, 3), value, np.uint8) for value in (0, 255))
    alone = refiners[kind](drawing, [ANN])
    assert not np.array_equal(refiners[kind](drawing, [ANN], dark), refiners[kind](drawing, [ANN], light))
    if kind != "wan_animate":  # which redraws the place of the avatar in a scene, else the whole picture
        assert np.array_equal(alone, refiners[kind](drawing, [ANN], np.full_like(dark, layers.FILL)))


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("sd", "depth"),
        ("sdxl", "depth"),
        ("wan_vace", "depth"),
        ("sd_three", "keypoints"),
        ("wan_animate", "keypoints"),
    ],
)
def test_the_control_maps_matter(refiners, kind, what):
    drawing = drawn()
    turned = {
        "depth": np.where(np.isfinite(drawing.depth), 7 - drawing.depth, np.inf),
        "keypoints": drawing.keypoints[..., ::-1],
    }
    other = dataclasses.replace(drawing, **{what: turned[what]})
    assert not np.array_equal(refiners[kind](drawing, [ANN]), refiners[kind](other, [ANN]))


def test_all_frames_get_the_same_noise_and_each_person_another(refiners):
    """A still avatar is drawn alike in every frame: nothing of the model's own flickers."""
    first = drawn(2)
    still = Drawing(*(np.repeat(getattr(first, name)[:1], 4, 0) for name in ("rgba", "depth", "person", "keypoints")))
    out = refiners["sd"](still, [ANN])
    assert all(np.array_equal(frame, out[0]) for frame in out)
    assert not np.array_equal(out, refiners["sd"](still, [BOB]))


def test_each_person_of_a_clip_has_a_prompt_and_colours_of_their_own():
    """A backend that paints everything by the prompt: each pixel shows the one who is nearest there."""
    asked = []

    def backend(portrait):
        asked.append(portrait)
        return np.full_like(portrait.views, 50 * len(asked))

    drawing = drawn(people=2)
    refiner = Refiner(dataclasses.make_dataclass("Config", ["context", "size"])("none", 64), backend, ("depth",))
    out = refiner(drawing, [ANN, BOB])
    assert [portrait.prompt for portrait in asked] == [prompt(ANN), prompt(BOB)]
    assert asked[0].seed != asked[1].seed
    for number in (0, 1):
        assert (out[drawing.person == number][:, :3] == 50 * (number + 1)).all()
    assert len(asked[0].views) == 2  # nobody is seen in the last frame
    assert all(portrait.places.mean((1, 2)).min() > 0.05 for portrait in asked)


def test_half_covered_outlines_hold_nothing_of_the_ground():
    """The ground of the model's picture is made green; none of it comes into the layer."""

    def backend(portrait):
        return np.where(portrait.places[..., None], portrait.views, np.uint8([0, 255, 0]))

    drawing = drawn()
    out = Refiner(dataclasses.make_dataclass("Config", ["context", "size"])("none", 64), backend, ())(drawing, [ANN])
    covered = drawing.rgba[..., 3] > 0
    assert ((drawing.rgba[..., 3] > 0) & (drawing.rgba[..., 3] < 255)).any()
    assert np.abs(out[covered][:, :3].astype(int) - (180, 90, 40)).max() < 40


def test_prompts_tell_of_the_identity_alone():
    assert prompt(ANN) == prompt(WARDROBE.identity("ann")) != prompt(BOB)
    assert "beard" not in prompt(dataclasses.replace(ANN, beard=False))
    assert "and a beard" in prompt(dataclasses.replace(ANN, beard=True))
    red = dataclasses.replace(ANN.top, colour=(0.62, 0.14, 0.17), pattern="stripe")
    assert "a striped red and " in prompt(dataclasses.replace(ANN, top=red))


def test_a_clip_longer_than_the_video_model_takes_goes_on_from_what_was_drawn(tiny):
    """Wan VACE in stretches of 17: the second is given the last 5 frames of the first as they were drawn."""
    backend = wan.Vace(VaceConfig(folder=tiny("vace"), steps=1, size=64, length=17))
    given, draw = [], backend._drawn

    def spy(video, mask, portrait):
        given.append((video, mask))
        return draw(video, mask, portrait)

    backend._drawn = spy
    drawing = drawn(24)
    portraits = []
    Refiner(backend.config, lambda portrait: portraits.append(portrait) or portrait.views, ("depth",))(drawing, [ANN])
    redrawn = backend(portraits[0])
    assert [len(video) for video, _ in given] == [17, 11]
    assert np.array_equal(given[1][0][:5], redrawn[12:17])
    assert not given[1][1][:5].any()
    assert given[1][1][5:].any((1, 2, 3)).all()
    assert redrawn.shape == portraits[0].views.shape


@pytest.mark.parametrize(("frames", "drawn_at_once"), [(1, 17), (9, 17), (17, 17), (18, 21), (21, 21)])
def test_the_video_model_is_given_as_many_frames_as_it_takes(tiny, frames, drawn_at_once):
    """4n + 1 of them, 17 or more, sides divisible by 32; what was padded is cut off again."""
    backend = wan.Vace(VaceConfig(folder=tiny("vace"), steps=1, size=70, length=21))
    given = {}

    class Result:
        frames = np.random.default_rng(0).uniform(size=(1, drawn_at_once, 64, 64, 3))

    backend.pipeline = type(
        "Spy",
        (),
        {
            "__call__": lambda self, **options: given.update(options) or Result,
            "tokenizer": backend.pipeline.tokenizer,
            "text_encoder": backend.pipeline.text_encoder,
        },
    )()
    portraits = []
    Refiner(backend.config, lambda portrait: portraits.append(portrait) or portrait.views, ("depth",))(
        drawn(frames + 1), [ANN]
    )
    redrawn = backend(portraits[0])
    assert given["num_frames"] == len(given["video"]) == len(given["mask"]) == drawn_at_once
    assert given["height"] % 32 == given["width"] % 32 == 0
    assert given["video"][-1] == given["video"][frames - 1]
    assert np.array_equal(redrawn, (Result.frames[0, :frames] * 255).round())


@pytest.mark.parametrize("strength", [0.5, 0.99])
@pytest.mark.parametrize("kind", ["sd_control", "sdxl_control", "vace"])
def test_what_lies_behind_an_avatar_cannot_be_recovered(tiny, kind, strength):
    """In view of the scene, too: a secret colour under the avatar changes no byte; outside of it nothing is drawn."""
    if kind == "vace":
        refiner = VaceConfig(folder=tiny(kind), length=17, steps=2, size=64, context="scene").load()
    else:
        refiner = ControlNetConfig(folder=tiny(kind), steps=4, size=64, strength=strength, context="scene").load()
    drawing = drawn()
    scenes = [np.full((3, 48, 48, 3), 90, np.uint8) for _ in range(2)]
    scenes[1][drawing.rgba[..., 3] == 255] = (255, 0, 255)
    one, two = (refiner(drawing, [ANN], scene) for scene in scenes)
    assert one.tobytes() == two.tobytes()
    assert not one[drawing.rgba[..., 3] == 0].any()
    for scene in scenes:
        shown = layers.composite(one, scene)
        assert np.array_equal(shown[drawing.rgba[..., 3] == 0], scene[drawing.rgba[..., 3] == 0])


def test_the_face_of_the_avatar_is_cut_out_where_it_is_seen():
    seen = drawn()
    portraits = []
    small = dataclasses.make_dataclass("Config", ["context", "size"])("none", 64)
    Refiner(small, lambda portrait: portraits.append(portrait) or portrait.views, ())(seen, [ANN])
    faces = wan.faces(portraits[0], 16)
    assert faces.shape == (2, 16, 16, 3)
    assert np.abs(faces[:, 6:10, 6:10].astype(int) - (180, 90, 40)).max() < 20
    hidden = dataclasses.replace(portraits[0], keypoints=np.full_like(portraits[0].keypoints, np.nan))
    assert not wan.faces(hidden, 16).any()


# ------------------------------------------------------------------------------------------------------------ settings


def test_it_is_off_by_default_and_chosen_by_type(tiny):
    assert config.parse(AnonymizeConfig, ["--out", "x"], "anonymize").refine == NoRefinement()
    options = ["--out", "x", "--refine.type", "wan_vace", "--refine.folder", tiny("vace"), "--refine.control", "pose"]
    assert config.parse(AnonymizeConfig, options, "anonymize").refine == VaceConfig(folder=tiny("vace"), control="pose")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tiny: NoRefinement(context="scene"), "refine.context: scene without a refine.type"),
        (
            lambda tiny: ControlNetConfig(),
            "refine.folder: missing, expected the folder of a saved StableDiffusionControl",
        ),
        (lambda tiny: VaceConfig(folder="/nowhere"), "refine.folder: /nowhere: no model_index.json there"),
        (lambda tiny: AnimateConfig(folder=tiny("vace")), "holds a WanVACEPipeline, expected a WanAnimatePipeline"),
        (lambda tiny: ControlNetConfig(folder=tiny("sd_control"), controls=("face",)), "expected some of depth, canny"),
        (lambda tiny: ControlNetConfig(folder=tiny("sd_control"), strength=0.0), "refine.strength: 0.0"),
        (
            lambda tiny: ControlNetConfig(folder=tiny("sd_control"), steps=1),
            "steps: 1 times strength 0.5 leaves no step",
        ),
        (lambda tiny: ControlNetConfig(folder=tiny("sd_control"), context="both"), "context"),
        (lambda tiny: VaceConfig(folder=tiny("vace"), length=80), "expected 4n \\+ 1 frames"),
        (lambda tiny: VaceConfig(folder=tiny("vace"), control="scribble"), "control"),
        (
            lambda tiny: ControlNetConfig(folder=tiny("sd_control"), controls=("depth", "canny")).load(),
            "refine.controls: 2 for a pipeline of 1 ControlNets",
        ),
    ],
)
def test_settings_that_will_not_do_are_one_clear_line(tiny, make, message):
    with pytest.raises(UserError, match=message) as error:
        make(tiny)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "folder", "kind"),
    [
        ("refine_controlnet", "sd_control", ControlNetConfig),
        ("refine_wan_vace", "vace", VaceConfig),
        ("refine_wan_animate", "animate", AnimateConfig),
    ],
)
def test_the_configs_that_come_with_the_project(tiny, name, folder, kind):
    file = str(config.bundled(f"anonymize/{name}.yaml"))
    options = ["--config_path", file, "--out", "x", "--refine.folder", tiny(folder)]
    assert type(config.parse(AnonymizeConfig, options, "anonymize").refine) is kind
