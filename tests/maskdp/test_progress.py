"""The progress bar: silent on standard output, a closing line in a log, lines at intervals."""

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
    assert lines[0].endswith("s left a.mp4")


def test_work_that_fails_does_not_close_with_a_line_that_claims_it_done(capsys):
    try:
        with progress.bar("clips", 3) as advance:
            advance()
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert "clips: 3/3" not in capsys.readouterr().err
