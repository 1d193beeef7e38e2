"""`maskdp studio`: raw videos of people who perform known actions in known places, with the truth about each.

The actions come from `motions`, places from `rooms`, people from `wardrobe`. The place tells something about the
action, as in real data: with probability `scene_correlation` an action is filmed in a room of its own kind.
"""

import csv
import dataclasses
import functools
import hashlib
import io
import pathlib
from collections.abc import Iterator

import numpy as np
import torch
import yaml

from anonymize.avatar.body import Body
from anonymize.avatar.camera import Camera
from anonymize.avatar.pose import Pose
from anonymize.avatar.render import render
from anonymize.avatar.wardrobe import Avatar, draw_identity
from anonymize.studio import motions, rooms
from anonymize.vision import video
from maskdp import atomic, layers, progress
from maskdp import config as configuration
from maskdp.errors import UserError

ACTIONS = {"private": motions.PRIVATE_ACTIONS, "public": motions.PUBLIC_ACTIONS, "all": motions.ACTIONS}

HOME = {
    "wave": "hallway",
    "clap": "classroom",
    "drink": "kitchen",
    "phone_call": "office",
    "sit_down": "living_room",
    "squat": "gym",
    "kick": "park",
    "throw": "beach",
    "walk": "street",
    "pick_up": "garage",
}
"""The kind of room that goes with an action; the others take the kinds in turn."""

_SHADOWS = ((0, 0.25, 0.28), *((joint, 0.3, 0.1) for joint in (7, 8, 10, 11)))  # of a joint: strength, spread (m)
_CLEARANCE = 0.65  # metres kept from the stool by those who do not sit on it
_MARGIN = 0.05  # of the picture's sides, kept free around the actor


@dataclasses.dataclass(frozen=True)
class StudioConfig:
    """What to film.

    Attributes:
        out: folder for `videos/`, `truth/` and `manifest.csv`; with `layers`, for `shards/`.
        videos: how many.
        actions: `private`, `public` (disjoint labels) or `all`.
        identities, rooms: how many people and places there are.
        frames, fps, size: frames of a video, frames a second, side of the square picture in pixels.
        scene_correlation: probability that an action is filmed in a room of its own kind rather than in any.
        second_person: probability that someone else stands in the picture.
        passing: probability that the actor walks up first, or off at the end, so that all of the room is seen.
        test_fraction: share of the videos in the split `test`.
        disjoint_subjects: whether nobody is in both splits.
        seed: everything follows from it.
        layers: write a two-layer dataset (avatars over nothing, empty room) instead of videos: public data that need
            no anonymizer.
    """

    out: str
    videos: int = 240
    actions: str = "private"
    identities: int = 24
    rooms: int = 24
    frames: int = 16
    fps: float = 8.0
    size: int = 112
    scene_correlation: float = 0.7
    second_person: float = 0.1
    passing: float = 0.3
    test_fraction: float = 0.25
    disjoint_subjects: bool = True
    seed: int = 0
    layers: bool = False

    def __post_init__(self):
        configuration.one_of(self, "actions", ACTIONS)
        configuration.positive(self, "videos", "identities", "rooms", "frames", "fps")
        for name in ("scene_correlation", "second_person", "passing", "test_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"StudioConfig.{name}: {getattr(self, name)!r}, expected a number from 0 to 1")
        if self.size < 32 or self.size % 2:
            raise UserError(f"StudioConfig.size: {self.size}, expected an even number of at least 32 pixels")
        if self.seed < 0:
            raise UserError(f"StudioConfig.seed: {self.seed}, expected 0 or more")
        if self.disjoint_subjects and 0 < self.test_fraction < 1 and self.identities < 2:
            raise UserError("StudioConfig.identities: 1, expected at least 2 for splits of disjoint subjects")


@dataclasses.dataclass(frozen=True)
class Take:
    """One video before it is filmed: who does what, where.

    Attributes:
        video_id: its name.
        action: the label.
        subjects: indices of the people, the actor first.
        room: index of the place.
        split: `train` or `test`.
    """

    video_id: str
    action: str
    subjects: tuple[int, ...]
    room: int
    split: str


@dataclasses.dataclass(frozen=True)
class Film:
    """One filmed take, T frames of P people.

    Attributes:
        rgba: (T, H, W, 4) uint8, the people over nothing.
        empty: (H, W, 3) uint8, the room without them.
        frames: (T, H, W, 3) uint8, what the camera records: both, the people's shadows, and noise.
        masks: (P, T, H, W) bool, where each person is nearest and covers at least half of the pixel.
        poses, betas: of each person.
        camera: where from.
    """

    rgba: np.ndarray
    empty: np.ndarray
    frames: np.ndarray
    masks: np.ndarray
    poses: tuple[Pose, ...]
    betas: tuple[np.ndarray, ...]
    camera: Camera


def plan(config: StudioConfig) -> list[Take]:
    """Every take, in order. Labels are balanced in both splits; take i does not depend on how many there are."""
    actions = list(ACTIONS[config.actions])
    tested = round(config.test_fraction * config.identities)
    tested = min(max(tested, 1), config.identities - 1) if config.identities > 1 else 0
    pools = {"test": np.arange(tested), "train": np.arange(tested, config.identities)}
    takes = []
    for index in range(config.videos):
        rng = np.random.default_rng([config.seed, index, 0])
        turn = index // len(actions) + index % len(actions)  # so that even a few takes have both splits
        split = "test" if int((turn + 1) * config.test_fraction) > int(turn * config.test_fraction) else "train"
        pool = (
            pools[split] if config.disjoint_subjects and 0 < config.test_fraction < 1 else np.arange(config.identities)
        )
        people = 1 + int(rng.uniform() < config.second_person and len(pool) > 1)
        action = actions[index % len(actions)]
        takes.append(
            Take(
                video_id=f"{config.actions}-{config.seed}-{index:05d}",
                action=action,
                subjects=tuple(rng.choice(pool, people, replace=False).tolist()),
                room=_place(action, rng, config),
                split=split,
            )
        )
    return takes


def _place(action: str, rng: np.random.Generator, config: StudioConfig) -> int:
    kinds = rooms.KINDS[: config.rooms]
    home = kinds.index(HOME[action]) if HOME.get(action) in kinds else list(motions.ACTIONS).index(action) % len(kinds)
    own = np.arange(home, config.rooms, len(rooms.KINDS))
    return int(rng.choice(own if rng.uniform() < config.scene_correlation else config.rooms))


def scene_id(config: StudioConfig, room: int) -> str:
    """Name of a place."""
    return f"{config.seed}-{rooms.KINDS[room % len(rooms.KINDS)]}-{room}"


def subject_id(config: StudioConfig, subject: int) -> str:
    """Name of a person."""
    return f"{config.seed}-person-{subject}"


@functools.cache
def _body() -> Body:
    return Body()


@functools.lru_cache(maxsize=32)
def _avatar(seed: int, subject: int) -> Avatar:
    return Avatar(_body(), draw_identity(np.random.default_rng([seed, subject, 1])))


@functools.lru_cache(maxsize=64)
def _room(seed: int, index: int) -> rooms.Room:
    return rooms.draw_room(rooms.KINDS[index % len(rooms.KINDS)], seed * 1000 + index)


def film(config: StudioConfig, take: Take) -> Film:
    """Performs and films one take."""
    rng = np.random.default_rng([config.seed, int(take.video_id.rsplit("-", 1)[1]), 2])
    room = _room(config.seed, take.room)
    avatars = [_avatar(config.seed, subject) for subject in take.subjects]
    pose = _performed(take.action, rng, config)
    poses = [_staged(pose, avatars[0], room, rng, seated=take.action in motions.SEATED)]
    for avatar in avatars[1:]:
        aside = rng.choice([-1, 1]) * rng.uniform(0.7, 1.1)
        actor = motions.pelvis(poses[0]).mean(0)
        bystander = motions.move(
            motions.stand(rng, config.frames, config.fps), [actor[0] + aside, 0, max(-0.6, actor[2] - 0.6)]
        )
        poses.append(motions.fit_to_body(bystander, _body(), avatar.betas))
    meshes = [avatar.mesh(pose) for avatar, pose in zip(avatars, poses)]
    camera = _aimed(meshes[0].vertices[:, ::16].reshape(-1, 3), rng, config.size)
    drawn = [render(meshes, frame, camera) for frame in range(config.frames)]
    rgba = np.stack([picture.rgba for picture in drawn])
    person = np.stack([picture.person for picture in drawn])
    masks = np.stack([(person == index) & (rgba[..., 3] >= 128) for index in range(len(poses))])
    empty, floor = rooms.look(room, camera)
    joints = np.stack([motions.joints(pose, _body(), avatar.betas) for avatar, pose in zip(avatars, poses)], 1)
    shade = np.stack([_shade(floor, people) for people in joints])
    frames = layers.composite(rgba, (empty * shade[..., None]).round().astype(np.uint8))
    return Film(
        rgba, empty, _noisy(frames, rng), masks, tuple(poses), tuple(avatar.betas.numpy() for avatar in avatars), camera
    )


def _performed(action: str, rng: np.random.Generator, config: StudioConfig) -> Pose:
    """The action; some actors walk up before it, others walk off after it, for a third of the time."""
    passing, before = rng.uniform() < config.passing, rng.uniform() < 0.5
    if action in motions.SEATED:
        before = action == "sit_down"
    walked = config.frames // 3
    if not passing or walked < 3 or action in motions.TRAVELLING:
        return motions.ACTIONS[action](rng, config.frames, config.fps)
    overlap = max(1, round(0.2 * config.fps))
    walks = [motions.ACTIONS["walk"](rng, walked, config.fps) for _ in range(3)]
    walk = max(walks, key=lambda pose: np.ptp(motions.pelvis(pose)[:, 0]))  # most across the picture
    act = motions.ACTIONS[action](rng, config.frames - walked + overlap, config.fps)
    return motions.join(walk, act, overlap) if before else motions.join(act, walk, overlap)


def _staged(pose: Pose, avatar: Avatar, room: rooms.Room, rng: np.random.Generator, seated: bool) -> Pose:
    """The actor's pose on a spot of the room: over the stool to sit, else clear of it and of the back wall."""
    pose = motions.fit_to_body(pose, _body(), avatar.betas)
    track = motions.pelvis(pose)
    if seated:
        spot = np.array(room.seat) - track[track[:, 1].argmin(), [0, 2]]
        return motions.move(pose, [spot[0], 0, spot[1]])
    spot = np.array([rng.uniform(-0.7, 0.7), rng.uniform(-0.3, 0.5)])
    path = track[:, [0, 2]] + spot
    while path[:, 1].min() < -0.5 or np.linalg.norm(path - room.seat, axis=1).min() < _CLEARANCE:
        path[:, 1] += 0.1
        spot[1] += 0.1
    return motions.move(pose, [spot[0], 0, spot[1]])


def _aimed(points: torch.Tensor, rng: np.random.Generator, size: int) -> Camera:
    """A camera that sees a standing actor 50 to 90 % as high as the picture; farther off if `points` (N, 3) would
    leave it."""
    middle = (points.amin(0) + points.amax(0)).numpy() / 2
    target = middle * [1, 0, 1] + [rng.normal(0, 0.08), rng.uniform(0.8, 1.0), 0]
    focal = rng.uniform(1.0, 1.4) * size
    distance = 1.7 * focal / (rng.uniform(0.5, 0.9) * size)
    angle, height = rng.uniform(-0.3, 0.3), rng.uniform(1.0, 1.6)
    while True:
        eye = target * [1, 0, 1] + [distance * np.sin(angle), height, distance * np.cos(angle)]
        camera = Camera.look_at(eye, target, size, size, focal)
        pixels = camera.project(points) / size
        if distance > 9 or (pixels.amin() > _MARGIN and pixels.amax() < 1 - _MARGIN):
            return camera
        distance *= 1.05


def _shade(floor: np.ndarray, people: np.ndarray) -> np.ndarray:
    """(H, W) brightness of the floor (H, W, 2; NaN elsewhere) beneath people (P, 55, 3): soft contact shadows."""
    x, z = np.nan_to_num(floor, nan=1e3).transpose(2, 0, 1)
    light = np.ones(x.shape, np.float32)
    for joints in people:
        for index, strength, spread in _SHADOWS:
            across, height, along = joints[index].tolist()
            strength *= np.exp(-max(height - 0.1, 0) / 0.2) if index else 1
            light *= 1 - strength * np.exp(-((x - across) ** 2 + (z - along) ** 2) / (2 * spread**2))
    return light


def _noisy(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A camera's noise: of each pixel, and of the exposure."""
    grain = rng.standard_normal(frames.shape, np.float32) * rng.uniform(1.0, 2.5)
    exposure = 1 + 0.006 * rng.standard_normal((len(frames), 1, 1, 1), np.float32)
    return (frames * exposure + grain).round().clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------- files


def write_truth(path: pathlib.Path, shot: Film) -> None:
    """Writes what is known of a video: an `.npz` of plain arrays, read back by `read_truth`."""
    arrays = {f"pose{k}_{name}": value for k, pose in enumerate(shot.poses) for name, value in pose.arrays().items()}
    stream = io.BytesIO()
    np.savez_compressed(
        stream,
        **arrays,
        betas=np.stack(shot.betas),
        masks=np.packbits(shot.masks, axis=-1),
        camera_size=[shot.camera.width, shot.camera.height],
        camera_focal=shot.camera.focal,
        camera_rotation=shot.camera.rotation,
        camera_translation=shot.camera.translation,
        empty=shot.empty,
    )
    atomic.write_bytes(path, stream.getvalue())


@dataclasses.dataclass(frozen=True)
class Truth:
    """What is known of a video: see `Film`."""

    masks: np.ndarray
    empty: np.ndarray
    poses: tuple[Pose, ...]
    betas: np.ndarray
    camera: Camera


def read_truth(path: pathlib.Path | str) -> Truth:
    """Reads what `write_truth` wrote."""
    with np.load(path) as file:
        width, height = file["camera_size"].tolist()
        camera = Camera(width, height, float(file["camera_focal"]), file["camera_rotation"], file["camera_translation"])
        masks = np.unpackbits(file["masks"], axis=-1, count=width).astype(bool)
        poses = tuple(Pose(**{name: file[f"pose{k}_{name}"] for name in Pose.WIDTHS}) for k in range(len(masks)))
        return Truth(masks, file["empty"], poses, file["betas"], camera)


def generate(config: StudioConfig) -> pathlib.Path:
    """Films every take of `config` into `config.out`; takes already there are kept.

    Returns:
        The path of `manifest.csv` (path, label, subject_ids joined by `;`, scene_id, split), or of the dataset if
        `config.layers`.

    Raises:
        UserError: the folder holds the work of another config.
    """
    out = pathlib.Path(config.out)
    _claim(out, config)
    takes = plan(config)
    if config.layers:
        labels = list(ACTIONS[config.actions])
        with progress.bar("studio", len(takes), "clip") as advance:
            splits = {name: _layered(config, takes, name, labels, advance) for name in ("train", "test")}
            present = {take.split for take in takes}
            kept = {name: clips for name, clips in splits.items() if name in present}
            notes = {"studio": configuration.resolved(dataclasses.replace(config, out=""))}
            return layers.write_dataset(out, kept, labels, notes=notes)
    with progress.bar("studio", len(takes), "video") as advance:
        for take in takes:
            path, truth = out / "videos" / f"{take.video_id}.mp4", out / "truth" / f"{take.video_id}.npz"
            if not (path.exists() and truth.exists()):
                shot = film(config, take)
                write_truth(truth, shot)
                video.encode(path, shot.frames, config.fps)
            advance()
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["path", "label", "subject_ids", "scene_id", "split"])
    for take in takes:
        subjects = ";".join(subject_id(config, subject) for subject in take.subjects)
        rows.writerow([f"videos/{take.video_id}.mp4", take.action, subjects, scene_id(config, take.room), take.split])
    atomic.write_text(out / "manifest.csv", text.getvalue())
    return out / "manifest.csv"


def _claim(out: pathlib.Path, config: StudioConfig) -> None:
    """Notes in the folder what is filmed there; only the number of videos may change later."""
    wanted = configuration.resolved(dataclasses.replace(config, out="", videos=1))
    note = out / "studio.yaml"
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file, expected a folder")
    if note.exists():
        found = yaml.safe_load(note.read_text())
        if found != wanted:
            keys = [key for key in wanted if not isinstance(found, dict) or found.get(key) != wanted[key]]
            raise UserError(f"{out}: holds videos filmed with other settings ({', '.join(keys)}); name another --out")
    else:
        atomic.write_text(note, yaml.safe_dump(wanted))


def _layered(
    config: StudioConfig, takes: list[Take], split: str, labels: list[str], advance
) -> Iterator[layers.TwoLayerClip]:
    """The takes of a split as two-layer clips: the people's render is the public layer, the room the private one."""
    for take in takes:
        if take.split != split:
            continue
        shot = film(config, take)
        rng = np.random.default_rng([config.seed, int(take.video_id.rsplit("-", 1)[1]), 3])
        yield layers.TwoLayerClip(
            rgba=shot.rgba,
            private=_noisy(np.broadcast_to(shot.empty, shot.frames.shape), rng),
            label=labels.index(take.action),
            clip_id=f"{take.video_id}-0",
            video_id=take.video_id,
            scene_id=scene_id(config, take.room),
            subject_ids=tuple(subject_id(config, subject) for subject in take.subjects),
            source=hashlib.sha256(shot.frames.tobytes()).hexdigest(),
            fps=config.fps,
        )
        advance()


def main(arguments: list[str]) -> int:
    """`maskdp studio --out DIR [--videos N …]`."""
    torch.set_num_threads(1)
    generate(configuration.parse(StudioConfig, arguments, "studio"))
    return 0
