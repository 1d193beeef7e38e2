import json
import os
import pathlib
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest

from maskdp import config as config_files
from maskdp.errors import UserError
from maskdp_jax import checkpoint, train
from maskdp_jax.config import TrainConfig

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(words: list[str]) -> pathlib.Path:
    return train.train(config_files.parse(TrainConfig, words, "train"))


@pytest.fixture
def finished(trained_run):
    """A finished run, and the words of its command."""
    return trained_run, ["--config_path", str(trained_run / "config.yaml")]


def test_run_folder_holds_what_it_should(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("config.yaml", "run.json", "run.secret", "checkpoints"),
        *("metrics.jsonl", "privacy_card.json", "result.json"),
    }
    assert stat.S_IMODE((folder / "run.secret").stat().st_mode) == 0o600
    result = json.loads((folder / "result.json").read_text())
    assert result["classes"] == 4
    assert 0 <= result["accuracy"]["composite"] <= 1
    note, *lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert "without noise" in note["note"]
    assert [line["step"] for line in lines if "public_loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "accuracy_composite" in line] == [2, 4]


def test_secret_is_nowhere_else(finished):
    folder, _ = finished
    secret = json.loads((folder / "run.secret").read_text())["secret"]
    for file in folder.rglob("*"):
        if file.is_file() and file.name != "run.secret":
            data = file.read_bytes()
            assert secret.encode() not in data
            assert bytes.fromhex(secret) not in data


def test_written_config_is_the_run_again(toy, dataset, finished):
    folder, _ = finished
    words = toy.arguments(dataset, folder, every__evaluate=2, every__log=1)
    assert checkpoint.read_config(folder) == config_files.parse(TrainConfig, words, "train")


def test_finished_run_is_left_alone(finished):
    folder, words = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert run(words) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_other_config_or_data_is_refused(finished, toy, tmp_path):
    _, words = finished
    with pytest.raises(UserError, match="other config"):
        run([*words, "--optim.momentum", "0.5"])
    other = toy.write(tmp_path / "data", {"train": 20, "test": 4}, seed=1)
    with pytest.raises(UserError, match=r"other (config|data)"):
        run([*words, "--data.path", str(other)])


def test_lost_secret_is_refused(toy, dataset, tmp_path):
    words = toy.arguments(dataset, tmp_path / "run", "public_only", optim__steps=1)
    folder = run(words)
    (folder / "result.json").unlink()
    (folder / "run.secret").unlink()
    with pytest.raises(UserError, match="expected the secret"):
        run(words)


def test_scene_context_is_refused_for_masked_objectives(toy, tmp_path):
    data = toy.write(tmp_path / "data", {"train": 4, "test": 2}, context="scene")
    with pytest.raises(UserError, match="in view of the scene"):
        run(toy.arguments(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_trunk_of_a_public_run_is_taken_but_never_one_of_these_data(finished, toy, dataset, tmp_path):
    folder, _ = finished
    with pytest.raises(UserError, match="private maskdp run"):
        run(toy.arguments(dataset, tmp_path / "a", init=folder))
    public = toy.write(tmp_path / "public", {"train": 8, "test": 2}, seed=3)
    first = run(toy.arguments(public, tmp_path / "pre", "sgd", optim__steps=2, data__eval_split=""))
    with pytest.raises(UserError, match="this very dataset"):
        run(toy.arguments(public, tmp_path / "b", "maskdp", init=first))
    second = run(toy.arguments(dataset, tmp_path / "c", "public_only", init=first, trainable="[head]", optim__steps=1))
    before, after = checkpoint.load(first).params, checkpoint.load(second).params
    for name in before:
        assert name.startswith("head.") or np.array_equal(before[name], after[name])
    (behind,) = json.loads((second / "privacy_card.json").read_text())["start_weights"]["runs"]
    assert behind["objective"] == "sgd"
    with pytest.raises(UserError, match="this very dataset"):
        run(toy.arguments(public, tmp_path / "d", "maskdp", init=second))  # its own data, two runs back


def test_kill_minus_nine_changes_nothing(toy, dataset, tmp_path):
    """A run that is killed and started again ends in the very weights of one that was not (rule 6)."""
    changes = {"optim__steps": 60, "every__checkpoint": 10, "data__eval_split": "", "model__depth": 1}
    whole = run(toy.arguments(dataset, tmp_path / "whole", **changes))
    words = toy.arguments(dataset, tmp_path / "cut", **changes)
    # the same secret and id, so that the two runs draw alike
    (tmp_path / "cut").mkdir()
    for name in ("run.secret", "run.json", "config.yaml"):
        (tmp_path / "cut" / name).write_bytes((whole / name).read_bytes())
    os.chmod(tmp_path / "cut" / "run.secret", 0o600)

    command = [sys.executable, "-m", "maskdp", "train", *words]
    checkpoints = tmp_path / "cut" / "checkpoints"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not any(path.name.isdigit() for path in checkpoints.glob("*")):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    cut = tmp_path / "cut"
    assert not (cut / "result.json").exists(), "the run ended before it could be killed"
    assert run(words) == cut
    one, other = checkpoint.load(whole).weights, checkpoint.load(cut).weights
    for name in one.theta:
        np.testing.assert_array_equal(one.theta[name], other.theta[name])
    np.testing.assert_array_equal(one.head["kernel"], other.head["kernel"])
    steps = [json.loads(line).get("step") for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert steps[1:] == [*range(1, 61), 60]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nope", "1"], "--nope"),
        (["--objective.type", "magic"], "magic"),
        (["--trainable", "[nothing_like_it]"], "matches no parameter"),
        (["--data.split", "valid"], "no split 'valid'"),
        (["--privacy.adjacency", "remove"], "remove"),
        (["--model.tubelet", "[2,5,5]"], "does not divide"),
    ],
)
def test_mistakes_are_one_line(toy, dataset, tmp_path, words, message, capsys):
    from maskdp import cli

    assert cli.main(["train", *toy.arguments(dataset, tmp_path / "run"), *words]) == 2
    line = capsys.readouterr().err.strip()
    assert message in line
    assert "\n" not in line
