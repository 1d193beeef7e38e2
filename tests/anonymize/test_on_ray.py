"""`maskdp anonymize --ray` on two real Ray nodes, one of them killed midway."""

import os
import pathlib
import sys
import threading
import time

import pytest

from anonymize import command
from maskdp import cli, layers

pytestmark = pytest.mark.slow
SMALL = ["--video.short_side", "128", "--fit.library", "300", "--fit.steps", "4"]


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes of one worker each, in processes of their own."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = Cluster()
    cluster.add_node(num_cpus=0)  # the head, which outlives the others
    cluster.nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    yield cluster
    cluster.shutdown()


def test_a_node_killed_midway_leaves_the_shards_of_a_local_run_and_ray_holds_no_secret(
    cluster, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)  # relative paths hold on every node
    videos = ["--videos", "5", "--frames", "12", "--size", "128", "--seed", "3"]
    assert cli.main(["studio", "--out", "studio", *videos]) == 0
    manifest, local, ray = "studio/manifest.csv", pathlib.Path("local"), pathlib.Path("ray")
    assert cli.main(["anonymize", manifest, "--out", str(local), *SMALL]) == 0
    ray.mkdir()
    secret = (local / "wardrobe.secret").read_bytes()
    (ray / "wardrobe.secret").write_bytes(secret)
    finished_before = []

    def kill_one() -> None:
        while not list((ray / "work").glob("*.json")):
            time.sleep(0.05)
        finished_before.extend((ray / "work").glob("*.json"))
        cluster.remove_node(cluster.nodes[1], allow_graceful=False)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    arguments = ["--workers", "2", "--ray", cluster.address]
    assert cli.main(["anonymize", manifest, "--out", str(ray), *SMALL, *arguments]) == 0
    assert not killer.is_alive()
    assert "a worker died; another takes over its work" in capfd.readouterr().err
    assert len(finished_before) < 5
    assert layers.Dataset(ray).contents_tag() == layers.Dataset(local).contents_tag()
    assert {file.name for file in ray.rglob(".*")} == {".lock", command.WORKERS_LOCK}
    session = pathlib.Path(os.path.realpath("/tmp/ray/session_latest"))
    seen = [file for file in session.rglob("*") if file.is_file()]
    assert any("worker" in file.name for file in seen)
    for file in seen:
        data = file.read_bytes()
        assert secret not in data, file
        assert secret.hex().encode() not in data, file


def test_no_cluster_is_one_line(tmp_path, capfd):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    (tmp_path / "a.mp4").touch()
    arguments = ["anonymize", str(tmp_path / "a.mp4"), "--out", str(tmp_path / "out"), "--ray", "localhost:1"]
    assert cli.main(arguments) == 2
    assert capfd.readouterr().err.startswith("maskdp anonymize: --ray: localhost:1: no cluster to be reached (")


def test_without_ray_is_one_line(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "a.mp4").touch()
    arguments = ["anonymize", str(tmp_path / "a.mp4"), "--out", str(tmp_path / "out"), "--ray", "auto"]
    assert cli.main(arguments) == 2
    assert "pip install 'maskdp[ray]'" in capfd.readouterr().err
