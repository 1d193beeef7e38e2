"""Faults planted in the real trainer are found. `python -m benchmarks.planted_faults` prints the table of all."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import membership, planted_faults, sampling_trap

TWO_DEVICES = [name for name, fault in planted_faults.FAULTS.items() if "parallel__devices" in fault.settings]
QUICK = ("noise_low", "no_clip", "mask_row", "private_in_theta")


def names(faults) -> list:
    """Those that are quick as they are, the others marked slow."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in faults]


@pytest.mark.parametrize("name", names([name for name in planted_faults.FAULTS if name not in TWO_DEVICES]))
def test_a_planted_fault_is_found(name):
    row = planted_faults.row(name)
    assert row.expected in row.failed


@pytest.mark.slow
@pytest.mark.parametrize("name", planted_faults.SOUND)
def test_a_sound_run_passes(name):
    row = planted_faults.row(name)
    assert row.failed == ()
    assert row.epsilon <= row.claimed


@pytest.mark.slow
def test_faults_of_several_devices_are_found():
    command = [sys.executable, "-m", "benchmarks.planted_faults", "--json", "--only", *TWO_DEVICES]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    assert [row["name"] for row in rows] == TWO_DEVICES
    assert all(row["expected"] in row["failed"] for row in rows)


@pytest.mark.slow
def test_batches_are_read_off_exact_steps():
    seen = sampling_trap.read_batches(records=60, batch=10, steps=2)
    assert seen["named"] > 0
    assert seen["missed"] == seen["wrongly named"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["shared_poisson", "independent"])
def test_the_usual_account_is_refuted_for_shared_batches_alone(sampling):
    row = sampling_trap.attacked(sampling, 1.0)
    assert (row["ε found at 95 %"] > row["ε by the usual account"]) == (sampling == "shared_poisson")
    assert row["ε found at 95 %"] <= row["ε that maskdp reports"]


@pytest.mark.slow
@pytest.mark.parametrize("objective", membership.OBJECTIVES)
def test_only_plain_training_gives_backgrounds_away(objective, tmp_path):
    data = membership.write_clips(tmp_path / "data", 100)
    row = membership.attacked(objective, data, tmp_path, epsilon=1.0, steps=300)
    if objective == "sgd":
        assert row["AUC"] > 0.8
        assert row["picked"] > 3 * row["picked of others"]
    else:
        assert row["epsilon"] <= row["claimed"]
        assert row["p"] > 1e-3
