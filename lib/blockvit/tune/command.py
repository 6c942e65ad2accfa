"""``python -m blockvit.tune``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from ..kernels import torch_tuned, tuning
from .cases import DTYPES, TOKENS, make_cases
from .tuners import TUNERS, tune


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: no NVIDIA GPU: torch.cuda.is_available() is False, and kernels are tuned on one", file=sys.stderr)
        return 3
    cases = make_cases(
        options.shapes or TUNERS[options.backend].shapes,
        block_sizes=options.block_sizes,
        dtypes=[DTYPES[name] for name in options.dtypes],
        tokens=options.tokens,
        sparsities=options.sparsity,
    )
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"tuning {options.backend} on {tuning.device_name(device)}: {len(cases)} cases, {options.seconds:g} s")
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    done = tune(
        TUNERS[options.backend],
        cases,
        device,
        seconds=options.seconds,
        force=options.force,
        report=lambda tuned: print(tuned, flush=True),
    )
    print(f"{len(done)} of {len(cases)} cases searched; parameters are in {tuning.path(tuning.device_name(device))}")
    return 1 if any(tuned.found is None for tuned in done) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m blockvit.tune", description="Find launch parameters of the block-sparse kernels for this GPU."
    )
    parser.add_argument("--backend", default=torch_tuned.NAME, choices=list(TUNERS), help="default: %(default)s")
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="OUTxIN", help="default: ViT-B/16's, e.g. 3072x768")
    parser.add_argument("--block-sizes", nargs="+", type=_block_size, default=[64, 32, 16], metavar="N")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bfloat16", "float32"])
    parser.add_argument(
        "--tokens", nargs="+", type=_positive, default=[TOKENS], metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--sparsity", nargs="+", type=_fraction, default=[0.9], metavar="S", help="default: %(default)s"
    )
    parser.add_argument(
        "--seconds", type=float, default=300, help="begin no further case after this time (default: %(default)s)"
    )
    parser.add_argument(
        "--tf32", action="store_true", help="allow TF32: float32 of the backend triton is tuned for that instead"
    )
    parser.add_argument("--force", action="store_true", help="search again what is in the file already")
    return parser


def _shape(text: str) -> tuple[int, int]:
    rows, _, cols = text.partition("x")
    try:
        return _positive(rows), _positive(cols)
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; expected OUTxIN, e.g. 3072x768") from None


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is too small; expected at least 1")
    return number


def _block_size(text: str) -> int:
    if (number := int(text)) < 16 or number & (number - 1):
        raise argparse.ArgumentTypeError(f"{text} is no block size of these kernels; expected 16, 32, 64 or 128")
    return number


def _fraction(text: str) -> float:
    if not 0 <= (number := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no sparsity; expected at least 0 and below 1")
    return number
