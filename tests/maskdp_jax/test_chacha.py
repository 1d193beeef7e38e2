"""The key stream is that of RFC 8439 and of `cryptography`."""

import jax
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from maskdp_jax import chacha

stream = jax.jit(chacha.words, static_argnums=(1, 2, 3))


def test_block_of_the_rfc():
    """RFC 8439, section 2.3.2."""
    key = np.arange(32, dtype=np.uint8).view(np.uint32)
    block = (
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )
    assert np.asarray(stream(key, 16, (0x09000000, 0x4A000000, 0), 1)).tobytes().hex() == block


@pytest.mark.parametrize(
    ("count", "nonce", "first"), [(5, (0, 0, 0), 0), (1000, (1, 2, 3), 0), (33, (0, 0, 9), 2**32 - 3)]
)
def test_stream_of_an_independent_implementation(count, nonce, first):
    key = np.random.default_rng(count).bytes(32)
    start = np.array([first, *nonce], np.uint32).tobytes()
    expected = Cipher(algorithms.ChaCha20(key, start), None).encryptor().update(bytes(4 * count))
    assert np.asarray(stream(np.frombuffer(key, np.uint32), count, nonce, first)).tobytes() == expected


def test_stream_does_not_wrap():
    with pytest.raises(ValueError, match="ends after"):
        chacha.words(np.zeros(8, np.uint32), 17, first_block=2**32 - 1)
