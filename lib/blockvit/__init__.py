"""BlockViT: block-sparse Vision Transformers, trained with supermasks, folded into BSR weights, and made fast.

The five calls, in the order of a model's life; each one's own help tells the rest::

    blockvit.sparsify(model, sparsity=0.9, block_size=32)  # linear layers get supermasks, then train as usual
    blockvit.fold(model)                                   # masks into weights: plain layers, the same outputs
    blockvit.to_block_sparse(model, block_size=32)         # layers that hold zero blocks run on a block-sparse kernel
    blockvit.save(model, "model.safetensors")
    model = blockvit.load("model.safetensors")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import kernels as kernels
    from .attention import MultiheadAttention as MultiheadAttention
    from .attention import expose_projections as expose_projections
    from .bsr import BSRMatrix as BSRMatrix
    from .checkpoint import load as load
    from .checkpoint import read_metadata as read_metadata
    from .checkpoint import save as save
    from .convert import LayerFate as LayerFate
    from .convert import fold as fold
    from .convert import layer_fates as layer_fates
    from .convert import model_bytes as model_bytes
    from .convert import to_block_sparse as to_block_sparse
    from .kernels import BackendUnavailableError as BackendUnavailableError
    from .kernels import backends as backends
    from .linear import BlockSparseLinear as BlockSparseLinear
    from .mlp import BlockSparseMLP as BlockSparseMLP
    from .patches import PatchEmbedding as PatchEmbedding
    from .sparse_training import end_sparse as end_sparse
    from .sparse_training import train_sparse as train_sparse
    from .superblock import load_superblock as load_superblock
    from .supermask import SupermaskConv2d as SupermaskConv2d
    from .supermask import SupermaskLinear as SupermaskLinear
    from .supermask import cubic_sparsity as cubic_sparsity
    from .supermask import set_sparsity as set_sparsity
    from .supermask import sparsify as sparsify

__version__ = "0.1.0"

# Imported when first asked for, so that the tables, the figures and the pipeline, which need no torch, import none.
_EXPORTS = {
    "attention": ("MultiheadAttention", "expose_projections"),
    "bsr": ("BSRMatrix",),
    "checkpoint": ("load", "read_metadata", "save"),
    "convert": ("LayerFate", "fold", "layer_fates", "model_bytes", "to_block_sparse"),
    "kernels": ("BackendUnavailableError", "backends"),
    "linear": ("BlockSparseLinear",),
    "mlp": ("BlockSparseMLP",),
    "patches": ("PatchEmbedding",),
    "sparse_training": ("end_sparse", "train_sparse"),
    "superblock": ("load_superblock",),
    "supermask": ("SupermaskConv2d", "SupermaskLinear", "cubic_sparsity", "set_sparsity", "sparsify"),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
        return value
    if name in _EXPORTS:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_EXPORTS})
