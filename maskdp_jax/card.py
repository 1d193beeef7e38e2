"""`privacy_card.json`: what ε speaks of, what it does not, and everything a reader needs to check it."""

import math
from collections.abc import Mapping
from typing import Any

from maskdp import __version__
from maskdp_jax.config import TrainConfig
from maskdp_jax.mechanism import Epsilon, Mechanism, upward

_NEIGHBOURS = {
    "zero_out": "the private layer of one record is replaced by the fill",
    "replace": "the private layer of one record is replaced by any other",
    "remove": "one whole record is left out",
}
_UNITS = {"video": "all clips of one video", "subject": "all clips of one person", "scene": "all clips of one place"}
_ASSIGNMENTS = {
    "own": "each clip belongs to the record of its own unit",
    "fixed": "clips of several people join the record that owns all of them and are left out where there is none; the "
    "assignment follows from ids alone, which neighbouring datasets share",
    "alone": "clips of several people are left out, so that one person fewer is one record fewer and changes no other",
}
_EVALUATION = "accuracies are computed on evaluation records without noise; those records are unprotected"
_OVERLAP = ". By option, evaluation records overlap with training records: ε does not cover these accuracies"
_SIDE_INFORMATION = (
    "labels",
    "silhouette, pose, gait, placement and timing of every person",
    "which clips were accepted, how many records and clips there are",
)


def make(
    config: TrainConfig,
    mechanism: Mechanism,
    *,
    most: Mapping[str, int],
    clips: int,
    left_out: int,
    context: str,
    start_weights: Mapping[str, Any],
    people_kept: int = 0,
    eval_overlap: bool = False,
) -> dict[str, Any]:
    """The card of a run.

    Args:
        config: of the run.
        mechanism: the source of every figure about privacy.
        most: most records of one person, place and video.
        clips: clips in all records together.
        left_out: labelled clips of the split that are in no record.
        context: what the avatars of the dataset were drawn from, one of `layers.CONTEXTS`.
        start_weights: where they come from.
        people_kept: people whom the user of the anonymizer kept visible.
        eval_overlap: whether the accuracies of the run were allowed to be those of protected records.

    Guarantees:
        The card is a function of its arguments, none of which depends on a private pixel: the dataset appears by its
        random id. ε comes from `mechanism.epsilon` alone. On a dataset of `context: scene` the public layer depends on
        the private one, and only `remove`, which takes both away, states an ε.
    """
    epsilon = mechanism.epsilon(config.objective.delta)
    independent = context == "none"
    claims = config.objective.private and (independent or config.privacy.adjacency == "remove")
    return {
        "maskdp": __version__,
        "objective": config.objective.name,
        "epsilon": _finite(epsilon.value) if claims else None,
        "epsilon_pld": _finite(epsilon.pld) if claims else None,
        "epsilon_rdp": _finite(epsilon.rdp) if claims else None,
        "delta": config.objective.delta if claims else None,
        "speaks_of": _subject(config, epsilon) if claims else "nothing: no differential privacy is claimed",
        "unit": config.privacy.unit,
        "adjacency": config.privacy.adjacency,
        "sampling": config.privacy.sampling,
        "event": epsilon.event,
        "release": _release(mechanism) if claims else None,
        "mechanism": mechanism.as_dict(),
        "noise_multiplier": mechanism.noise_multiplier,
        "l2_clip_norm": mechanism.l2_clip_norm,
        "sensitivity": _finite(mechanism.sensitivity),
        "sampling_prob": mechanism.sampling_prob,
        "steps": mechanism.steps,
        "records": mechanism.num_units,
        "clips": clips,
        "clips_left_out": left_out,
        "assignment": _ASSIGNMENTS[_assignment(config)],
        "most_records": dict(most),
        "epsilon_whole_record": _whole_record(config, epsilon),
        "not_covered": list(_not_covered(config)),
        "evaluation": _EVALUATION + (_OVERLAP if eval_overlap else ""),
        "choices": "clip norm, learning rates, steps and architecture are taken from the config as public; the last "
        "checkpoint is the one released. Choosing any of them by looking at private results costs privacy that this "
        "card does not count; so does publishing several runs.",
        "start_weights": dict(start_weights),
        "dataset": {"id": mechanism.dataset, "context": context, "people_kept": people_kept},
    }


def _release(mechanism: Mechanism) -> str:
    if mechanism.exact:
        return "in integers, on a lattice of public spacing"
    return "in floating point: the account is of real numbers, and attacks on low bits are not excluded"


def _assignment(config: TrainConfig) -> str:
    if config.privacy.unit != "subject":
        return "own"
    return "alone" if config.privacy.adjacency == "remove" else "fixed"


def _subject(config: TrainConfig, epsilon: Epsilon) -> str:
    what = "the whole of" if config.privacy.adjacency == "remove" else "the private layer (the scene) of"
    return f"{what} {_UNITS[config.privacy.unit]}, in the stored two-layer dataset"


def _whole_record(config: TrainConfig, epsilon: Epsilon) -> str | float | None:
    """ε for a record's labels and avatars as well."""
    covered = config.objective.name == "dp_sgd" and config.privacy.adjacency == "remove"
    return _finite(epsilon.value) if covered else "infinite"


def _not_covered(config: TrainConfig) -> tuple[str, ...]:
    if config.objective.name == "dp_sgd" and config.privacy.adjacency == "remove":
        return ("how many records there are", "evaluation records")
    return (*_SIDE_INFORMATION, "evaluation records")


def plain_words(card: Mapping[str, Any]) -> dict[str, Any]:
    """A card for people: `sentence`, and the lists `covered` and `uncovered`."""
    objective, most = card["objective"], card["most_records"]
    if objective == "public_only" and card["dataset"]["context"] == "none":
        sentence = (
            "This model was trained on avatars over a blank background. No private pixel of these clips entered it, so "
            "it can tell nothing of their scenes; no ε is spent."
        )
        return {
            "sentence": sentence,
            "covered": ["the scene behind the people: it is never used"],
            "uncovered": list(card["not_covered"]),
        }
    if card["epsilon"] is None:
        sentence = "This model was trained on the clips as they are, or without noise. It carries no privacy guarantee."
        return {"sentence": sentence, "covered": [], "uncovered": ["everything in the clips"]}
    epsilon, delta = card["epsilon"], card["delta"]
    factor = math.exp(min(epsilon, 700))
    sentence = (
        f"Whoever sees this model learns little about {card['speaks_of']}: if "
        f"{_NEIGHBOURS[card['adjacency']]}, no outcome of the training becomes more than {upward(factor, 3)} times as "
        f"likely or unlikely, but for a chance of {upward(delta, 2)} (ε = {math.ceil(epsilon * 1000) / 1000:g})."
    )
    covered = [f"{card['speaks_of']}: ε = {math.ceil(epsilon * 1000) / 1000:g} at δ = {upward(delta)}"]
    for who in ("person", "place"):
        if most[who] == 1:
            covered.append(f"the same of one {who}, all of whose clips are one record")
    uncovered = list(card["not_covered"])
    if kept := card["dataset"].get("people_kept"):
        uncovered.append(f"{kept} people who were kept visible on purpose: to this model they are part of the scene")
    for who in ("person", "place"):
        if most[who] is None:
            uncovered.append(f"one {who} as a whole: the dataset does not say which clips share one")
        elif most[who] > 1:
            uncovered.append(f"one {who} as a whole: up to {most[who]} records, up to so many times ε, and a larger δ")
    uncovered.append("choices made by looking at private results, and further runs on the same data")
    return {"sentence": sentence, "covered": covered, "uncovered": uncovered}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
