import hashlib
import socket

import numpy as np
import pytest

from maskdp import layers
from maskdp_jax.audit import exports
from maskdp_jax.export import export


@pytest.fixture
def released(trained_run, tmp_path):
    return export(trained_run, tmp_path / "export")


def test_secrets_hashes_and_paths_are_found(released, trained_run, dataset):
    data = layers.Dataset(dataset)
    needles = exports.secrets_of(trained_run, data)
    shard = next(file for file in data.path.iterdir() if "array_record" in file.name)
    digest = hashlib.sha256(shard.read_bytes())
    for content in (digest.hexdigest().encode(), digest.digest(), needles["the run's secret"][2], str(shard).encode()):
        (released / "more.bin").write_bytes(b"\0" * 7 + content + b"\0")
        found = exports.scan(released, needles)
        assert not found.holds
        assert "more.bin" in found.found
    array = np.frombuffer(digest.digest(), np.float32)
    assert not exports.scan(released / "weights" / "d", needles, [array]).holds


def test_names_of_this_machine_are_looked_for(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "lab-seven")
    assert b"lab-seven" in exports.secrets_of(None, None)["a user or host name"]


def test_entries_of_a_checkpoint_are_read(released):
    """Names and values in the key-value store are compressed on disk; the scan sees them as they were written."""
    names = dict(exports.contents(released))
    assert any("theta" in name for name in names)


def test_differing_exports_are_named(released, trained_run, tmp_path):
    again = export(trained_run, tmp_path / "again")
    (again / "model.json").write_text("{}")
    (again / "extra").write_text("")
    assert {"model.json", "extra"} <= set(exports.differences(released, again))
    assert exports.differences(released, released) == []
