"""Programs written for jax_privacy run with our functions in the place of theirs, and give the same numbers.

Each program uses `clipped_grad` or `clipped_fun` the way the example or module of jax_privacy it is named for does, and
returns whatever it reads from the result. Theirs (2.0) is the oracle.
"""

import unittest.mock

import dp_accounting
import flax.linen as nn
import jax
import jax.numpy as jnp
import jax_privacy.clipping
import numpy as np
import optax
import pytest
from flax import nnx
from jax_privacy import batch_selection
from jax_privacy.experimental import execution_plan

import maskdp_jax.clipping

PROGRAMS = []


def program(name, rtol=1e-4):
    """Registers a program (module with the two functions) -> tree of results, to be run with both modules."""
    return lambda function: PROGRAMS.append(pytest.param(function, rtol, id=name))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def mean_over_real(values, is_padding):
    """Rows of padding hold nothing that anyone may rely on."""
    return jnp.where(is_padding, 0, values).sum() / (~is_padding).sum()


@pytest.mark.parametrize(("run", "rtol"), PROGRAMS)
def test_same_as_jax_privacy(run, rtol):
    ours, theirs = run(maskdp_jax.clipping), run(jax_privacy.clipping)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        left, right = jnp.asarray(left), jnp.asarray(right)
        wide = jnp.promote_types(right.dtype, jnp.float32)  # sums are not rounded to the type of the parameters
        assert left.shape == right.shape
        assert left.dtype in (right.dtype, wide)
        left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
        assert np.linalg.norm(left - right) <= rtol * np.linalg.norm(right)


@program("jax_api_example")
def _(clipping):
    """A line fitted through scalars: noise scaled to the sensitivity, the loss logged, a few steps."""

    def loss(params, x, y):
        return jnp.mean(jnp.square(params["slope"] * x + params["offset"] - y))

    grad_fn = clipping.clipped_grad(loss, l2_clip_norm=1.0, batch_argnums=(1, 2), has_aux=False, return_values=True)
    stddev = 0.1 * grad_fn.sensitivity(dp_accounting.NeighboringRelation.REPLACE_ONE)

    @jax.jit
    def step(params, x, y, key):
        total, aux = grad_fn(params, x, y)
        assert (aux.grad_norms, aux.aux) == (None, None)
        noise = dict(zip(total, stddev * jax.random.normal(key, (2,))))
        return jax.tree.map(lambda p, g, n: p - 0.02 * (g + n) / 8, params, total, noise), aux.values.mean()

    x, params, losses = jnp.linspace(0, 3, 8), {"slope": jnp.array(0.3), "offset": jnp.array(-1.0)}, []
    for i in range(3):
        params, value = step(params, x, 2 * x + 1, jax.random.key(i))
        losses.append(value)
    return params, losses


@program("dp_logistic_regression")
def _(clipping):
    """Batches of several sizes, padded to a multiple; labels are bools in numpy; nothing asked for but the gradient."""

    def loss(params, x, y):
        logits = x @ params["weights"] + params["bias"]
        return jnp.mean(-jax.nn.log_sigmoid(jnp.where(y, logits, -logits)))

    x, y = normal(0, 20, 5), np.arange(20) % 3 == 0
    params = {"weights": normal(1, 5), "bias": jnp.array(0.0)}
    step = jax.jit(clipping.clipped_grad(loss, l2_clip_norm=0.5, batch_argnums=(1, 2), normalize_by=6))
    totals = []
    for size in (3, 7, 8):
        index = batch_selection.pad_to_multiple_of(np.arange(size), 4)
        totals.append(step(params, x[index], y[index], is_padding_example=index == -1))
    return totals


@program("execution_plan")
def _(clipping):
    """A plan of jax_privacy asks for the sensitivity of a function without arguments, then builds the real one."""
    with unittest.mock.patch.object(jax_privacy.clipping, "clipped_grad", clipping.clipped_grad):
        plan = execution_plan.BandMFExecutionPlanConfig(
            iterations=8,
            strategy=np.array([1.0, 0.5]),
            epsilon=None,
            delta=None,
            noise_multiplier=0.7,
            l2_clip_norm=0.3,
            normalize_by=4.0,
            noise_seed=0,
        ).plan
        grad_fn = plan.clipped_grad(lambda p, x: jnp.mean(jnp.square(p - x)), return_grad_norms=True)
        total, aux = grad_fn(jnp.ones(3), normal(0, 4, 3), is_padding_example=jnp.arange(4) == 2)
    noisy, _ = plan.noise_addition_transform.update(total, plan.noise_addition_transform.init(jnp.ones(3)))
    return total, noisy, aux.grad_norms[jnp.array([0, 1, 3])]


@program("dp_sgd_transformer")
def _(clipping):
    """Next-token loss: embedding and positions gathered, a list of layers, causal attention, unit-norm rescaling."""

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)

    def loss(params, tokens, targets):
        x = params["embedding"][tokens] + params["positions"][: tokens.shape[1]]
        for layer in params["layers"]:
            q, k, v = (jnp.dot(x, layer[name]).reshape(*x.shape[:2], 2, -1) for name in "qkv")
            x = norm(x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)) * layer["scale"]
            x = x + jnp.dot(jax.nn.gelu(jnp.dot(x, layer["up"])), layer["down"])
        logits = jnp.dot(norm(x), params["head"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def layer(seed):
        shapes = {"q": (8, 8), "k": (8, 8), "v": (8, 8), "up": (8, 32), "down": (32, 8)}
        return {name: 0.3 * normal(seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())} | {
            "scale": jnp.ones(8)
        }

    params = {
        "embedding": normal(0, 11, 8),
        "positions": normal(1, 16, 8),
        "layers": [layer(10)],
        "head": normal(2, 8, 11),
    }
    text = jax.random.randint(jax.random.key(3), (6, 13), 0, 11)
    is_padding = jnp.arange(6) >= 4
    grad_fn = clipping.clipped_grad(
        loss, batch_argnums=(1, 2), l2_clip_norm=0.2, rescale_to_unit_norm=True, normalize_by=100, return_values=True
    )
    total, aux = jax.jit(grad_fn)(params, text[:, :-1], text[:, 1:], is_padding_example=is_padding)
    return total, mean_over_real(aux.values, is_padding), grad_fn.sensitivity()


@program("secure_noise_example")
def _(clipping):
    """Sensitivity by default and under each relation, and the attributes noise is calibrated from."""
    grad_fn = clipping.clipped_grad(
        lambda p, x, y: jnp.mean(p * x - y), l2_clip_norm=3, batch_argnums=(1, 2), normalize_by=8
    )
    relations = [dp_accounting.NeighboringRelation[n] for n in ("ADD_OR_REMOVE_ONE", "REPLACE_ONE", "REPLACE_SPECIAL")]
    with pytest.raises(ValueError):
        grad_fn.sensitivity(None)
    return grad_fn.sensitivity(), [grad_fn.sensitivity(r) for r in relations], grad_fn.l2_norm_bound, grad_fn.has_aux


@program("keras_api")
def _(clipping):
    """A stateless loss with much besides the parameters: state, flags, missing weights, predictions as aux."""

    def compute_loss_and_updates(trainable, frozen, metrics, x, y, sample_weight, training, optimizer_variables):
        assert training is True
        assert sample_weight is None
        kernel, bias = trainable
        y_pred = jax.nn.softmax(jnp.tanh(x @ frozen[0]) @ kernel + bias)
        loss = -jnp.mean(jnp.sum(y * jnp.log(y_pred), -1))
        return loss * optimizer_variables[0], (loss, y_pred, [frozen[0], frozen[1] + 1], [metrics[0] + loss])

    grad_fn = clipping.clipped_grad(
        fun=compute_loss_and_updates,
        has_aux=True,
        return_values=True,
        l2_clip_norm=0.5,
        rescale_to_unit_norm=True,
        normalize_by=6,
        batch_argnums=(3, 4, 5),
        microbatch_size=2,
    )
    x, y = normal(0, 6, 4), jax.nn.one_hot(jnp.arange(6) % 3, 3)
    total, aux = grad_fn(
        [normal(1, 7, 3), jnp.zeros(3)],
        [normal(2, 4, 7), jnp.array(0)],
        [jnp.array(0.0)],
        x,
        y,
        None,
        True,
        [jnp.array(2.0)],
        is_padding_example=jnp.zeros(6, jnp.bool_),
    )
    assert aux.aux[1].shape == (6, 3)
    return total, aux.values, aux.aux, grad_fn.l2_norm_bound


@program("dp_sgd_keras_gemma3_lora")
def _(clipping):
    """Low-rank adapters learn beside a frozen kernel that belongs to no batch."""

    def loss(adapters, frozen, tokens, targets):
        x = frozen["embedding"][tokens]
        for kernel, (down, up) in zip(frozen["kernels"], adapters):
            x = jax.nn.relu(x @ kernel + (x @ down) @ up)
        logits = x @ frozen["embedding"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    frozen = {"embedding": normal(0, 9, 6), "kernels": [normal(1, 6, 6), normal(2, 6, 6)]}
    adapters = [(normal(3, 6, 2), 0.1 * normal(4, 2, 6)), (normal(5, 6, 2), 0.1 * normal(6, 2, 6))]
    text = jax.random.randint(jax.random.key(7), (4, 9), 0, 9)
    grad_fn = clipping.clipped_grad(loss, l2_clip_norm=0.001, batch_argnums=(2, 3), return_grad_norms=True)
    total, aux = jax.jit(grad_fn)(adapters, frozen, text[:, :-1], text[:, 1:])
    return total, aux.grad_norms


@program("dp_sgd_flax_linen_mnist")
def _(clipping):
    """A linen network with a convolution; the batch is a dictionary, the logits come back for the accuracy."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.avg_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
            return nn.Dense(10)(x.reshape(x.shape[0], -1))

    network = Network()
    batch = {"image": normal(0, 6, 8, 8, 1), "label": jnp.arange(6)}
    params = network.init(jax.random.key(1), batch["image"])["params"]

    def loss(params, batch):
        logits = network.apply({"params": params}, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), logits

    grad_fn = clipping.clipped_grad(loss, has_aux=True, l2_clip_norm=0.1, rescale_to_unit_norm=True)
    total, aux = jax.jit(grad_fn)(params, batch)
    return total, aux.aux


@program("nnx")
def _(clipping):
    """An nnx network split into graph and parameters; the gradient is an `nnx.State`."""
    network = nnx.Sequential(nnx.Linear(5, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 3, rngs=nnx.Rngs(1)))
    graph, params = nnx.split(network, nnx.Param)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graph, params)(x), y).mean()

    grad_fn = clipping.clipped_grad(loss, l2_clip_norm=0.3, batch_argnums=(1, 2), return_values=True)
    total, aux = jax.jit(grad_fn)(params, normal(2, 7, 5), jnp.arange(7) % 3)
    assert isinstance(total, nnx.State)
    return nnx.to_pure_dict(total), aux.values


@program("training.DPTrainer")
def _(clipping):
    """Built anew inside the compiled step: a preconditioner out of the optimizer's state, dropout, every output."""

    def loss(params, batch, key):
        x = batch["x"] @ params["kernel"]
        x = jnp.where(jax.random.bernoulli(key, 0.7, x.shape), x, 0) + params["bias"]
        return jnp.mean(jnp.square(x - batch["y"])), {"prediction": x}

    optimizer = optax.scale_by_rms()
    params = {"kernel": normal(0, 4, 3), "bias": jnp.ones(3)}

    @jax.jit
    def step(params, state, batch, is_padding, key):
        def precondition(grad):
            return jax.tree.map(lambda g, nu: g / (jnp.sqrt(nu) + 0.1), grad, state.nu)

        grad_fn = clipping.clipped_grad(
            loss,
            has_aux=True,
            return_values=True,
            return_grad_norms=True,
            pre_clipping_transform=precondition,
            prng_argnum=2,
            l2_clip_norm=1,
            microbatch_size=None,
            spmd_axis_name=None,
            keep_batch_dim=True,
            dtype=None,
        )
        total, aux = grad_fn(params, batch, key, is_padding_example=is_padding)
        updates, state = optimizer.update(total, state, params)
        return optax.apply_updates(params, updates), state, aux

    state, batch = optimizer.init(params), {"x": normal(1, 5, 4), "y": normal(2, 5, 3)}
    results = []
    for i in range(2):
        params, state, aux = step(params, state, batch, jnp.zeros(5, jnp.bool_), jax.random.key(i))
        results.append((params, aux.values, aux.grad_norms, aux.aux))
    return results


@program("pre_clipping_transform")
def _(clipping):
    """What is clipped may be another tree than the gradient; the norms told are the gradient's own."""
    grad_fn = clipping.clipped_grad(
        lambda p, x: jnp.sum(jnp.square(x @ p["kernel"] + p["bias"])),
        l2_clip_norm=2.0,
        return_grad_norms=True,
        pre_clipping_transform=lambda grad: (10 * grad["kernel"].T, {"all": grad["bias"].sum()}),
    )
    total, aux = jax.jit(grad_fn)({"kernel": normal(0, 4, 3), "bias": jnp.ones(3)}, normal(1, 5, 4))
    return total, aux.grad_norms


@program("per_user")
def _(clipping):
    """One gradient for all examples of a user."""

    def loss(params, x, y):
        assert x.shape == (3, 4)
        prediction = jnp.tanh(x @ params)
        return jnp.mean(jnp.square(prediction - y)), prediction[None]

    grad_fn = clipping.clipped_grad(
        loss, has_aux=True, l2_clip_norm=0.2, batch_argnums=(1, 2), keep_batch_dim=False, microbatch_size=2
    )
    total, aux = jax.jit(grad_fn)(normal(0, 4), normal(1, 6, 3, 4), normal(2, 6, 3))
    return total, aux.aux


@program("prng_argnum")
def _(clipping):
    """Named keys, one set for each example, whatever the microbatch; parameters are Python floats."""

    def loss(params, x, keys):
        return jnp.mean(params["w"] * x + params["b"] * jax.random.normal(keys["noise"], x.shape))

    def gradient(microbatch_size):
        grad_fn = clipping.clipped_grad(loss, l2_clip_norm=50.0, prng_argnum=2, microbatch_size=microbatch_size)
        return jax.jit(grad_fn)({"w": 2.5, "b": 1.0}, jnp.array([10.0, 20.0, 30.0, 40.0]), {"noise": jax.random.key(0)})

    return gradient(None), gradient(2)


@program("sharp_edges_mixed_precision", rtol=1e-2)
def _(clipping):
    """Parameters in bfloat16, the sum in float32."""

    def loss(params, x):
        return jnp.mean(jnp.square(jnp.tanh(x @ params["up"]) @ params["down"]).astype(jnp.float32))

    params = {"up": normal(0, 6, 16).astype(jnp.bfloat16), "down": normal(1, 16, 4).astype(jnp.bfloat16)}
    x = normal(2, 8, 6).astype(jnp.bfloat16)
    return [
        jax.jit(clipping.clipped_grad(loss, l2_clip_norm=0.05, dtype=dtype))(params, x) for dtype in (jnp.float32, None)
    ]


@program("NonPrivateConfig")
def _(clipping):
    """No bound: the gradient of the mean. Data are integers, the parameter a Python float."""
    grad_fn = clipping.clipped_grad(
        lambda p, x: jnp.mean(jnp.square(p - x)) / 2,
        l2_clip_norm=float("inf"),
        normalize_by=4.0,
        return_values=True,
        return_grad_norms=True,
    )
    total, aux = grad_fn(3.0, jnp.array([0, 7, -2, 3]))
    np.testing.assert_allclose(total, 1.0, rtol=1e-6)
    return total, aux.values, aux.grad_norms


@program("argnums")
def _(clipping):
    """Two arguments are learned, the batch stands before them; a keyword argument has one row for each example."""

    def loss(x, kernel, bias, *, weight):
        return jnp.mean(weight * jnp.square(x @ kernel + bias["b"]))

    grad_fn = clipping.clipped_grad(loss, (1, 2), l2_clip_norm=0.5, batch_argnums=0)
    return grad_fn(normal(0, 5, 3), normal(1, 3, 2), {"b": jnp.zeros(2)}, weight=jnp.arange(5.0))


@program("clipped_fun")
def _(clipping):
    """Any per-example value: a bounded mean, with and without what comes beside it."""
    rows = jnp.arange(12.0).reshape(6, 2)

    def both(row):
        return {"row": row, "square": jnp.square(row)}, row.sum()

    def squares(row):
        return both(row)[0]

    plain = clipping.clipped_fun(jnp.mean, l2_clip_norm=1.0)
    options = dict(l2_clip_norm=3.0, normalize_by=2.0, microbatch_size=3)
    # Its docs say (value, norms); 2.0.0 hands out (value, ((), norms)).
    value, norms = clipping.clipped_fun(squares, return_norms=True, keep_batch_dim=False, **options)(rows)
    return (
        (value, jax.tree.leaves(norms)),
        plain(jnp.arange(6)),
        plain(jnp.arange(6), is_padding_example=jnp.arange(6) > 2),
        clipping.clipped_fun(both, has_aux=True, keep_batch_dim=False, **options)(rows),
        clipping.clipped_fun(both, has_aux=True, return_norms=True, **options)(rows),
        clipping.clipped_fun(both, True, **options).sensitivity(),
    )


@program("sharp_edges_dp_training_pitfalls")
def _(clipping):
    """An example whose loss is not finite adds nothing and hides nothing: the others are as without it."""
    x = normal(0, 5, 3).at[2].set(jnp.inf)
    grad_fn = clipping.clipped_grad(lambda p, x: jnp.mean(jnp.square(p - x)), l2_clip_norm=0.5)
    return grad_fn(jnp.ones(3), x)
