"""Faults planted in the real trainer are found. `python -m benchmarks.planted_faults` prints the table of all."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import planted_faults

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
