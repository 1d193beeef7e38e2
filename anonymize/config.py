"""Settings of `maskdp anonymize`."""

import dataclasses
from dataclasses import field

from anonymize.fitting.fit import FitConfig
from anonymize.people import FinderConfig, choice
from anonymize.people.blazepose import wheel
from anonymize.people.blazepose.finder import BlazePoseConfig
from anonymize.people.embedded.finder import EmbeddedConfig
from anonymize.people.precomputed import PrecomputedConfig
from anonymize.refine.refiner import NoRefinement, RefineConfig
from anonymize.scene.inpaint import InpaintConfig, OpenCVInpaint
from maskdp.config import fingerprint, one_of, positive
from maskdp.errors import UserError


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    """How videos are read.

    Attributes:
        short_side: frames are scaled down until their shorter side is at most so many pixels.
        fps: frames a second to keep; 0: all.
        max_frames: a longer video becomes several clips; also what bounds the memory.
    """

    short_side: int = 256
    fps: float = 0.0
    max_frames: int = 300

    def __post_init__(self):
        positive(self, "max_frames")
        if self.short_side < 32:
            raise UserError(f"video.short_side: {self.short_side}, expected 32 or more")
        if not self.fps >= 0:
            raise UserError(f"video.fps: {self.fps!r}, expected a rate, or 0 for all frames")


@dataclasses.dataclass(frozen=True)
class AvatarConfig:
    """Who the avatars are and how they are drawn.

    Attributes:
        model_path: an official `SMPLX_*.npz`; empty for the embedded body.
        identity: `track` draws a new identity for every person of every video; `subject` one for a named subject
            wherever they are the only person, so that avatars can be told apart as the people could.
        samples: samples a pixel along each side.
    """

    model_path: str = ""
    identity: str = "track"
    samples: int = 2

    def __post_init__(self):
        one_of(self, "identity", ("track", "subject"))
        positive(self, "samples")


@dataclasses.dataclass(frozen=True)
class LimitsConfig:
    """When a clip is quarantined rather than written.

    Attributes:
        max_without_pose: more than this part of the frames shows a person who could not be re-posed.
        max_blanked: more than this part of the frames had to be blanked.
    """

    max_without_pose: float = 0.5
    max_blanked: float = 0.2

    def __post_init__(self):
        for name in ("max_without_pose", "max_blanked"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"limits.{name}: {getattr(self, name)!r}, expected a number from 0 to 1")


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """What is written about a clip besides its layers.

    Attributes:
        private_format: `jpeg` or `png`, for the private layer; the public one is always PNG.
        label_from: `none`, or `folder`: a video without a label in a manifest is labelled by the folder it lies in.
        split: split of a video without one in a manifest.
    """

    private_format: str = "jpeg"
    label_from: str = "none"
    split: str = "train"

    def __post_init__(self):
        one_of(self, "private_format", ("jpeg", "png"))
        one_of(self, "label_from", ("none", "folder"))


@FinderConfig.register_subclass("auto")
@dataclasses.dataclass(frozen=True)
class AutoConfig(BlazePoseConfig):
    """`blazepose` where its models are, else `embedded` with its own defaults. The keys are those of `blazepose`; a
    folder that is named in `weights` must hold the models."""

    def chosen(self) -> FinderConfig:
        names = [item.name for item in dataclasses.fields(BlazePoseConfig)]
        wanted = BlazePoseConfig(**{name: getattr(self, name) for name in names})
        return wanted.chosen() if self.weights or wheel.complete(self.folder) else EmbeddedConfig()


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Everything that one clip's two layers depend on, besides the clip and the wardrobe's secret.

    Attributes:
        span: the part of each video that is anonymized, `3.0-7.5` in seconds; empty: all of it.
        keep: who stays visible, `SECONDS@X,Y` or `SECONDS@X0,Y0,X1,Y1` in pixels of the one video, separated by `;`.
        only: who alone is replaced, in the same form: everybody else who is there at that time stays visible.
    """

    span: str = ""
    keep: str = ""
    only: str = ""
    video: VideoConfig = field(default_factory=VideoConfig)
    finder: FinderConfig = field(default_factory=AutoConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    avatar: AvatarConfig = field(default_factory=AvatarConfig)
    inpaint: InpaintConfig = field(default_factory=OpenCVInpaint)
    refine: RefineConfig = field(default_factory=NoRefinement)
    limits: LimitsConfig = field(default_factory=LimitsConfig)

    @property
    def seconds(self) -> tuple[float, float] | None:
        """The two ends of `span`; None where it is empty."""
        if not self.span:
            return None
        try:
            start, end = (float(part) for part in self.span.split("-"))
        except ValueError:
            start = end = 0.0
        if not 0 <= start < end:
            raise UserError(f"--span: {self.span!r}, expected two times in seconds such as 3.0-7.5")
        return start, end


@dataclasses.dataclass(frozen=True)
class AnonymizeConfig(PipelineConfig):
    """videos -> two-layer TFDS shards, people replaced by avatars.

    Attributes:
        out: folder to write; the same command continues what is there.
        workers: processes.
        ray: address of a Ray cluster for the workers to run on (`auto`: the one this machine belongs to); empty: here.
        wardrobe_secret: file of the 32 bytes that avatars are drawn from; made as OUT/wardrobe.secret where empty.
        sheets: contact sheets of the `layers`, `full` ones that show the original too, or `none`.
        export: videos to be played: `mp4` OUT/mp4/KEY-composite.mp4, -public and -private; `lab` these and
            OUT/lab_only/KEY.mp4, the original beside the composite; or `none`.
    """

    out: str = ""
    workers: int = 1
    ray: str = ""
    wardrobe_secret: str = ""
    sheets: str = "layers"
    export: str = "none"
    dataset: DatasetConfig = field(default_factory=DatasetConfig)

    def __post_init__(self):
        if not self.out:
            raise UserError("--out: missing, expected a folder to write")
        one_of(self, "sheets", ("layers", "full", "none"))
        one_of(self, "export", ("none", "mp4", "lab"))
        self.seconds  # noqa: B018, raises where `span` is wrong
        for key in ("keep", "only"):
            choice.places(key, getattr(self, key))
        positive(self, "workers")

    @property
    def precomputed(self) -> PrecomputedConfig | None:
        """The finder's settings where people come from files."""
        return self.finder if isinstance(self.finder, PrecomputedConfig) else None

    @property
    def pipeline_fingerprint(self) -> str:
        """SHA-256 of the settings that a clip's layers depend on: finished work under others is not taken up."""
        names = [item.name for item in dataclasses.fields(PipelineConfig)]
        settings = PipelineConfig(**{name: getattr(self, name) for name in names})
        return fingerprint(dataclasses.replace(settings, finder=self.finder.chosen().pinned()))
