"""The command line: a user's mistake is one line, the exit status is as promised, nothing heavy is imported early."""

import importlib
import subprocess
import sys

import pytest

from maskdp import cli
from maskdp.errors import UserError


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "maskdp", *arguments], capture_output=True, text=True, timeout=60)


def test_unknown_command_is_one_line_and_exit_2(capsys):
    assert cli.main(["frobnicate"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert "frobnicate" in err
    assert "anonymize" in err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(arguments, capsys):
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)


def test_user_error_is_one_line_and_exit_2(capsys, tmp_path):
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "report.html")]) == 2
    err = capsys.readouterr().err
    assert err == f"maskdp report: {tmp_path}: holds no finished run, expected folders that `maskdp train` wrote\n"


@pytest.mark.parametrize(
    ("raised", "status"), [(UserError("x"), 2), (KeyboardInterrupt(), 130), (BrokenPipeError(), 141)]
)
def test_exit_status(monkeypatch, raised, status):
    def command(arguments):
        raise raised

    monkeypatch.setattr(importlib.import_module("maskdp.sweep"), "main", command)
    assert cli.main(["sweep"]) == status


def test_another_exception_keeps_its_traceback(monkeypatch):
    def command(arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(importlib.import_module("maskdp.sweep"), "main", command)
    with pytest.raises(ZeroDivisionError):
        cli.main(["sweep"])


def test_a_mistake_in_a_real_process():
    finished = run("sweep", "--nope", "1")
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1
    assert "--nope" in finished.stderr


def test_version():
    finished = run("--version")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.strip() == importlib.import_module("maskdp").__version__


def test_neither_torch_nor_jax_is_imported_by_our_own_commands():
    code = (
        "import sys, maskdp.cli, maskdp.sweep, maskdp.demo, maskdp.report\n"
        "assert not {'torch', 'jax', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
