import json

import jax
import numpy as np
import pytest

from maskdp import cli, layers
from maskdp_jax import checkpoint
from maskdp_jax.config import DataConfig
from maskdp_jax.data import Clips


def output(capsys, *words) -> str:
    assert cli.main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def test_eval_counts_what_predict_says(trained_run, dataset, capsys):
    found = json.loads(output(capsys, "eval", trained_run, "--data", dataset, "--json"))
    lines = output(capsys, "predict", trained_run, dataset, "--split", "test").splitlines()
    said = {line["clip_id"]: line["label"] for line in map(json.loads, lines)}
    truth = layers.Dataset(dataset)
    right = [said[record.clip_id] == truth.labels[record.label] for record in truth["test"]]
    assert found["clips"] == len(right) == 16
    assert found["accuracy"]["composite"] == pytest.approx(np.mean(right))
    assert json.loads((trained_run / "result.json").read_text())["accuracy"] == pytest.approx(found["accuracy"])


def test_table_names_every_class(trained_run, dataset, toy, capsys):
    table = output(capsys, "eval", trained_run, "--data", dataset, "--view", "public")
    assert all(label in table for label in (*toy.LABELS, "all", "public view"))
    assert "composite" not in table


@pytest.mark.parametrize(("split", "warned"), [("train", True), ("test", False)])
def test_figures_on_protected_records_come_with_a_warning(trained_run, dataset, split, warned, capsys):
    assert cli.main(["eval", str(trained_run), "--data", str(dataset), "--split", split]) == 0
    assert ("are not protected" in capsys.readouterr().err) == warned


def test_other_labels_are_refused(trained_run, tmp_path, toy, capsys):
    clip = toy.clip(0, np.random.default_rng(0))
    layers.write_dataset(tmp_path, {"test": [clip]}, ("a", "b", "c", "d"), private_format="png")
    assert cli.main(["eval", str(trained_run), "--data", str(tmp_path)]) == 2
    assert "expected the model's" in capsys.readouterr().err


def test_a_folder_that_is_no_run(tmp_path, dataset, capsys):
    assert cli.main(["eval", str(tmp_path), "--data", str(dataset)]) == 2
    assert "not a run" in capsys.readouterr().err


def test_public_view_of_two_paths_is_the_public_path(trained_run, dataset):
    """With x = x̃ the private head has no say, whatever its weights."""
    trained = checkpoint.load(trained_run)
    clips = Clips(layers.Dataset(dataset), "test", DataConfig(path=str(dataset), frames=4, size=16))
    public = clips.batch([(n,) for n in range(4)], 1).public[:, 0]
    weights = trained.weights._replace(head={"kernel": trained.weights.head["kernel"] + 1e3})
    np.testing.assert_allclose(
        jax.jit(trained.objective.logits)(weights, public, public),
        jax.jit(trained.objective.network.logits)(trained.params, public),
        rtol=1e-4,
        atol=1e-4,
    )
