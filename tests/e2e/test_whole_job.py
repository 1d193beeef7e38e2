"""The whole job in small, by the commands a user types: film, anonymize, train, evaluate, export, audit, report."""

import json
import subprocess
import sys

import pytest

from maskdp import layers
from maskdp.config import bundled

VIDEOS = 8


def maskdp(*words: str) -> str:
    finished = subprocess.run([sys.executable, "-m", "maskdp", *words], capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which every command has been run."""
    folder = tmp_path_factory.mktemp("job")
    filmed, data, run = (str(folder / name) for name in ("filmed", "data", "run"))
    maskdp("studio", "--out", filmed, "--videos", str(VIDEOS), "--passing", "1")
    maskdp("anonymize", f"{filmed}/manifest.csv", "--out", data)
    maskdp(
        *("train", "--config_path", str(bundled("demo.yaml")), "--data.path", data, "--out", run),
        *("--optim.steps", "4", "--optim.batch", "2", "--optim.public_batch", "2", "--objective.epsilon", "0.5"),
    )
    maskdp("export", run, "--out", str(folder / "model"))
    maskdp("report", run, "--data", data, "--videos", f"{filmed}/videos", "--out", str(folder / "report.html"))
    return folder


def test_every_video_is_written_or_quarantined_with_a_reason(folder):
    rows = [json.loads(line) for line in (folder / "data" / "manifest.jsonl").read_text().splitlines()]
    assert len(rows) == VIDEOS
    assert all(row["status"] == "written" or row["reason"] for row in rows)
    dataset = layers.Dataset(folder / "data")
    assert sum(len(dataset[split]) for split in dataset.splits) == sum(row["status"] == "written" for row in rows)
    assert dataset.metadata["context"] == "none"


def test_the_card_states_the_epsilon_that_was_asked_for(folder):
    card = json.loads((folder / "run" / "privacy_card.json").read_text())
    assert 0 < card["epsilon"] <= 0.5
    assert card["epsilon_whole_record"] == "infinite"


def test_run_and_export_evaluate_alike(folder):
    run, model = (
        json.loads(maskdp("eval", str(folder / name), "--data", str(folder / "data"), "--split", "train", "--json"))
        for name in ("run", "model")
    )
    assert run == model


def test_the_audits_find_nothing(folder):
    maskdp("audit", str(folder / "data"))
    maskdp("audit", str(folder / "run"))


def test_the_report_shows_the_claim(folder):
    page = (folder / "report.html").read_text()
    assert "ε = 0.5" in page
    assert str(folder) not in page
