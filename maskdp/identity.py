"""Which dataset this is: a random id that may be released, and a secret key under which contents are compared locally.

An unkeyed hash of a dataset must not leave the lab. Someone who knows two neighbouring datasets would hash both and
read off which one was used, whatever the ε. The id says nothing of the contents; `Identity.tag` is an HMAC under a key
that stays beside the data.
"""

import dataclasses
import hashlib
import hmac
import json
import pathlib
import secrets

from maskdp import secret_file
from maskdp.errors import UserError

SECRET = "dataset.secret"
"""Name of the file, beside the shards."""

_FORMAT = "maskdp dataset secret 1"
_KEY_BYTES = 32


@dataclasses.dataclass(frozen=True)
class Identity:
    """Id and key of one dataset.

    Guarantees:
        `id` is 128 random bits, drawn anew when the contents change, and no function of them. Tags are HMAC-SHA256
        under a key of 256 random bits: without the key they are indistinguishable from random. The key shows in no
        repr.

    Attributes:
        id: 32 hex digits; recorded in the dataset and in whatever is released of runs on it.
        contents: tag of the contents the id stands for; empty before the first write.
        written: id in the shards of a copy that came without its secret; such a copy has an id of its own, since its
            ledger begins with it.
    """

    path: pathlib.Path
    id: str
    contents: str
    key: bytes = dataclasses.field(repr=False)
    written: str = ""

    @classmethod
    def at(cls, folder: pathlib.Path, written: str = "", key: bytes | None = None) -> "Identity":
        """The identity in `folder`; where there is none, a new one.

        Args:
            folder: where `dataset.secret` lies.
            written: id in the shards, where there are any.
            key: key of a new identity; by default 256 bits from the operating system.

        Raises:
            UserError: the file cannot be written, is readable by others, or is no dataset secret.
        """
        path = folder / SECRET
        if not path.exists():
            new = cls(path, _new_id(), "", key or secrets.token_bytes(_KEY_BYTES), written)
            try:
                secret_file.create(path, new._bytes())
            except FileExistsError:
                pass  # another process was first
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}, expected a place for the dataset's secret") from None
        found = _parsed(path, secret_file.read(path, "the secret of a dataset"))
        if found is None:
            raise UserError(f"{path}: expected a {_FORMAT!r} file")
        return found

    def tag(self, kind: str, data: bytes) -> str:
        """HMAC-SHA256 of `data`, 64 hex digits; tags of different kinds are unrelated."""
        return hmac.digest(self.key, len(kind).to_bytes(4, "little") + kind.encode() + data, "sha256").hex()

    def of_contents(self, digest: bytes) -> "Identity":
        """The identity for a dataset whose contents hash to `digest`: this one, or with a new id if they changed.

        The change is on disk before it returns.
        """
        tag = self.tag("contents", digest)
        if tag == self.contents:
            return self
        renewed = dataclasses.replace(self, id=_new_id() if self.contents else self.id, contents=tag, written="")
        secret_file.replace(self.path, renewed._bytes())
        return renewed

    def _bytes(self) -> bytes:
        fields = {"format": _FORMAT, "id": self.id, "contents": self.contents, "key": self.key.hex()}
        fields |= {"written": self.written} if self.written else {}
        return (json.dumps(fields, indent=2) + "\n").encode()


def _parsed(path: pathlib.Path, data: bytes) -> Identity | None:
    """The identity in a file, or None; it returns rather than raises, so that no traceback holds what was read."""
    try:
        fields = json.loads(data)
        key = bytes.fromhex(fields["key"])
        if fields["format"] == _FORMAT and len(key) == _KEY_BYTES and len(bytes.fromhex(fields["id"])) == 16:
            return Identity(path, fields["id"], str(fields["contents"]), key, str(fields.get("written", "")))
    except (ValueError, KeyError, TypeError):
        pass
    return None


def _new_id() -> str:
    return secrets.token_hex(16)


def of_files(paths: list[pathlib.Path]) -> bytes:
    """SHA-256 over the names and contents of files. Unkeyed: feed it to `Identity.tag`, never release it."""
    total = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        with open(path, "rb") as opened:
            total.update(path.name.encode() + b"\0" + hashlib.file_digest(opened, "sha256").digest())
    return total.digest()
