import pytest


@pytest.fixture(autouse=True, scope="session")
def no_weights_of_this_machine(tmp_path_factory):
    """`finder.type: auto` must not take up weights that happen to lie in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKDP_WEIGHTS", str(tmp_path_factory.mktemp("none")))
        yield
