"""docs/privacy.md names a test for every pitfall; each must exist."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_every_guard_named_exists():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "privacy.md").read_text()))
    defined = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    assert len(named) > 20
    assert named <= defined, sorted(named - defined)
