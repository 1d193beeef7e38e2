"""The progress bar: silent on standard output, a closing line in a log, lines at intervals."""

import io

from rich.console import Console

from maskdp import progress


def test_a_log_gets_one_closing_line_and_standard_output_nothing(capsys):
    with progress.bar("clips", 3) as advance:
        for _ in range(3):
            advance()
    out, err = capsys.readouterr()
    assert not out
    assert err == "clips: 3/3 in 0 s\n"


def test_a_log_shows_rate_time_left_and_note(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_EVERY_SECONDS", -1.0)
    with progress.bar("clips", 4, unit="clips") as advance:
        advance(2, note="a.mp4")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("clips: 2/4, ")
    assert " clips/s, " in lines[0]
    assert lines[0].endswith(" left, a.mp4")


def test_work_that_was_there_already_says_nothing_of_the_pace(capsys, monkeypatch):
    now = iter([0.0, *[10.0] * 9])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(progress, "LOG_EVERY_SECONDS", -1.0)
    with progress.bar("clips", 1000, unit="clips") as advance:
        advance(900, known=True)
        advance(1)
    assert capsys.readouterr().err.splitlines()[:2] == [
        "clips: 900/1000",
        "clips: 901/1000, 0.10 clips/s, 0:16:30 left",
    ]


def test_a_terminal_gets_the_same_words(monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(progress, "Console", lambda file: console)
    with progress.bar("clips", 4, unit="clips") as advance:
        advance(2, note="a.mp4")
    assert "2/4" in screen.getvalue()
    assert " clips/s, 0:00:0" in screen.getvalue()
    assert "a.mp4" in screen.getvalue()


def test_work_that_fails_does_not_close_with_a_line_that_claims_it_done(capsys):
    try:
        with progress.bar("clips", 3) as advance:
            advance()
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert "clips: 3/3" not in capsys.readouterr().err
