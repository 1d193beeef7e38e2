"""The sweep: a grid is the Cartesian product; what is done is never run twice, what failed is, a killed one goes on."""

import pytest

from maskdp import sweep
from maskdp.errors import UserError


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
