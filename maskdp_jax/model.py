"""A small video ViT (flax nnx) and its functional form. LayerNorm only: nothing in it mixes records."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from maskdp.errors import UserError
from maskdp_jax.config import ModelConfig, ViTConfig

Params = dict[str, Array]
"""Parameters by name, `blocks.0.mlp_in.kernel`."""

HEAD = "head."

_INIT = {"kernel_init": nnx.initializers.xavier_uniform()}


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs):
        width = config.width
        self.norm_attention = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(config.heads, width, decode=False, rngs=rngs, **_INIT)
        self.norm_mlp = nnx.LayerNorm(width, rngs=rngs)
        self.mlp_in = nnx.Linear(width, config.mlp_ratio * width, rngs=rngs, **_INIT)
        self.mlp_out = nnx.Linear(config.mlp_ratio * width, width, rngs=rngs, **_INIT)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        x = x + self.attention(self.norm_attention(x))
        return x + self.mlp_out(jax.nn.gelu(self.mlp_in(self.norm_mlp(x))))


class VideoViT(nnx.Module):
    """Tubelets → transformer → mean over tokens → a linear head that starts at 0 (arXiv 2103.15691, model 1)."""

    def __init__(self, config: ViTConfig, frames: int, size: int, classes: int, rngs: nnx.Rngs):
        grid = [length // step for length, step in zip((frames, size, size), config.tubelet)]
        if any(n * step != length for n, step, length in zip(grid, config.tubelet, (frames, size, size))):
            raise UserError(
                f"model.tubelet: {list(config.tubelet)} does not divide clips of {frames} frames and side {size}"
            )
        self.embed = nnx.Conv(
            3, config.width, config.tubelet, strides=config.tubelet, padding="VALID", rngs=rngs, **_INIT
        )
        start = nnx.initializers.uniform(0.04)
        self.place = nnx.Param(start(rngs.params(), (grid[1] * grid[2], config.width)))
        self.time = nnx.Param(start(rngs.params(), (grid[0], 1, config.width)))
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.depth)])
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, classes, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def features(self, video: UInt8[Array, "b t h w 3"]) -> Float[Array, "b d"]:
        """Pooled tokens φ; the final LayerNorm gives each about unit variance."""
        x = self.embed(video.astype(jnp.float32) / 127.5 - 1)
        b, t, h, w, d = x.shape
        x = (x.reshape(b, t, h * w, d) + self.time + self.place).reshape(b, t * h * w, d)
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(axis=1)

    def __call__(self, video: UInt8[Array, "b t h w 3"]) -> Float[Array, "b classes"]:
        return self.head(self.features(video))


class Network:
    """The model as functions of a flat dict of parameters.

    Attributes:
        classes, width: numbers of logits and features.

    Raises:
        UserError: the model has state besides parameters, e.g. the running means of BatchNorm, which mix records.
    """

    def __init__(self, config: ModelConfig, frames: int, size: int, classes: int, seed: int):
        self.classes, self.width = classes, config.width
        self._make = lambda: VideoViT(config, frames, size, classes, nnx.Rngs(params=jax.random.key(seed, impl="rbg")))
        module = nnx.eval_shape(self._make)
        refuse_mixing(module)
        self._graph, state, other = nnx.split(module, nnx.Param, ...)
        if jax.tree.leaves(other):
            raise UserError("model.type: it keeps state besides its parameters, expected a model that mixes no records")
        self._variables = _by_name(state)

    @property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of the parameters."""
        return {name: variable.get_value() for name, (_, variable) in self._variables.items()}

    @functools.cached_property
    def init(self) -> Params:
        """Initial parameters, drawn from `seed`."""
        state = jax.jit(lambda: nnx.state(self._make(), nnx.Param))()
        return {name: variable.get_value() for name, (_, variable) in _by_name(state).items()}

    def logits(self, params: Mapping[str, Array], video: UInt8[Array, "b t h w 3"]) -> Float[Array, "b classes"]:
        """f(video; params)."""
        return self._module(params)(video)

    def features(self, params: Mapping[str, Array], video: UInt8[Array, "b t h w 3"]) -> Float[Array, "b d"]:
        """φ(video; params)."""
        return self._module(params).features(video)

    def _module(self, params: Mapping[str, Array]) -> VideoViT:
        flat = [(path, variable.replace(params[name])) for name, (path, variable) in self._variables.items()]
        return nnx.merge(self._graph, nnx.from_flat_state(flat))


def _by_name(state: nnx.State) -> dict[str, tuple[tuple, nnx.Variable]]:
    return {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}


def refuse_mixing(module: nnx.Module) -> None:
    """Raises UserError if a layer of `module` mixes the records of a batch."""
    for path, part in nnx.iter_modules(module):
        if isinstance(part, nnx.BatchNorm):
            raise UserError(f"model: {'.'.join(map(str, path))} is a BatchNorm and mixes records; expected LayerNorm")


def fits(params: Mapping[str, Array], like: Mapping[str, Array], head: bool) -> Params:
    """`params` as start values for a model of `like`: all of the trunk, and the head too if `head`; else like's own.

    Raises:
        UserError: the trunks differ.
    """
    taken = {}
    for name, own in like.items():
        if name.startswith(HEAD) and not head:
            taken[name] = own
        elif name not in params or params[name].shape != own.shape:
            have = params[name].shape if name in params else "none"
            raise UserError(f"init: parameter {name} has shape {have}, expected {own.shape}; are the models the same?")
        else:
            taken[name] = jnp.asarray(params[name])
    return taken
