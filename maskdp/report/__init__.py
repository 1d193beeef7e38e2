"""`maskdp report`: runs → one self-contained `report.html`.

The page holds no link, script or picture from elsewhere, no path of this machine, no figure other than the runs' files
hold, and no ε for a run whose card states none.
"""

import argparse
import pathlib
from collections.abc import Sequence

import jinja2

from maskdp import __version__, atomic, layers
from maskdp.report import anonymization, page, pictures
from maskdp.report import runs as run_folders

CLIPS = 4
"""Clips shown."""


def main(arguments: list[str]) -> int:
    """`maskdp report RUN… [--data DIR] [--videos DIR] --out FILE`"""
    parser = argparse.ArgumentParser(prog="maskdp report", description="One self-contained page from runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or a folder of runs (a sweep)")
    parser.add_argument(
        "--data", metavar="DIR", help="two-layer dataset; adds pictures of private material and a summary"
    )
    parser.add_argument("--videos", metavar="DIR", help="the source videos; adds the originals to the pictures")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="default: report.html")
    options = parser.parse_args(arguments)
    html = render([run_folders.load(folder) for folder in run_folders.find(options.runs)], options.data, options.videos)
    atomic.write_text(options.out, html)
    print(f"{options.out}: {len(html) / 1e6:.1f} MB")
    return 0


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
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("maskdp.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html").render(
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
        anonymization=summary,
        provenance=page.provenance(table, dataset),
        runs=page.every_run(runs),
        version=__version__,
        percent=page.percent,
        spread=page.spread_words,
    )
