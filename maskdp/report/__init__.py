"""`maskdp report`: runs → one self-contained `report.html`; or a dataset → the page on which a person signs it off.

The page of runs holds no link, script or picture from elsewhere, no path of this machine, no figure other than the
runs' files hold, and no ε for a run whose card states none.
"""

import argparse
import pathlib
from collections.abc import Sequence

import jinja2

from maskdp import __version__, atomic, layers
from maskdp.errors import UserError
from maskdp.report import anonymization, audits, page, pictures, review
from maskdp.report import runs as run_folders

CLIPS = 4
"""Clips shown."""


def main(arguments: list[str]) -> int:
    """`maskdp report RUN…|DATASET [--data DIR] [--videos DIR] --out FILE`"""
    parser = argparse.ArgumentParser(
        prog="maskdp report", description="One self-contained page: results of runs, or a dataset to be signed off."
    )
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="run folders or folders of runs (sweeps); or a dataset"
    )
    parser.add_argument(
        "--data", metavar="DIR", help="two-layer dataset; adds pictures of private material and a summary"
    )
    parser.add_argument("--videos", metavar="DIR", help="the source videos; adds the originals to the pictures")
    parser.add_argument("--clips", type=int, default=500, metavar="N", help="of a dataset, worst first; default 500")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="default: report.html")
    options = parser.parse_args(arguments)
    if options.clips < 1:
        raise UserError(f"--clips: {options.clips}, expected a number above 0")
    if len(options.paths) == 1 and review.is_dataset(options.paths[0]):
        html = render_review(options.paths[0], options.videos, options.clips)
    else:
        runs = [run_folders.load(folder) for folder in run_folders.find(options.paths)]
        html = render(runs, options.data, options.videos)
    atomic.write_text(options.out, html)
    print(f"{options.out}: {len(html) / 1e6:.1f} MB")
    return 0


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("maskdp.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def render_review(folder: str | pathlib.Path, videos: str | pathlib.Path | None, clips: int) -> str:
    """The page of a dataset as HTML: its worst `clips`, what the audit found, and who looked at them."""
    return _template("review.html").render(version=__version__, **review.context(folder, videos, clips))


def render(
    runs: Sequence[run_folders.Run],
    data: str | pathlib.Path | None = None,
    videos: str | pathlib.Path | None = None,
) -> str:
    """The page as HTML.

    Args:
        runs: finished runs.
        data: folder that `maskdp anonymize` wrote; without it the page holds figures only.
        videos: folder of the source videos, found by their hash; adds the originals.
    """
    dataset = layers.Dataset(data) if data else None
    table = page.rows(runs)
    strips = pictures.filmstrips(dataset, videos, CLIPS) if dataset else []
    plots, legend = page.plots(table)
    summary = anonymization.summary(anonymization.read(dataset.path.parent)) if dataset else None
    return _template("template.html").render(
        title="maskdp privacy report",
        headline=page.headline(table),
        result=page.result_sentence(table, page.evaluated(table, dataset)),
        tiles=page.tiles(table, summary),
        strips=strips,
        panels=len(strips[0].panels) if strips else 0,
        originals=bool(strips) and strips[0].panels[0].title == pictures.ORIGINAL,
        chance=page.chance(table),
        rows=page.table_rows(table),
        seeds=any(len(row.runs) > 1 for row in table),
        table_notes=page.table_notes(table),
        plots=plots,
        legend=legend,
        cards=page.cards(table),
        audits=audits.shown(table, private=dataset is not None),
        anonymization=summary,
        provenance=page.provenance(table, dataset),
        runs=page.every_run(runs),
        version=__version__,
        percent=page.percent,
        spread=page.spread_words,
    )
