import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import time
import uuid

import cv2
import jax
import numpy as np
import pytest

from maskdp import config as config_files
from maskdp import layers, report
from maskdp.errors import UserError
from maskdp.report import runs as run_folders
from maskdp_jax import checkpoint, environment, export, keys, ledger, run_folder, train
from maskdp_jax.config import TrainConfig
from maskdp_jax.mechanism import Mechanism, compose

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
        *("config.yaml", "run.json", "run.secret", "lineage.json", "checkpoints"),
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
    assert run_folder.read_config(folder) == config_files.parse(TrainConfig, words, "train")


def test_finished_run_is_left_alone(finished):
    folder, words = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert run(words) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_other_config_or_data_is_refused_by_name(finished, toy, tmp_path):
    _, words = finished
    with pytest.raises(UserError, match=r"run with optim.momentum 0.9, not 0.5"):
        run([*words, "--optim.momentum", "0.5"])
    other = toy.write(tmp_path / "data", {"train": 20, "test": 4}, seed=1)
    with pytest.raises(UserError, match="run with dataset"):
        run([*words, "--data.path", str(other)])


@pytest.fixture
def unfinished(finished, dataset, tmp_path):
    """A run that was cut off after its second step, on a copy of the dataset; its folder, dataset and command."""
    data, folder = tmp_path / "data", tmp_path / "run"
    shutil.copytree(dataset, data)
    shutil.copytree(finished[0], folder)
    for name in ("result.json", "privacy_card.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoints" / "4")
    return folder, data, ["--config_path", str(folder / "config.yaml"), "--out", str(folder), "--data.path", str(data)]


def test_a_moved_run_on_a_moved_dataset_goes_on(unfinished, finished):
    folder, _, words = unfinished
    assert run(words) == folder
    one, other = (checkpoint.load(path).weights.head["kernel"] for path in (folder, finished[0]))
    np.testing.assert_array_equal(one, other)


def test_noise_is_never_calibrated_again(unfinished, monkeypatch):
    folder, _, _ = unfinished
    config = run_folder.read_config(folder)
    objective = dataclasses.replace(config.objective, noise_multiplier=None, epsilon=2.0)
    about = json.loads((folder / "run.json").read_text())
    about["mechanism"]["noise_multiplier"] = 0.7310585
    plan = Mechanism(**about["mechanism"] | {"noise_multiplier": 0.0})
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "config.yaml").write_text(config_files.dump(dataclasses.replace(config, objective=objective)))
    monkeypatch.setattr(run_folder.RunSecret, "load", lambda *_: None)
    config = run_folder.read_config(folder)
    opened = run_folder.open_again(folder, config, plan, about["contents"], about["environment"])
    assert opened.mechanism.noise_multiplier == 0.7310585


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (("environment", "jaxlib"), "run with jaxlib 'other'"),
        (("environment", "code"), "run with code 'other'"),
        (("environment", "XLA_FLAGS"), "run with XLA_FLAGS 'other'"),
        (("environment", "devices"), "run with devices 'other'"),
        (("mechanism", "steps"), "run with mechanism.steps 5, not 4"),
        (("mechanism", "noise_multiplier"), "run with mechanism.noise_multiplier 5"),
        (("mechanism", "unit"), "run with mechanism.unit 'scene', not 'video'"),
        (("contents",), "other data"),
    ],
)
def test_what_would_change_a_replayed_step_is_refused_by_name(unfinished, field, message):
    folder, _, words = unfinished
    about = json.loads((folder / "run.json").read_text())
    owner = about
    for key in field[:-1]:
        owner = owner[key]
    owner[field[-1]] = {"mechanism": {"unit": "scene"}.get(field[-1], 5)}.get(field[0], "other")
    (folder / "run.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=message):
        run(words)


def test_changed_private_layers_are_refused(unfinished, toy):
    _, data, words = unfinished
    identity = json.loads((data / "dataset.secret").read_text())
    toy.write(data, {"train": 40, "test": 16}, seed=5)
    assert json.loads((data / "dataset.secret").read_text())["id"] != identity["id"]
    with pytest.raises(UserError, match=r"run with mechanism\.dataset"):
        run(words)


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
    public = toy.write(tmp_path / "public", {"public": 8, "train": 8}, seed=3)  # its videos are others
    pretrain = {"optim__steps": 2, "data__eval_split": "", "data__split": "public"}
    first = run(toy.arguments(public, tmp_path / "pre", "sgd", **pretrain))
    with pytest.raises(UserError, match="with sgd on records protected here: 4 equal video ids in public"):
        run(toy.arguments(public, tmp_path / "b", "maskdp", init=first, data__split="public", data__eval_split=""))
    other = run(toy.arguments(public, tmp_path / "e", "maskdp", init=first, data__eval_split="", optim__steps=1))
    assert (other / "result.json").exists()  # other records of the same dataset are no obstacle
    elsewhere = toy.write(tmp_path / "elsewhere", {"a": 2, "b": 2, "c": 2, "d": 2, "test": 2, "train": 40}, seed=9)
    changes = {"init": first, "trainable": "[head]", "optim__steps": 1}
    second = run(toy.arguments(elsewhere, tmp_path / "c", "public_only", **changes))
    before, after = checkpoint.load(first).params, checkpoint.load(second).params
    for name in before:
        assert name.startswith("head.") or np.array_equal(before[name], after[name])
    (behind,) = json.loads((second / "privacy_card.json").read_text())["start_weights"]["runs"]
    assert behind["objective"] == "sgd"
    with pytest.raises(UserError, match="with sgd on records protected here"):  # its own data, two runs back
        run(toy.arguments(public, tmp_path / "d", init=second, data__split="public", data__eval_split=""))


def rewritten(data: pathlib.Path, out: pathlib.Path, change=lambda clip: {}, **notes) -> pathlib.Path:
    """`data` written again to `out`, every clip changed, with further metadata."""
    dataset = layers.Dataset(data)
    clips = {split: [clip.clip() for clip in dataset[split]] for split in dataset.splits}
    changed = {s: [dataclasses.replace(clip, **change(clip)) for clip in clips[s]] for s in clips}
    layers.write_dataset(out, changed, dataset.labels, private_format="png", notes=notes)
    return out


def test_rewriting_the_dataset_does_not_make_its_weights_public(toy, tmp_path):
    """Neither a note in the metadata, nor other names, nor other private layers hide that records are the same."""
    data = toy.write(tmp_path / "data", {"train": 8}, seed=3)
    first = run(toy.arguments(data, tmp_path / "pre", "sgd", optim__steps=1, data__eval_split=""))
    noted = rewritten(data, tmp_path / "noted", note=1)
    renamed = rewritten(data, tmp_path / "named", lambda c: dict(video_id="x" + c.video_id, clip_id="x" + c.clip_id))
    painted = rewritten(data, tmp_path / "painted", lambda c: dict(private=c.private // 2))
    assert len({layers.Dataset(one).id for one in (data, noted, renamed, painted)}) == 4
    for other, reason in ((noted, "video ids"), (renamed, "8 equal private layers"), (painted, "4 equal video ids")):
        with pytest.raises(UserError, match=f"on records protected here: .*{reason}"):
            run(toy.arguments(other, tmp_path / "run", init=first, data__eval_split=""))
        assert not (tmp_path / "run" / "run.json").exists()


def test_renamed_records_with_other_private_layers_are_known_by_their_public_ones(toy, tmp_path):
    """Coding the scenes once more and other names would hide them; neighbours share all public layers."""
    data = toy.write(tmp_path / "data", {"train": 8}, seed=3)
    first = run(toy.arguments(data, tmp_path / "pre", "sgd", optim__steps=1, data__eval_split=""))
    change = lambda c: dict(private=c.private // 2, video_id="x" + c.video_id, clip_id="x" + c.clip_id)  # noqa: E731
    other = rewritten(data, tmp_path / "other", change)
    with pytest.raises(UserError, match="8 equal public layers"):
        run(toy.arguments(other, tmp_path / "run", init=first, data__eval_split="", optim__steps=1))


def test_an_export_is_public_only_on_the_users_word(toy, dataset, tmp_path):
    public = toy.write(tmp_path / "public", {"a": 2, "train": 8}, seed=3)
    first = run(toy.arguments(public, tmp_path / "pre", "sgd", optim__steps=1, data__eval_split=""))
    model = export.export(first, tmp_path / "model")
    changes = {"init": model, "data__eval_split": "", "optim__steps": 1}
    with pytest.raises(UserError, match="does not say which records"):
        run(toy.arguments(dataset, tmp_path / "a", **changes))
    with pytest.raises(UserError, match="this very dataset"):
        run(toy.arguments(public, tmp_path / "b", init_is_public="true", **changes))
    folder = run(toy.arguments(dataset, tmp_path / "c", init_is_public="true", **changes))
    assert "user says" in json.loads((folder / "privacy_card.json").read_text())["start_weights"]["from"]


def test_evaluation_on_protected_records_is_refused_unless_asked_for(toy, tmp_path):
    data = toy.write(tmp_path / "data", {"train": 8, "test": 4}, seed=3)
    copies = rewritten(data, tmp_path / "copies")  # the test split gets the training clips under other names
    train_clips = [record.clip() for record in layers.Dataset(data)["train"]]
    named = [dataclasses.replace(c, video_id="y" + c.video_id, clip_id="y" + c.clip_id) for c in train_clips]
    labels = layers.Dataset(data).labels
    layers.write_dataset(copies, {"train": train_clips, "test": named}, labels, private_format="png")
    words = {"optim__steps": 1}
    with pytest.raises(UserError, match="shares 4 units"):
        run(toy.arguments(data, tmp_path / "a", data__eval_split="train", **words))
    with pytest.raises(UserError, match="8 equal private layers"):
        run(toy.arguments(copies, tmp_path / "b", **words))
    for unit in ("subject", "scene"):  # the two splits have the same persons and rooms
        with pytest.raises(UserError, match=rf"shares \d units \({unit}"):
            run(toy.arguments(data, tmp_path / "c", privacy__unit=unit, optim__batch=2, **words))
    run(toy.arguments(data, tmp_path / "d", "sgd", data__eval_split="train", **words))
    asked = run(toy.arguments(copies, tmp_path / "e", data__eval_on_protected_records="true", **words))
    assert "ε does not cover" in json.loads((asked / "privacy_card.json").read_text())["evaluation"]


def test_released_bytes_do_not_depend_on_a_private_layer(toy, tmp_path):
    """Two datasets that differ in one training record's private layer, same weights, id and secrets (rule 14).

    `public_only` never reads a private layer, so with one secret both runs end in the same weights.
    """
    data, changed = tmp_path / "data", tmp_path / "changed"
    toy.write(data, {"train": 8, "test": 4}, seed=3)
    rewritten(data, changed, lambda c: dict(private=c.private // 3) if "0000" in c.video_id else {})
    secret = json.loads((data / "dataset.secret").read_text())
    metadata = changed / "shards" / "metadata.json"
    metadata.write_text(metadata.read_text().replace(layers.Dataset(changed).metadata["dataset_id"], secret["id"]))
    own = json.loads((changed / "dataset.secret").read_text())
    (changed / "dataset.secret").write_text(json.dumps(own | {"id": secret["id"]}))
    released = []
    for folder in (data, changed):
        out = tmp_path / f"run-{folder.name}" / "run"
        words = toy.arguments(folder, out, "public_only", optim__steps=2, every__evaluate=1)
        out.parent.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(keys.secrets, "token_bytes", lambda count: bytes(count))
            patch.setattr(run_folder.uuid, "uuid4", lambda: uuid.UUID(int=7))
            patch.setattr(keys, "_digest", lambda *parts: hashlib.sha256(repr(parts[:2]).encode()).digest())
            run(words)
        model = export.export(out, tmp_path / f"model-{folder.name}")
        page = report.render([run_folders.load(out)])
        files = {str(f.relative_to(model)): f.read_bytes() for f in sorted(model.rglob("*")) if f.is_file()}
        released.append((files, (out / "privacy_card.json").read_bytes(), page))
    assert layers.Dataset(data).contents_tag() != layers.Dataset(changed).contents_tag()
    assert released[0] == released[1]
    assert len(released[0][0]) > 10


def test_every_start_of_a_private_run_is_charged_once(toy, tmp_path):
    data = toy.write(tmp_path / "data", {"train": 8, "test": 4}, seed=3)
    words = {"optim__steps": 2, "every__checkpoint": 1, "data__eval_split": ""}
    run(toy.arguments(data, tmp_path / "kept", **words))
    with pytest.MonkeyPatch.context() as patch:  # thrown away after it began
        patch.setattr(train, "stream", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(toy.arguments(data, tmp_path / "lost", **words))
    run(toy.arguments(data, tmp_path / "lost", **words))  # the same run goes on
    run(toy.arguments(data, tmp_path / "open", "sgd", **words))
    run(toy.arguments(data, tmp_path / "free", "public_only", **words))
    entries = ledger.read(layers.Dataset(data))
    assert [entry.mechanism.objective for entry in entries] == ["maskdp", "maskdp", "sgd"]
    (account,) = ledger.accounts(entries)
    assert (account.runs, account.without_noise, account.records) == (2, 1, 4)
    one, both = entries[0].mechanism.epsilon(1e-5).value, account.epsilon.value
    assert one < both < 2 * one
    assert both == compose([entry.mechanism for entry in entries[:2]], 1e-5).value


def test_a_dataset_of_one_split_is_trained_on_without_evaluation(toy, tmp_path, capsys):
    data = toy.write(tmp_path / "data", {"train": 8}, seed=3)
    folder = run(toy.arguments(data, tmp_path / "run", optim__steps=1))
    assert "no split 'test': the run is not evaluated" in capsys.readouterr().err
    result = json.loads((folder / "result.json").read_text())
    assert result["accuracy"] == {}
    assert result["eval_split"] is None
    with pytest.raises(UserError, match="no split 'tset'"):
        run(toy.arguments(data, tmp_path / "b", data__eval_split="tset"))


def test_a_run_that_cannot_be_charged_does_not_start(toy, tmp_path):
    data = toy.write(tmp_path / "data", {"train": 8}, seed=3)
    (data / "ledger.jsonl").mkdir()
    with pytest.raises(UserError, match="must be entered in the dataset's ledger"):
        run(toy.arguments(data, tmp_path / "run", data__eval_split="", optim__steps=1))
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


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
        assert process.poll() is None, "the run ended before it could be killed"
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


def test_a_second_process_does_not_take_over_a_run_that_was_just_opened(unfinished):
    """Both found no run; while the second calibrated its noise, the first opened the folder."""
    folder, _, words = unfinished
    shutil.rmtree(folder / "checkpoints")  # the first has not reached a checkpoint yet
    secret = (folder / "run.secret").read_bytes()
    started, early = run_folder.started, [False]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "started", lambda path: early.pop() if early else started(path))
        with pytest.raises(UserError, match="opened by another process"):
            run(words)
    assert (folder / "run.secret").read_bytes() == secret


def test_the_environment_names_all_that_a_view_or_a_step_depends_on():
    known = environment.describe(1)
    assert known["opencv"] == cv2.__version__
    assert known["processor"]
    optimized = jax.config.values["jax_disable_most_optimizations"]
    try:  # what counts is what JAX took up when it was imported, not what the environment says later
        jax.config.update("jax_disable_most_optimizations", not optimized)
        assert environment.describe(1) != known
    finally:
        jax.config.update("jax_disable_most_optimizations", optimized)


def test_a_gpu_must_repeat_a_step_bit_for_bit(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=4 --xla_dump_to=x")
    environment.ask_for_determinism()
    assert os.environ["XLA_FLAGS"].split()[2:] == ["--xla_gpu_deterministic_ops=true"]  # what the user set stays
    with pytest.raises(UserError, match="a private run on a GPU needs"):
        environment.refuse_nondeterminism("gpu", os.environ["XLA_FLAGS"])
    environment.refuse_nondeterminism("cpu", "")
    monkeypatch.setenv("XLA_FLAGS", "")
    environment.ask_for_determinism()
    environment.refuse_nondeterminism("gpu", os.environ["XLA_FLAGS"])
