"""ChaCha20 on the device: random words of a 256-bit key (RFC 8439)."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

_CONSTANTS = np.frombuffer(b"expand 32-byte k", np.uint32)
_QUARTERS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
_DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))


def words(
    key: UInt32[Array, "8"], count: int, nonce: tuple[int, int, int] = (0, 0, 0), first_block: int = 0
) -> UInt32[Array, " count"]:
    """`count` words of the key stream from block `first_block` on, 16 words a block, as RFC 8439 orders them.

    Guarantees:
        The same words on every device and under any sharding: additions, exclusive ors and rotations of uint32 alone.
        Two calls share words only if key, nonce and blocks coincide.

    Raises:
        ValueError: the stream of one nonce, 2³² blocks, is too short.
    """
    if not 0 <= 16 * first_block + count <= 2**36:
        raise ValueError(f"{count} words from block {first_block}: a stream ends after 2^36 words")
    blocks = -(-count // 16)
    counter = jnp.arange(blocks, dtype=jnp.uint32) + np.uint32(first_block)
    fixed = [*map(jnp.uint32, _CONSTANTS), *(key[i] for i in range(8))]
    start = [jnp.broadcast_to(word, blocks) for word in fixed] + [counter]
    start += [jnp.full(blocks, word, jnp.uint32) for word in nonce]
    start = [word | (key[0] & 0) for word in start]  # in `shard_map` all vary over the devices that the key varies over
    state = jax.lax.fori_loop(0, 10, _double_round, start)
    return jnp.stack([a + b for a, b in zip(state, start)], axis=-1).reshape(-1)[:count]


def _double_round(_, state: list[Array]) -> list[Array]:
    state = list(state)
    for a, b, c, d in (*_QUARTERS, *_DIAGONALS):
        for one, other, third, distance in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            state[one] = state[one] + state[other]
            mixed = state[third] ^ state[one]
            state[third] = (mixed << distance) | (mixed >> (32 - distance))
    return state
