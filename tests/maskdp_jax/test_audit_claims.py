import pytest

from maskdp_jax.audit import claims
from maskdp_jax.mechanism import Mechanism

DELTA = 1e-5
MECHANISMS = [
    {"objective": "maskdp"},
    {"objective": "maskdp", "max_batch": 12},
    {"objective": "maskdp_two_step"},
    {"objective": "dp_sgd", "adjacency": "remove"},
    {"objective": "maskdp_residual", "sampling": "shared_poisson"},
    {"objective": "maskdp_residual", "adjacency": "replace", "sampling": "shared_epochs"},
]


def mechanism(**changes) -> Mechanism:
    return Mechanism(num_units=100, batch_size=10, steps=20, noise_multiplier=3.0, **changes)


@pytest.mark.parametrize("changes", MECHANISMS)
def test_second_account_agrees(changes):
    finding = claims.second_account(mechanism(**changes), DELTA)
    assert finding.holds
    stated = mechanism(**changes).epsilon(DELTA).value
    assert claims._again(mechanism(**changes), DELTA) == pytest.approx(stated, rel=0.02)


def test_what_is_not_charged_is_found(monkeypatch):
    swapped, cut = mechanism(objective="maskdp_two_step"), mechanism(max_batch=10)
    with monkeypatch.context() as patch:
        patch.setattr(Mechanism, "sensitivity", property(lambda m: 1.0))
        assert not claims.second_account(swapped, DELTA).holds
    with monkeypatch.context() as patch:
        patch.setattr(Mechanism, "_overflow", 0.0)
        assert not claims.second_account(cut, DELTA).holds
