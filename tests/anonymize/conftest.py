import pathlib

import pytest
import torch


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> pathlib.Path:
    """A complete weights folder of tiny random models."""
    from tests.anonymize import tiny_models

    torch.set_num_threads(1)
    return tiny_models.save(tmp_path_factory.mktemp("weights"))
