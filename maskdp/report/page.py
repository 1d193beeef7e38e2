"""What the report says. Figures are read from the runs' own files; only means and spreads are computed here."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from maskdp.report.runs import Run, Spread, by_settings, spread

VIEWS = COMPOSITE, PUBLIC_VIEW = "composite", "public_view"
MASKED = ("maskdp", "maskdp_residual", "maskdp_two_step")
ORDER = ("maskdp", "maskdp_residual", "maskdp_two_step", "dp_sgd", "public_only", "sgd")
IN_WORDS = {
    "maskdp": "two paths, noise only where the scene enters",
    "maskdp_residual": "what the scene adds, through DP",
    "maskdp_two_step": "DP step on the clip, plain step on the avatars",
    "dp_sgd": "the whole clip through DP",
    "public_only": "avatars alone, the scene never read",
    "sgd": "no protection",
}
NONE = "–"
COLOURS = 8
PLOTTED = (
    ("accuracy_composite", "accuracy on the composite"),
    ("accuracy_public_view", "accuracy on the public view"),
    ("public_loss", "training loss on public views"),
)
"""Logged metrics that are drawn, and their titles."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One configuration: its runs and what they came to. `epsilon` is None where its card states none."""

    name: str
    objective: str
    runs: tuple[Run, ...]
    composite: Spread | None
    public_view: Spread | None
    epsilon: float | None
    delta: float | None

    @property
    def card(self) -> Mapping[str, Any]:
        """The privacy card of its first run."""
        return self.runs[0].card


def rows(runs: Sequence[Run]) -> list[Row]:
    """One row a configuration, masked objectives first."""
    groups = by_settings(runs)
    objectives = Counter(group[0].objective for group in groups)
    made = []
    for group in groups:
        objective = group[0].objective
        alike = [other for other in groups if other[0].objective == objective]
        name = objective if objectives[objective] == 1 else f"{objective}, {_differences(group, alike)}"
        epsilons = [epsilon_of(run) for run in group]
        stated = None if None in epsilons else max(epsilons)
        figures = (spread(run.accuracy(view) for run in group) for view in (COMPOSITE, PUBLIC_VIEW))
        made.append(Row(name, objective, tuple(group), *figures, stated, group[0].card.get("delta")))
    return sorted(made, key=lambda row: ORDER.index(row.objective) if row.objective in ORDER else len(ORDER))


def _differences(group: Sequence[Run], alike: Sequence[Sequence[Run]]) -> str:
    """The settings in which the configurations of one objective differ, in words; of a path its last part."""
    keys = sorted({key for other in alike for key in other[0].settings})
    missing = object()
    differing = [k for k in keys if len({str(other[0].settings.get(k, missing)) for other in alike}) > 1]
    names = {"epsilon": "ε", "delta": "δ"}
    words = [(key.rsplit(".", 1)[-1], group[0].settings.get(key)) for key in differing]
    return ", ".join(f"{names.get(key, key)} = {str(value).rstrip('/').rsplit('/', 1)[-1]}" for key, value in words)


def epsilon_of(run: Run) -> float | None:
    """The ε that the run's card states; None where it states none."""
    value = run.card.get("epsilon")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def percent(value: float) -> str:
    """`71.4 %`, held together by a no-break space."""
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def spread_words(value: Spread | None) -> str:
    """`71.4 ± 1.2 %`"""
    if value is None:
        return NONE
    return percent(value.mean) if value.sd is None else f"{100 * value.mean:.1f} ± {percent(value.sd)}"


def number(value: float | None, digits: int = 3) -> str:
    """A number of that many significant digits, rounded up: a privacy loss is never shown smaller than it is."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    scale = digits - 1 - math.floor(math.log10(abs(value)))
    text = f"{math.ceil(round(value * 10**scale, 6)) / 10**scale:.{digits}g}"
    return text.replace("e-0", "e-").replace("e+0", "e")


def epsilon_words(row: Row) -> str:
    """`ε = 0.5`, or that there is none."""
    return "no ε" if row.epsilon is None else f"ε = {number(row.epsilon)}"


def flagship(table: Sequence[Row]) -> Row | None:
    """The first private configuration, masked ones before the others; None where no card states an ε above 0."""
    return next((row for row in table if row.epsilon), None)


def headline(table: Sequence[Row]) -> str:
    """What was protected, and at which ε."""
    row = flagship(table)
    if row is None:
        return "Action recognition on two-layer clips, without a privacy guarantee"
    if row.objective in MASKED:
        return f"People replaced by avatars, scenes protected at ε = {number(row.epsilon)}"
    return f"Whole clips protected at ε = {number(row.epsilon)}"


def evaluated(table: Sequence[Row], dataset) -> int | None:
    """Number of evaluation clips; None where `dataset` is not the one that the runs were trained on."""
    results = [run.result for row in table for run in row.runs]
    splits = {result["eval_split"] for result in results}
    if dataset is None or len(splits) != 1 or {result["dataset"] for result in results} != {dataset.id}:
        return None
    (split,) = splits
    return sum(record.label >= 0 for record in dataset[split]) if split else None


def result_sentence(table: Sequence[Row], clips: int | None) -> str:
    """The result in one or two sentences, of those objectives that were run; `clips` is the number evaluated."""
    row = flagship(table) or next((row for row in table if row.composite), None)
    if row is None or row.composite is None:
        return "The runs on this page were not evaluated."
    runs = f", mean of {row.composite.count} runs" if row.composite.count > 1 else ""
    if row.epsilon:
        opening = f"At ε = {number(row.epsilon)}, δ = {number(row.delta)}, {row.name} names the right action in"
    else:
        opening = f"{row.name} names the right action in"
    text = f"{opening} {spread_words(row.composite)} of {clips or 'the'} evaluation clips{runs}"

    def other(objective: str) -> Row | None:
        return next(
            (
                one
                for one in table
                if one.objective == objective
                and one.composite
                and (objective != "dp_sgd" or (one.epsilon == row.epsilon and _adjacency(one) == _adjacency(row)))
            ),
            None,
        )

    contrasts = [
        (words, found.composite.mean)
        for objective, words in (
            ("dp_sgd", "with the whole clip through DP-SGD at the same ε"),
            ("public_only", "when only the avatars are learned from"),
            ("sgd", "with no protection at all"),
        )
        if objective != row.objective and (found := other(objective))
    ]
    if not contrasts:
        return text + "."
    return f"{text}; " + ", ".join(f"{percent(mean)} {words}" for words, mean in contrasts) + "."


def _adjacency(row: Row) -> Any:
    return row.card.get("adjacency")


def table_rows(table: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as the template shows them."""
    lead = flagship(table)
    return [
        {
            "name": row.name,
            "lead": row is lead,
            "composite": row.composite,
            "public_view": row.public_view,
            "epsilon": "no ε" if row.epsilon is None else number(row.epsilon),
            "words": " · ".join(filter(None, (epsilon_words(row), IN_WORDS.get(row.objective)))),
            "delta": NONE if row.epsilon is None else number(row.delta),
            "sigma": _word(row.card.get("noise_multiplier")),
            "adjacency": _word(row.card.get("adjacency")),
            "unit": _word(row.card.get("unit")),
            "sampling": _word(row.card.get("sampling")),
            "runs": len(row.runs),
        }
        for row in table
    ]


def _word(value: Any) -> str:
    return NONE if value is None else f"{value:.4g}" if isinstance(value, float) else str(value).replace("_", " ")


def plots(table: Sequence[Row]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Learning curves of each row's first run, a plot for each of PLOTTED that any run logged; and their legend."""
    shown = table[:COLOURS]
    made = []
    for metric, title in PLOTTED:
        curves = [(colour, _curve(row.runs[0], metric)) for colour, row in enumerate(shown)]
        curves = [(colour, points) for colour, points in curves if len(points) > 1]
        if not curves:
            continue
        last = max(points[-1][0] for _, points in curves) or 1
        share = "accuracy" in metric
        low, high = 0.0, 1.0 if share else _nice(max(y for _, points in curves for _, y in points))
        ticks = [low + (high - low) * i / 4 for i in range(5)]
        made.append(
            {
                "title": title,
                "last_step": last,
                "y_ticks": [
                    {"at": 100 * (1 - (t - low) / (high - low)), "text": f"{100 * t:.0f}%" if share else f"{t:.3g}"}
                    for t in ticks
                ],
                "lines": [
                    {
                        "colour": colour,
                        "points": " ".join(
                            f"{100 * x / last:.2f},{100 * (1 - (min(max(y, low), high) - low) / (high - low)):.2f}"
                            for x, y in points
                        ),
                    }
                    for colour, points in curves
                ],
            }
        )
    legend = [{"colour": colour, "name": row.name} for colour, row in enumerate(shown)]
    return made, legend if made else []


def _nice(value: float) -> float:
    """The least of 1, 2, 4, 5, 8, 10 times a power of ten that is not below `value`."""
    if value <= 0:
        return 1.0
    power = 10 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 5, 8, 10) if step * power >= value * (1 - 1e-9))


def _curve(run: Run, metric: str, count: int = 200) -> list[tuple[float, float]]:
    """At most `count` (step, value) points, each the mean of a stretch of steps."""
    points = [
        (record["step"], record[metric])
        for record in run.metrics
        if isinstance(record.get(metric), int | float) and math.isfinite(record[metric]) and "step" in record
    ]
    width = max(1, math.ceil(len(points) / count))
    stretches = [points[i : i + width] for i in range(0, len(points), width)]
    return [(stretch[-1][0], sum(value for _, value in stretch) / len(stretch)) for stretch in stretches]


def tiles(table: Sequence[Row], summary: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """The few figures under the headline."""
    row = flagship(table)
    made = []
    if row:
        made.append(
            (f"{number(row.epsilon)}", f"ε at δ = {number(row.delta)}, one {_word(row.card.get('unit'))} a record")
        )
    shown = row or table[0]
    if shown.composite:
        made.append((percent(shown.composite.mean), f"accuracy on the composite, {shown.name}"))
    if row and row.public_view:
        made.append((percent(row.public_view.mean), "with the scene blanked (public view), same model"))
    if summary:
        made += [(str(item["value"]), item["text"]) for item in summary["tally"][:3]]
    return [{"value": value, "text": text} for value, text in made]


def chance(table: Sequence[Row]) -> float | None:
    """One over the number of classes; None where the runs do not agree on it."""
    counts = {run.result.get("classes") for row in table for run in row.runs}
    return 1 / counts.pop() if len(counts) == 1 and None not in counts else None


def table_notes(table: Sequence[Row]) -> list[str]:
    """What a reader of the table must know."""
    notes = []
    adjacencies = {row.card.get("adjacency") for row in table if row.epsilon is not None}
    if len(adjacencies) > 1:
        notes.append(
            "These objectives stand under different adjacencies: their ε are promises about different things and must "
            "not be compared."
        )
    if any(row.epsilon is None for row in table):
        notes.append("“no ε”: the run makes no differential-privacy claim.")
    if any(row.objective == "public_only" and row.card["dataset"]["context"] == "none" for row in table):
        notes.append("public_only needs no ε: it never reads the scene.")
    if sum(len(row.runs) for row in table if row.epsilon) > 1:
        notes.append("Each ε is the cost of one run. Publishing several runs costs their composition, which is more.")
    return notes


def cards(table: Sequence[Row]) -> list[dict[str, Any]]:
    """The privacy cards in plain words."""
    from maskdp_jax import card

    return [
        {"name": row.name, "event": row.card["event"] if row.epsilon else None, **card.plain_words(row.card)}
        for row in table
    ]


def provenance(table: Sequence[Row], dataset) -> list[tuple[str, str]]:
    """Random ids of datasets, and versions."""
    trained = sorted({run.result["dataset"] for row in table for run in row.runs})
    facts = [("trained on dataset", dataset_id) for dataset_id in trained]
    if dataset is not None and [dataset.id] != trained:
        facts.append(("shown above", f"{dataset.id}, not what all of the runs were trained on"))
    return facts + list(table[0].runs[0].result["versions"].items())


def every_run(runs: Sequence[Run]) -> list[dict[str, str]]:
    """One line a run."""
    return [
        {
            "name": run.name,
            "objective": run.objective,
            "composite": _share(run.accuracy(COMPOSITE)),
            "public_view": _share(run.accuracy(PUBLIC_VIEW)),
            "epsilon": "no ε" if epsilon_of(run) is None else number(epsilon_of(run)),
            "config": run.settings_hash,
        }
        for run in runs
    ]


def _share(value: float | None) -> str:
    return NONE if value is None else percent(value)
