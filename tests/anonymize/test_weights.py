"""`maskdp weights fetch` against a Hub of our own on 127.0.0.1, and weights folders that are not what they should."""

import hashlib
import http.server
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import pytest

from anonymize import weights
from anonymize.refine import hub as refine_hub
from anonymize.refine.refiner import ControlNetConfig
from maskdp.errors import UserError

COMMITS = {repository: hashlib.sha1(repository.encode()).hexdigest() for repository in weights.PARTS.values()}
FILES = {
    "config.json": b'{"model_type": "any"}',
    "preprocessor_config.json": b"{}",
    "model.safetensors": b"\0" * 40,
    "README.md": b"not wanted",
    "pytorch_model.bin": b"never wanted",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's HTTP interface as the client asks for. `served` may differ from what the listing says."""

    served: dict[str, bytes]
    listed: dict[str, bytes]
    heads: dict[str, str]

    def do_HEAD(self):
        self._answer(False)

    def do_GET(self):
        self._answer(True)

    def _answer(self, body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repository = "/".join(parts[2:4])
            sha = parts[5] if len(parts) > 5 and parts[4] == "revision" else self.heads[repository]
            files = [self._listed(*item) for item in self.listed.items()]
            siblings = [{**file, "rfilename": file["path"], "blobId": file["oid"]} for file in files]
            answer = files if parts[4:5] == ["tree"] else {"id": repository, "sha": sha, "siblings": siblings}
            self._send(json.dumps(answer).encode(), body, sha)
        elif (name := "/".join(parts[4:])) in self.served:
            self._send(self.served[name], body, parts[3])
        else:
            self.send_error(404)

    def _listed(self, name: str, data: bytes) -> dict:
        oid, sha256 = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), hashlib.sha256(data).hexdigest()
        entry = {"type": "file", "path": name, "size": len(data), "oid": oid}
        if name.endswith((".safetensors", ".bin")):
            entry["lfs"] = {"oid": sha256, "sha256": sha256, "size": len(data), "pointerSize": 120}
        return entry

    def _send(self, data: bytes, body: bool, commit: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    handler = type("OneHub", (Hub,), {"served": dict(FILES), "listed": dict(FILES), "heads": dict(COMMITS)})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()


def fetch(url: str, out: pathlib.Path, *arguments: str, **environment) -> subprocess.CompletedProcess:
    """The command in a process of its own, since the client reads its endpoint when it is imported."""
    fresh = {"HF_ENDPOINT": url, "HF_HOME": str(out.parent / "hf"), "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-m", "maskdp", "weights", "fetch", *arguments, "--out", str(out)]
    return subprocess.run(command, env={**os.environ, **fresh}, capture_output=True, text=True, timeout=120)


def last_line(finished: subprocess.CompletedProcess) -> str:
    assert finished.returncode == 2, finished
    assert "Traceback" not in finished.stderr
    return finished.stderr.strip().splitlines()[-1]


def test_a_fetch_records_what_it_got_and_the_next_one_keeps_to_it(hub, tmp_path):
    out = tmp_path / "weights"
    finished = fetch(hub.url, out)
    assert finished.returncode == 0, finished.stderr
    record = json.loads((out / weights.RECORD).read_text())
    wanted = {name: hashlib.sha256(FILES[name]).hexdigest() for name in FILES if name.endswith(("json", "safetensors"))}
    for part, repository in weights.PARTS.items():
        assert record[part] == {"repository": repository, "revision": COMMITS[repository], "files": wanted}
        assert {file.name for file in (out / part).iterdir()} == set(wanted)
    assert len(weights.check(out)) == 64

    hub.heads = dict.fromkeys(COMMITS, "f" * 40)  # the repositories go on
    (out / "depth" / "model.safetensors").unlink()
    (out / "depth" / "config.json").unlink()
    (out / "depth" / "preprocessor_config.json").unlink()
    (out / "depth").rmdir()
    again = fetch(hub.url, out)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("there already") == 3
    assert json.loads((out / weights.RECORD).read_text()) == record

    hub.listed = hub.served = {**FILES, "model.safetensors": b"\1" * 40}  # and one is rewritten
    for file in (out / "depth").iterdir():
        file.unlink()
    (out / "depth").rmdir()
    assert "is not the file that was expected" in last_line(fetch(hub.url, out))
    assert not (out / "depth").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_is_not_what_the_hub_lists_is_refused(hub, tmp_path, name):
    hub.served[name] = FILES[name][:-1] + b"!"
    line = last_line(fetch(hub.url, tmp_path / "weights"))
    where = f"{weights.PARTS['detector']}: {name} at {COMMITS[weights.PARTS['detector']]}"
    assert line == f"maskdp weights: {where} is not the file that was expected"
    assert not (tmp_path / "weights" / "detector").exists()
    assert not (tmp_path / "weights" / weights.RECORD).exists()


def test_a_part_that_the_user_put_there_is_not_replaced(hub, tmp_path):
    (tmp_path / "weights" / "detector").mkdir(parents=True)
    assert "detector: is there, but" in last_line(fetch(hub.url, tmp_path / "weights"))


def test_without_safetensors_or_without_a_network_it_is_one_line(hub, tmp_path):
    hub.listed.pop("model.safetensors")
    assert "holds no safetensors" in last_line(fetch(hub.url, tmp_path / "weights"))
    finished = fetch("http://127.0.0.1:9", tmp_path / "weights", HF_HUB_OFFLINE="1")
    assert f"{weights.PARTS['detector']}: cannot be fetched" in last_line(finished)


def test_a_pipeline_for_the_refinement_is_put_together_pinned_and_checked(hub, tmp_path, tiny):
    """Inpainting and ControlNet come from two repositories; what lies there then is what the refinement loads."""
    base, net = pathlib.Path(tiny("sd_inpaint")), pathlib.Path(tiny("sd_control")) / "controlnet"
    files = {str(file.relative_to(base)): file.read_bytes() for file in base.rglob("*") if file.is_file()}
    files |= {file.name: file.read_bytes() for file in net.iterdir()}
    unwanted = {
        "v1-5-pruned.safetensors": b"1",
        "unet/diffusion_pytorch_model.fp16.safetensors": b"2",
        "unet/a.bin": b"3",
    }
    hub.listed = hub.served = files | unwanted
    pipeline = refine_hub.PIPELINES["sd"]
    hub.heads = {pipeline.repository: "a" * 40, pipeline.controlnet: "b" * 40}
    out = tmp_path / "weights"
    finished = fetch(hub.url, out, "refine", "--kind", "sd")
    assert finished.returncode == 0, finished.stderr
    place = out / "refine" / "sd"
    assert not [name for name in unwanted if (place / name).exists()]
    ControlNetConfig(folder=str(place), size=64, steps=2).load()
    record = weights.record(out / "refine")
    assert record["sd"]["revision"] == "a" * 40
    assert record["sd controlnet"]["revision"] == "b" * 40

    hub.heads = dict.fromkeys(hub.heads, "f" * 40)  # the repositories go on
    shutil.rmtree(place)
    assert fetch(hub.url, out, "refine", "--kind", "sd").returncode == 0
    assert weights.record(out / "refine") == record
    weight = next(place.glob("unet/*.safetensors"))
    weight.write_bytes(weight.read_bytes()[:-1] + b"!")
    weights._checksums.cache_clear()
    with pytest.raises(UserError, match=r"unet/.* is not the file that .*weights.json records"):
        ControlNetConfig(folder=str(place), size=64, steps=2).load()
    shutil.rmtree(place)
    hub.served = {**hub.served, "vae/config.json": b"{}"}
    assert "vae/config.json at " in last_line(fetch(hub.url, out, "refine", "--kind", "sd"))
    assert not place.exists()
    assert "--kind: 'flux', expected one of sd" in last_line(fetch(hub.url, out, "refine", "--kind", "flux"))


@pytest.mark.parametrize("arguments", [[], ["remove"]])
def test_other_words_are_refused(arguments):
    with pytest.raises(UserError, match="maskdp weights fetch"):
        weights.main(arguments)


# ----------------------------------------------------------------------------------------------------- what lies there


def folder(place: pathlib.Path) -> pathlib.Path:
    """A folder as a fetch leaves it."""
    record = {}
    for part, repository in weights.PARTS.items():
        (place / part).mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (place / part / name).write_bytes(FILES[name])
        files = {file.name: weights.sha256(file) for file in (place / part).iterdir()}
        record[part] = {"repository": repository, "revision": "a" * 40, "files": files}
    (place / weights.RECORD).write_text(json.dumps(record))
    return place


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda place: (place / "tracker" / "model.safetensors").write_bytes(b"\1" * 40),
            "tracker/model.safetensors: is",
        ),
        (lambda place: (place / "tracker" / "adapter_config.json").write_text("{}"), "tracker/adapter_config.json: is"),
        (lambda place: (place / "tracker" / "config.json").unlink(), "tracker: no model here"),
        (lambda place: (place / weights.RECORD).write_text("[]"), "weights.json: not a record"),
        (lambda place: (place / weights.RECORD).write_text('{"depth": 1}'), "weights.json: not a record"),
    ],
)
def test_weights_are_held_against_the_record(tmp_path, spoil, message):
    place = folder(tmp_path / "weights")
    spoil(place)
    with pytest.raises(UserError) as error:
        weights.check(place)
    assert message in str(error.value)
    with pytest.raises(UserError):
        weights.load(place, "tracker", object, ("any",))


def test_the_digest_is_that_of_all_files_with_or_without_a_record(tmp_path):
    one, two, three = (folder(tmp_path / name) for name in "abc")
    (two / weights.RECORD).unlink()
    (three / weights.RECORD).unlink()
    (three / "depth" / "config.json").write_text("{} ")
    assert weights.check(one) == weights.check(two) != weights.check(three)
    assert weights.complete(one)
    (one / "depth" / "model.safetensors").unlink()
    assert not weights.complete(one)
