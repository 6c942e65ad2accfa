"""Block-sparse linear layers on CPUs: a C++ kernel with fused bias and GELU, float32 and bfloat16.

The kernel (``csrc/block_linear.h``) works in tiles of a few tokens x a panel of 8, 16 or 32 outputs that stay in
registers over all blocks of a block row: vector registers, or those of AMX in bfloat16 where the CPU has it. It is
compiled at first use for the instructions of this CPU (``build.py``), with the one of ``cpu_attention``. As fast as a
good dense linear without zeros, and faster in proportion with them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import cache
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bsr import BSRMatrix, dense_from_bsr
from ..transforms import needs_plain_operators
from . import build
from .registry import Backend, constant_in_graphs, dense_linear, register

_CODES = {None: 0, "gelu": 1, "gelu_tanh": 2}
DTYPES = (torch.float32, torch.bfloat16)

BREAK_EVEN = 0.15
"""From which sparsity on it beats PyTorch's dense linear, about, at every shape of ViT-B/16.

Without zeros the kernel is so many times as fast as that linear:

- float32 on a Zen 3, 1576 tokens on 2 cores, where MKL is at its best: 0.85 to 1.3;
- float32 with AVX-512: 0.8 to 1.5 in blocks of 32 and more, 0.7 to 1.1 in blocks of 16 (even at 0.3);
- bfloat16 on the Zen 3: 4;
- bfloat16 with AMX, as that linear: 1.2 to 2.7 in blocks of 32 and more, 0.8 to 2 in blocks of 16 (even at 0.2).
"""


@cache
def load() -> str | None:
    """Compile the kernels if need be and load their operators; None, or why that failed.

    Called by every conversion for a CPU. A process that runs an exported program without converting anything calls it
    itself. Failure warns once: the layers then take a slower backend.
    """
    try:
        torch.ops.load_library(build.build_for_this_cpu("operators.cpp"))
        torch.library.register_fake("blockvit::cpu_linear", _fake)
        torch.library.register_fake("blockvit::cpu_linear_no_grad", _fake)
        torch.library.register_autograd("blockvit::cpu_linear", _backward, setup_context=_save_inputs)
        for operator in ("cpu_attention", "cpu_attention_no_grad"):
            torch.library.register_fake(f"blockvit::{operator}", _fake_attention)
        torch.library.register_autograd("blockvit::cpu_attention", _attention_backward, setup_context=_save_qkv)
    except (build.BuildError, OSError) as error:
        warnings.warn(
            f"blockvit's CPU kernel is not available, so block-sparse layers run in plain PyTorch, which is several "
            f"times slower: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return f"its C++ kernel could not be built: {error}"
    return None


def _block_size(weight: Tensor) -> int:
    return weight.shape[1] * (weight.shape[3] if weight.ndim == 4 else 1)


def _fake(x: Tensor, weight: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    return x.new_empty(x.shape[0], (crow.shape[0] - 1) * _block_size(weight))


def _save_inputs(ctx, inputs, output) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    # For fine-tuning what is around frozen sparse layers. The input of the GELU is computed again instead of being
    # kept, and the gradient goes through the dense weight: a second, transposed packing would double the memory.
    x, weight, crow, col, bias = ctx.saved_tensors
    if ctx.activation:
        before = torch.ops.blockvit.cpu_linear(x, weight, crow, col, bias, 0)  # with gradients: for second derivatives
        approximate = "none" if ctx.activation == _CODES["gelu"] else "tanh"
        grad = torch.ops.aten.gelu_backward(grad, before, approximate=approximate)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        block_shape = crow.shape[0] - 1, x.shape[1] // _block_size(weight)
        grad_x = grad @ dense_from_bsr(crow, col, unpack(weight, crow), block_shape)
    if bias is not None and ctx.needs_input_grad[4]:
        grad_bias = grad.sum(dim=0)
    return grad_x, None, None, None, grad_bias, None


def _fake_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


def _save_qkv(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _attention_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Only of graphs: eagerly PyTorch's attention runs where a gradient is asked for, and it keeps what its own needs.
    q, k, v = ctx.saved_tensors
    grad, scale = grad.transpose(1, 2), q.shape[-1] ** -0.5
    weights = (q @ k.mT * scale).softmax(dim=-1)
    grad_weights = grad @ v.mT
    grad_scores = weights * (grad_weights - (grad_weights * weights).sum(dim=-1, keepdim=True)) * scale
    return grad_scores @ k, grad_scores.mT @ q, weights.mT @ grad


@constant_in_graphs  # an operator that returns a number cannot be traced
def _panel_width(block_size: int) -> int:
    return torch.ops.blockvit.cpu_panel_width(block_size)


def _places(crow: Tensor, nnz: int, panels: int) -> Tensor:
    """``(nnz, panels)``: where panel p of stored block i lies. Within a block row it is panel by panel."""
    crow = crow.long()
    counts = crow.diff()
    rows = torch.repeat_interleave(torch.arange(len(counts), device=crow.device), counts, output_size=nnz)
    first, in_row = crow[rows], torch.arange(nnz, device=crow.device) - crow[rows]
    return (panels * first + in_row)[:, None] + counts[rows, None] * torch.arange(panels, device=crow.device)


def pack(values: Tensor, crow: Tensor, width: int) -> Tensor:
    """``values`` ``(nnz, b, b)`` in the order in which the kernel reads them, in panels of ``width`` outputs.

    float32: ``(nnz * b / width, b, width)``, a step in k after the other. bfloat16: ``(nnz * b / width, b / 2, width,
    2)``, pairs of steps side by side, as instructions for bfloat16 take them.
    """
    nnz, b, _ = values.shape
    panels = values.view(nnz, b // width, width, b).transpose(2, 3)
    if values.dtype == torch.bfloat16:
        panels = panels.unflatten(2, (b // 2, 2)).transpose(3, 4)
    packed = values.new_empty(nnz * (b // width), *panels.shape[2:])
    packed[_places(crow, nnz, b // width).flatten()] = panels.flatten(0, 1)
    return packed


def unpack(weight: Tensor, crow: Tensor) -> Tensor:
    """The values ``(nnz, b, b)`` that ``pack`` was given; tensor operations only, so that it can be traced."""
    b, width = _block_size(weight), weight.shape[2]
    nnz = weight.shape[0] * width // b
    panels = weight[_places(crow, nnz, b // width)]
    if weight.ndim == 4:
        panels = panels.transpose(3, 4).flatten(2, 3)
    return panels.transpose(2, 3).reshape(nnz, b, b)


@register
class CPU(Backend):
    """C++ kernel; float32 and bfloat16, block sizes that are multiples of 8; differentiable in ``x`` and ``bias``.

    In bfloat16 the sums are float32; products are exact in float32 or, on CPUs with AMX or AVX-512 BF16, made by those.
    """

    name = "cpu"

    @classmethod
    def refusal(cls, device: torch.device, dtype: torch.dtype, block_size: int) -> str | None:
        """What the kernel was not written for; and, once that is settled, why it could not be built."""
        if device.type != "cpu":
            return "its kernel runs on a CPU only"
        if dtype not in DTYPES:
            return "its kernel takes float32 and bfloat16 only"
        if block_size % 8:
            return "its kernel needs a block size that is a multiple of 8"
        return load()

    @classmethod
    def preference(cls, device: torch.device, dtype: torch.dtype, block_size: int, sparsity: float = 1.0) -> float:
        """First on a CPU from its break-even sparsity on, below it behind dense."""
        return 2.0 if sparsity >= BREAK_EVEN else -0.25

    @staticmethod
    def pack(weight: BSRMatrix) -> dict[str, Tensor]:
        """``weight``: see ``pack`` above; ``crow`` and ``col``: the indices as they are."""
        crow, col = weight.crow_indices.contiguous(), weight.col_indices.contiguous()
        return {"weight": pack(weight.values, crow, _panel_width(weight.block_size)), "crow": crow, "col": col}

    @staticmethod
    def unpack(packed: dict[str, Tensor]) -> Tensor:
        """See ``unpack`` above."""
        return unpack(packed["weight"], packed["crow"])

    @staticmethod
    def linear(x: Tensor, packed: dict[str, Tensor], bias: Tensor | None, activation: str | None) -> Tensor:
        """See ``Backend.linear``."""
        if needs_plain_operators():
            crow, col = packed["crow"], packed["col"]
            rows = (crow.shape[0] - 1) * _block_size(packed["weight"])
            return dense_linear(x, crow, col, unpack(packed["weight"], crow), rows, bias, activation)
        operator = torch.ops.blockvit.cpu_linear.default
        # Autograd registered from Python costs 9 microseconds a call, as much as a small layer takes at batch size 1,
        # also where no gradient is asked for. A traced graph leaves it out by itself.
        if not torch.compiler.is_compiling():
            wanted = x.requires_grad or (bias is not None and bias.requires_grad)
            if not (wanted and torch.is_grad_enabled()):
                operator = torch.ops.blockvit.cpu_linear_no_grad.default
        return operator(x, packed["weight"], packed["crow"], packed["col"], bias, _CODES[activation])


TOKENS = 197
"""Of one image in ViT-B/16: what is faster, the kernels or PyTorch, is measured with so many."""

MARGIN = 1.1
"""What is dense moves to a kernel only for a gain that nine calls can tell from noise."""


def beats_dense(shape: tuple[int, int], dtype: torch.dtype, block_size: int) -> bool:
    """Whether the kernel is faster than PyTorch's dense linear for a weight ``(out, in)`` without zeros.

    Measured once for each number of threads.

    That depends on the CPU and on PyTorch's library for it more than on the kernel: where MKL reaches 80% of the peak
    there is nothing to gain, where it reaches 50% the kernel is 1.5 times faster. Takes up to some tenths of a second.
    """
    return _beats_dense(shape, dtype, block_size, torch.get_num_threads())


@cache
def _beats_dense(shape: tuple[int, int], dtype: torch.dtype, block_size: int, threads: int) -> bool:
    if CPU.refusal(torch.device("cpu"), dtype, block_size) is not None:
        return False
    weight = torch.full(shape, 0.01, dtype=dtype, device="cpu")
    matrix = BSRMatrix.from_dense(weight, block_size)
    x = torch.full((TOKENS, matrix.padded_shape[1]), 0.01, dtype=dtype, device="cpu")
    weight = matrix.to_dense(padded=True)
    packed = CPU.pack(matrix)
    return beats(lambda: CPU.linear(x, packed, None, None), lambda: F.linear(x, weight))


def beats(ours: Callable[[], Tensor], dense: Callable[[], Tensor]) -> bool:
    """Whether ``ours`` is faster than ``dense`` by ``MARGIN``, by the median of nine calls each."""
    calls, times = (ours, dense), ([], [])
    with torch.no_grad():
        for _ in range(9):  # in turn, so that other work on the machine hits both
            for call, taken in zip(calls, times, strict=True):
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
    return median(times[0]) * MARGIN < median(times[1])


def peak_flops(dtype: torch.dtype = torch.float32, seconds: float = 2.0) -> float:
    """Measured floating-point operations a second of multiply-adds in registers, on all of PyTorch's threads.

    What no kernel in ``dtype`` (one of ``DTYPES``) can exceed here: the roof of a roofline. The best of many runs in
    about ``seconds``: for the first tenths of a second two threads may share a core, or the cores belong to others.

    Raises:
        RuntimeError: the kernel could not be built.
        ValueError: another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; the kernel multiplies in {' and '.join(map(str, DTYPES))}")
    if reason := load():
        raise RuntimeError(f"the peak cannot be measured: {reason}")
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        done = torch.ops.blockvit.cpu_multiply_adds(200_000, dtype == torch.bfloat16)
        best = max(best, done / (time.perf_counter() - start))
    return best
