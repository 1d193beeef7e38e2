import dataclasses
import json
import math
import re

import pytest

from maskdp import config as config_files
from maskdp_jax import card
from maskdp_jax.config import TrainConfig
from maskdp_jax.mechanism import Mechanism
from maskdp_jax.train import make_mechanism


def make(toy, tmp_path, objective="maskdp", context="none", most=None, kept=0, **changes):
    words = toy.arguments(tmp_path, tmp_path, objective, **changes)
    config = config_files.parse(TrainConfig, words, "train")
    mechanism = make_mechanism(config, 200, "0" * 32)
    return card.make(
        config,
        mechanism,
        most=most or {"person": 12, "place": 3, "video": 1},
        clips=400,
        left_out=0,
        context=context,
        start_weights={"from": "random"},
        people_kept=kept,
    )


def test_epsilon_is_the_mechanisms(toy, tmp_path):
    made = make(toy, tmp_path)
    again = Mechanism(**json.loads(json.dumps(made["mechanism"]))).epsilon(made["delta"])
    assert made["epsilon"] == again.value > 0
    assert made["event"] == again.event
    assert made["records"] == 200


def test_calibrated_noise_keeps_to_epsilon(toy, tmp_path):
    made = make(toy, tmp_path, objective__noise_multiplier=None, objective__epsilon=0.5)
    assert 0.49 < made["epsilon"] <= 0.5


def test_people_who_were_kept_visible_are_named_as_part_of_the_scene(toy, tmp_path):
    said = [" ".join(card.plain_words(make(toy, tmp_path, kept=kept))["uncovered"]) for kept in (0, 3)]
    assert "kept visible" not in said[0]
    assert "3 people who were kept visible on purpose" in said[1]


def test_says_whether_the_release_is_exact(toy, tmp_path):
    """By default for the private head alone."""
    for objective, changes, exact in (
        ("maskdp", {}, True),
        ("maskdp", {"privacy__exact": "false"}, False),
        ("dp_sgd", {}, False),
        ("dp_sgd", {"privacy__exact": "true"}, True),
    ):
        made = make(toy, tmp_path, objective, **changes)
        assert made["mechanism"]["exact"] == exact
        assert ("integers" in made["release"]) == exact
        assert ("floating point" in made["release"]) != exact
    assert make(toy, tmp_path, "public_only")["mechanism"]["exact"] is False


@pytest.mark.parametrize("objective", ["sgd", "public_only"])
def test_no_noise_no_epsilon(toy, tmp_path, objective):
    made = make(toy, tmp_path, objective)
    assert made["epsilon"] is None
    assert made["noise_multiplier"] == 0


def test_scene_context_gets_no_epsilon(toy, tmp_path):
    assert make(toy, tmp_path, context="scene")["epsilon"] is None
    assert make(toy, tmp_path, "dp_sgd", context="scene")["epsilon"] is None
    assert make(toy, tmp_path, "dp_sgd", context="scene", privacy__adjacency="remove")["epsilon"] > 0
    assert "no privacy" in card.plain_words(make(toy, tmp_path, "public_only", context="scene"))["sentence"]


def test_whole_record_is_covered_by_removal_alone(toy, tmp_path):
    assert make(toy, tmp_path)["epsilon_whole_record"] == "infinite"
    assert make(toy, tmp_path, "dp_sgd")["epsilon_whole_record"] == "infinite"
    removed = make(toy, tmp_path, "dp_sgd", privacy__adjacency="remove")
    assert removed["epsilon_whole_record"] == removed["epsilon"]
    assert "labels" not in removed["not_covered"]


def test_swapped_terms_are_charged_twice(toy, tmp_path):
    assert make(toy, tmp_path)["sensitivity"] == 1
    assert make(toy, tmp_path, "dp_sgd")["sensitivity"] == 2


def test_plain_words_say_what_is_not_covered(toy, tmp_path):
    words = card.plain_words(make(toy, tmp_path))
    uncovered = " ".join(words["uncovered"])
    assert "gait" in uncovered
    assert "up to 12 records" in uncovered
    assert "up to 3 records" in uncovered
    assert "private layer" in words["covered"][0]
    alone = card.plain_words(make(toy, tmp_path, most={"person": 1, "place": 3, "video": 1}))
    assert any("one person" in line for line in alone["covered"])


def test_plain_words_never_promise_without_noise(toy, tmp_path):
    assert "no privacy" in card.plain_words(make(toy, tmp_path, "sgd"))["sentence"]
    assert card.plain_words(make(toy, tmp_path, "sgd"))["covered"] == []
    assert "no ε" in card.plain_words(make(toy, tmp_path, "public_only"))["sentence"]
    none = make(toy, tmp_path, objective__noise_multiplier=1.0)
    infinite = none | {"epsilon": None}
    assert "no privacy" in card.plain_words(infinite)["sentence"]


def test_card_is_json(toy, tmp_path):
    made = make(toy, tmp_path)
    assert json.loads(json.dumps(made)) == made
    assert all(not (isinstance(value, float) and math.isinf(value)) for value in made.values())
    assert dataclasses.is_dataclass(Mechanism)


def test_plain_words_round_up(toy, tmp_path):
    made = make(toy, tmp_path) | {"epsilon": 0.7, "delta": 1.4444444e-5}
    words = card.plain_words(made)
    factor, delta = re.search(r"more than (\S+) times .* a chance of (\S+) \(", words["sentence"]).groups()
    assert float(factor) >= math.exp(0.7)
    assert float(delta) >= made["delta"]
    assert float(re.search(r"at δ = (\S+)$", words["covered"][0])[1]) >= made["delta"]
