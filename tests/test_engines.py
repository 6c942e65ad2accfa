from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap

import pytest
import torch
from torch import nn

from blockvit import engines, models
from blockvit.attention import expose_projections

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

every_engine = pytest.mark.parametrize("engine", engines.ENGINES)


def need(engine: str, dtype: torch.dtype = torch.float32) -> None:
    """Skip without the engine; ``pytest.importorskip`` would import it, and with that start its telemetry."""
    if reason := engines.refusal(engine, CPU, dtype):
        pytest.skip(reason)


def hide(monkeypatch, *names: str) -> None:
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def vit() -> nn.Module:
    model = models.create("vit_digits")
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)
    return expose_projections(model).eval()


def linear() -> nn.Module:
    return nn.Linear(768, 384).eval()


def error(call, model: nn.Module, x: torch.Tensor) -> float:
    with torch.inference_mode():
        expected = model(x)
    result = call(x)
    assert type(result) is torch.Tensor and result.dtype == torch.float32 and result.shape == expected.shape
    return float((result - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def prepared():
    """A layer in each engine that is installed, with one thread."""
    made = {}

    def get(engine):
        need(engine)
        if engine not in made:
            model = linear()
            made[engine] = model, engines.prepare(engine, model, torch.randn(197, 768), threads=1)
        return made[engine]

    return get


# --- what it computes ------------------------------------------------------------------------------------------------


@every_engine
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_vit_gives_what_the_model_gives(engine, batch_size):
    need(engine)
    model, x = vit(), torch.randn(batch_size, 3, 8, 8)
    call = engines.prepare(engine, model, x, threads=1)
    assert error(call, model, x) < 1e-4
    assert error(call, model, torch.randn_like(x)) < 1e-4, "the example is no constant of the graph"


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (3, 3, 8, 8)])
def test_openvino_in_bfloat16_gives_what_the_model_gives(shape):
    need("openvino", torch.bfloat16)
    model, x = vit().bfloat16(), torch.randn(shape).bfloat16()
    call = engines.prepare("openvino", model, x, threads=1)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    with torch.inference_mode():
        expected = model(x).float()
    for _ in range(2):  # memory is shared, and lives as long as it is needed
        result = call(x)
        assert result.dtype == torch.bfloat16
        assert (result.float() - expected).abs().max() < 0.03 * expected.abs().max()
    with pytest.raises(ValueError, match=r"prepared for .* in torch.bfloat16 on the CPU"):
        call(x.float())


@every_engine
def test_a_linear_gives_what_the_layer_gives(engine, prepared):
    model, call = prepared(engine)
    assert error(call, model, torch.randn(197, 768)) < 1e-4
    assert error(call, model, torch.randn(768, 197).T) < 1e-4, "strides"
    assert error(call, model, torch.randn(197, 768, requires_grad=True)) < 1e-4


@every_engine
def test_results_stay_what_they_were(engine, prepared):
    _, call = prepared(engine)
    x = torch.randn(197, 768)
    first = call(x)
    kept = first.clone()
    call(torch.randn(197, 768))
    assert torch.equal(first, kept)
    assert torch.equal(call(x), kept)


@every_engine
def test_models_made_and_called_in_inference_mode(engine):
    need(engine)
    with torch.inference_mode():
        model, x = linear(), torch.randn(5, 768)
        assert error(engines.prepare(engine, model, x, threads=1), model, x) < 1e-4


@every_engine
@pytest.mark.parametrize("x", [torch.zeros(196, 768), torch.zeros(197, 768).double(), torch.zeros(1, 197, 768)])
def test_other_inputs_are_refused(engine, prepared, x):
    _, call = prepared(engine)
    with pytest.raises(ValueError, match=r"the engine was prepared for \(197, 768\) in torch.float32 on the CPU"):
        call(x)


# --- how it is set up ------------------------------------------------------------------------------------------------


def set_threads(call) -> int:
    if isinstance(call, engines.OnnxRuntime):
        return call.session.get_session_options().intra_op_num_threads
    return call.compiled.get_property("INFERENCE_NUM_THREADS")


@every_engine
def test_threads_are_those_asked_for_and_else_pytorchs(engine, monkeypatch):
    need(engine)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert set_threads(engines.prepare(engine, linear(), torch.randn(5, 768))) == 1
    if CORES < 2:
        pytest.skip("there is one core")
    assert set_threads(engines.prepare(engine, linear(), torch.randn(5, 768), threads=2)) == 2


def test_openvino_with_fewer_threads_than_asked_for_is_no_baseline():
    need("openvino")
    with pytest.raises(RuntimeError, match=r"computes with \d+ threads, expected 4096: .*torch.set_num_threads\(\d+\)"):
        engines.prepare("openvino", linear(), torch.randn(5, 768), threads=4096)


def test_onnx_runtime_optimises_all_it_can_and_runs_one_operator_at_a_time(prepared):
    session = prepared("onnxruntime")[1].session
    import onnxruntime

    options = session.get_session_options()
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert options.execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    assert options.inter_op_num_threads == 1
    assert session.get_providers() == ["CPUExecutionProvider"]


def test_openvino_computes_in_float32_one_inference_at_a_time(prepared):
    compiled = prepared("openvino")[1].compiled
    import openvino

    assert compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    assert str(compiled.get_property("PERFORMANCE_HINT")).upper().endswith("LATENCY")
    assert int(compiled.get_property("NUM_STREAMS")) == 1
    assert list(compiled.input(0).shape) == [197, 768], "a dynamic shape would cost time"


@every_engine
def test_leaves_no_file_and_says_nothing(engine, tmp_path):
    """In a process of its own, with its own home: what is imported first may write or warn."""
    need(engine)
    folders = {name: tmp_path / name for name in ("home", "work", "temp")}
    for folder in folders.values():
        folder.mkdir()
    script = textwrap.dedent(f"""
        import sys, torch
        sys.path[:0] = {sys.path!r}
        import tempfile
        from pathlib import Path
        from blockvit import engines
        from blockvit.attention import expose_projections
        from blockvit import models
        model = expose_projections(models.create("vit_digits")).eval()
        call = engines.prepare({engine!r}, model, torch.zeros(1, 3, 8, 8), threads=1)
        call(torch.zeros(1, 3, 8, 8))
        telemetry = sys.modules.get("openvino_telemetry")
        assert telemetry is None, telemetry
        left = [str(p) for p in Path(tempfile.gettempdir()).iterdir() if not p.name.startswith("torchinductor")]
        assert left == [], left
    """)
    home = {"HOME": str(folders["home"]), "TMPDIR": str(folders["temp"]), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folders["work"], env=home, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
    assert list(folders["work"].iterdir()) == []
    assert list(folders["home"].iterdir()) == []


@every_engine
def test_a_failing_conversion_leaves_no_file(engine, monkeypatch, tmp_path):
    need(engine)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    class Sorted(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x).real  # an operator that neither has

    with pytest.raises(Exception, match="eig"):
        engines.prepare(engine, Sorted().eval(), torch.randn(4, 4))
    assert not list(tmp_path.glob("blockvit-onnx-*"))


# --- what it refuses -------------------------------------------------------------------------------------------------


@every_engine
def test_refuses_other_devices_and_dtypes(engine):
    assert (
        engines.refusal(engine, CUDA, torch.float32) == f"{engine} is a baseline on CPUs only, and the device is cuda"
    )
    known = {"onnxruntime": "float32", "openvino": "float32 and bfloat16"}[engine]
    assert engines.refusal(engine, "cpu", torch.float16) == f"{engine} is measured in {known} only, not in float16"
    with pytest.raises(RuntimeError, match=f"{engine} cannot be prepared: .* not in float64"):
        engines.prepare(engine, linear().double(), torch.randn(5, 768).double())


def test_refuses_to_compute_in_float32_what_is_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    reason = "this CPU has no instructions for bfloat16, so openvino would compute in float32"
    assert engines.refusal("openvino", CPU, torch.bfloat16) == reason


def test_says_how_to_install_what_is_missing(monkeypatch):
    hide(monkeypatch, "onnxruntime", "onnx", "onnxscript", "openvino")
    remedy = "not installed: pip install 'blockvit[engines]'"
    assert engines.refusal("onnxruntime", CPU, torch.float32) == f"onnxruntime, onnx, onnxscript are {remedy}"
    assert engines.refusal("openvino", CPU, torch.float32) == f"openvino is {remedy}"
    with pytest.raises(RuntimeError, match=r"the engine openvino cannot be prepared: openvino is not installed: pip"):
        engines.prepare("openvino", linear(), torch.randn(5, 768))


def test_unknown_engines_raise():
    with pytest.raises(ValueError, match=r"engine is 'tensorrt'; expected one of \['onnxruntime', 'openvino'\]"):
        engines.refusal("tensorrt", CPU, torch.float32)


def test_prepare_says_what_is_wrong_with_its_arguments(monkeypatch):
    monkeypatch.setattr(engines, "refusal", lambda *arguments: None)
    with pytest.raises(ValueError, match=r"the model is in training mode; .*model.eval\(\)"):
        engines.prepare("openvino", nn.Linear(4, 4), torch.randn(1, 4))
    with pytest.raises(ValueError, match="threads is 0; expected at least 1, or None for PyTorch's number"):
        engines.prepare("openvino", linear(), torch.randn(1, 768), threads=0)


def test_the_import_of_openvino_goes_on_without_its_telemetry(monkeypatch, tmp_path):
    (tmp_path / "openvino.py").write_text(
        "try:\n    import openvino_telemetry\n    sent = True\nexcept ImportError:\n    sent = False\n"
    )
    (tmp_path / "openvino_telemetry.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("openvino", "openvino_telemetry"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert engines._import_openvino().sent is False
    assert "openvino_telemetry" not in sys.modules, "others may import it"
    monkeypatch.delitem(sys.modules, "openvino")
