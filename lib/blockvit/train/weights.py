"""Trained weights to begin with: from a file, or torchvision's by name."""

from __future__ import annotations

from pathlib import Path

import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..checkpoint import mismatches
from ..models import TORCHVISION_MODELS
from ..superblock import read_torch_checkpoint, state_dict_in

HEAD = "heads.head."  # torchvision's name of a Vision Transformer's last layer


def trained_weights(weights: str, model: str) -> dict[str, Tensor]:
    """The state dict that ``weights`` names.

    Args:
        weights: a file, ``.safetensors`` or a ``torch.save`` of a state dict or of ``{"model": state_dict, ...}``; or
            torchvision's weights of ``model``, which are downloaded once: ``"DEFAULT"``, ``"IMAGENET1K_V1"``, or as
            torchvision's reference has it, ``"ViT_B_16_Weights.IMAGENET1K_V1"``.
        model: the model's name, see ``models.names``.

    Raises:
        FileNotFoundError: neither a file nor a name that torchvision has for ``model``.
        ValueError: a damaged or foreign file, or one that holds a block-sparse model.
    """
    path = Path(weights).expanduser()
    if not path.is_file():
        return _torchvision_weights(weights, model)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                written_by_us = "blockvit" in (file.metadata() or {})
            if written_by_us:
                raise ValueError(
                    f"{path} is a block-sparse model, for blockvit.load, and a training begins with dense weights; "
                    "pass the state dict of the dense model"
                )
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or damaged ({error}); fetch or save it again") from error
    state = state_dict_in(read_torch_checkpoint(path))
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} holds no state dict; expected one, or one under the key 'model'")
    return state


def _torchvision_weights(weights: str, model: str) -> dict[str, Tensor]:
    known = torchvision.models.get_model_weights(model).__members__ if model in TORCHVISION_MODELS else {}
    name = weights.rpartition(".")[2]
    if name not in known or weights not in (name, f"{type(known[name]).__name__}.{name}"):
        there = f"torchvision has {', '.join(known)}" if known else "torchvision has none"
        raise FileNotFoundError(f"{weights} is no file, and no weights of {model} ({there})")
    return known[name].get_state_dict(progress=False, check_hash=True)


def begin_with(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Load ``state`` into ``model``, a dense one; a head of other classes stays as it is. Returns whether all fitted.

    Raises:
        ValueError: weights of another architecture; the model is then as it was.
    """
    own = model.state_dict()
    heads = [name for name in state if name.startswith(HEAD) and name in own]
    other_head = [name for name in heads if state[name].shape != own[name].shape]
    filled = state | {name: own[name] for name in other_head}
    if problems := mismatches(model, filled):
        raise ValueError("the weights are of another architecture than the model:\n" + "\n".join(problems))
    model.load_state_dict(filled)
    return not other_head
