"""What may leave the lab, searched byte by byte for what must not."""

import getpass
import hashlib
import json
import os
import pathlib
import socket
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import tensorstore

from maskdp import layers
from maskdp_jax import checkpoint
from maskdp_jax.audit.findings import Finding
from maskdp_jax.run_folder import RUN, SECRET

_SHORTEST = 5  # letters of a user or host name from which on it is not found by chance


def secrets_of(run: pathlib.Path | None, dataset: layers.Dataset | None) -> dict[str, list[bytes]]:
    """What → its forms in bytes: secrets, hashes of the dataset's files, and names of this machine."""
    needles: dict[str, list[bytes]] = {}
    if run is not None and (run / SECRET).exists():
        needles["the run's secret"] = _hex_and_raw(json.loads((run / SECRET).read_text())["secret"])
    if run is not None and (run / RUN).exists():
        needles["the run's id"] = _hex_and_raw(json.loads((run / RUN).read_text())["run_id"])
    if dataset is not None:
        for file in sorted(dataset.path.rglob("*")):
            if not file.is_file():
                continue
            with open(file, "rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            needles[f"SHA-256 of {file.name}"] = _hex_and_raw(digest)
        needles["the dataset's key"] = _hex_and_raw(dataset.identity.key.hex())
        needles["keyed hash of the dataset"] = _hex_and_raw(dataset.contents_tag())
        for split in dataset.splits:
            for record in dataset[split]:
                if record.source.strip("0"):
                    needles.setdefault("keyed hash of a recording", []).extend(_hex_and_raw(record.source))
    places = {run, dataset and dataset.path, pathlib.Path.cwd(), pathlib.Path.home(), pathlib.Path(os.sep) / "tmp"}
    needles["a path of this machine"] = [
        str(place.absolute()).encode() + tail
        for place in places
        if place is not None and str(place.absolute()) != os.sep
        for tail in (b"/", b'"')
    ]
    names = {socket.gethostname(), getpass.getuser()} - {"localhost"}
    needles["a user or host name"] = [name.encode() for name in names if len(name) >= _SHORTEST]
    return {what: forms for what, forms in needles.items() if forms}


def _hex_and_raw(digest: str) -> list[bytes]:
    return [digest.encode(), digest.upper().encode(), bytes.fromhex(digest)]


def contents(folder: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every file, of every entry of checkpoints' key-value stores, and of every array."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            yield str(file.relative_to(folder)), file.read_bytes()
        if file.name == "manifest.ocdbt":
            store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{file.parent.absolute()}/"}).result()
            for key in store.list().result():
                yield f"{file.parent.relative_to(folder)}: {key.decode(errors='replace')}", key + store[key]


def scan(folder: str | pathlib.Path, needles: Mapping[str, list[bytes]], arrays=()) -> Finding:
    """Whether any of `needles` is anywhere in `folder`, its names included, or in the bytes of `arrays`."""
    found, bytes_read = [], 0
    everything = [
        *contents(pathlib.Path(folder)),
        *((f"array {n}", np.asarray(a).tobytes()) for n, a in enumerate(arrays)),
    ]
    for name, content in everything:
        bytes_read += len(content)
        for what, forms in needles.items():
            if any(form in content or form in name.encode() for form in forms):
                found.append(f"{what} in {name}")
    return Finding(
        "nothing secret in what is released",
        not found,
        "; ".join(found[:5]) or f"{len(everything)} files, entries and arrays ({bytes_read / 1e6:.1f} MB)",
        f"none of {len(needles)} secrets, hashes, paths and names",
    )


def differences(one: str | pathlib.Path, other: str | pathlib.Path) -> list[str]:
    """Files in which two exports differ, or which only one of them has."""
    trees = [
        {str(file.relative_to(folder)): file.read_bytes() for file in pathlib.Path(folder).rglob("*") if file.is_file()}
        for folder in (one, other)
    ]
    return sorted(name for name in trees[0].keys() | trees[1].keys() if trees[0].get(name) != trees[1].get(name))


def released_arrays(folder: pathlib.Path) -> list[jax.Array]:
    """The weights in a run or an export."""
    return jax.tree.leaves(checkpoint.load(folder).weights)
