"""The report: self-contained, true to the runs' files, silent about this machine, and no ε where a card states none."""

import base64
import hashlib
import io
import json
import pathlib
import re
import shutil
import socket

import numpy as np
import pytest
import yaml
from PIL import Image

from maskdp import layers, report
from maskdp.errors import UserError
from maskdp.report import anonymization, page, pictures, review, runs

LABELS = ("wave", "clap", "sit_down")


def moving_person(index, frames=8, height=48, width=64):
    """A clip of a disc crossing a room, and the whole recording."""
    y, x = np.mgrid[:height, :width]
    scene = np.stack([80 + 60 * (x > 40), 110 + y, 140 + 0 * x], axis=-1).astype(np.uint8)
    rgba = np.zeros((frames, height, width, 4), np.uint8)
    for t in range(frames):
        person = (x - 10 - 6 * t) ** 2 + (y - 28) ** 2 < 12**2
        rgba[t][person] = (200, 60 + 40 * index, 40, 255)
    private = np.repeat(scene[None], frames, axis=0)
    return rgba, private, layers.composite(rgba, private)


def write_data(folder):
    """A two-layer dataset of three clips, its source videos and its manifest."""
    from anonymize.vision import video

    clips = []
    for index in range(3):
        rgba, private, recording = moving_person(index)
        path = folder / "videos" / f"v{index}.mp4"
        path.parent.mkdir(exist_ok=True, parents=True)
        video.encode(path, recording, 8.0)
        source = hashlib.sha256(path.read_bytes()).hexdigest()
        clips.append(
            layers.TwoLayerClip(rgba, private, index, f"v{index}-000", f"v{index}", "room", ("ann",), source, 8.0)
        )
    layers.write_dataset(folder / "data", {"train": clips[:2], "test": clips}, LABELS)
    figures = {"people": 1, "frames": 8, "frames_without_pose": 2, "frames_blanked": 0, "iou": 0.75}
    written = [{"clip_id": "v0-000", "status": "written", "reason": None, **figures}] * 3
    doubts = ("no person found", "no person found", "51% of the frames are blank", "72% of the frames are blank")
    refused = [{"status": "quarantined", "reason": reason, **figures} for reason in doubts]
    refused.append({"status": "failed", "reason": "not a video: /home/lab/a.mp4", "source": None})
    lines = "".join(json.dumps(record) + "\n" for record in written + refused)
    (folder / "data" / anonymization.MANIFEST).write_text(lines)


def write_run(folder, objective, seed=0, epsilon=None, composite=0.5, public_view=0.4, **settings):
    """A run folder in the documented format."""
    folder.mkdir(parents=True)
    config = {"objective": {"type": objective, "epsilon": epsilon, **settings}, "seed": seed, "out": str(folder)}
    (folder / runs.CONFIG).write_text(yaml.safe_dump(config))
    card = {
        "objective": objective,
        "epsilon": epsilon,
        "delta": None if epsilon is None else 1e-5,
        "speaks_of": "the scene of all clips of one video",
        "noise_multiplier": 2.68 if epsilon else 0.0,
        "adjacency": "zero_out",
        "unit": "video",
        "sampling": "independent",
        "event": "300 × Poisson(q=0.1, Gaussian(σ=2.68))",
        "most_records": {"person": 12, "place": 1, "video": 1},
        "dataset": {"id": "0" * 32, "context": "none"},
        "not_covered": ["labels", "silhouette, pose and gait"],
    }
    (folder / runs.CARD).write_text(json.dumps(card))
    result = {
        "accuracy": {"composite": composite, "public_view": public_view},
        "classes": len(LABELS),
        "dataset": "0" * 32,
    }
    result |= {"versions": {"jax": "0.10"}, "eval_split": "test"}
    (folder / runs.RESULT).write_text(json.dumps(result))
    rng = np.random.default_rng(seed)
    with open(folder / runs.METRICS, "w") as metrics:
        metrics.write('{"note": "not private"}\n')
        for step in range(0, 301, 10):
            rise = 1 - np.exp(-step / 80)
            record = {"step": step, "accuracy_composite": 0.3 + (composite - 0.3) * rise + rng.normal() * 0.01}
            metrics.write(json.dumps(record | {"accuracy_public_view": 0.3 + (public_view - 0.3) * rise}) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_data(folder)
    for seed in range(3):
        write_run(folder / "runs" / f"maskdp-{seed}", "maskdp", seed, 0.5, 0.70 + 0.02 * seed, 0.66)
        write_run(folder / "runs" / f"dp-{seed}", "dp_sgd", seed, 0.5, 0.41 + 0.01 * seed, 0.39)
    write_run(folder / "runs" / "public", "public_only", 0, None, 0.648, 0.65)
    write_run(folder / "runs" / "plain", "sgd", 0, None, 0.817, 0.55)
    return folder


@pytest.fixture(scope="module")
def html(folder):
    assert report.main(
        [
            *(str(folder / "runs"), "--data", str(folder / "data"), "--videos", str(folder / "videos")),
            *("--out", str(folder / "report.html")),
        ]
    ) in (None, 0)
    return (folder / "report.html").read_text()


def cells(html, table):
    """Text of the cells of the n-th table, row by row, without the head."""
    body = re.findall(r"<tbody>(.*?)</tbody>", html, re.S)[table]
    rows = re.findall(r"<tr.*?</tr>", body, re.S)
    return [[re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<td.*?</td>", row, re.S)] for row in rows]


def percent(value):
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def test_nothing_comes_from_elsewhere(html):
    assert not re.search(r"https?:|<link|<script|@import|<iframe", html)
    assert all(address.startswith("data:image/webp;base64,") for address in re.findall(r"url\((.*?)\)", html))
    assert not re.search(r"\b(src|href)=", html)
    assert len(html) < 6e6


def test_no_trace_of_the_machine(html, folder):
    words = re.sub(r"base64,[\w+/=]+", "", html)
    for trace in (str(folder), folder.name, str(pathlib.Path.home()), socket.gethostname(), "/tmp", "/home"):
        assert len(trace) < 4 or trace not in words


def test_configurations_that_differ_in_a_path_are_told_apart_without_it(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, "maskdp", epsilon=0.5, base=f"/home/ann/{name}")
    html = report.render([runs.load(tmp_path / name) for name in ("a", "b")])
    assert [row[0] for row in cells(html, 0)] == ["maskdp, base = a", "maskdp, base = b"]
    assert "/home" not in html


def test_every_figure_equals_the_files(html, folder):
    by_objective = {}
    for path in (folder / "runs").iterdir():
        by_objective.setdefault(json.loads((path / runs.CARD).read_text())["objective"], []).append(path)
    shown = {row[0]: row[1:] for row in cells(html, 0)}
    assert set(shown) == set(by_objective)
    for objective, paths in by_objective.items():
        results = [json.loads((path / runs.RESULT).read_text())["accuracy"] for path in paths]
        for column, view in enumerate(("composite", "public_view")):
            values = [result[view] for result in results]
            expected = percent(np.mean(values))
            if len(values) > 1:
                expected = f"{100 * np.mean(values):.1f} ± {percent(np.std(values, ddof=1))}"
            assert shown[objective][column] == expected
        assert shown[objective][-1] == str(len(paths))
    assert len(cells(html, -1)) == len(list((folder / "runs").iterdir()))
    for name, _, composite, public_view, *_ in cells(html, -1):
        result = json.loads((folder / "runs" / name / runs.RESULT).read_text())["accuracy"]
        assert [composite, public_view] == [percent(result["composite"]), percent(result["public_view"])]


def test_epsilon_stands_only_where_the_card_states_one(html, folder, tmp_path):
    shown = {row[0]: row[3] for row in cells(html, 0)}
    assert shown == {"maskdp": "0.5", "dp_sgd": "0.5", "public_only": "no ε", "sgd": "no ε"}
    plain = report.render([runs.load(folder / "runs" / "plain")])
    assert "no ε" in plain
    assert not re.search(r"ε\s*=", plain)


def test_quarantined_clips_are_shown_with_reason(html):
    assert cells(html, 1) == [
        ["no person found", "2"],
        ["…% of the frames are blank", "2"],
        ["not a video: a.mp4", "1"],
    ]


def test_what_comes_from_files_is_escaped(folder, tmp_path):
    write_run(tmp_path / "run", "maskdp", epsilon=0.5, note="<script>1")
    write_run(tmp_path / "run2", "maskdp", epsilon=0.5, note="<script>2")
    html = report.render([runs.load(tmp_path / name) for name in ("run", "run2")])
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_sprite_sheet_holds_the_frames_side_by_side():
    rgba, private, _ = moving_person(0)
    for frames in (private, rgba):
        sheet = pictures.sprite_sheet(frames, height=48, quality=90)
        image = Image.open(io.BytesIO(base64.b64decode(sheet.split(",")[1])))
        read = np.asarray(image.convert("RGBA" if frames.shape[3] == 4 else "RGB"))
        assert read.shape == (48, 8 * 64, frames.shape[3])
        expected = np.concatenate(list(frames), axis=1)
        seen = expected[..., 3:] > 0 if frames.shape[3] == 4 else True
        assert np.abs(np.where(seen, read.astype(int) - expected, 0)).mean() < 4


def test_scaling_keeps_the_avatars_colour_to_its_edge():
    rgba, _, _ = moving_person(0)
    small = pictures._scaled(rgba[0], 16, 12)
    assert small[small[..., 3] > 40][:, 0].min() >= 195  # black under alpha = 0 would darken the rim


def test_originals_are_shown_only_if_each_is_found(folder, tmp_path):
    dataset = layers.Dataset(folder / "data")
    titles = [[p.title for p in s.panels] for s in pictures.filmstrips(dataset, folder / "videos", 3)]
    assert titles == [["original", "private layer", "public layer", "composite", "public view"]] * 3
    assert all(len(strip.panels) == 4 for strip in pictures.filmstrips(dataset, tmp_path, 3))


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5"), (0.49961, "0.5"), (0.5001, "0.501"), (1e-5, "1e-5"), (0.0, "0"), (12.34, "12.4")]
)
def test_a_privacy_loss_is_never_shown_smaller_than_it_is(value, text):
    assert page.number(value) == text
    assert float(text) >= value


def test_what_is_no_finished_run_is_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        runs.load(tmp_path)
    write_run(tmp_path / "run", "sgd")
    (tmp_path / "run" / runs.RESULT).unlink()
    with pytest.raises(UserError, match=f"has no {runs.RESULT}"):
        runs.load(tmp_path / "run")


def test_a_metrics_line_cut_off_by_a_kill_is_passed_over(tmp_path):
    write_run(tmp_path / "run", "sgd")
    whole = runs.load(tmp_path / "run").metrics
    with open(tmp_path / "run" / runs.METRICS, "a") as metrics:
        metrics.write('{"step": 310, "accur')
    assert runs.load(tmp_path / "run").metrics == whole


# ------------------------------------------------------------------------------------------- the page of a dataset


def write_review(folder, tmp_path, overlaps=(0.9, 0.4, None), audit=None):
    """The dataset of `folder` with these fits and this audit, and the page of it."""
    data = tmp_path / "data"
    shutil.copytree(folder / "data", data)
    figures = {"people": 1, "frames": 8, "frames_without_pose": 0, "frames_blanked": 1, "reason": None}
    records = [{"clip_id": f"v{i}-000", "status": "written", "iou": v, **figures} for i, v in enumerate(overlaps)]
    (data / anonymization.MANIFEST).write_text("".join(json.dumps(record) + "\n" for record in records))
    if audit:
        (data / review.AUDIT).write_text(json.dumps(audit | {"dataset": audit["dataset"] or contents_tag(data)}))
    out = tmp_path / "review.html"
    arguments = [str(data), "--videos", str(folder / "videos"), "--out", str(out)]
    assert report.main(arguments) == 0
    return out.read_text()


def contents_tag(data):
    return layers.Dataset(data).contents_tag()


LEAK = {
    "check": "nobody seen",
    "holds": False,
    "seen": "somebody in v0-000",
    "figures": {"seen_in": ["v0-000"], "nobody": ["v1-000"]},
}


def test_clips_without_a_fit_and_of_the_worst_fit_come_first(folder, tmp_path):
    html = write_review(folder, tmp_path)
    articles = re.findall(r'<article class="clip[^"]*" id="([^"]+)"', html)
    assert articles == ["v2-000", "v1-000", "v1-000", "v0-000", "v0-000"]  # of both splits
    assert re.findall(r"fit ([\d.–]+)", html) == ["–", "0.40", "0.40", "0.90", "0.90"]
    assert "1 frames blanked" in html
    assert "No audit was made" in html
    assert str(tmp_path) not in html


def test_a_sheet_shows_recording_private_layer_and_composite(folder, tmp_path):
    html = write_review(folder, tmp_path)
    for rows in re.findall(r"<ol>(.*?)</ol>", html):
        assert re.findall(r"<li>(.*?)</li>", rows) == ["recording", "private layer", "as published"]
    record = layers.Dataset(folder / "data")["test"][0]
    picture, _ = review.sheet(record, None)
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.split(",")[1]))).convert("RGB")).astype(int)
    clip, height = record.clip(), review.HEIGHT
    first = np.asarray(Image.fromarray(clip.private[0]).resize((image.shape[1] // review.COLUMNS, height)))
    assert np.abs(image[:height, : first.shape[1]] - first).mean() < 8
    assert image[height:, : first.shape[1]].mean((0, 1))[0] > image[:height, : first.shape[1]].mean((0, 1))[0] + 5


def test_what_the_audit_found_is_on_the_page_and_marks_the_clips(folder, tmp_path):
    html = write_review(folder, tmp_path, audit={"findings": [LEAK], "dataset": None})
    assert "somebody in v0-000" in html
    assert "0 of 1 bounds hold" in html
    assert '<td class="fails">fails</td>' in html
    assert html.count('class="clip suspect"') == 4
    assert html.count("somebody is seen in the private layer") == 2


def test_an_audit_of_another_dataset_is_not_shown(folder, tmp_path):
    html = write_review(folder, tmp_path, audit={"findings": [LEAK], "dataset": "0" * 64})
    assert "another state" in html
    assert "somebody in v0-000" not in html


def test_clips_left_out_of_the_page_are_said(folder, tmp_path):
    assert "Only 2 of 5" in report.render_review(folder / "data", None, 2)


def test_a_broken_audit_is_one_line(folder, tmp_path):
    shutil.copytree(folder / "data", tmp_path / "data")
    (tmp_path / "data" / review.AUDIT).write_text("{}")
    with pytest.raises(UserError, match=r"audit\.json: cannot be read"):
        report.render_review(tmp_path / "data", None, 2)


def write_audit(folder, holds=True):
    """What `maskdp audit` leaves in a run's folder."""
    findings = [
        {"check": "noise is stated", "holds": holds, "found": "0.998", "claimed": "1", "private": False},
        {"check": "terms are bounded", "holds": True, "found": "0.7321 C", "claimed": "1 C", "private": True},
    ]
    attack = {"name": "sum", "bounds": {"one run": 0.1234}, "false": [0, 0.25, 1], "true": [0, 0.5, 1]}
    (folder / runs.AUDIT).write_text(json.dumps({"maskdp": "0", "findings": findings, "attacks": [attack]}))


def test_what_attacks_found_is_shown_and_private_findings_only_with_the_data(folder, tmp_path):
    write_run(tmp_path / "run", "maskdp", 0, 0.5)
    write_audit(tmp_path / "run")
    run = runs.load(tmp_path / "run")
    released, own = report.render([run]), report.render([run], folder / "data")
    for html in (released, own):
        assert "ε ≥ 0.12; the card claims ε = 0.5" in html
        assert 'points="0.00,100.00 25.00,50.00 100.00,0.00"' in html
    assert "0.7321" in own
    assert "0.7321" not in released
    assert "All 1 checks hold." in released


def test_a_failed_check_is_said(tmp_path):
    write_run(tmp_path / "run", "maskdp", 0, 0.5)
    write_audit(tmp_path / "run", holds=False)
    html = report.render([runs.load(tmp_path / "run")])
    assert "1 of 1 checks failed." in html
    assert "FAILS" in html


def test_no_audit_no_section(tmp_path):
    write_run(tmp_path / "run", "maskdp", 0, 0.5)
    assert "What attacks found" not in report.render([runs.load(tmp_path / "run")])
