import dataclasses
import json
import shutil

import numpy as np
import pytest

from maskdp import cli, layers
from maskdp_jax import audit
from maskdp_jax.audit import findings


@pytest.fixture
def copy(trained_run, tmp_path):
    return shutil.copytree(trained_run, tmp_path / "run")


def test_sound_dataset_passes(dataset, capsys):
    assert cli.main(["audit", str(dataset)]) == 0
    assert "FAILS" not in capsys.readouterr().out


def test_path_and_scene_are_found(tmp_path, toy):
    clip = toy.clip(0, np.random.default_rng(0))
    bad = dataclasses.replace(clip, video_id="/home/ann/video.mp4")
    layers.write_dataset(tmp_path, {"train": [bad]}, toy.LABELS, private_format="png", context="scene")
    assert failed(audit.audit_dataset(tmp_path)) == ["no path in keys and source", "avatars independent of the scene"]


def failed(found) -> list[str]:
    return findings.failed(finding for finding in found if isinstance(finding, findings.Finding))


def test_sound_run_passes(copy, capsys):
    """It says so, and leaves what the report shows."""
    assert cli.main(["audit", str(copy)]) == 0
    assert "FAILS" not in capsys.readouterr().out
    left = json.loads((copy / audit.REPORT).read_text())
    assert all(finding["holds"] for finding in left["findings"])
    assert {attack["name"] for attack in left["attacks"]} >= {"sum of projections"}


def test_faked_epsilon_is_found(copy):
    card = json.loads((copy / "privacy_card.json").read_text())
    (copy / "privacy_card.json").write_text(json.dumps(card | {"epsilon": card["epsilon"] / 2}))
    assert "ε follows from the mechanism" in failed(audit.audit_run(copy, rehearsals=0))


def test_leaked_secret_is_found(copy):
    (copy / "notes.txt").write_text("key: " + json.loads((copy / "run.secret").read_text())["secret"])
    (copy / "run.secret").chmod(0o644)
    assert failed(audit.audit_run(copy, rehearsals=0))[:2] == [
        "secret readable by its owner alone",
        "secret in no other file of the run",
    ]
