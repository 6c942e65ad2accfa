"""Published SuperBlock checkpoints: read, and loaded into a dense model.

A checkpoint is a ``torch.save`` of ``{"model": state_dict, ...}`` whose masked layers hold ``weight, bias, scores,
shift, scale``: the weight is ``weight * scale + shift``, and the scores say which of its blocks stay. Sparsity and
block size are not in it; by custom its name tells them, as in ``sp0.80-ts32.pth``.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .attention import MultiheadAttention, rename_packed_projection
from .bsr import check_block_size
from .checkpoint import mismatches
from .files import check_file
from .masks import block_mask, check_scores, check_sparsity, expand_mask
from .supermask import sparsify

_NAME = re.compile(r"sp(?P<sparsity>0?\.\d+)-ts(?P<block_size>\d+)")


def read_name(path: str | os.PathLike) -> tuple[float, int] | None:
    """Sparsity and block size as a checkpoint's file name tells them; None if it does not."""
    found = _NAME.search(Path(path).name)
    return (float(found["sparsity"]), int(found["block_size"])) if found else None


def masked_layers(state: Mapping[str, Any]) -> list[str]:
    """The layers that have a mask in a state dict that ``read_superblock`` returned."""
    return [name.removesuffix(".scores") for name in state if name.endswith(".scores")]


def is_left_out(name: str, apply_out_proj_masks: bool = False) -> bool:
    """Whether ``load_superblock`` leaves out this layer's mask."""
    return name.endswith("out_proj") and not apply_out_proj_masks


def read_superblock(checkpoint: str | os.PathLike | Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of a published checkpoint, without the prefix of data-parallel training.

    Raises:
        FileNotFoundError: no such file.
        IsADirectoryError: it is a folder.
        ValueError: a truncated or foreign file.
    """
    if not isinstance(checkpoint, Mapping):
        checkpoint = read_torch_checkpoint(Path(checkpoint))
    state = state_dict_in(checkpoint)
    if not isinstance(state, Mapping):
        raise ValueError(
            f"the checkpoint holds a {type(state).__name__}; expected a state dict, or one under the key 'model'"
        )
    masked = masked_layers(state)
    if not masked:
        raise ValueError("the checkpoint holds no '.scores': it is no SuperBlock checkpoint; load it as a dense model")
    for name in masked:
        if f"{name}.weight" not in state:
            raise ValueError(f"the checkpoint holds {name}.scores but no {name}.weight; it is damaged: fetch it again")
    if others := [name for name, tensor in state.items() if not isinstance(tensor, Tensor)]:
        raise ValueError(
            f"the checkpoint holds {others[0]}, a {type(state[others[0]]).__name__}; expected a state dict, which "
            "holds tensors only: take out what is none"
        )
    return state


@torch.no_grad()
def load_superblock(
    checkpoint: str | os.PathLike | Mapping[str, Any],
    model: nn.Module,
    *,
    sparsity: float,
    block_size: int,
    apply_out_proj_masks: bool = False,
    fold: bool = True,
) -> nn.Module:
    """Load a published SuperBlock checkpoint into a dense ``model``, its masks folded into the weights, in place.

    Masks of attention output projections are left out by default: the reference implementation put them into
    ``nn.MultiheadAttention``, which never applied them, so the published accuracy is the accuracy without them.

    Args:
        checkpoint: path of a ``torch.save`` of ``{"model": state_dict, ...}`` or of a state dict, or either as a dict.
        model: a dense model of the architecture, e.g. ``torchvision.models.vit_b_16()``.
        sparsity: the linear sparsity it was trained with (not stored in the checkpoint).
        block_size: its tile size.
        apply_out_proj_masks: apply the ``out_proj`` masks too.
        fold: multiply the masks into the weights. Without it the layers keep them, as ``sparsify`` makes them, to be
            trained further or folded later.

    Returns:
        ``model`` in evaluation mode, ready for ``to_block_sparse`` once it is folded.

    Raises:
        FileNotFoundError: no such file.
        IsADirectoryError: it is a folder.
        ValueError: a truncated or foreign file; another architecture, block size or (by the file's name) sparsity.
            ``model`` is as it was.
    """
    sparsity, block_size = check_sparsity(sparsity), check_block_size(block_size)
    if not isinstance(checkpoint, Mapping):
        _check_name(Path(checkpoint), sparsity, block_size)
    state = read_superblock(checkpoint)
    kept: dict[str, Tensor] = {}  # scores of the masks that are applied but not folded
    for name in masked_layers(state):
        scores = state.pop(f"{name}.scores")
        weight = state[f"{name}.weight"] * state.pop(f"{name}.scale", 1.0) + state.pop(f"{name}.shift", 0.0)
        _check_blocks(name, weight, scores, block_size)
        if not is_left_out(name, apply_out_proj_masks):
            check_scores(scores)
            if fold:
                weight = weight * expand_mask(block_mask(scores, sparsity), block_size, tuple(weight.shape))
            else:
                kept[name] = scores
        state[f"{name}.weight"] = weight
    for name, module in model.named_modules():
        if isinstance(module, MultiheadAttention):
            rename_packed_projection(module, state, f"{name}.")
    problems = mismatches(model, state)
    if problems:
        raise ValueError(
            f"the checkpoint is of another architecture than {type(model).__name__}:\n" + "\n".join(problems)
        )
    if kept:
        sparsify(model, sparsity, block_size, targets=lambda name, module: name in kept)
    model.load_state_dict(state | {f"{name}.scores": scores for name, scores in kept.items()})
    return model.eval()


def _check_name(path: Path, sparsity: float, block_size: int) -> None:
    found = read_name(path)
    if found and found != (sparsity, block_size):
        raise ValueError(
            f"{path.name} says sparsity {found[0]:g} and block size {found[1]}, but sparsity={sparsity} and "
            f"block_size={block_size} were given; pass the values in the name, or rename the file"
        )


def _check_blocks(name: str, weight: Tensor, scores: Tensor, block_size: int) -> None:
    expected = tuple(-(-size // block_size) for size in weight.shape)
    if tuple(scores.shape) != expected:
        raise ValueError(
            f"{name}: scores have shape {tuple(scores.shape)}, but a {tuple(weight.shape)} weight in blocks of "
            f"{block_size} has {expected}; the checkpoint was trained with another block_size"
        )


def state_dict_in(checkpoint: Any) -> Any:
    """The state dict that a checkpoint holds or is, without the prefix of data-parallel training; any else as it is."""
    state = checkpoint.get("model", checkpoint) if isinstance(checkpoint, Mapping) else checkpoint
    if not isinstance(state, Mapping):
        return state
    return {str(name).removeprefix("module."): tensor for name, tensor in state.items()}


def read_torch_checkpoint(path: Path) -> dict[str, Any]:
    """``torch.load`` onto the CPU without running code from the file; clear errors for what is no checkpoint."""
    check_file(path, "expected a checkpoint written by torch.save")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain values, or is no checkpoint: {error}") from error
    except PermissionError:
        raise
    except Exception as error:  # damaged files raise anything: KeyError, EOFError, OSError, ...
        raise ValueError(f"{path} is truncated or damaged ({error}); fetch or save it again") from error
