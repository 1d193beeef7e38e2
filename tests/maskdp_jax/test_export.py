import json

import numpy as np
import pytest

from maskdp.errors import UserError
from maskdp_jax import checkpoint, export


def test_export_says_what_the_run_says(trained_run, dataset, tmp_path):
    out = export.export(trained_run, tmp_path / "model")
    run, exported = checkpoint.load(trained_run), checkpoint.load(out)
    assert exported.labels == run.labels
    for name, value in run.params.items():
        np.testing.assert_array_equal(exported.params[name], value)
    np.testing.assert_array_equal(exported.weights.head["kernel"], run.weights.head["kernel"])


def test_export_holds_no_secret_and_no_path(trained_run, tmp_path):
    out = export.export(trained_run, tmp_path / "model")
    secret = json.loads((trained_run / "run.secret").read_text())["secret"]
    run_id = json.loads((trained_run / "run.json").read_text())["run_id"]
    needles = [secret.encode(), bytes.fromhex(secret), run_id.encode(), str(trained_run.parent).encode()]
    files = [file for file in out.rglob("*") if file.is_file()]
    assert {file.name for file in out.iterdir()} == {"weights", "config.yaml", "privacy_card.json", "model.json"}
    for file in files:
        data = file.read_bytes()
        assert not any(needle in data for needle in needles), file
        assert b"optimizer" not in data or file.name == "config.yaml"


def test_export_never_overwrites(trained_run, tmp_path):
    with pytest.raises(UserError, match="exists"):
        export.export(trained_run, tmp_path)
    with pytest.raises(UserError, match="not a run"):
        export.export(tmp_path, tmp_path / "model")
