"""One clip through the whole of stage 1: people found, removed, re-posed and rendered as avatars; or quarantined."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from anonymize.avatar.body import Body
from anonymize.avatar.camera import Camera
from anonymize.avatar.pose import Pose
from anonymize.avatar.render import Mesh, render
from anonymize.avatar.wardrobe import Avatar, Wardrobe
from anonymize.config import AvatarConfig, PipelineConfig
from anonymize.fitting.fit import Fit, Fitter
from anonymize.people import FinderConfig, People, PeopleFinder, Person, choice
from anonymize.people.blazepose.finder import BlazePoseConfig, BlazePoseFinder
from anonymize.people.embedded.finder import EmbeddedFinder
from anonymize.people.models.depth import in_order
from anonymize.people.models.finder import ModelFinder, ModelsConfig
from anonymize.people.precomputed import PrecomputedConfig
from anonymize.refine import control
from anonymize.refine.refiner import Drawing
from anonymize.scene.removal import remove

_CHUNK = 32  # frames posed at a time


@dataclasses.dataclass(frozen=True)
class ClipResult:
    """What became of a clip.

    Attributes:
        rgba, private: the two layers, (T, H, W, 4) and (T, H, W, 3) uint8; None where the clip is quarantined.
        reason: why it is quarantined, in one line; None where it is written.
        people: number of people found.
        frames, frames_without_pose, frames_blanked: of the clip; with a person in them who has no avatar; blanked
            because the removal failed.
        iou: mean overlap of the avatars' bodies with the people's silhouettes; None where there was nothing to fit.
        people_kept: people who are visible on purpose (`choice`): they are real in the private layer.
        notes: the finder's figures.
    """

    rgba: np.ndarray | None
    private: np.ndarray | None
    reason: str | None
    people: int
    frames: int
    frames_without_pose: int = 0
    frames_blanked: int = 0
    iou: float | None = None
    people_kept: int = 0
    notes: dict = dataclasses.field(default_factory=dict)

    @property
    def status(self) -> str:
        """`written` or `quarantined`."""
        return "quarantined" if self.rgba is None else "written"


class Anonymizer:
    """The pipeline with its models loaded.

    Args:
        config: the settings.
        secret: what identities are drawn from.
        finder: finds the people; the one that `config.finder` chooses where None.
    """

    def __init__(self, config: PipelineConfig, secret: bytes, finder: PeopleFinder | None = None):
        self.config = config
        self.finder = finder or _finder(config.finder.chosen())
        self.body = Body(config.avatar.model_path or None)
        self.wardrobe = Wardrobe(secret)
        self.fitter = Fitter(self.body, config.fit)
        self.inpaint = config.inpaint.load()
        self.refiner = config.refine.load()

    def clip(
        self,
        frames: np.ndarray,
        fps: float,
        video: str,
        subjects: Sequence[str] = (),
        people: People | None = None,
        keep: Sequence[tuple[int, choice.Place]] = (),
        only: Sequence[tuple[int, choice.Place]] = (),
    ) -> ClipResult:
        """Anonymizes one clip.

        Fails closed: whatever leaves a doubt that somebody might still be seen quarantines the clip; a person who
        cannot be re-posed is removed all the same; a frame whose removal failed is blanked.

        Args:
            frames: (T, H, W, 3) uint8 RGB.
            video: the video's key.
            subjects: the people in it by name, where known.
            people: where they are, if that is known already, as it must be with `finder.type: precomputed`; None: the
                finder finds them.
            keep, only: frames and places (pixels of `frames`) of who stays visible, and of who alone goes. All persons
                are removed first, and the result is judged as without this option; then the original returns where
                those kept are.

        Raises:
            UserError: at one of those places there is no person, or more than one.
        """
        total = len(frames)
        people = people or self.finder.find(frames, fps)
        found = functools.partial(ClipResult, people=len(people.persons), frames=total, notes=people.notes)
        quarantined = functools.partial(found, None, None)
        if people.doubt:
            return quarantined(people.doubt)
        if not people.persons:
            return quarantined("no person found")
        removal = remove(frames, people, self.config.limits.max_blanked, *self.inpaint)
        blanked = int(removal.blanked.sum())
        if removal.doubt:
            return quarantined(removal.doubt, frames_blanked=blanked)

        kept = choice.kept(people, keep, only)
        private = removal.frames
        if kept.any():
            private = np.where(choice.shown(people, kept, removal.blanked)[..., None], frames, private)
        camera = people.camera or Camera.default(frames.shape[2], frames.shape[1])
        keys = [identity_key(video, person.track_id, subjects, self.config.avatar) for person in people.persons]
        avatars = [self.avatar(key) for key in keys]
        fits = [
            _given(person) if person.pose else self.fitter(person, camera, avatar, fps)
            for person, avatar in zip(people.persons, avatars)
        ]
        fits = [dataclasses.replace(fit, ok=fit.ok & ~stays) for fit, stays in zip(fits, kept)]
        missing = np.any(
            [person.present & ~fit.ok & ~stays for person, fit, stays in zip(people.persons, fits, kept)], 0
        )
        overlaps = np.concatenate([fit.iou[np.isfinite(fit.iou)] for fit in fits])
        figures = {
            "frames_without_pose": int(missing.sum()),
            "frames_blanked": blanked,
            "iou": float(overlaps.mean()) if len(overlaps) else None,
            "people_kept": int(kept.any(1).sum()),
        }
        if missing.mean() > self.config.limits.max_without_pose:
            return quarantined(f"{missing.mean():.0%} of the frames show a person who could not be re-posed", **figures)
        if not any(fit.ok.any() for fit in fits):
            left = any((person.present & ~stays).any() for person, stays in zip(people.persons, kept))
            return quarantined("no person could be re-posed" if left else "everybody in it is kept visible", **figures)

        nearness = [person.nearness for person in people.persons]
        samples = self.config.avatar.samples
        rgba, depth, person = render_public(fits, avatars, camera, samples, nearness)
        if self.refiner:
            drawn = zip(fits, avatars)
            skeletons = [control.keypoints(fit, avatar.betas, self.body, camera, depth) for fit, avatar in drawn]
            drawing = Drawing(rgba, depth, person, np.stack(skeletons, 1))
            ground = removal.frames if self.config.refine.context == "scene" else None
            rgba = self.refiner(drawing, [avatar.identity for avatar in avatars], ground)
        return found(rgba, private, None, **figures)

    def avatar(self, key: str) -> Avatar:
        """Who stands in for the person with this key (`identity_key`)."""
        return Avatar(self.body, self.wardrobe.identity(key))


def _finder(config: FinderConfig) -> PeopleFinder | None:
    """The finder with these settings, its models loaded; None where people come from files."""
    if isinstance(config, PrecomputedConfig):
        return None
    if isinstance(config, BlazePoseConfig):
        return BlazePoseFinder(config)
    return ModelFinder.load(config) if isinstance(config, ModelsConfig) else EmbeddedFinder(config)


def _given(person: Person) -> Fit:
    """The poses that came with a person, `ok` where the person is present and the pose is finite."""
    arrays = person.pose.arrays()
    finite = np.all([np.isfinite(values).all(1) for values in arrays.values()], 0)
    pose = Pose(**{name: np.where(finite[:, None], values, 0) for name, values in arrays.items()})
    return Fit(pose, person.present & finite, np.full(len(finite), np.nan, np.float32))


def render_public(
    fits: Sequence[Fit],
    avatars: Sequence[Avatar],
    camera: Camera,
    samples: int = 2,
    nearness: Sequence[np.ndarray | None] = (),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The public layer: `avatars[i]` in the poses `fits[i]` wherever these are `ok`, nearer ones over farther ones.

    Where `nearness[i]` (T,) is known it decides who is nearer (`depth.in_order`), else the poses do.

    Guarantees: a function of poses and their order, camera, and avatars, which are drawn from keys. No pixel of a
    source reaches it, nor any shape, colour or light taken from one.

    Returns:
        rgba (T, H, W, 4) uint8, straight colour; depth (T, H, W) float32 in metres, infinite where nothing is; and the
        index of the nearest avatar (T, H, W) int16, -1 where nothing is.
    """
    rgba, depth, person = [], [], []
    for start in range(0, len(fits[0].ok), _CHUNK):
        part = slice(start, start + _CHUNK)
        meshes = [avatar.mesh(fit.pose[part]) for avatar, fit in zip(avatars, fits)]
        for t in range(len(fits[0].ok[part])):
            shown = [i for i, fit in enumerate(fits) if fit.ok[start + t]]
            pieces = [Mesh(meshes[i].vertices[t : t + 1], meshes[i].faces, meshes[i].colours) for i in shown]
            order = [nearness[i][start + t] if nearness and nearness[i] is not None else np.nan for i in shown]
            rendering = render(in_order(pieces, order, camera), 0, camera, samples)
            rgba.append(rendering.rgba)
            depth.append(rendering.depth)
            person.append(np.array([*shown, -1], np.int16)[rendering.person])
    return np.stack(rgba), np.stack(depth), np.stack(person)


def identity_key(video: str, track: int, subjects: Sequence[str], config: AvatarConfig) -> str:
    """What a person's identity is drawn from: the video and the track, or the subject where that is asked and known."""
    if config.identity == "subject" and len(subjects) == 1:
        return f"subject/{subjects[0]}"
    return f"{video}/{track}"
