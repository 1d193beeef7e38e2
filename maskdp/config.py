"""Configuration: frozen dataclasses parsed by draccus from YAML with command-line overrides.

Unknown keys, wrong types and impossible values are errors of one line. Every run writes the resolved config and its
hash.
"""

import hashlib
import importlib.resources
import json
import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

import draccus

from maskdp.errors import UserError

T = TypeVar("T")


def parse(config_class: type[T], arguments: list[str], command: str) -> T:
    """Parses `--config_path FILE --a.b value …` into `config_class`.

    Raises:
        UserError: the file or key at fault, in one line.
    """
    try:
        return draccus.parse(config_class, args=arguments, prog=f"maskdp {command}", exit_on_error=False)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such config file") from None
    except UserError:
        raise
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"see maskdp {command} --help") from None
    except Exception as error:  # draccus, argparse, yaml and __post_init__ each raise their own kind
        raise UserError(_one_line(error)) from None


def _one_line(error: BaseException) -> str:
    """The most telling message of a chain of exceptions, on one line."""
    while error.__cause__ is not None and not isinstance(error, UserError):
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__


def resolved(config) -> dict:
    """The config as plain YAML-ready values."""
    return draccus.encode(config)


def dump(config) -> str:
    """The config as YAML text, which `parse` reads back."""
    return draccus.dump(config)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` → `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of plain values, hex, whatever the order of keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint(config) -> str:
    """SHA-256 of the resolved config, hex."""
    return hashlib.sha256(dump(config).encode()).hexdigest()


def bundled(name: str) -> pathlib.Path:
    """Path of a config shipped with the project, e.g. `demo.yaml`."""
    beside = pathlib.Path(__file__).resolve().parent.parent / "configs" / name
    return beside if beside.exists() else pathlib.Path(str(importlib.resources.files("maskdp") / "configs" / name))


def positive(owner: object, *names: str) -> None:
    """For `__post_init__`: raises UserError unless each named field is a number above 0."""
    for name in names:
        value = getattr(owner, name)
        if not value > 0:
            raise UserError(f"{type(owner).__name__}.{name}: {value!r}, expected a number above 0")


def one_of(owner: object, name: str, choices) -> None:
    """For `__post_init__`: raises UserError unless the named field is one of `choices`."""
    value = getattr(owner, name)
    if value not in choices:
        raise UserError(f"{type(owner).__name__}.{name}: {value!r}, expected one of {', '.join(map(str, choices))}")
