import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from maskdp_jax import checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run_flags(devices: int) -> str:
    return f"--xla_force_host_platform_device_count={devices}"


def run(words: list[str], devices: int) -> subprocess.CompletedProcess:
    flags = {"XLA_FLAGS": run_flags(devices), "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=os.environ | flags, capture_output=True, text=True)


def test_two_processes_of_two_devices_are_one_of_four(toy, dataset, tmp_path):
    """One secret, so one Poisson draw and one noise: the processes only share the work."""
    changes = {"data__eval_split": "", "optim__steps": 2, "model__depth": 1}
    two = run(["launch/local", "2", "train", *toy.arguments(dataset, tmp_path / "two", **changes)], devices=2)
    assert two.returncode == 0, two.stderr[-2000:]
    (tmp_path / "one").mkdir()
    for name in ("run.secret", "config.yaml"):
        shutil.copy(tmp_path / "two" / name, tmp_path / "one" / name)
    about = json.loads((tmp_path / "two" / "run.json").read_text())
    assert about["environment"]["devices"] == "4 × cpu in 2 processes"
    about["environment"]["devices"] = "4 × cpu in 1 processes"
    about["environment"]["XLA_FLAGS"] = run_flags(4)
    (tmp_path / "one" / "run.json").write_text(json.dumps(about))
    one = run(["-m", "maskdp", "train", *toy.arguments(dataset, tmp_path / "one", **changes)], devices=4)
    assert one.returncode == 0, one.stderr[-2000:]
    first, second = (checkpoint.load(tmp_path / name).weights for name in ("one", "two"))
    for name in first.theta:
        np.testing.assert_allclose(second.theta[name], first.theta[name], atol=1e-5)
    # The head starts at zero and is all noise and batches: of another draw it would be off by its own length.
    head = first.head["kernel"]
    assert np.linalg.norm(second.head["kernel"] - head) < 1e-3 * np.linalg.norm(head)


@pytest.mark.parametrize("words", [[], ["x", "train"], ["0", "train"]])
def test_usage(words):
    done = run(["launch/local", *words], devices=1)
    assert done.returncode == 2
    assert done.stderr.startswith("usage:")


def test_slurm_script_is_sound():
    assert subprocess.run(["bash", "-n", "launch/slurm"], cwd=ROOT).returncode == 0
