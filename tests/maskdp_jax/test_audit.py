import dataclasses
import json
import shutil

import numpy as np
import pytest

from maskdp import cli, layers
from maskdp_jax import audit, checkpoint
from maskdp_jax.mechanism import Mechanism


def failed(findings) -> list[str]:
    return [finding.check for finding in findings if not finding.holds]


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


def test_sound_run_passes(trained_run):
    assert failed(audit.audit_run(trained_run, trials=20)) == []


def test_faked_epsilon_is_found(copy):
    card = json.loads((copy / "privacy_card.json").read_text())
    (copy / "privacy_card.json").write_text(json.dumps(card | {"epsilon": card["epsilon"] / 2}))
    assert failed(audit.audit_run(copy, trials=2)) == ["ε follows from the mechanism"]


def test_leaked_secret_is_found(copy):
    (copy / "notes.txt").write_text("key: " + json.loads((copy / "run.secret").read_text())["secret"])
    (copy / "run.secret").chmod(0o644)
    assert failed(audit.audit_run(copy, trials=2)) == [
        "secret readable by its owner alone",
        "secret in no other file of the run",
    ]


def test_game_finds_missing_noise(trained_run, monkeypatch):
    """A step that adds a tenth of the noise it is accounted for loses the game."""
    trained, config = checkpoint.load(trained_run), checkpoint.read_config(trained_run)
    mechanism = Mechanism(num_units=20, batch_size=8, steps=4, noise_multiplier=4.0, l2_clip_norm=0.1)
    honest = audit.game(trained, config, mechanism, trials=60)
    assert honest.holds
    monkeypatch.setattr(Mechanism, "noise_stddev", property(lambda m: 0.1 * m.noise_multiplier * m.l2_clip_norm))
    assert not audit.game(trained, config, mechanism, trials=60).holds
