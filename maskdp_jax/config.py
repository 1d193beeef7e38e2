"""Typed configuration of a training run, parsed by `maskdp.config.parse` from YAML and `--a.b value` overrides."""

import dataclasses

import draccus

from maskdp import config
from maskdp.errors import UserError
from maskdp_jax.mechanism import ADJACENCIES, SAMPLINGS, UNITS


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which clips, and at which size a model sees them.

    Attributes:
        path: a two-layer dataset, the folder that `maskdp anonymize` wrote.
        split, eval_split: names of the splits. Without `eval_split`, or if a dataset has only one split, the run is not
            evaluated.
        frames: frames a clip, spaced evenly over its length.
        size: side of the square views in pixels.
        eval_on_protected_records: allow `eval_split` to be or to overlap with the split trained on. The accuracies of a
            private run are then functions of the records it protects, and no ε covers them.
        crop: cut each clip to a square around its avatars, wider than they are by this part; 0: the whole frame.
        cache: keep decoded views in memory (`2 * frames * size² * 3` bytes a clip).
        threads: threads that read ahead.
    """

    path: str = ""
    split: str = "train"
    eval_split: str = "test"
    eval_on_protected_records: bool = False
    frames: int = 8
    size: int = 64
    crop: float = 0.0
    cache: bool = True
    threads: int = 2

    def __post_init__(self):
        if not self.path:
            raise UserError("data.path: missing, expected the folder of a two-layer dataset")
        config.positive(self, "frames", "size", "threads")
        if not 0 <= self.crop < 10:
            raise UserError(f"data.crop: {self.crop!r}, expected a number from 0 to below 10")


@dataclasses.dataclass(frozen=True)
class ModelConfig(draccus.ChoiceRegistry):
    """Base of the models; `model.type` chooses."""

    @classmethod
    def default_choice_name(cls) -> str:
        return "vit"


@ModelConfig.register_subclass("vit")
@dataclasses.dataclass(frozen=True)
class ViTConfig(ModelConfig):
    """A small video ViT with joint space-time attention.

    Attributes:
        width, depth, heads: of the transformer.
        mlp_ratio: width of the hidden layer over `width`.
        tubelet: frames, rows and columns of one token.
    """

    width: int = 128
    depth: int = 4
    heads: int = 4
    mlp_ratio: int = 4
    tubelet: tuple[int, int, int] = (2, 16, 16)

    def __post_init__(self):
        config.positive(self, "width", "depth", "heads", "mlp_ratio")
        if self.width % self.heads:
            raise UserError(f"model.width: {self.width}, expected a multiple of model.heads = {self.heads}")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(draccus.ChoiceRegistry):
    """Base of the objectives; `objective.type` chooses.

    Every type has these keys, so that one file serves all of them; `sgd` and `public_only` add no noise and read none.

    Attributes:
        epsilon: the noise is calibrated to it.
        noise_multiplier: standard deviation of the noise over the clip norm; instead of `epsilon`.
        delta: of (ε, δ).
        l2_clip_norm: bound on the norm of one record's contribution.
        learning_rate: of the steps that carry noise; by default that of `optim`.
    """

    epsilon: float | None = None
    noise_multiplier: float | None = None
    delta: float = 1e-5
    l2_clip_norm: float = 1.0
    learning_rate: float | None = None

    def __post_init__(self):
        config.positive(self, "l2_clip_norm")
        if not 0 < self.delta < 1:
            raise UserError(f"objective.delta: {self.delta!r}, expected a number between 0 and 1")
        for name in ("epsilon", "noise_multiplier", "learning_rate"):
            if getattr(self, name) is not None:
                config.positive(self, name)
        if self.private and (self.epsilon is None) == (self.noise_multiplier is None):
            raise UserError("objective: expected epsilon or noise_multiplier, and not both")

    @classmethod
    def default_choice_name(cls) -> str:
        return "maskdp"

    @property
    def name(self) -> str:
        """The value of `objective.type`."""
        return ObjectiveConfig.get_choice_name(type(self))

    @property
    def private(self) -> bool:
        """Whether its steps clip and add noise."""
        return self.name not in ("sgd", "public_only")

    @property
    def masked(self) -> bool:
        """Whether its ε speaks of the private layer alone."""
        return self.name.startswith("maskdp")


@ObjectiveConfig.register_subclass("sgd")
@dataclasses.dataclass(frozen=True)
class SGDConfig(ObjectiveConfig):
    """∇L(x): no privacy.

    Attributes:
        both_views: the mean of ∇L(x) and ∇L(x̃) instead, for pre-training: what starts from it knows either view.
    """

    both_views: bool = False


@ObjectiveConfig.register_subclass("public_only")
@dataclasses.dataclass(frozen=True)
class PublicOnlyConfig(ObjectiveConfig):
    """∇L(x̃): the private layer is never read."""


@ObjectiveConfig.register_subclass("dp_sgd")
@dataclasses.dataclass(frozen=True)
class DPSGDConfig(ObjectiveConfig):
    """Σ clip(∇L(x)) + noise: the whole clip through DP (arXiv 1607.00133)."""


@ObjectiveConfig.register_subclass("maskdp")
@dataclasses.dataclass(frozen=True)
class MaskDPConfig(ObjectiveConfig):
    """Two paths: logits f(x̃; θ) + λ·h(φ(x) − φ(x̃); W).

    Attributes:
        lambda_: weight of the private path; 0 is `public_only`.
    """

    learning_rate: float | None = 0.02
    lambda_: float = 1.0


@ObjectiveConfig.register_subclass("maskdp_residual")
@dataclasses.dataclass(frozen=True)
class ResidualConfig(ObjectiveConfig):
    """Σ clip(∇L(x) − ∇L(x̃)) + noise + Σ ∇L(x̃): one model, one optimiser, one learning rate."""


@ObjectiveConfig.register_subclass("maskdp_two_step")
@dataclasses.dataclass(frozen=True)
class TwoStepConfig(ObjectiveConfig):
    """The paper's: a DP-SGD step on the composite, then a plain step on the public view (arXiv 2410.17098)."""


@dataclasses.dataclass(frozen=True)
class PrivacyConfig:
    """What one record is and what it means to change it.

    Attributes:
        unit: a record is all clips of one `video`, `subject` or `scene`.
        adjacency: neighbours differ in one record, whose private layer is `zero_out` (becomes the fill), `replace` (any
            other), or whose whole term is `remove`d.
        sampling: `independent` private and public batches; `shared_*` the same batch for both, without amplification.
        clips_per_record: most clips one record contributes; 0: all.
        exact: make the release in integers, out of reach of attacks on floating point. By default for `maskdp` alone:
            it forms the terms of a microbatch of records, which large models cannot afford.
    """

    unit: str = "video"
    adjacency: str = "zero_out"
    sampling: str = "independent"
    clips_per_record: int = 0
    exact: bool | None = None

    def __post_init__(self):
        config.one_of(self, "unit", UNITS)
        config.one_of(self, "adjacency", ADJACENCIES)
        config.one_of(self, "sampling", SAMPLINGS)
        if self.clips_per_record < 0:
            raise UserError(f"privacy.clips_per_record: {self.clips_per_record}, expected 0 or more")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Steps, batches and learning rates.

    Attributes:
        optimizer: `sgd` (with momentum) or `adam`, of the model; the private head of `maskdp` always takes `sgd`.
        learning_rate: of the steps with exact gradients; warmed up linearly, then a cosine to 0.
        momentum: of `sgd`.
        warmup_steps: length of the warm-up.
        steps: length of the run.
        batch: expected records in a private batch (Poisson).
        public_batch: records in a batch of exact gradients.
    """

    optimizer: str = "sgd"
    learning_rate: float = 0.05
    momentum: float = 0.9
    warmup_steps: int = 10
    steps: int = 300
    batch: int = 64
    public_batch: int = 64

    def __post_init__(self):
        config.one_of(self, "optimizer", ("sgd", "adam"))
        config.positive(self, "learning_rate", "steps", "batch", "public_batch")
        if not 0 <= self.momentum < 1:
            raise UserError(f"optim.momentum: {self.momentum!r}, expected a number from 0 to below 1")


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How a step is spread over devices.

    Attributes:
        device_map: `shard_map` or `pmap`.
        devices: of those there are; 0: all.
        microbatch: records whose gradients are held at a time on one device; 0: all of a batch.
    """

    device_map: str = "shard_map"
    devices: int = 0
    microbatch: int = 0

    def __post_init__(self):
        config.one_of(self, "device_map", ("shard_map", "pmap"))


@dataclasses.dataclass(frozen=True)
class EveryConfig:
    """Steps between two checkpoints, logged lines, evaluations; 0: at the end only."""

    checkpoint: int = 50
    log: int = 1
    evaluate: int = 0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        out: run folder; the same command continues a run that was cut off.
        seed: of the initial weights. Never of noise or sampling, which come from the run's secret.
        init: run or export whose weights to start from, trained on public data; its head is kept if the labels agree.
            `studio` is the one that comes with the project (`configs/pretrain.yaml`).
        init_is_public: your word that the data behind `init` are public and hold none of the records protected here. An
            export does not say which records it was trained on, so a private run asks for it.
        trainable: regular expressions of parameter names; one that matches anywhere is trained.
    """

    out: str = ""
    seed: int = 0
    init: str = ""
    init_is_public: bool = False
    trainable: tuple[str, ...] = (".",)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ViTConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=MaskDPConfig)
    privacy: PrivacyConfig = dataclasses.field(default_factory=PrivacyConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    every: EveryConfig = dataclasses.field(default_factory=EveryConfig)

    def __post_init__(self):
        if not self.out:
            raise UserError("out: missing, expected the folder of the run")
        if self.objective.masked and self.privacy.adjacency == "remove":
            raise UserError("privacy.adjacency: remove, expected zero_out or replace with a masked objective")
