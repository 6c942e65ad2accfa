"""``python -m blockvit.pipeline``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from .errors import EXIT_CODES, UsageError
from .profiles import DEFAULT_PROFILE, read_yaml
from .run import reproduce


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 1 failed notebook or tests, 2 wrong usage, 3 no such device, 4 busy."""
    options = _parser().parse_args(arguments)
    try:
        reproduce(
            options.profile,
            data=options.data,
            checkpoint=options.checkpoint,
            only=options.only,
            parameters=_parse_parameters(options.parameters),
            remeasure=options.remeasure,
            publish=options.publish,
            readme=not options.no_readme,
            tests=not options.no_tests,
        )
    except tuple(EXIT_CODES) as error:
        print(f"error: {error}", file=sys.stderr)
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    except KeyboardInterrupt:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it would report the cell that was cut short
        print("\ninterrupted; what was measured is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m blockvit.pipeline", description="Run the study's notebooks in order and write one report."
    )
    parser.add_argument(
        "--profile", default=DEFAULT_PROFILE, help="a file of notebooks/profiles (default: %(default)s)"
    )
    parser.add_argument("--data", metavar="PATH", help="folder of the data sets, for profiles that need one")
    parser.add_argument(
        "--checkpoint", metavar="PATH", help="a published checkpoint: run only the notebooks that take one"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NOTEBOOK", help="run these, e.g. 03_microbenchmarks")
    parser.add_argument(
        "-p",
        dest="parameters",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="override a parameter in every notebook that has it; the value is read as YAML",
    )
    parser.add_argument("--remeasure", action="store_true", help="measure again what has been measured already")
    parser.add_argument("--publish", action="store_true", help="write the outputs into notebooks/, to be committed")
    parser.add_argument("--no-readme", action="store_true", help="leave README.md as it is")
    parser.add_argument("--no-tests", action="store_true", help="do not run the tests that the profile names first")
    return parser


def _parse_parameters(texts: Iterable[str]) -> dict[str, Any]:
    parameters = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"-p is given {text!r}, expected NAME=VALUE, e.g. -p seeds=[0,1]")
        parameters[name] = read_yaml(value, f"the value of -p {name}")
    return parameters
