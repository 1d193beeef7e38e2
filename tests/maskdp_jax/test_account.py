import dataclasses
import json

import pytest

from maskdp import cli, layers
from maskdp.errors import UserError
from maskdp_jax import account, ledger
from maskdp_jax.mechanism import Epsilon, Mechanism, compose

KEYS = {
    "noise_multiplier",
    "epsilon",
    "epsilon_pld",
    "epsilon_rdp",
    "delta",
    "sampling_prob",
    "steps",
    "sensitivity",
    "event",
}


def run(capsys, words: str) -> dict:
    assert account.main([*words.split(), "--json"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_noise_for_an_epsilon_and_back(capsys):
    run_ = "--n 1000 --batch 50 --epochs 5 --delta 1e-6 --sampling shared_poisson"
    found = run(capsys, f"{run_} --epsilon 2")
    assert set(found) == KEYS
    assert found["steps"] == 100
    assert found["sampling_prob"] == 0.05
    assert 1.99 < found["epsilon"] <= 2
    back = run(capsys, f"{run_} --noise_multiplier {found['noise_multiplier']!r}")
    assert back == found
    mechanism = Mechanism(1000, 50, 100, sampling="shared_poisson", noise_multiplier=found["noise_multiplier"])
    assert mechanism.epsilon(1e-6).value == found["epsilon"]


def test_steps_and_batch_for_an_epsilon_and_a_noise(capsys):
    """One more of either would exceed the claim."""
    words = "--n 1000 --noise_multiplier 4 --sampling shared_epochs --delta 1e-6"
    most = run(capsys, f"{words} --batch 50 --epsilon 3")["steps"]
    assert run(capsys, f"{words} --batch 50 --steps {most}")["epsilon"] <= 3
    assert run(capsys, f"{words} --batch 50 --steps {most + 1}")["epsilon"] > 3
    largest = round(1000 * run(capsys, f"{words} --steps 60 --epsilon 3")["sampling_prob"])
    assert run(capsys, f"{words} --steps 60 --batch {largest}")["epsilon"] <= 3
    assert run(capsys, f"{words} --steps 60 --batch {largest + 1}")["epsilon"] > 3


def test_what_cannot_be_had_is_null(capsys):
    words = "--n 1000 --batch 50 --steps 10 --noise_multiplier 3"
    shared = run(capsys, f"{words} --sampling shared_poisson")
    assert shared["epsilon"] > 0
    assert shared["epsilon_pld"] is None
    assert shared["epsilon_rdp"] is None
    swapped = run(capsys, f"{words} --adjacency replace")
    assert swapped["sensitivity"] == 2
    assert swapped["epsilon_pld"] == swapped["epsilon"]
    assert swapped["epsilon_rdp"] is None
    plain = run(capsys, "--n 1000 --batch 50 --steps 10 --objective sgd")
    assert plain["epsilon"] is None
    assert plain["sensitivity"] is None
    assert run(capsys, "--n 1000 --batch 50 --steps 10 --objective public_only")["epsilon"] == 0


def test_figures_in_the_table_are_rounded_up(capsys):
    words = "--n 1000 --batch 50 --steps 10 --sampling shared_epochs --noise_multiplier"
    for noise in ("3", "4", "5.5"):
        exact = run(capsys, f"{words} {noise}")
        account.main([*words.split(), noise])
        printed = dict(line.split() for line in capsys.readouterr().out.splitlines()[1:] if len(line.split()) == 2)
        for name in ("epsilon", "epsilon_pld", "epsilon_rdp"):
            assert exact[name] <= float(printed[name]) < exact[name] * (1 + 1e-5)


def test_warns_of_a_delta_that_publishes_a_record(capsys):
    words = "--n 1000 --batch 50 --steps 10 --noise_multiplier 3 --json --delta"
    for delta, warned in (("1e-3", True), ("9e-4", False)):
        account.main([*words.split(), delta])
        assert ("1/n" in capsys.readouterr().err) == warned


def test_table_is_readable(capsys):
    words = "--n 1000 --batch 50 --steps 10 --noise_multiplier 3 --sampling shared_epochs"
    account.main(words.split())
    printed = capsys.readouterr().out
    assert all(key in printed for key in KEYS)
    assert max(map(len, printed.splitlines())) < 120


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--batch 50 --steps 10 --epsilon 1", ".n:"),
        ("--n 1000 --batch 50 --epsilon 1", "steps"),
        ("--n 1000 --steps 50 --epsilon 1", "batch"),
        ("--n 1000 --epochs 5 --epsilon 1 --noise_multiplier 1", "just one of batch, steps"),
        ("--n 1000 --epsilon 1 --noise_multiplier 1", "just one of batch, steps"),
        ("--n 1000 --batch 50 --steps 10 --epochs 1 --epsilon 1", "epochs, steps"),
        ("--n 1000 --batch 50 --steps 10", "epsilon, noise_multiplier"),
        ("--n 1000 --batch 50 --steps 10 --epsilon 1 --noise_multiplier 1", "epsilon, noise_multiplier"),
        ("--n 10 --batch 50 --steps 10 --epsilon 1", "batch_size"),
        ("--n 1000 --batch 50 --steps 10 --epsilon -1", "epsilon"),
        ("--n 1000 --batch 50 --steps 10 --epsilon 50", "finite support"),
        ("--n 1000 --batch 50 --steps 10 --epsilon 800", "finite support"),
        ("--n 1000 --batch 50 --steps 100000000000000000000 --epsilon 1", "steps"),
        ("--n 1000 --batch 50 --epochs 1e300 --epsilon 1", "steps"),
        ("--n 1000 --batch 50 --steps 10 --epsilon 1 --delta 0", "delta"),
        ("--n 1000 --batch 50 --steps 10 --epsilon 1 --adjacency none", "adjacency"),
        ("--n 1000 --batch 50 --steps 10 --epsilon 1 --adjacency remove", "remove"),
        ("--n 1000 --batch 50 --steps 10 --epsilon 1 --colour red", "colour"),
    ],
)
def test_mistakes_are_one_line_that_names_them(words, named):
    with pytest.raises(UserError) as refusal:
        account.main(words.split())
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.fixture
def charged(toy, tmp_path):
    """A dataset whose ledger holds two private runs, one of them of another unit, and one without noise."""
    data = layers.Dataset(toy.write(tmp_path / "data", {"train": 4}))
    one = Mechanism(100, 10, 5, noise_multiplier=1.0, dataset=data.id)
    other = dataclasses.replace(one, unit="scene", num_units=7, batch_size=2)
    for name, mechanism in (("r1", one), ("r2", one), ("r2", one), ("r3", other)):
        ledger.charge(data, name, "train", 1e-5, mechanism)
    ledger.charge(data, "r4", "train", 1e-5, dataclasses.replace(one, objective="sgd", noise_multiplier=0.0))
    return data, one


def test_ledger_prints_what_publishing_all_of_it_costs(charged, capsys):
    data, one = charged
    assert cli.main(["account", "--ledger", str(data.folder), "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["runs"], first["without_noise"], first["unit"]) == (2, 1, "video")
    assert first["epsilon"] == pytest.approx(compose([one, one], 1e-5).value)
    assert (second["runs"], second["unit"], second["records"]) == (1, "scene", 7)
    assert cli.main(["account", "--ledger", str(data.folder)]) == 0
    text = capsys.readouterr().out
    assert "publishing all 2 private runs on split train costs ε = " in text
    assert "must not be published" in text
    assert "No single ε covers these accounts together" in text


def test_a_cut_last_line_of_the_ledger_is_passed_over_and_a_damaged_one_is_not(charged, capsys):
    data, one = charged
    path = data.folder / ledger.FILE
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert [entry.run for entry in ledger.read(data)] == ["r1", "r2", "r3"]
    ledger.charge(data, "r5", "train", 1e-5, one)
    assert [entry.run for entry in ledger.read(data)] == ["r1", "r2", "r3", "r5"]
    path.write_text(whole.replace('"run": "r3"', '"walk": "r3"'))
    assert cli.main(["account", "--ledger", str(data.folder)]) == 2
    assert "line 3 is not an entry" in capsys.readouterr().err


def test_ledger_epsilon_is_rounded_up():
    for value in (0.12341, 0.9999, 1.0001, 33.333333):
        assert float(ledger.epsilon_words(Epsilon(value, None, None, 1e-5, ""))) >= value


def test_a_run_entered_with_another_mechanism_is_refused(charged):
    """Else `run.json` could be given more noise half-way, and the card would state less than was spent."""
    data, one = charged
    ledger.charge(data, "r1", "train", 1e-5, one)
    with pytest.raises(UserError, match="r1 was entered with another mechanism"):
        ledger.charge(data, "r1", "train", 1e-5, dataclasses.replace(one, noise_multiplier=50.0))
