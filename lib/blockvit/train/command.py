"""One training as a plain command, in one process or in those that ``accelerate launch`` started."""

from __future__ import annotations

import argparse
import copy
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

from .. import checkpoint, data, files, models
from ..attention import packed_state_dict
from ..convert import fold, layer_fates, to_block_sparse
from ..machine import usable_cores
from ..supermask import BLOG_TARGETS, METHODS, SCORES, sparsify, supermask_layers
from .batches import accumulation, steps_per_epoch
from .loop import History, NonFiniteLossError, fit
from .processes import Alone, join
from .recipe import RECIPES, Recipe, recipe_for
from .weights import begin_with, trained_weights

EXAMPLES = """
examples:
  python -m blockvit.train --dataset digits --model vit_digits --sparsity 0.9 --output runs/digits

  a trained model, made sparse in a tenth of the epochs, and taught by what it was:
  python -m blockvit.train --dataset imagenet --data /data/imagenet --model vit_b_16 --weights IMAGENET1K_V1 \\
      --sparsity 0.8 --scores magnitude --sparsity-schedule cubic --distillation-alpha 0.5 --epochs 30 \\
      --lr-warmup-epochs 3 --lr 3e-4 --output runs/vit_b_16-sp0.80-bs32

  one node of eight GPUs:
  accelerate launch --multi_gpu --num_processes 8 -m blockvit.train --dataset imagenet --data /data/imagenet \\
      --model vit_b_16 --sparsity 0.9 --block-size 32 --output runs/vit_b_16-sp0.90-bs32 --resume

  two such nodes, on each its own --machine_rank, 0 and 1; HOST is the first one's address:
  accelerate launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank 0 --main_process_ip HOST \\
      --main_process_port 29500 -m blockvit.train ...

The output folder gets checkpoint.pt and curve.csv after each epoch, and at the end model.safetensors: masks folded,
layers that hold zero blocks in block-sparse form, for blockvit.load; of a dense model the plain state dict.
"""

MASKS = {"targets": BLOG_TARGETS, "method": "supermask", "scores": "kaiming"}
"""Options that say nothing without ``--sparsity``, and what they are if left out."""

METAVARS = {"int": "N", "float": "X", "str": "NAME", "bool": "true|false"}


def parser() -> argparse.ArgumentParser:
    """The command line: what to train, how to run it, and every field of the recipe."""
    one = argparse.ArgumentParser(
        prog="python -m blockvit.train",
        usage="%(prog)s --dataset NAME [--data DIR] --model NAME [--sparsity S] --output DIR [--resume] [option ...]",
        description="Train a Vision Transformer, dense or with supermasks, and write it folded.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = one.add_argument_group("what to train")
    what.add_argument("--dataset", required=True, choices=data.NAMES, help="data set to train on")
    what.add_argument("--data", metavar="DIR", help="its folder: train/ and val/, each with a folder for every class")
    what.add_argument("--model", required=True, metavar="NAME", help=", ".join(models.names()))
    what.add_argument(
        "--weights", metavar="FILE|NAME", help="begin with these, dense: a state dict, or torchvision's IMAGENET1K_V1; "
        "they also teach, if distillation_alpha is set",
    )  # fmt: skip
    what.add_argument("--sparsity", type=float, metavar="S", help="fraction of blocks to drop; left out: dense")
    what.add_argument("--block-size", type=int, default=32, metavar="N", help="edge length of blocks (default: 32)")
    masks = one.add_argument_group("its masks, with --sparsity", argument_default=argparse.SUPPRESS)
    masks.add_argument("--targets", nargs="+", metavar="NAME", help="default: mlp out_proj head")
    masks.add_argument("--method", choices=METHODS, help="what decides which blocks stay (default: supermask)")
    masks.add_argument("--scores", choices=SCORES, help="how scores start (default: kaiming)")

    how = one.add_argument_group("how to run")
    how.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for checkpoint, curve, model")
    how.add_argument("--resume", action="store_true", help="go on from the output folder's checkpoint if it has one")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    how.add_argument("--device", type=_device, default=here, help="default: %(default)s")
    how.add_argument("--workers", type=_count, metavar="N", help="decoding processes for each training process")
    how.add_argument("--accumulate", type=int, metavar="N", help="forward passes that each process makes in a step")
    how.add_argument(
        "--compile", type=_mode, nargs="?", const=True, default=False, metavar="MODE", help="use torch.compile"
    )
    how.add_argument("--eval-every", type=int, default=1, metavar="N", help="epochs between evaluations (default: 1)")

    about = _attributes_of(Recipe)
    recipe = one.add_argument_group("the recipe", "names as in torchvision's reference")
    recipe.add_argument("--recipe", choices=RECIPES, help="where defaults come from (default: the data set's recipe)")
    for field in fields(Recipe):
        kind, *more = field.type.split(" | ")
        metavar = METAVARS[kind] + "|none" * bool(more)
        recipe.add_argument(
            _option(field.name), type=_reader(field.type), metavar=metavar, default=argparse.SUPPRESS,
            help=about[field.name],
        )  # fmt: skip
    return one


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _reader(annotation: str) -> Any:
    """Reads a recipe's field, by its annotation, from a word of the command line."""
    kind, *more = annotation.split(" | ")

    def read(text: str) -> Any:
        if more and text.lower() == "none":
            return None
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        return {"int": int, "float": float, "str": str}[kind](text)

    def read_or_tell(text: str) -> Any:
        try:
            return read(text)
        except (ValueError, KeyError):
            raise argparse.ArgumentTypeError(f"{text!r}; expected {annotation.replace(' |', ' or')}") from None

    return read_or_tell


def _device(text: str) -> str:
    """A device that there is; it is not touched, because each of several processes takes a GPU of its own."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    others = [] if kind is None else [f"{kind.type}:{index}" for index in range(torch.accelerator.device_count())]
    if text not in ("cpu", *others, *(other.partition(":")[0] for other in others)):
        raise argparse.ArgumentTypeError(f"{text!r} is not here; expected one of {', '.join(['cpu', *others])}")
    return text


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number, 0 or more")
    return int(text)


def _mode(text: str) -> str:
    try:
        torch.compile(nn.Identity(), mode=text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _attributes_of(cls: type) -> dict[str, str]:
    """What a dataclass's docstring says of each attribute."""
    text = " ".join(cls.__doc__.partition("Attributes:")[2].partition("Raises:")[0].split())
    names = "|".join(field.name for field in fields(cls))
    found = re.findall(rf"\b({names}): (.*?)\.?(?= (?:{names}): |$)", text)
    return {name: about.replace("``", "").replace("%", "%%") for name, about in found}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status. What the user can mend is told in one line, without a traceback."""
    words = [_dashed(word) for word in (sys.argv[1:] if argv is None else argv)]
    one = parser()
    args = one.parse_args(words)
    try:
        recipe = _recipe(args)
    except ValueError as error:
        one.error(str(error))
    if args.sparsity is None and (idle := [f"--{name}" for name in MASKS if name in args]):
        one.error(f"{', '.join(idle)} without --sparsity, of a dense training without masks; pass --sparsity too")
    processes = None
    try:
        processes = join(args.device)
        train(args, recipe, processes)
    except (ValueError, OSError, ImportError, NonFiniteLossError) as error:
        where = f" (process {processes.rank} of {processes.count})" if processes and processes.count > 1 else ""
        print(f"{one.prog}{where}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    processes.leave()
    return 0


def _dashed(word: str) -> str:
    """``--batch_size=8`` as ``--batch-size=8``: both ways to write an option are usual."""
    option, equals, value = word.partition("=")
    return option.replace("_", "-") + equals + value if word.startswith("--") else word


def _recipe(args: argparse.Namespace) -> Recipe:
    name = args.recipe or ("imagenet" if args.dataset == "folder" else args.dataset)
    changes = {field.name: getattr(args, field.name) for field in fields(Recipe) if hasattr(args, field.name)}
    return recipe_for(name, **changes)


def train(args: argparse.Namespace, recipe: Recipe, processes: Alone) -> None:
    """Train as the command line says, and write checkpoint, curve and model."""
    state = args.output / "checkpoint.pt"
    exists = processes.on_main(state.exists)
    if exists and not args.resume:
        raise FileExistsError(f"{state} exists; pass --resume to go on from it, or another --output")
    processes.on_main(lambda: files.check_writable(state))
    with processes.main_first():
        where = {"download": True, "cache_dir": args.output / "datasets"}
        splits = data.load(args.dataset, args.data, image_size=recipe.val_crop_size, **where)
    torch.manual_seed(recipe.seed)
    model = models.create(args.model, num_classes=len(splits.classes), image_size=splits.image_size)
    if args.weights is not None:
        with processes.main_first():
            whole = begin_with(model, trained_weights(args.weights, args.model))
        if not whole and recipe.distillation_alpha:
            raise ValueError(
                f"--weights {args.weights} has a head of other classes than {args.dataset}, so it cannot teach them; "
                "leave out --distillation-alpha, or pass weights that were trained on this data"
            )
    teacher = copy.deepcopy(model) if recipe.distillation_alpha and args.weights is not None else None
    masks = {} if args.sparsity is None else {name: getattr(args, name, value) for name, value in MASKS.items()}
    if masks:
        sparsify(model, args.sparsity, args.block_size, **masks)
    accumulate = accumulation(recipe.batch_size, processes.count, args.accumulate)
    in_memory = isinstance(splits.train, data.ImageTensors)
    workers = _workers(processes.count) if args.workers is None else args.workers
    workers = 0 if in_memory else workers
    if processes.is_main:
        run = {
            "source": splits.source,
            "training images": len(splits.train),
            "steps per epoch": steps_per_epoch(len(splits.train), recipe),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "processes": processes.count,
            "images per pass": recipe.batch_size // (processes.count * accumulate),
            **{name: value for name, value in vars(args).items() if not hasattr(recipe, name)},
            **masks,
            "accumulate": accumulate,
            "workers": workers,
            **asdict(recipe),
        }
        print("".join(f"{name} = {value}\n" for name, value in run.items()), flush=True)
    fit(
        model,
        splits,
        recipe,
        device=args.device,
        checkpoint=state,
        eval_every=args.eval_every,
        progress=sys.stderr.isatty(),
        num_workers=workers,
        accumulate=accumulate,
        compile=args.compile,
        teacher=teacher,
        on_epoch=lambda history: report(history, recipe, args.output / "curve.csv"),
    )
    if processes.is_main:
        path = args.output / "model.safetensors"
        export(model, path, args.block_size)
        print(f"wrote {path}", flush=True)


def report(history: History, recipe: Recipe, curve: Path) -> None:
    """Print the last epoch as a line and write all of them as a table."""
    last = history.epochs[-1]
    top1 = "" if last["test_top1"] is None else f"  top-1 {last['test_top1']:.2%}"
    print(
        f"epoch {last['epoch']}/{recipe.epochs}  loss {last['train_loss']:.4f}{top1}  lr {last['lr']:.3g}  "
        f"{last['images_per_s']:,.0f} images/s  {last['data_share']:.1%} waiting for data  {last['seconds']:.1f} s",
        flush=True,
    )
    files.write(curve, pd.DataFrame(history.epochs).to_csv(index=False))


def export(model: nn.Module, path: Path, block_size: int) -> None:
    """Write ``model``, its masks folded: block-sparse for ``blockvit.load``, or its state dict if no block is zero."""
    model.cpu().eval()
    if supermask_layers(model):
        fold(model)
    if any(fate.fate != "dense" for fate in layer_fates(model, block_size)):
        checkpoint.save(to_block_sparse(model, block_size, backend="dense"), path)  # a backend that runs everywhere
    else:
        state = packed_state_dict(model)  # what PyTorch's own models load, and --weights
        files.write(path, safetensors_bytes({name: t.contiguous() for name, t in state.items()}))


def _workers(processes: int) -> int:
    """Decoding processes for each training process: its share of the cores of this machine."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return max(1, min(16, usable_cores() // here))
