import os
import tempfile

import pytest

from anonymize import weights

# Tests compile more than they compute. Set before any test module imports jax, which reads them once; child processes
# inherit them and reuse what was compiled here.
_COMPILED = tempfile.TemporaryDirectory(prefix="maskdp-compiled-")
os.environ |= {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": _COMPILED.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


@pytest.fixture(autouse=True, scope="session")
def weights_of_tests(tmp_path_factory):
    """Of the weights that lie in the user's cache, tests see BlazePose's (pinned, fetched with .venv) and no others:
    `finder.type: auto` must not take up what happens to be there."""
    known = weights.default_folder() / "blazepose"
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("weights")
        if known.is_dir():
            (folder / "blazepose").symlink_to(known.resolve(), target_is_directory=True)
        patch.setenv("MASKDP_WEIGHTS", str(folder))
        yield
