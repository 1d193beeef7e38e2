"""Whole or absent, even under kill -9."""

import json
import math
import pathlib
import signal
import subprocess
import sys

import pytest

from maskdp import atomic


def half_and_fail(path):
    path.write_text("half")
    raise ZeroDivisionError


def test_writes_and_replaces(tmp_path):
    for text in ("one", "two"):
        atomic.write_text(tmp_path / "new" / "file.txt", text)
        assert (tmp_path / "new" / "file.txt").read_text() == text
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["file.txt"]


def test_an_exception_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    atomic.write_text(tmp_path / "file.txt", "old")
    with pytest.raises(ZeroDivisionError), atomic.writing(tmp_path / "file.txt") as aside:
        half_and_fail(aside)
    assert (tmp_path / "file.txt").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_an_exception_leaves_no_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic.folder(tmp_path / "out") as aside:
        half_and_fail(aside / "part")
    assert not list(tmp_path.iterdir())


def test_a_finished_folder_is_never_overwritten(tmp_path):
    with atomic.folder(tmp_path / "out") as aside:
        (aside / "part").write_text("whole")
    with pytest.raises(OSError), atomic.folder(tmp_path / "out") as aside:
        (aside / "part").write_text("other")
    assert (tmp_path / "out" / "part").read_text() == "whole"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "code",
    [
        "with atomic.writing(path / 'out') as aside:\n    aside.write_text('half')\n",
        "with atomic.folder(path / 'out') as aside:\n    (aside / 'part').write_text('half')\n",
    ],
)
def test_killed_while_writing_leaves_nothing_of_that_name(tmp_path, code):
    code = f"""
import pathlib, sys, time
from maskdp import atomic
path = pathlib.Path(sys.argv[1])
{code}    print("writing", flush=True)
    time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"writing\n"
    child.send_signal(signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert all(left.name.startswith(".") for left in tmp_path.iterdir())
    (tmp_path / ".settings").touch()
    atomic.sweep(tmp_path)
    assert [left.name for left in tmp_path.iterdir()] == [".settings"]


def test_a_reader_beside_a_writer_never_sees_half_a_file(tmp_path):
    path = tmp_path / "numbers.json"
    code = "import sys\nfrom maskdp import atomic\nfor i in range(150): atomic.write_json(sys.argv[1], [i] * 20000)\n"
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    seen = 0
    while writer.poll() is None:
        if path.exists():
            numbers = json.loads(path.read_text())
            assert numbers == numbers[:1] * 20000
            seen += 1
    assert writer.returncode == 0
    assert seen > 1


def test_json_has_neither_nan_nor_infinity(tmp_path):
    atomic.write_json(tmp_path / "a.json", {"a": math.nan, "b": [math.inf, -math.inf, 1.5], "c": (1, None)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None, "b": [None, None, 1.5], "c": [1, None]}


def test_files_can_be_read_by_others(tmp_path):
    atomic.write_text(tmp_path / "file", "x")
    assert pathlib.Path(tmp_path / "file").stat().st_mode & 0o777 == 0o644
