"""The secret of a run, and every random key derived from it.

No key in the project comes from an integer seed: `jax.random.key(2**40 + 1)` equals `jax.random.key(1)`, and a seed in
a config is public. Two runs with one key and different noise would reveal the gradient as the difference of two
releases, so a secret serves one run, one resolved config and one dataset.
"""

import hashlib
import hmac
import json
import os
import pathlib
import secrets
import tempfile

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from maskdp import secret_file
from maskdp.errors import UserError

_BYTES = 32
_FORMAT = "maskdp run secret 1"


class RunSecret:
    """256 bits from the operating system, bound to one run.

    Guarantees:
        Keys are HKDF-SHA256(secret, binding ‖ kind ‖ purpose ‖ step): knowing some tells nothing about others, and the
        same file bound to another run would yield unrelated keys. The file has mode 0600, is written whole or not at
        all and never replaces another; the secret shows in no repr, error or pickle.

    Noise comes from ChaCha20 under 256-bit keys (`chacha.words`), batches from Philox under 128-bit keys. `jax.random`
    is not used: a `threefry2x32` key has 64 bits, and the exclusive or of two such streams falls to a
    meet-in-the-middle search of about 2⁶⁴ steps, not 2¹²⁸.
    """

    __slots__ = ("_binding", "_secret", "run_id")

    def __init__(self, secret: bytes, run_id: str, config_hash: str, data_fingerprint: str):
        if len(secret) != _BYTES:
            raise ValueError(f"a run secret has {_BYTES} bytes")
        self.run_id = run_id
        self._binding = _digest(run_id, config_hash, data_fingerprint)
        self._secret = secret

    @classmethod
    def create(cls, path: os.PathLike | str, run_id: str, config_hash: str, data_fingerprint: str) -> "RunSecret":
        """Draws a secret and writes it to `path`, mode 0600.

        Raises:
            UserError: `path` exists; a secret is never overwritten.
        """
        path = pathlib.Path(path)
        created = cls(secrets.token_bytes(_BYTES), run_id, config_hash, data_fingerprint)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600 from the start
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump({"format": _FORMAT, "binding": created._binding.hex(), "secret": created._secret.hex()}, file)
                file.flush()
                os.fsync(file.fileno())
            os.link(aside, path)
        except FileExistsError:
            raise UserError(f"{path}: a run secret is here already, expected a new place") from None
        finally:
            os.unlink(aside)
        return created

    @classmethod
    def load(cls, path: os.PathLike | str, run_id: str, config_hash: str, data_fingerprint: str) -> "RunSecret":
        """Reads the secret at `path` for the run it was made for.

        Raises:
            UserError: it is missing, readable by others, not a run secret, or bound to another run, config or dataset.
        """
        # no local holds the bytes, so that no traceback does
        loaded, binding = cls._read(
            secret_file.read(path, f"the secret of run {run_id}"), run_id, config_hash, data_fingerprint
        )
        if loaded is None:
            raise UserError(f"{path}: expected a {_FORMAT!r} file")
        if not hmac.compare_digest(binding, loaded._binding):
            raise UserError(f"{path}: made for another run, config or dataset than {run_id}; its keys are refused here")
        return loaded

    @classmethod
    def _read(cls, data: bytes, *bound_to: str) -> "tuple[RunSecret, bytes] | tuple[None, None]":
        """Secret and binding in a file's bytes; it returns rather than raises, so no traceback holds what was read."""
        try:
            entry = json.loads(data)
            if entry["format"] == _FORMAT:
                return cls(bytes.fromhex(entry["secret"]), *bound_to), bytes.fromhex(entry["binding"])
        except (ValueError, KeyError, TypeError):
            pass
        return None, None

    def key(self, purpose: str, step: int) -> np.ndarray:
        """(8,) uint32: the 256-bit key of `chacha.words` for one purpose and step."""
        return np.frombuffer(self._expand("chacha20", purpose, step, 32), np.uint32)

    def noise_key(self, step: int) -> np.ndarray:
        """(8,) uint32: the key from which `step` draws its noise."""
        return self.key("noise", step)

    def generator(self, purpose: str, step: int) -> np.random.Generator:
        """A numpy generator (Philox, 128-bit key) for one purpose and step."""
        return np.random.Generator(
            np.random.Philox(key=int.from_bytes(self._expand("numpy", purpose, step, 16), "little"))
        )

    def fingerprint(self) -> str:
        """A keyed hash, hex, by which a checkpoint recognises the secret without holding it."""
        return self._expand("fingerprint", "", 0, 32).hex()

    def _expand(self, kind: str, purpose: str, step: int, length: int) -> bytes:
        info = self._binding + _digest(kind, purpose, str(int(step)))
        return HKDFExpand(hashes.SHA256(), length, info).derive(self._secret)

    def __repr__(self) -> str:
        return f"RunSecret(run_id={self.run_id!r})"

    def __reduce__(self):
        raise TypeError("a run secret is not pickled or copied")


def _digest(*parts: str) -> bytes:
    """SHA-256 of the parts, each preceded by its length so that no two lists read alike."""
    state = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        state.update(len(encoded).to_bytes(8, "little") + encoded)
    return state.digest()
