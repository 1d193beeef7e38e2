import json
import pathlib
import runpy
import sys

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "exact_release.py"


def test_benchmark_of_a_tiny_network(monkeypatch, capsys):
    sizes = {"width": 16, "depth": 1, "frames": 2, "size": 16, "classes": 3, "batch": 4, "microbatch": 2, "rounds": 1}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--case", "head", "--json", *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["coordinates"] == 48
    assert row["ratio"] > 0
