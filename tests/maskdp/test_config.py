"""Configuration: what is dumped parses back to itself; every mistake is one line that names the key or file."""

import dataclasses

import pytest

from maskdp import config
from maskdp.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    kind: str = "a"

    def __post_init__(self):
        config.positive(self, "rate")
        config.one_of(self, "kind", ("a", "b"))


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    steps: int = 3
    name: str | None = None


def parse(*arguments):
    return config.parse(Outer, list(arguments), "test")


def test_command_line_overrides_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("steps: 7\ninner:\n  rate: 0.5\n")
    parsed = parse("--config_path", str(file), "--inner.rate", "0.25")
    assert (parsed.steps, parsed.inner.rate, parsed.inner.kind) == (7, 0.25, "a")


def test_dump_parses_back_to_the_same_config(tmp_path):
    written = Outer(Inner(0.3, "b"), 9, "n")
    (tmp_path / "c.yaml").write_text(config.dump(written))
    read = parse("--config_path", str(tmp_path / "c.yaml"))
    assert read == written
    assert config.fingerprint(read) == config.fingerprint(written)
    assert config.fingerprint(read) != config.fingerprint(dataclasses.replace(read, steps=10))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("stepps: 3\n", "stepps"),
        ("inner:\n  ratee: 3\n", "ratee"),
        ("steps: many\n", "many"),
        ("inner:\n  rate: -1\n", "Inner.rate: -1"),
        ("inner:\n  kind: c\n", "Inner.kind: 'c', expected one of a, b"),
        ("steps: [3\n", "c.yaml"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path, text, named):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        parse("--config_path", str(tmp_path / "c.yaml"))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config_path", "absent.yaml"], "absent.yaml: no such config file"),
        (["--inner.ratee", "3"], "--inner.ratee"),
        (["--steps", "many"], "many"),
        (["--inner.rate", "0"], "Inner.rate"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments, named):
    with pytest.raises(UserError) as caught:
        parse(*arguments)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_for_a_config_is_one_line(tmp_path):
    with pytest.raises(UserError, match=tmp_path.name):
        parse("--config_path", str(tmp_path))


def test_help_is_not_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert not stop.value.code
    assert "--inner.rate" in capsys.readouterr().out
