"""The sweep: a grid is the Cartesian product; what is done is never run twice, what failed is, a killed one goes on."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from maskdp import config, layers, sweep
from maskdp.errors import UserError
from maskdp_jax.config import TrainConfig


def test_grid_is_the_cartesian_product_then_the_listed_runs():
    listed = [{"objective.type": "sgd"}, {"objective.type": "maskdp", "seed": 1}]
    points = sweep.points({"objective.type": ["maskdp", "dp_sgd"], "seed": [0, 1]}, listed)
    assert points == [
        {"objective.type": "maskdp", "seed": 0},
        {"objective.type": "maskdp", "seed": 1},
        {"objective.type": "dp_sgd", "seed": 0},
        {"objective.type": "dp_sgd", "seed": 1},
        {"objective.type": "sgd"},
    ]


def test_a_mapping_in_the_grid_sets_its_keys_together():
    points = sweep.points({"arm": [{"a": 1}, {"a": 2, "b.c": 3}], "seed": [0, 1]})
    assert points == [
        {"a": 1, "seed": 0},
        {"a": 1, "seed": 1},
        {"a": 2, "b.c": 3, "seed": 0},
        {"a": 2, "b.c": 3, "seed": 1},
    ]


def test_names_are_unique_safe_and_stable():
    points = sweep.points({"a.b": ["x/../y", "x y", 1, 1.0, True, None, "1"], "seed": [0, 1]})
    names = [sweep.run_name(point) for point in points]
    assert len(set(names)) == len(points)
    assert not any(set(name) & set("/ \\:") or name.startswith(".") for name in names)
    assert sweep.run_name({"seed": 0, "a": 1}).split("-")[-1] == sweep.run_name({"a": 1, "seed": 0}).split("-")[-1]


def test_overrides_parse_back():
    words = sweep.overrides({"a.b": None, "c": True, "d": [1, 2], "e": "x", "f": 0.5})
    assert words == ["--a.b", "null", "--c", "true", "--d", "[1, 2]", "--e", "x", "--f", "0.5"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("base: demo.yaml\nout: o\n", "grid, runs: both empty"),
        ("base: demo.yaml\nout: o\ngrid: {seed: []}\n", "grid.seed: no values"),
        ("base: demo.yaml\nout: o\nruns: [{seed: 1}]\njobs: 0\n", "jobs: 0"),
        ("out: o\nruns: [{seed: 1}]\n", "base: missing"),
        ("base: absent.yaml\nout: o\nruns: [{seed: 1}]\n", "absent.yaml: no such config file"),
        ("base: demo.yaml\nout: o\nruns: [{seed: 1}]\ngird: 1\n", "gird"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, text, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(UserError, match=named) as caught:
        sweep.main(["--config_path", "sweep.yaml"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", sorted(config.bundled("sweeps").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_run_of_a_shipped_sweep_parses(file, tmp_path):
    shipped = config.parse(sweep.SweepConfig, ["--config_path", str(file), "--out", str(tmp_path)], "sweep")
    points = sweep.points(shipped.grid, shipped.runs)
    assert points
    for point in points:
        words = sweep.overrides(shipped.fixed | point)
        base = str(config.bundled(shipped.base))
        parsed = config.parse(TrainConfig, ["--config_path", base, *words, "--out", str(tmp_path)], "train")
        assert parsed.objective.name == point["objective.type"]


BASE = """
data: {{path: {data}, frames: 2, size: 16}}
model: {{type: vit, width: 8, depth: 1, heads: 1, tubelet: [2, 8, 8]}}
objective: {{type: public_only}}
optim: {{steps: 3, batch: 2, public_batch: 2}}
"""


def write_sweep(folder, seeds):
    (folder / "base.yaml").write_text(BASE.format(data=folder / "data"))
    (folder / "sweep.yaml").write_text(
        f"base: {folder / 'base.yaml'}\nout: {folder / 'out'}\ngrid: {{seed: {seeds}}}\n"
    )
    return [sys.executable, "-m", "maskdp", "sweep", "--config_path", str(folder / "sweep.yaml")]


def write_data(folder):
    rng = np.random.default_rng(0)

    def clip(index):
        rgba = rng.integers(1, 256, (2, 16, 16, 4), np.uint8)
        private = rng.integers(0, 256, (2, 16, 16, 3), np.uint8)
        return layers.TwoLayerClip(rgba, private, index % 2, f"v{index}-0", f"v{index}", "room", ("ann",), "0", 8.0)

    layers.write_dataset(folder, {"train": [clip(i) for i in range(4)], "test": [clip(9)]}, ["wave", "clap"])


def manifest(folder):
    path = folder / "out" / sweep.MANIFEST
    return json.loads(path.read_text())["runs"] if path.exists() else {}


def test_a_failed_run_is_one_line_and_exit_1(tmp_path):
    command = write_sweep(tmp_path, [0])
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 1
    failed = [line for line in finished.stderr.splitlines() if "failed: " in line]
    assert len(failed) == 1
    assert "not a two-layer dataset" in failed[0]
    assert [run["state"] for run in manifest(tmp_path).values()] == ["failed"]
    assert not (tmp_path / "out" / sweep.SUMMARY).exists()


def test_another_base_config_is_refused(tmp_path):
    write_sweep(tmp_path, [0])
    sweep.Manifest(tmp_path, tmp_path / "base.yaml").update("a", state="done")
    (tmp_path / "base.yaml").write_text("seed: 7\n")
    with pytest.raises(UserError, match="another base config"):
        sweep.Manifest(tmp_path, tmp_path / "base.yaml")


def test_two_sweeps_in_one_folder_are_refused(tmp_path):
    with sweep._alone(tmp_path), pytest.raises(UserError, match="another sweep is at work"), sweep._alone(tmp_path):
        pass


@pytest.mark.slow
def test_failed_runs_are_retried_and_a_killed_sweep_goes_on(tmp_path):
    command = write_sweep(tmp_path, [0, 1])
    assert subprocess.run(command, timeout=300).returncode == 1
    assert [run["state"] for run in manifest(tmp_path).values()] == ["failed", "failed"]
    write_data(tmp_path / "data")

    killed = subprocess.Popen(command)
    while not any(run["state"] == "done" for run in manifest(tmp_path).values()):
        assert killed.poll() is None
        time.sleep(0.2)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    time.sleep(1)
    assert not at_work(tmp_path)  # its training died with it
    (first,) = (name for name, run in manifest(tmp_path).items() if run["state"] == "done")
    result = tmp_path / "out" / "runs" / first / "result.json"
    before = result.stat()

    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0
    assert "1 of 2 runs were done before" in finished.stderr
    assert result.stat().st_mtime_ns == before.st_mtime_ns
    (configuration,) = json.loads((tmp_path / "out" / sweep.SUMMARY).read_text())["configurations"]
    values = [
        json.loads((tmp_path / "out" / "runs" / name / "result.json").read_text())["accuracy"]["composite"]
        for name in manifest(tmp_path)
    ]
    assert len(values) == configuration["runs"] == 2
    assert configuration["composite"]["mean"] == pytest.approx(np.mean(values))
    assert configuration["composite"]["sd"] == pytest.approx(np.std(values, ddof=1))
    assert configuration["epsilon"] is None


def at_work(folder):
    """Processes whose command line names the folder."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(folder) in line and "maskdp" in line]
