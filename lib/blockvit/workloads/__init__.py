"""What the study times: single layers, whole Vision Transformers, conversion, training steps, the device's ceilings.

Each case builds a group of variants of one computation: dense PyTorch as it comes, dense PyTorch compiled, and the
same weights block-sparse through each backend. Every sparse variant's output is checked against the dense one before
its time is taken.
"""

from .attention import AttentionCase
from .conversion import DIFFERENCES, ConversionCase, fold_differences, masked_model
from .device import CeilingCase, TuningCase, fewer_threads, tuning_cases
from .grid import DeviceGrid, ModelGrid
from .layers import LinearCase, linear_cases
from .mlp import MLPCase, mlp_cases
from .modes import CUDA_GRAPH, mode_refusal, mode_refusals, runnable_modes
from .training import TrainingStepCase, step_cases
from .variants import DENSE_TOO, FUSED_MLP, TAILS, Variant, measure_group, refusals, runnable, tail_metric
from .vit import SCOPES, UNPRUNED, ModelCase, model_shape, sparse_share

__all__ = [
    "CUDA_GRAPH",
    "DENSE_TOO",
    "DIFFERENCES",
    "FUSED_MLP",
    "SCOPES",
    "TAILS",
    "UNPRUNED",
    "AttentionCase",
    "CeilingCase",
    "ConversionCase",
    "DeviceGrid",
    "LinearCase",
    "MLPCase",
    "ModelCase",
    "ModelGrid",
    "TrainingStepCase",
    "TuningCase",
    "Variant",
    "fewer_threads",
    "fold_differences",
    "linear_cases",
    "masked_model",
    "measure_group",
    "mlp_cases",
    "mode_refusal",
    "mode_refusals",
    "model_shape",
    "refusals",
    "runnable",
    "runnable_modes",
    "sparse_share",
    "step_cases",
    "tail_metric",
    "tuning_cases",
]
