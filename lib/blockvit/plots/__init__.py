"""Every figure of the study, drawn from tables alone: no torch, no measuring, one shared style.

A figure takes rows as ``results.Store.read`` gives them (or ``comparisons.speedups`` of them) and returns a matplotlib
figure. What is computed for a figure and would stand in a text as well belongs into ``results`` or ``limits``.

- ``training``: models while they are trained, and their masks.
- ``layers``: single linear layers and large products.
- ``roofline``: single layers against what the device can do, and what an MLP has to move.
- ``models``: whole models: speed, memory, and converting them.
- ``latency``: one image at a time: the distribution of the latency, and threads.
- ``headline``: whole models on every machine at once.
- ``losses``: what sparsity costs, beside the speed it buys.
- ``style``: what they share to draw: titles, colours, markers, lines, axes, legends, labels, saving.
- ``words``: what they share to name: models, layers, backends, engines, machines.
- ``rows``: what they share to read: which rows a figure may take, and those of each block size.
"""

from .headline import headline_speedups
from .latency import latency_tails, threads
from .layers import contenders, large_matmuls, linear_speedup, linear_throughput, speedup_heatmaps
from .losses import accuracy, mask_changes, pareto, variants
from .models import batch_sizes, conversion, execution_modes, memory, model_speedup
from .roofline import roofline, traffic
from .style import WIDTH, save, set_style
from .training import block_masks, kept_blocks, step_overhead, training_curves

__all__ = [
    "WIDTH",
    "accuracy",
    "batch_sizes",
    "block_masks",
    "contenders",
    "conversion",
    "execution_modes",
    "headline_speedups",
    "kept_blocks",
    "large_matmuls",
    "latency_tails",
    "linear_speedup",
    "linear_throughput",
    "mask_changes",
    "memory",
    "model_speedup",
    "pareto",
    "roofline",
    "save",
    "set_style",
    "speedup_heatmaps",
    "step_overhead",
    "threads",
    "traffic",
    "training_curves",
    "variants",
]
