"""Public weights of the model backends: where they lie, fetching them pinned, checking and loading them.

A weights folder holds one folder a part (`PARTS`), each a saved transformers model: `config.json`, safetensors and,
where there is one, a preprocessor config. `weights.json` beside them records for each part the repository, its commit
and the SHA-256 of every file; whatever it records is checked whenever weights are loaded. A folder filled by hand needs
no `weights.json`. Nothing but safetensors is ever loaded, and only `maskdp weights fetch` uses a network. The models of
`finder.type: blazepose` have their own pins (`people/blazepose/wheel.py`).
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

from maskdp import atomic, config
from maskdp.errors import UserError

PARTS = {
    "detector": "PekingU/rtdetr_v2_r50vd",
    "tracker": "facebook/sam2.1-hiera-small",
    "keypoints": "usyd-community/vitpose-base-simple",
    "depth": "depth-anything/Depth-Anything-V2-Small-hf",
}
RECORD = "weights.json"
_WANTED = ("*.safetensors", "*.safetensors.index.json", "config.json", "*processor_config.json")


def default_folder() -> pathlib.Path:
    """Where weights are looked for by default: `$MASKDP_WEIGHTS`, or `maskdp/weights` in the user's cache."""
    named = os.environ.get("MASKDP_WEIGHTS")
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(named) if named else pathlib.Path(cache) / "maskdp" / "weights"


def complete(folder: pathlib.Path) -> bool:
    """Whether every part seems to be there."""
    return all(
        (folder / part / "config.json").is_file() and any((folder / part).glob("*.safetensors")) for part in PARTS
    )


def check(folder: pathlib.Path) -> str:
    """SHA-256 over all files of all parts, hex; each file is read once a process.

    Raises:
        UserError: a part is missing, holds no safetensors, or is not what `weights.json` records.
    """
    return hashlib.sha256(json.dumps([_checked(folder, part) for part in PARTS]).encode()).hexdigest()


def load(folder: pathlib.Path, part: str, model_class: type, kinds: tuple[str, ...]) -> Any:
    """The model of one part in evaluation mode, on the GPU where there is one.

    Guarantees: local files only, safetensors only, no weight left at its random start.

    Args:
        model_class: a transformers class with `from_pretrained`.
        kinds: the values of `model_type` that are understood.

    Raises:
        UserError: missing, changed, another kind of model, or weights that do not fill the model.
    """
    import safetensors
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what matters of its reports is raised below, in one line
    _checked(folder, part)
    place = folder / part
    try:
        kind = json.loads((place / "config.json").read_text()).get("model_type")
        if kind not in kinds:
            raise UserError(f"{place}: holds a {kind} model, expected {' or '.join(kinds)}")
        model, report = model_class.from_pretrained(
            place, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise UserError(f"{place}: cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    missing = sorted(key for key in report["missing_keys"] if not key.endswith("num_batches_tracked"))
    if missing:
        raise UserError(f"{place}: {len(missing)} weights of a {kind} are missing, the first is {missing[0]}")
    return model.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")


def _checked(folder: pathlib.Path, part: str) -> dict[str, str]:
    """SHA-256 of each file of a part, by name, after it was held against the record."""
    place = folder / part
    if not (place / "config.json").is_file() or not any(place.glob("*.safetensors")):
        raise UserError(
            f"{place}: no model here, expected config.json and safetensors such as those of {PARTS[part]} "
            "(maskdp weights fetch)"
        )
    found = _checksums(place)
    recorded = _record(folder).get(part)
    if recorded:
        for name in sorted(found.keys() | recorded["files"].keys()):
            if found.get(name) != recorded["files"].get(name):
                raise UserError(f"{place / name}: is not the file that {folder / RECORD} records")
    return found


@functools.cache
def _checksums(place: pathlib.Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(place.iterdir()) if file.is_file()}


def sha256(file: pathlib.Path) -> str:
    """Hash of a file, hex."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _record(folder: pathlib.Path) -> dict[str, Any]:
    file = folder / RECORD
    if not file.exists():
        return {}
    try:
        record = json.loads(file.read_text())
        for part in record.values():
            part["repository"], part["revision"], part["files"].items()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise UserError(
            f"{file}: not a record of weights, expected repository, revision and files of each part"
        ) from None
    return record


# ------------------------------------------------------------------------------------------------------------- fetching


def fetch(folder: pathlib.Path) -> None:
    """Gets every part that is not there yet, at the commits that `weights.json` records, or at today's head.

    A commit that was not recorded before is recorded with the SHA-256 of every file; the Hub's own checksums must agree
    with what came. A part takes its place whole, after it was checked.

    Raises:
        UserError: no connection, no such repository or commit, or a file that differs.
    """
    from huggingface_hub.errors import HTTPError

    for part, repository in PARTS.items():
        record = _record(folder)
        if (folder / part).is_dir():
            if part not in record:
                raise UserError(
                    f"{folder / part}: is there, but {folder / RECORD} does not record it; move it away first"
                )
            _checked(folder, part)
            print(f"{folder / part}: there already, {record[part]['repository']} at {record[part]['revision']}")
            continue
        pins = record.get(part, {"repository": repository, "revision": None, "files": None})
        try:
            pins = _fetch_part(folder / part, pins)
        except UserError:
            raise
        except (HTTPError, OSError, ValueError) as error:
            reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
            raise UserError(f"{pins['repository']}: cannot be fetched ({reason})") from None
        atomic.write_json(folder / RECORD, {**record, part: pins})
        print(f"{folder / part}: {pins['repository']} at {pins['revision']}")


def _fetch_part(place: pathlib.Path, pins: dict[str, Any]) -> dict[str, Any]:
    """One part from the Hub into `place`; its complete pins."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    repository = pins["repository"]
    info = HfApi().model_info(repository, revision=pins["revision"], files_metadata=True)
    files = {file.rfilename: file for file in info.siblings if "/" not in file.rfilename}
    wanted = sorted(filter_repo_objects(files, allow_patterns=list(_WANTED)))
    if not any(name.endswith(".safetensors") for name in wanted):
        raise UserError(f"{repository}: holds no safetensors at {info.sha}")
    with atomic.folder(place) as aside:
        snapshot_download(repository, revision=info.sha, local_dir=aside, allow_patterns=wanted)
        shutil.rmtree(aside / ".cache", ignore_errors=True)
        found = {file.name: sha256(file) for file in sorted(aside.iterdir())}
        expected = pins["files"] or {name: _hub_checksum(files[name], aside / name, found[name]) for name in found}
        for name in sorted(expected.keys() | found.keys() | set(wanted)):
            if found.get(name) != expected.get(name):
                raise UserError(f"{repository}: {name} at {info.sha} is not the file that was expected")
    return {"repository": repository, "revision": info.sha, "files": found}


def _hub_checksum(listed, file: pathlib.Path, found: str) -> str | None:
    """The SHA-256 that the Hub states for a file; of small files it states git's hash: `found` if that holds."""
    if listed.lfs:
        return listed.lfs.sha256
    data = file.read_bytes()
    return found if hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == listed.blob_id else None


@dataclasses.dataclass(frozen=True)
class FetchConfig:
    """public weights into a local folder.

    Attributes:
        out: the folder; empty: `$MASKDP_WEIGHTS`, or `maskdp/weights` in the user's cache.
    """

    out: str = ""


SETS = ("models", "blazepose")
USAGE = f"maskdp weights fetch [{'|'.join(SETS)}] [--out DIR]"


def main(arguments: list[str]) -> int:
    """`maskdp weights fetch [models|blazepose] [--out DIR]`: `fetch`, or `blazepose.wheel.fetch`."""
    if not arguments or arguments[0] != "fetch":
        raise UserError(f"expected: {USAGE}")
    named = arguments[1:2] if arguments[1:2] and not arguments[1].startswith("-") else []
    settings = config.parse(FetchConfig, arguments[1 + len(named) :], "weights fetch")
    folder = pathlib.Path(settings.out) if settings.out else default_folder()
    if named == ["blazepose"]:
        from anonymize.people.blazepose import wheel

        wheel.fetch(folder / "blazepose")
    elif named in ([], ["models"]):
        fetch(folder)
    else:
        raise UserError(f"{named[0]}: no such set of weights, expected {USAGE}")
    return 0
