"""Vision Transformers by name: torchvision's, and three small ones for small images.

All are ``torchvision.models.VisionTransformer``, so that sparsifying, folding and timing treat them alike. They take
``(N, 3, S, S)`` floats and return ``(N, num_classes)`` logits. Weights are random (``torch.manual_seed`` fixes them).
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from torch import nn

TORCHVISION_MODELS = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_h_14")

# The digits are grey but come in three equal channels: that costs 4 K parameters and spares every tool (builders, saved
# models, images from folders) a special case. Their patches are 4 x 4: five tokens train twice as fast as the
# seventeen of 2 x 2 and, in the same time, more accurately (90% sparse in blocks of 32: 97% against 86%).
SMALL_MODELS: dict[str, dict[str, int]] = {
    "vit_digits": {
        "image_size": 8,
        "patch_size": 4,
        "num_layers": 4,
        "num_heads": 4,
        "hidden_dim": 128,
        "mlp_dim": 512,
        "num_classes": 10,
    },
    # The shape of ViT-CIFAR (github.com/omihub777/ViT-CIFAR), 6.3 M parameters; blocks of 16, 32 and 64 divide it.
    "vit_cifar": {
        "image_size": 32,
        "patch_size": 4,
        "num_layers": 7,
        "num_heads": 12,
        "hidden_dim": 384,
        "mlp_dim": 384,
        "num_classes": 10,
    },
    # For a CPU: 0.8 M parameters in 17 tokens. An epoch of 50,000 images takes 100 s on a core of an AMD EPYC, with
    # patches of 4 x 4 (65 tokens) 390 s; blocks of 32 divide every layer, a head of 10 rows aside.
    "vit_cifar_small": {
        "image_size": 32,
        "patch_size": 8,
        "num_layers": 4,
        "num_heads": 4,
        "hidden_dim": 128,
        "mlp_dim": 512,
        "num_classes": 10,
    },
}

# torchvision draws position embeddings at 0.02, a fiftieth of a patch embedding: few-epoch training on little data then
# sees a bag of patches for most of its time. Digits after ten epochs: 40% at 0.02, 98% at 0.5.
SMALL_POSITION_STD = 0.5


def num_classes(model: nn.Module) -> int | None:
    """How many logits a ``VisionTransformer`` returns; None for a model that is not built as torchvision's.

    Read from the head: ``model.num_classes`` stays what it was when the head is replaced, as for fine-tuning.
    """
    head = getattr(getattr(model, "heads", None), "head", None)
    return getattr(head, "out_features", None)


def names() -> list[str]:
    """The names that ``create`` knows."""
    return [*SMALL_MODELS, *TORCHVISION_MODELS]


def create(name: str, **kwargs: Any) -> nn.Module:
    """Make the model called ``name``, with random weights.

    Args:
        name: one of ``names()``.
        kwargs: passed to ``torchvision.models.VisionTransformer``, over the model's own settings: ``num_classes``,
            ``image_size`` (pixels, a multiple of the patch size), ``dropout``, ...

    Raises:
        ValueError: unknown name; the message gives the nearest one and the list.
        TypeError: a keyword that ``VisionTransformer`` does not take.
    """
    import torchvision.models as tv  # here, because it takes a second that users of other models need not wait

    if name in TORCHVISION_MODELS:
        return getattr(tv, name)(weights=None, **kwargs)
    if name not in SMALL_MODELS:
        raise unknown_name("model", name, names())
    model = tv.VisionTransformer(**SMALL_MODELS[name] | kwargs)
    nn.init.normal_(model.encoder.pos_embedding, std=SMALL_POSITION_STD)
    return model


def unknown_name(kind: str, name: str, known: list[str]) -> ValueError:
    """The error for a ``name`` that is not among ``known``, with the nearest one that is."""
    near = get_close_matches(str(name), known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ValueError(f"unknown {kind} {name!r}{hint}; expected one of: {', '.join(known)}")
