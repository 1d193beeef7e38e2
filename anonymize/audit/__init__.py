"""`maskdp audit anonymization DATASET [--originals DIR]`: tries to break what the anonymizer claims.

Of any dataset it looks for people in the private layer. With the studio videos it was made from, whose truth is known,
it paints canaries, makes noise of the pixels, trains a network to re-identify people and one to know actions, and
measures finder and fitter.
"""

import dataclasses
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import field

from rich.console import Console
from rich.table import Table

from anonymize.audit.canary import CanaryConfig
from anonymize.audit.findings import Finding
from anonymize.audit.reidentify import ReIDConfig
from anonymize.audit.utility import UtilityConfig
from maskdp import atomic, config
from maskdp.errors import UserError

USAGE = "usage: maskdp audit anonymization DATASET [--originals DIR] [--out FILE] [--key value ...]"
CHECKS = ("stored", "canary", "accuracy", "reid", "utility")
REPORT = "audit.json"


@dataclasses.dataclass(frozen=True)
class AuditConfig:
    """tries to break what the anonymizer claims; exit status 1 where a bound is broken.

    Attributes:
        originals: folder of the recordings the dataset was made from, found by their hash.
        out: file for the figures, JSON; `DATASET/audit.json` where empty.
        checks: which ones, of stored, canary, accuracy, reid and utility.
        looks: frames of a clip in which people are looked for in the private layer.
        videos: recordings on which finder and fitter are measured again.
        size: side of the pictures that networks are trained on, pixels.
        seed: of patterns, networks and intervals.
    """

    originals: str = ""
    out: str = ""
    checks: tuple[str, ...] = CHECKS
    looks: int = 6
    videos: int = 40
    size: int = 56
    seed: int = 0
    canary: CanaryConfig = field(default_factory=CanaryConfig)
    reid: ReIDConfig = field(default_factory=ReIDConfig)
    utility: UtilityConfig = field(default_factory=UtilityConfig)

    def __post_init__(self):
        config.positive(self, "looks", "videos")
        if self.size < 32:
            raise UserError(f"size: {self.size}, expected 32 pixels or more")
        if unknown := set(self.checks) - set(CHECKS):
            raise UserError(f"checks: {', '.join(unknown)}, expected some of {', '.join(CHECKS)}")


def audit(dataset: str, settings: AuditConfig) -> Iterator[Finding]:
    """Every check that can be made; what cannot is said, too."""
    import torch

    from anonymize.audit import accuracy, canary, reidentify, stored, treatments, utility
    from anonymize.audit.footage import Archive, chosen

    torch.set_num_threads(1)
    archive = Archive(dataset, settings.originals)
    if "stored" in settings.checks:
        yield from stored.check(archive, settings.looks)
    rest = [name for name in CHECKS[1:] if name in settings.checks]
    if not any(archive.footage(record) for record in archive.records()):
        for name in rest:
            yield Finding(name, None, "not checked: needs --originals, studio videos with their truth")
        return
    secret = secrets.token_bytes(32)
    if "canary" in rest:
        records = chosen(list(archive.records()), settings.canary.videos)
        films = filter(None, map(archive.footage, records))
        image = archive.settings.dataset.private_format
        yield from canary.check(films, len(records), archive.settings, image, secret, settings.canary, settings.seed)
    if "accuracy" in rest:
        files = chosen(archive.filmed, settings.videos)
        films = filter(None, map(archive.film, files))
        yield from accuracy.check(films, len(files), archive.settings, secret)
    if {"reid", "utility"} & set(rest):
        clips = treatments.crops(archive, settings.size, settings.reid.pictures, settings.utility.frames)
        if "reid" in rest:
            yield from reidentify.check(clips, settings.reid, settings.seed)
        if "utility" in rest:
            yield from utility.check(clips, len(archive.dataset.labels), settings.utility, settings.seed)


def main(arguments: Sequence[str]) -> int:
    """`maskdp audit anonymization`; see `audit`."""
    from maskdp import layers

    if not arguments:
        raise UserError(f"nothing to do\n{USAGE}")
    named = not arguments[0].startswith("-")
    settings = config.parse(AuditConfig, arguments[named:], "audit anonymization DATASET")
    if not named:
        raise UserError(f"{arguments[0]}: expected the dataset first\n{USAGE}")
    dataset = layers.Dataset(arguments[0])
    findings = list(audit(arguments[0], settings))
    out = settings.out or str(dataset.path.parent / REPORT)
    report = {
        "dataset": dataset.contents_tag(),
        "settings": config.resolved(dataclasses.replace(settings, originals="", out="")),
        "findings": [dataclasses.asdict(finding) for finding in findings],
    }
    atomic.write_json(out, report)
    words = {True: "[green]holds[/green]", False: "[red]FAILS[/red]", None: ""}
    table = Table("check", "", "seen")
    for finding in findings:
        table.add_row(finding.check, words[finding.holds], finding.seen)
    Console().print(table)
    print(f"{out}: the same as JSON")
    return 1 if any(finding.holds is False for finding in findings) else 0
