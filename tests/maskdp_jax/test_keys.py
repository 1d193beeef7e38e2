import copy
import hashlib
import hmac
import json
import os
import pickle
import traceback

import numpy as np
import pytest

from maskdp.errors import UserError
from maskdp_jax import keys
from maskdp_jax.keys import RunSecret

RUN = dict(run_id="run", config_hash="config", data_fingerprint="data")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "secret.json"


def bits(key: np.ndarray) -> bytes:
    assert key.shape == (8,)
    return key.tobytes()


def test_survives_the_disk_with_the_same_keys(path):
    created, loaded = RunSecret.create(path, **RUN), RunSecret.load(path, **RUN)
    assert created.fingerprint() == loaded.fingerprint()
    assert bits(created.key("noise", 3)) == bits(loaded.key("noise", 3))
    assert np.array_equal(created.generator("x", 1).random(9), loaded.generator("x", 1).random(9))


def test_file_is_private_whole_and_never_replaced(path):
    previous = os.umask(0)
    try:
        RunSecret.create(path, **RUN)
    finally:
        os.umask(previous)
    assert os.stat(path).st_mode & 0o7777 == 0o600
    before = path.read_bytes()
    with pytest.raises(UserError, match="already"):
        RunSecret.create(path, **RUN)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("other", [dict(run_id="run2"), dict(config_hash="c"), dict(data_fingerprint="d")])
def test_refused_anywhere_else(path, other):
    RunSecret.create(path, **RUN)
    with pytest.raises(UserError, match="another run, config or dataset") as refusal:
        RunSecret.load(path, **RUN | other)
    assert "\n" not in str(refusal.value)


def test_keys_differ_elsewhere_even_if_the_refusal_were_passed():
    here, there = (RunSecret(bytes(32), run, "config", "data") for run in ("a", "b"))
    assert bits(here.key("noise", 0)) != bits(there.key("noise", 0))
    assert here.fingerprint() != there.fingerprint()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_refused_when_others_can_read_it(path, mode):
    RunSecret.create(path, **RUN)
    os.chmod(path, mode)
    with pytest.raises(UserError, match="0600"):
        RunSecret.load(path, **RUN)


def test_refused_when_missing_linked_or_broken(path):
    with pytest.raises(UserError, match="secret of run run"):
        RunSecret.load(path, **RUN)
    RunSecret.create(path, **RUN)
    link = path.parent / "link"
    link.symlink_to(path)
    with pytest.raises(UserError):
        RunSecret.load(link, **RUN)
    whole = json.loads(path.read_text())
    for broken in ("", "[]", "{}", json.dumps(whole | {"secret": "00"}), json.dumps(whole | {"format": "x"})):
        path.write_text(broken)
        with pytest.raises(UserError) as refusal:
            RunSecret.load(path, **RUN)
        assert whole["secret"] not in str(refusal.value)


def test_shows_nowhere(path, monkeypatch):
    created = RunSecret.create(path, **RUN)
    secret = json.loads(path.read_text())["secret"]
    raw = bytes.fromhex(secret)
    for seen in (repr(created), str(created), f"{created!r}", created.fingerprint()):
        assert secret not in seen
        assert repr(raw) not in seen
    for escape in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not pickled"):
            escape(created)

    def fail(*_):
        raise OSError("disk full")

    def traceback_of(action) -> str:
        try:
            action()
        except (OSError, UserError) as error:
            return "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
        raise AssertionError("expected a failure")

    monkeypatch.setattr(keys.secrets, "token_bytes", lambda _: raw)
    monkeypatch.setattr(keys.os, "fsync", fail)
    for shown in (
        traceback_of(lambda: RunSecret.create(path.parent / "second", **RUN)),
        traceback_of(lambda: RunSecret.load(path, **RUN | dict(run_id="other"))),
    ):
        assert "created" in shown or "loaded" in shown
        assert secret not in shown
        assert repr(raw)[2:-1] not in shown
    assert os.listdir(path.parent) == [path.name]


def test_every_purpose_step_and_kind_has_its_own_key():
    secret = RunSecret(bytes(range(32)), **RUN)
    steps = (0, 1, 2**32, 2**32 + 1, 2**40 + 1)  # an integer seed would fold these together
    streams = {bits(secret.key(purpose, step)) for purpose in ("noise", "noise1", "") for step in steps}
    assert len(streams) == 3 * len(steps)
    assert bits(secret.noise_key(1)) == bits(secret.key("noise", 1))
    assert bits(secret.key("noise", 1)) != bits(secret.key("noise1", 0))
    draws = {tuple(secret.generator(purpose, step).integers(2**63, size=2)) for purpose in "ab" for step in steps}
    assert len(draws) == 2 * len(steps)
    assert RunSecret(bytes(32), "ab", "c", "d").fingerprint() != RunSecret(bytes(32), "a", "bc", "d").fingerprint()


def test_keys_are_hkdf():
    """Against RFC 5869 written out with the standard library."""

    def digest(*parts: str) -> bytes:
        return hashlib.sha256(b"".join(len(p).to_bytes(8, "little") + p.encode() for p in parts)).digest()

    info = digest("run", "config", "data") + digest("chacha20", "noise", "5")
    first = hmac.new(bytes(range(32)), info + b"\x01", hashlib.sha256).digest()
    secret = RunSecret(bytes(range(32)), **RUN)
    assert bits(secret.noise_key(5)) == first
