"""Other people's inference engines on the plain dense model: the dense baselines that count on a CPU.

ONNX Runtime and OpenVINO run a dense Vision Transformer faster than PyTorch does: they are what a block-sparse one has
to beat. Each gets the model as ``torch.export`` gives it, at one shape, and as many threads as PyTorch has; OpenVINO
computes in float32 or bfloat16, ONNX Runtime in float32. They are optional: ``pip install 'blockvit[engines]'``.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

ENGINES = ("onnxruntime", "openvino")
"""What the tables call them, in the column ``compile``; the names of their packages, too."""

DTYPES = {"onnxruntime": (torch.float32,), "openvino": (torch.float32, torch.bfloat16)}
"""What each computes in on a CPU. ONNX Runtime would convert bfloat16 products to float32."""

_NEEDS = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "openvino": ("openvino",)}


def refusal(engine: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why ``engine`` cannot run a model there, or None if it can; imports nothing.

    Raises:
        ValueError: ``engine`` is none of ``ENGINES``.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine is {engine!r}; expected one of {list(ENGINES)}")
    if torch.device(device).type != "cpu":
        return f"{engine} is a baseline on CPUs only, and the device is {device}"
    if dtype not in DTYPES[engine]:
        known = " and ".join(_name(one) for one in DTYPES[engine])
        return f"{engine} is measured in {known} only, not in {_name(dtype)}"
    if dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        return f"this CPU has no instructions for bfloat16, so {engine} would compute in float32"
    missing = [name for name in _NEEDS[engine] if importlib.util.find_spec(name) is None]
    if missing:
        what = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'}"
        return f"{what} not installed: pip install 'blockvit[engines]'"
    return None


def prepare(engine: str, model: nn.Module, example: Tensor, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """``model`` converted for ``engine``: a call that gives what ``model`` gives, for inputs like ``example``.

    Converting takes seconds, and for a moment the memory of another copy or two of the weights. Nothing stays on disk.

    Args:
        engine: one of ``ENGINES``.
        model: dense, in evaluation mode, on the CPU, with one input and one output, and in one dtype.
        example: an input; its shape and dtype are the only ones that the call takes.
        threads: how many the engine computes with; by default ``torch.get_num_threads()``, read now.

    Raises:
        RuntimeError: the engine cannot run here, for ``refusal``'s reason, or not with so many threads.
        ValueError: the model is in training mode, or ``threads`` is less than 1.
    """
    if reason := refusal(engine, example.device, example.dtype):
        raise RuntimeError(f"the engine {engine} cannot be prepared: {reason}")
    if model.training:
        raise ValueError("the model is in training mode; an engine runs what it computes in evaluation: model.eval()")
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads is {threads}; expected at least 1, or None for PyTorch's number")
    build = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}[engine]
    with torch.inference_mode(False), torch.no_grad(), _silence():
        exported = torch.export.export(_exportable(model), (torch.zeros(example.shape),))
        return build(exported, example, threads)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _exportable(model: nn.Module) -> nn.Module:
    """``model`` in float32 and outside of inference mode, a copy if need be: so exporters take it.

    An engine rounds weights to bfloat16 itself; here they are what they were rounded to before.
    """
    tensors = [*model.parameters(), *model.buffers()]
    as_it_is = all(not t.is_inference() and t.dtype in (torch.float32, torch.int64) for t in tensors)
    return model if as_it_is else copy.deepcopy(model).float()


class OnnxRuntime:
    """A model in ONNX Runtime's CPU provider, with all its graph optimisations.

    Its threads spin for some 50 ms after a call, waiting for the next, as they do by default: without that, calls back
    to back take up to twice as long, of small layers above all. Whatever else is timed in that while has fewer cores.
    """

    def __init__(self, exported: ExportedProgram, example: Tensor, threads: int) -> None:
        onnxruntime = _import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3  # errors
        # A file holds 2 GB at most, and vit_h_14 has more: weights beside it. A session reads them when it is made.
        with tempfile.TemporaryDirectory(prefix="blockvit-onnx-", ignore_cleanup_errors=True) as folder:
            path = Path(folder) / "model.onnx"
            torch.onnx.export(exported, dynamo=True, verbose=False).save(path, external_data=True)
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (self._input,), (self._output,) = self.session.get_inputs(), self.session.get_outputs()
        self._example, self._binding = _Example.of(example), self.session.io_binding()

    def __call__(self, x: Tensor) -> Tensor:
        """The model's output for ``x``; neither is copied."""
        x = self._example.check(x)
        y = torch.empty(self._output.shape)
        self._binding.bind_input(self._input.name, "cpu", 0, np.float32, x.shape, x.data_ptr())
        self._binding.bind_output(self._output.name, "cpu", 0, np.float32, y.shape, y.data_ptr())
        self.session.run_with_iobinding(self._binding)
        return y


class OpenVino:
    """A model in OpenVINO's CPU plugin, in its mode for one inference at a time."""

    def __init__(self, exported: ExportedProgram, example: Tensor, threads: int) -> None:
        self._openvino = _import_openvino()
        precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[example.dtype]
        config: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": threads,
            # Without it, it computes in bfloat16 on CPUs that have it, which is another precision class.
            "INFERENCE_PRECISION_HINT": precision,
        }
        # Without `input` the shape is dynamic, whatever was exported.
        converted = self._openvino.convert_model(exported, input=list(example.shape))
        if example.dtype == torch.bfloat16:
            converted = self._with_ends_in_bfloat16(converted)
        self.compiled = self._openvino.Core().compile_model(converted, "CPU", config)
        used = self.compiled.get_property("INFERENCE_NUM_THREADS")
        if 0 < used < threads:  # else it would lose for want of threads, without a word
            raise RuntimeError(
                f"OpenVINO computes with {used} threads, expected {threads}: it takes one for each physical core that "
                f"this process may use; call torch.set_num_threads({used}) before"
            )
        hint = self.compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if hint != precision:  # else it would compete in another precision class, without a word
            raise RuntimeError(f"OpenVINO computes in {hint}, expected {precision}, which it cannot on this CPU")
        self._example, self._request = _Example.of(example), self.compiled.create_infer_request()
        self._output_shape = tuple(self.compiled.output(0).shape)

    def _with_ends_in_bfloat16(self, model: Any) -> Any:
        bf16 = self._openvino.Type.bf16
        ends = self._openvino.preprocess.PrePostProcessor(model)
        ends.input().tensor().set_element_type(bf16)
        ends.output().tensor().set_element_type(bf16)
        return ends.build()

    def _tensor(self, memory: Tensor) -> Any:
        """``memory`` as OpenVINO's, not copied. NumPy has no bfloat16, so there it goes as numbers of that size."""
        if memory.dtype == torch.bfloat16:
            return self._openvino.Tensor(memory.view(torch.int16).numpy(), memory.shape, self._openvino.Type.bf16)
        return self._openvino.Tensor(memory.numpy(), shared_memory=True)

    def __call__(self, x: Tensor) -> Tensor:
        """The model's output for ``x``; neither is copied."""
        x = self._example.check(x)
        y = torch.empty(self._output_shape, dtype=x.dtype)
        # The request keeps the addresses, but not the tensors alive: both are set before every inference.
        self._request.set_input_tensor(self._tensor(x))
        self._request.set_output_tensor(self._tensor(y))
        self._request.infer(share_outputs=True)
        return y


@dataclass(frozen=True)
class _Example:
    """What an engine was prepared for."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, example: Tensor) -> _Example:
        return cls(tuple(example.shape), example.dtype)

    def check(self, x: Tensor) -> Tensor:
        """``x``, contiguous; an engine reads its memory, so anything but what it was prepared for is an error."""
        if tuple(x.shape) != self.shape or x.dtype != self.dtype or x.device.type != "cpu":
            raise ValueError(
                f"the input is {tuple(x.shape)} in {x.dtype} on {x.device}; the engine was prepared for {self.shape} "
                f"in {self.dtype} on the CPU: prepare it with such an example"
            )
        return x.detach().contiguous()


def _import_onnxruntime() -> ModuleType:
    """The package, without its telemetry, which runs beside the sessions and leaves files."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read by its library when it is loaded
    import onnxruntime

    onnxruntime.disable_telemetry_events()  # if that was before
    return onnxruntime


def _import_openvino() -> ModuleType:
    """The package, without its telemetry: that would send an event at the import, and leave files in the home folder.

    It takes a stub in place of ``openvino_telemetry`` where that is not installed, so it is hidden for the import.
    """
    hidden = "openvino_telemetry" not in sys.modules
    if hidden:
        sys.modules["openvino_telemetry"] = None  # what makes an import fail
    try:
        import openvino
    finally:
        if hidden:
            del sys.modules["openvino_telemetry"]
    return openvino


@contextmanager
def _silence() -> Iterator[None]:
    """Without the exporters' warnings, which a reader can do nothing about; errors are raised, not logged."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
