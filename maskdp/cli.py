"""The `maskdp` command: a table of sub-commands, each imported only when it is called."""

import importlib
import logging
import os
import sys

from maskdp import __version__
from maskdp.errors import UserError

# name: (module, function taking the remaining arguments and returning an exit status, one line of help)
COMMANDS = {
    "demo": ("maskdp.demo", "main", "the whole job on generated videos; writes report.html"),
    "studio": ("anonymize.studio.film", "main", "generate raw videos of actions with known truth"),
    "anonymize": ("anonymize.command", "main", "videos -> two-layer TFDS shards, people replaced by avatars"),
    "weights": ("anonymize.weights", "main", "fetch public weights for the anonymizer's model backends"),
    "train": ("maskdp_jax.train", "main", "one training run -> checkpoint, privacy card, metrics"),
    "eval": ("maskdp_jax.evaluate", "main", "accuracy of a trained run on a dataset"),
    "predict": ("maskdp_jax.evaluate", "predict_main", "class of each clip"),
    "export": ("maskdp_jax.export", "main", "the model without secrets, as an Orbax checkpoint"),
    "audit": ("maskdp_jax.audit", "main", "try to break the claims of a dataset or a run"),
    "audit anonymization": ("anonymize.audit", "main", "look for leaks in a dataset, measure it against its originals"),
    "account": ("maskdp_jax.account", "main", "noise for an epsilon, epsilon for a noise"),
    "sweep": ("maskdp.sweep", "main", "a grid of runs, resumable"),
    "report": ("maskdp.report", "main", "report.html from runs, or of a dataset to sign off"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(
        [f"maskdp {__version__}", "usage: maskdp COMMAND [options]", "", *lines, "", "maskdp COMMAND --help"]
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 done, 1 part of the work failed, 2 the user's mistake."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(__version__)
        return 0
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    if name not in COMMANDS:
        print(f"maskdp: no command {name!r}; one of: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    module, function, _ = COMMANDS[name]
    try:
        return getattr(importlib.import_module(module), function)(rest) or 0
    except UserError as error:
        print(f"maskdp {name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        print(f"maskdp {name}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"maskdp {name}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
