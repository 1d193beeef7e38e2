"""Public weights of the model backends: where they lie, fetching them pinned, checking and loading them.

A weights folder holds one folder a part (`PARTS`), each a saved transformers model: `config.json`, safetensors and,
where there is one, a preprocessor config. `weights.json` beside them records for each part the repository, its commit
and the SHA-256 of every file; whatever it records is checked whenever weights are loaded. A folder filled by hand needs
no `weights.json`. Nothing but safetensors is ever loaded, and only `maskdp weights fetch` uses a network. The models of
`finder.type: blazepose` have their own pins (`people/blazepose/wheel.py`).
"""

import dataclasses
import fnmatch
import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
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
    return held_against_record(folder, part)


def held_against_record(folder: pathlib.Path, part: str) -> dict[str, str]:
    """SHA-256 of each file of FOLDER/PART, by name. What FOLDER/weights.json does not record is only listed.

    Raises:
        UserError: a file is not the recorded one, is missing, or was added.
    """
    found = _checksums(folder / part)
    recorded = record(folder).get(part)
    if recorded:
        for name in sorted(found.keys() | recorded["files"].keys()):
            if found.get(name) != recorded["files"].get(name):
                raise UserError(f"{folder / part / name}: is not the file that {folder / RECORD} records")
    return found


@functools.cache
def _checksums(place: pathlib.Path) -> dict[str, str]:
    return {str(file.relative_to(place)): sha256(file) for file in sorted(place.rglob("*")) if file.is_file()}


def sha256(file: pathlib.Path) -> str:
    """Hash of a file, hex."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def record(folder: pathlib.Path) -> dict[str, Any]:
    """What FOLDER/weights.json records: repository, revision and files of each part; nothing where it is missing.

    Raises:
        UserError: it is there and says something else.
    """
    file = folder / RECORD
    if not file.exists():
        return {}
    try:
        recorded = json.loads(file.read_text())
        for part in recorded.values():
            part["repository"], part["revision"], part["files"].items()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise UserError(
            f"{file}: not a record of weights, expected repository, revision and files of each part"
        ) from None
    return recorded


# ------------------------------------------------------------------------------------------------------------- fetching


def fetch(folder: pathlib.Path) -> None:
    """Gets every part that is not there yet, at the commits that `weights.json` records, or at today's head.

    A commit that was not recorded before is recorded with the SHA-256 of every file; the Hub's own checksums must agree
    with what came. A part takes its place whole, after it was checked.

    Raises:
        UserError: no connection, no such repository or commit, or a file that differs.
    """
    for part, repository in PARTS.items():
        if there_already(folder, part):
            continue
        with atomic.folder(folder / part) as aside:
            pins = download(aside, repository, record(folder).get(part), is_model_file)
        atomic.write_json(folder / RECORD, {**record(folder), part: pins})
        print(f"{folder / part}: {pins['repository']} at {pins['revision']}")


def there_already(folder: pathlib.Path, part: str) -> bool:
    """Whether FOLDER/PART was fetched before; a line says so.

    Raises:
        UserError: it is there, and is not what `weights.json` records.
    """
    if not (folder / part).is_dir():
        return False
    pins = record(folder).get(part)
    if not pins:
        raise UserError(f"{folder / part}: is there, but {folder / RECORD} does not record it; move it away first")
    held_against_record(folder, part)
    print(f"{folder / part}: there already, {pins['repository']} at {pins['revision']}")
    return True


def is_model_file(name: str) -> bool:
    """Whether a file of a repository belongs to a transformers model that lies at its top."""
    return "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in _WANTED)


def download(
    place: pathlib.Path, repository: str, pins: dict[str, Any] | None, wanted: Callable[[str], bool]
) -> dict[str, Any]:
    """Gets the wanted files of a repository from the Hub into `place`; its complete pins.

    Args:
        pins: repository, revision and files as they were recorded; None: today's head, held against the Hub's listing.

    Raises:
        UserError: no connection, no such repository or commit, no safetensors, or a file that differs.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError

    repository, revision, expected = (
        (pins["repository"], pins["revision"], pins["files"]) if pins else (repository, None, None)
    )
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        files = {file.rfilename: file for file in info.siblings if wanted(file.rfilename)}
        if not any(name.endswith(".safetensors") for name in files):
            raise UserError(f"{repository}: holds no safetensors at {info.sha}")
        snapshot_download(repository, revision=info.sha, local_dir=place, allow_patterns=sorted(files))
    except (HTTPError, OSError, ValueError) as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        raise UserError(f"{repository}: cannot be fetched ({reason})") from None
    shutil.rmtree(place / ".cache", ignore_errors=True)
    found = {name: sha256(place / name) for name in sorted(files) if (place / name).is_file()}
    expected = expected or {name: _hub_checksum(files[name], place / name, found[name]) for name in found}
    for name in sorted(expected.keys() | found.keys() | files.keys()):
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
        kind: of `refine`: `sd`, `sdxl` or `vace`.
    """

    out: str = ""
    kind: str = "sd"


SETS = ("models", "blazepose", "refine")
USAGE = f"maskdp weights fetch [{'|'.join(SETS)}] [--out DIR]"


def main(arguments: list[str]) -> int:
    """`maskdp weights fetch [models|blazepose|refine] [--out DIR]`: `fetch`, or that of `wheel` or `refine.hub`."""
    if not arguments or arguments[0] != "fetch":
        raise UserError(f"expected: {USAGE}")
    named = arguments[1:2] if arguments[1:2] and not arguments[1].startswith("-") else []
    settings = config.parse(FetchConfig, arguments[1 + len(named) :], "weights fetch")
    folder = pathlib.Path(settings.out) if settings.out else default_folder()
    if named == ["blazepose"]:
        from anonymize.people.blazepose import wheel

        wheel.fetch(folder / "blazepose")
    elif named == ["refine"]:
        from anonymize.refine import hub

        hub.fetch(folder / "refine", settings.kind)
    elif named in ([], ["models"]):
        fetch(folder)
    else:
        raise UserError(f"{named[0]}: no such set of weights, expected {USAGE}")
    return 0
