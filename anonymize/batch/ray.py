"""Videos anonymized on the machines of a Ray cluster: an actor a worker, its models loaded once, and a video a task.

The videos, the output folder, the secret's file and the folder that the command is given in lie on a file system that
all machines share, and all have maskdp. A worker writes the finished clips there itself, so that no picture goes
through Ray, only paths, labels and records; and it reads the secret there, so that Ray never holds it: not in its
object store, which may spill to disk, nor in what it logs.

A video whose worker or machine dies is given to another worker. Should the first be alive after all, cut off only, both
write the same bytes under the same name, each in one step: no clip is lost, doubled or mixed.
"""

import os
import pathlib
import socket
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence

from anonymize.config import AnonymizeConfig
from maskdp.errors import UserError

ATTEMPTS = 4  # at a video whose workers die


class Actor:
    """One worker of the cluster."""

    def __init__(self, settings: AnonymizeConfig, secret: pathlib.Path, folder: str):
        os.chdir(folder)  # what paths in the settings are relative to
        from anonymize.command import Worker, wardrobe_secret

        self._work = Worker(settings, wardrobe_secret(secret, create=False))

    def ready(self) -> None:
        """Returns as soon as the worker has started."""

    def work(self, source):
        """What `Worker` returns for one video."""
        return self._work(source)


def results(sources: Sequence, settings: AnonymizeConfig, secret: pathlib.Path) -> Iterator[tuple]:
    """Yields (source, what `Worker` returns for it) as videos are finished.

    Args:
        secret: file of the wardrobe's secret.

    Raises:
        UserError: Ray is missing, there is no such cluster, or a video brought down its worker `ATTEMPTS` times.
        OSError: the output folder cannot be written.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError("--ray: Ray is missing, expected `pip install 'maskdp[ray]'`") from None
    host, _, port = settings.ray.partition(":")
    try:
        if port.isdigit():  # where nobody answers, Ray itself tries for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(settings.ray, logging_level="ERROR", log_to_driver=False)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"--ray: {settings.ray}: no cluster to be reached ({reason}), expected `ray start`") from None
    actor_class = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(Actor)
    waiting, failures, idle, running = deque(sources), Counter(), [], {}

    def start() -> None:
        actor = actor_class.remote(settings, secret, os.getcwd())
        running[actor.ready.remote()] = actor, None  # a video is given to workers that have started

    try:
        for _ in range(min(settings.workers, len(sources))):
            start()
        left = len(sources)
        while left:
            (task,), _ = ray.wait(list(running))
            actor, source = running.pop(task)
            try:
                outcome = ray.get(task)
            except ray.exceptions.RayActorError as error:
                failures[source] += 1
                if failures[source] == ATTEMPTS:
                    what = f"{source.path}: its workers die" if source else "--ray: workers do not start"
                    raise UserError(f"{what} ({str(error).strip().splitlines()[-1]})") from None
                print("a worker died; another takes over its work", file=sys.stderr)
                if source:
                    waiting.appendleft(source)
                start()
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            else:
                failures.pop(source, None)
                idle.append(actor)
                if source:
                    left -= 1
                    yield source, outcome
            while idle and waiting:
                actor, source = idle.pop(), waiting.popleft()
                running[actor.work.remote(source)] = actor, source
    finally:
        ray.shutdown()
