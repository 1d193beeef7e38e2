"""The packages keep apart: each may import only what docs/architecture.md allows."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "anonymize": {"jax", "flax", "optax", "maskdp_jax", "jax_privacy", "orbax"},
    "maskdp_jax": {"torch", "smplx", "diffusers", "transformers", "anonymize"},
}


def imported(file: pathlib.Path) -> set[str]:
    """Top-level names of every module `file` imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_stage_never_imports_the_other_stages_framework(package):
    for file in (ROOT / package).rglob("*.py"):
        assert not imported(file) & FORBIDDEN[package], file


def test_command_line_starts_without_a_framework():
    code = (
        "import sys, maskdp.cli, maskdp.config, maskdp.layers; print({'torch', 'jax', 'tensorflow'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


def test_nothing_unpickles():
    for package in ("maskdp", "anonymize", "maskdp_jax"):
        for file in (ROOT / package).rglob("*.py"):
            assert "pickle" not in imported(file), file
            assert "allow_pickle=True" not in file.read_text(), file
