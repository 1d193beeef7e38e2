import json
import pathlib
import runpy
import sys

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "clipping.py"


def test_benchmark_of_a_tiny_network(monkeypatch, capsys):
    """It runs, ours agrees with jax_privacy, and whoever needs less memory fits more."""
    sizes = {"width": 16, "depth": 1, "heads": 2, "tokens": 4, "batch": 1, "rounds": 1, "memory_limit": 0.00028}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--case", "scan", "--json", *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == ["gradient", "maskdp", "jax_privacy"]
    assert rows["gradient"]["time_ratio"] == 1
    assert rows["maskdp"]["error"] < 1e-4
    assert rows["jax_privacy"]["largest_batch"] < rows["gradient"]["largest_batch"]
    assert 0 < rows["gradient"]["temporary_bytes"] < rows["jax_privacy"]["temporary_bytes"]
