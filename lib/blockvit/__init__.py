"""BlockViT: block-sparse Vision Transformers, trained with supermasks, folded into BSR weights, and made fast."""

from .attention import MultiheadAttention, expose_projections
from .bsr import BSRMatrix
from .checkpoint import load, read_metadata, save
from .fold import fold, layer_fates, model_bytes, to_block_sparse
from .kernels import BackendUnavailableError, backends
from .linear import BlockSparseLinear
from .superblock import load_superblock
from .supermask import SupermaskConv2d, SupermaskLinear, sparsify

__version__ = "0.1.0"

__all__ = [
    "BSRMatrix",
    "BackendUnavailableError",
    "BlockSparseLinear",
    "MultiheadAttention",
    "SupermaskConv2d",
    "SupermaskLinear",
    "backends",
    "expose_projections",
    "fold",
    "layer_fates",
    "load",
    "load_superblock",
    "model_bytes",
    "read_metadata",
    "save",
    "sparsify",
    "to_block_sparse",
]
