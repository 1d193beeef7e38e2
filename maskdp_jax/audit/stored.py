"""What lies on disk: the contract of a dataset, and where a run keeps its secret."""

import json
import pathlib
import re
import stat
from collections.abc import Iterator

from maskdp import layers, progress
from maskdp.errors import UserError
from maskdp_jax.audit.findings import Finding
from maskdp_jax.run_folder import SECRET


def dataset_checks(dataset: layers.Dataset) -> Iterator[Finding]:
    """The contract in every frame, no path in any key, what the avatars were drawn from."""
    broken, paths, count = [], [], 0
    total = sum(len(dataset[split]) for split in dataset.splits)
    with progress.bar("audit", total, "clips") as advance:
        for split in dataset.splits:
            for record in dataset[split]:
                count += 1
                try:
                    record.layers(range(record.frames))
                except UserError as error:
                    broken.append(str(error))
                names = (record.clip_id, record.video_id, record.scene_id, *record.subject_ids)
                if any(re.search(r"^[/~]|\\|\.\.|^[A-Za-z]:", name) for name in names) or not re.fullmatch(
                    r"[0-9a-f]{64}", record.source
                ):
                    paths.append(record.clip_id)
                advance(1)
    yield Finding(
        "no colour where alpha is 0, in every frame", not broken, broken[0] if broken else f"{count} clips, all frames"
    )
    yield Finding("no path in keys and source", not paths, ", ".join(paths[:3]) or "none")
    context = dataset.metadata.get("context")
    yield Finding("avatars independent of the scene", context == "none", f"context: {context}")


def secret_checks(folder: pathlib.Path) -> Iterator[Finding]:
    """The run's secret: who can read it, and whether another file of the run holds it."""
    path = folder / SECRET
    if not path.exists():
        yield Finding("secret kept from the run folder", True, "no run.secret here")
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    yield Finding("secret readable by its owner alone", mode == 0o600, f"mode {mode:04o}", "mode 0600")
    words = json.loads(path.read_text())["secret"]
    needles = (words.encode(), bytes.fromhex(words))
    files = [file for file in folder.rglob("*") if file.is_file() and file != path]
    leaks = [str(file.relative_to(folder)) for file in files if any(needle in file.read_bytes() for needle in needles)]
    yield Finding(
        "secret in no other file of the run", not leaks, ", ".join(leaks) or f"{len(files)} files searched", "in none"
    )
