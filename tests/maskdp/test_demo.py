"""The demo is public commands in a row: a finished stage is not run again, a failed one is where it goes on."""

import pytest

from maskdp import cli, config, demo
from maskdp.errors import UserError
from maskdp_jax.config import TrainConfig

VERSION = demo.Stage("say the version", ("--version",))
HELP = demo.Stage("help", ("--help",))
BROKEN = demo.Stage("break", ("no-such-command",))


def run(stages, folder):
    return demo.run(stages, demo.State(folder / demo.STATE, 40))


def test_every_stage_is_a_public_command(tmp_path):
    stages = demo.stages(tmp_path, 40)
    assert {stage.words[0] for stage in stages} <= set(cli.COMMANDS)
    assert {"studio", "anonymize", "train", "eval", "audit", "report"} <= {stage.words[0] for stage in stages}


def test_objectives_start_alike_and_stand_under_one_claim(tmp_path):
    own = {"--out", "--objective.type"}
    trained = [stage.words for stage in demo.stages(tmp_path, 40) if stage.words[0] == "train"]
    settings = [{key: value for key, value in zip(words[1::2], words[2::2]) if key not in own} for words in trained]
    assert len(trained) == len(demo.OBJECTIVES)
    assert all(each == settings[0] for each in settings)


def test_every_training_command_parses(tmp_path):
    for stage in demo.stages(tmp_path, 40):
        if stage.words[0] == "train":
            parsed = config.parse(TrainConfig, list(stage.words[1:]), "train")
            assert not parsed.objective.private or parsed.objective.epsilon == 0.5


def test_a_finished_stage_is_not_run_again(tmp_path, capfd):
    assert run([VERSION, HELP], tmp_path) == 0
    first = capfd.readouterr().out
    assert "[1/2] say the version\n      $ maskdp --version\n" in first
    assert "usage: maskdp" in first
    assert run([VERSION, HELP], tmp_path) == 0
    assert capfd.readouterr().out == "[1/2] say the version: done before\n[2/2] help: done before\n"


def test_a_failed_stage_stops_it_and_is_where_it_goes_on(tmp_path, capfd):
    assert run([VERSION, BROKEN, HELP], tmp_path) == 2
    out, err = capfd.readouterr()
    assert "stopped at [2/3] break" in out
    assert "no command 'no-such-command'" in err
    assert "[3/3]" not in out
    assert run([VERSION, HELP], tmp_path) == 0
    out = capfd.readouterr().out
    assert "[1/2] say the version: done before\n" in out
    assert "usage: maskdp" in out


def test_what_follows_a_changed_stage_is_run_again(tmp_path, capfd):
    assert run([VERSION, HELP], tmp_path) == 0
    capfd.readouterr()
    other = demo.Stage("say the version", ("-V",))
    assert run([other, HELP], tmp_path) == 0
    out = capfd.readouterr().out
    assert "done before" not in out
    assert "usage: maskdp" in out


def test_a_demo_of_another_size_is_left_alone(tmp_path):
    assert run([VERSION], tmp_path) == 0
    with pytest.raises(UserError, match="holds a demo of 40 videos"):
        demo.State(tmp_path / demo.STATE, 60)


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[]"])
def test_a_foreign_state_file_is_one_line(tmp_path, text):
    (tmp_path / demo.STATE).write_text(text)
    with pytest.raises(UserError, match="not a demo's state file"):
        demo.State(tmp_path / demo.STATE, 40)


def test_too_few_videos_is_one_line(tmp_path):
    with pytest.raises(UserError, match="--videos: 3"):
        demo.main(["--out", str(tmp_path), "--videos", "3"])
