from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

import blockvit
from blockvit import bench, engines, models, semi_structured, tune
from blockvit.accuracy import AccuracyCell
from blockvit.attention import expose_projections
from blockvit.bench import Effort, sweep
from blockvit.clocks import Clock, Timing
from blockvit.convert import random_block_mask_
from blockvit.kernels import cpu, cpu_attention
from blockvit.masks import num_kept
from blockvit.results import COLUMNS, KEYS, Store
from blockvit.supermask import supermask_layers
from blockvit.targets import matching
from blockvit.workloads import (
    DIFFERENCES,
    SCOPES,
    UNPRUNED,
    AttentionCase,
    CeilingCase,
    ConversionCase,
    LinearCase,
    MLPCase,
    ModelCase,
    conversion,
    fewer_threads,
    fold_differences,
    linear_cases,
    masked_model,
    mlp_cases,
    mode_refusals,
    model_shape,
    modes,
    refusals,
    runnable,
    runnable_modes,
    sparse_share,
    tuning_cases,
    variants,
    vit,
)
from blockvit.workloads import device as device_cases
from blockvit.workloads import layers as layer_cases

CPU = torch.device("cpu")
SHORT = Effort(min_repeats=2, max_repeats=2, seconds=0, min_sample=0)


def by_backend(rows: list[dict], metric: str = "latency") -> dict[tuple[str, str], dict]:
    found = [row for row in rows if row["metric"] == metric]
    named = {(row["backend"], row["compile"]): row for row in found}
    assert len(named) == len(found), "two rows of one variant"
    return named


def kept_blocks(weight: torch.Tensor, block_size: int) -> int:
    rows, columns = (-(-n // block_size) for n in weight.shape)
    padded = torch.zeros(rows * block_size, columns * block_size)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    return int(padded.view(rows, block_size, columns, block_size).ne(0).any(3).any(1).sum())


def check_times(rows: list[dict]) -> None:
    for row in rows:
        assert set(row) <= set(COLUMNS)
        assert 0 < row["low"] <= row["value"] <= row["high"] and row["unit"] == "s" and row["repeats"] == 2


# --- which backends --------------------------------------------------------------------------------------------------


def unavailable(monkeypatch, name: str, why: str | None = "it is Tuesday"):
    from blockvit.kernels import backends

    monkeypatch.setattr(backends()[name], "refusal", classmethod(lambda cls, device, dtype, block_size: why))


def test_a_backend_that_cannot_run_is_left_out_and_named(monkeypatch):
    unavailable(monkeypatch, "torch")
    case = LinearCase((48, 32), 5, 16, 0.5)
    assert [key["backend"] for key in case.keys(CPU)] == ["gather"]
    assert set(by_backend(case.measure(CPU, SHORT))) == {("dense", "eager"), ("gather", "eager")}
    (line,) = refusals(["gather", "torch"], "cpu", ["fp32"], [16])
    assert line == "not measured: torch in fp32, blocks of 16: it is Tuesday"


def test_a_backend_that_knows_tf32_only_is_not_measured_in_fp32(monkeypatch):
    unavailable(monkeypatch, "blksprs", None)  # as if it were available
    able = {precision: runnable(["blksprs"], CPU, precision, 32) for precision in ("fp32", "tf32", "bf16")}
    assert able == {"fp32": [], "tf32": ["blksprs"], "bf16": ["blksprs"]}
    (line,) = refusals(["blksprs"], CPU, ["fp32", "tf32"], [32, 16])
    assert line.startswith("not measured: blksprs in fp32, blocks of 32, 16: blksprs multiplies float32 as TF32 only")


@pytest.mark.parametrize("seconds_left, measured", [(-1, ["eager", "eager"]), (60, ["eager", "compile", "eager"])])
def test_what_would_be_compiled_after_the_deadline_has_no_row(seconds_left, measured):
    keys = [("dense", "eager"), ("dense", "compile"), ("gather", "eager")]
    group = [
        variants.Variant(variants.latency_key("fp32", 0, backend=b, compile=c), lambda: lambda: torch.ones(1))
        for b, c in keys
    ]
    effort = replace(SHORT, deadline=time.perf_counter() + seconds_left)
    rows, calls = variants.measure_group(group, "fp32", Clock(), effort)
    assert [row["compile"] for row in rows] == measured and len(calls) == len(rows)
    assert all(row["metric"] == "latency" for row in rows)


def test_refusals_name_each_reason_once(monkeypatch):
    assert refusals(["gather"], "cpu", ["fp32", "bf16"], [16, 32]) == []
    unavailable(monkeypatch, "torch")
    (line,) = refusals(["torch", "torch"], "cpu", ["fp32", "bf16"], [16, 32])
    assert line == "not measured: torch in fp32, bf16, blocks of 16, 32: it is Tuesday"
    (line,) = refusals(["2:4"], "cpu", ["fp32"], [16])
    assert line.startswith("not measured: 2:4 in fp32") and "needs an NVIDIA GPU" in line


def test_where_no_backend_can_run_there_is_nothing_to_measure(monkeypatch):
    unavailable(monkeypatch, "gather")
    assert LinearCase((48, 32), 5, 16, 0.5, backends=("gather",)).keys(CPU) == []
    assert ModelCase("vit_digits", "mlp", 1, 16, 0.5).keys(CPU) == []


@pytest.mark.parametrize("ask", [lambda b: runnable(b, CPU, "fp32", 16), lambda b: refusals(b, "cpu", ["fp32"], [16])])
def test_unknown_backends_raise(ask):
    with pytest.raises(ValueError, match="backend is 'gahter'; expected 'auto' or one of"):
        ask(["gather", "gahter"])


def test_the_baseline_is_no_backend_to_compare_with_it():
    with pytest.raises(ValueError, match="backend 'dense' is the baseline that every case measures; leave it out"):
        LinearCase((48, 32), 5, 16, 0.5, backends=("gather", "dense")).measure(CPU, SHORT)


# --- linear layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_linear_case_rows(precision, dtype):
    rows = LinearCase((50, 32), 7, 16, 0.75, precision, seed=3).measure(CPU, SHORT)
    check_times(rows)
    found = by_backend(rows)
    able = runnable(("torch", "gather"), CPU, precision, 16)  # PyTorch's kernels have no bf16 on some CPUs
    assert set(found) == {("dense", "eager"), *((name, "eager") for name in able)} and "gather" in able
    for (backend, _), row in found.items():
        assert (row["model"], row["scope"], row["tokens"], row["seed"]) == ("50x32", "linear", 7, 3)
        assert (row["dtype"], row["precision"]) == (dtype, precision)
        sparse = (row.get("block_size"), row.get("sparsity"))
        assert sparse == ((None, None) if backend == "dense" else (16, 0.75))


def test_linear_case_computes_what_it_says(monkeypatch):
    seen = {}

    def spy(calls, *, clock, effort):
        seen.update({name: call() for name, call in calls.items()})
        return {name: Timing((1.0,)) for name in calls}

    monkeypatch.setattr(variants, "interleave", spy)
    masked = []
    monkeypatch.setattr(
        layer_cases, "random_block_mask_", lambda weight, *a: (random_block_mask_(weight, *a), masked.append(weight))
    )
    LinearCase((64, 48), 7, 16, 0.75).measure(CPU, SHORT)
    assert {tuple(y.shape) for y in seen.values()} == {(7, 64)}
    dense, *sparse = seen.values()
    assert len(sparse) == 2 and all(float((y - dense).abs().max()) < 1e-5 for y in sparse)
    assert kept_blocks(masked[0].detach(), 16) == num_kept(12, 0.75)


def test_linear_cases_are_the_full_grid():
    cases = linear_cases([[8, 4], [4, 8]], [5, 6], [2, 4], [0.5, 0.9], ["fp32", "bf16"], ["gather"])
    assert len(set(cases)) == len(cases) == 2**5
    assert all(case.backends == ("gather",) and case.shape in {(8, 4), (4, 8)} for case in cases)
    first = cases[:2]
    assert {case.block_size for case in first} == {2, 4} and len({case.shape for case in first}) == 1
    assert {(case.sparsity, case.tokens) for case in cases[:8]} == {(0.5, 5)}
    assert len({(case.shape, case.precision) for case in cases[:8]}) == 4, "all layers at the first sparsity"
    assert [case.semi_structured for case in cases].count(True) == 2 * 2 * 2, "once a shape, precision and tokens"


@pytest.mark.parametrize(("shape", "block_size"), [((64, 64), 16), ((50, 70), 16), ((10, 128), 32), ((5, 5), 8)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99])
def test_random_masks_keep_the_right_number_of_blocks(shape, block_size, sparsity):
    weight = torch.ones(shape)
    random_block_mask_(weight, sparsity, block_size, torch.Generator().manual_seed(0))
    blocks = -(-shape[0] // block_size) * -(-shape[1] // block_size)
    assert kept_blocks(weight, block_size) == num_kept(blocks, sparsity)
    assert set(weight.unique().tolist()) <= {0.0, 1.0}


def test_random_masks_follow_their_generator():
    masks = []
    for seed in (0, 0, 1):
        masks.append(torch.ones(64, 64))
        random_block_mask_(masks[-1], 0.5, 8, torch.Generator().manual_seed(seed))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["mlp", "all"])
def test_model_case_rows(scope):
    case = ModelCase("vit_digits", scope, 2, 32, 0.9, backends=("torch", "gather"), memory=True)
    rows = case.measure(CPU, SHORT)
    check_times([row for row in rows if row["metric"] == "latency"])
    found = by_backend(rows)
    assert set(found) == {("dense", "eager"), ("torch", "eager"), ("gather", "eager")}
    for (backend, _), row in found.items():
        assert (row["model"], row["batch_size"], row["precision"], row["seed"]) == ("vit_digits", 2, "fp32", 0)
        sparse = (row["scope"], row.get("block_size"), row.get("sparsity"))
        assert sparse == (("dense", None, None) if backend == "dense" else (scope, 32, 0.9))
    held = {name: row["value"] for (name, _), row in by_backend(rows, "model_bytes").items()}
    assert set(held) == {"dense", "torch", "gather"}
    assert held["dense"] == sum(p.numel() for p in models.create("vit_digits").parameters()) * 4
    assert held["torch"] < 0.6 * held["dense"], "most of this model is sparse at 90%"
    peaks = by_backend(rows, "peak_memory")
    assert all(row["value"] >= 0 and row["unit"] == "B" for row in peaks.values())


def test_model_case_without_memory_has_latencies_only():
    case = ModelCase("vit_digits", "mlp", 1, 16, 0.5)
    assert {row["metric"] for row in case.measure(CPU, SHORT)} == {"latency"}
    assert {key["metric"] for key in case.keys(CPU)} == {"latency"}


def test_modes_are_in_the_same_group(monkeypatch):
    monkeypatch.setattr(vit, "compiled", lambda model, device, mode: model)
    vit._compiled_dense.cache_clear()
    case = ModelCase("vit_digits", "mlp", 1, 16, 0.5, dense_modes=("compile", "cudagraph"), sparse_modes=("compile",))
    rows = case.measure(CPU, SHORT)
    vit._compiled_dense.cache_clear()
    assert set(by_backend(rows)) == {
        ("dense", "eager"), ("dense", "compile"), ("gather", "eager"), ("gather", "compile"),
    }, "a CPU has no CUDA graphs"  # fmt: skip
    assert {(key["backend"], key["compile"]) for key in case.keys(CPU)} == set(by_backend(rows)) - {("dense", "eager")}


def _dense(name, device, dtype):
    return vit.dense_model(name, device, dtype)


def test_the_timed_models_logits_are_no_zeros():
    """Else every check against the dense result compares zeros with zeros."""
    model = _dense("vit_digits", CPU, torch.float32)
    with torch.inference_mode():
        logits = model(torch.randn(4, 3, 8, 8))
    assert logits.std() > 0.01
    assert (logits[0] != logits[1]).any()


@pytest.mark.parametrize("scope", list(SCOPES))
def test_sparse_model_masks_its_scope_and_leaves_the_dense_one_alone(scope):
    before = {name: value.clone() for name, value in _dense("vit_digits", CPU, torch.float32).state_dict().items()}
    sparse = ModelCase("vit_digits", scope, 1, 16, 0.9).sparse_model(CPU)
    after = _dense("vit_digits", CPU, torch.float32).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    chosen = matching(sparse, SCOPES[scope], types=(nn.Linear,))
    for name, layer in sparse.named_modules():
        if isinstance(layer, nn.Linear):
            blocks = -(-layer.out_features // 16) * -(-layer.in_features // 16)
            expected = num_kept(blocks, 0.9) if name in chosen else blocks
            assert kept_blocks(layer.weight.detach(), 16) == expected, name


def test_mlp_and_attention_scopes_are_what_they_say():
    model = expose_projections(models.create("vit_digits"))
    sizes = {scope: len(matching(model, targets, types=(nn.Linear,))) for scope, targets in SCOPES.items()}
    assert sizes == {"mlp": 8, "mlp+attention": 16, "blog": 13, "all": 17}


def test_model_shape():
    assert model_shape("vit_cifar") == "7 blocks of width 384, 32×32 pixels in patches of 4×4"


def test_share_of_vit_b_16s_mlp():
    assert sparse_share("vit_b_16", "mlp") == pytest.approx(0.635, abs=0.01)


def test_share_against_a_count_by_hand():
    tokens, width, mlp, layers = 1 + (8 // 4) ** 2, 128, 512, 4
    multiply_adds = {
        "patches": 4 * width * 3 * 4 * 4,
        "qkv": layers * tokens * width * 3 * width,
        "attention": layers * 2 * tokens * tokens * width,
        "out_proj": layers * tokens * width * width,
        "mlp": layers * 2 * tokens * width * mlp,
        "head": width * 10,
    }
    total = sum(multiply_adds.values())
    for scope, parts in {
        "mlp": ["mlp"],
        "mlp+attention": ["mlp", "qkv", "out_proj"],
        "blog": ["mlp", "out_proj", "head"],
        "all": ["mlp", "qkv", "out_proj", "head"],
    }.items():
        by_hand = sum(multiply_adds[part] for part in parts) / total
        assert sparse_share("vit_digits", scope) == pytest.approx(by_hand, rel=1e-6), scope


# --- ways to run the dense model -------------------------------------------------------------------------------------


@pytest.fixture
def fake_engines(monkeypatch):
    """Both engines as if installed; gives what was prepared: engine, model, the example's shape and the threads."""
    prepared = []

    def prepare(engine, model, example, threads=None):
        prepared.append((engine, model, tuple(example.shape), threads))
        return model

    monkeypatch.setattr(engines, "prepare", prepare)
    monkeypatch.setattr(engines, "_NEEDS", dict.fromkeys(ENGINES, ()))
    _forget_engines()
    yield prepared
    _forget_engines()


def _forget_engines():
    vit._engine_dense.cache_clear()
    modes._prepared.cache_clear()


ENGINES = ("onnxruntime", "openvino")
LAYER = LinearCase((48, 32), 5, 16, 0.5, backends=("gather",), dense_modes=ENGINES)
MLP = MLPCase(5, 16, 0.5, backends=("gather",), dense_modes=ENGINES, width=32, hidden=64)
VIT = ModelCase("vit_digits", "mlp", 2, 16, 0.5, dense_modes=ENGINES, sparse_modes=ENGINES)


@pytest.mark.parametrize("case", [LAYER, MLP, VIT])
def test_engines_run_the_dense_model(case, fake_engines):
    rows = case.measure(CPU, SHORT)
    check_times(rows)
    everything = {("dense", mode) for mode in ("eager", *ENGINES)} | {("gather", "eager")}
    assert set(by_backend(rows)) == everything, "and no sparse one"
    assert {(key["backend"], key["compile"]) for key in case.keys(CPU)} == everything - {("dense", "eager")}
    assert all(set(key) <= set(KEYS) for key in case.keys(CPU))
    assert [engine for engine, *_ in fake_engines] == list(ENGINES)


@pytest.mark.parametrize("case", [LAYER, MLP, VIT])
def test_engines_that_cannot_run_are_left_out_and_named(case, monkeypatch):
    monkeypatch.setattr(engines, "refusal", lambda engine, *where: None if engine == "openvino" else "gone")
    monkeypatch.setattr(engines, "prepare", lambda engine, model, *how: model)
    _forget_engines()
    assert {(key["backend"], key["compile"]) for key in case.keys(CPU)} == {("dense", "openvino"), ("gather", "eager")}
    assert ("dense", "onnxruntime") not in by_backend(case.measure(CPU, SHORT))
    _forget_engines()
    assert mode_refusals(case.dense_modes, "cpu", ["fp32"]) == ["not measured: onnxruntime in fp32: gone"]


def test_mode_refusals_name_each_reason_once(fake_engines, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert mode_refusals(["compile", *ENGINES], "cpu", ["fp32"]) == []
    (line,) = mode_refusals(["onnxruntime", "onnxruntime"], "cpu", ["fp32", "bf16", "fp16", "bf16"])[:1]
    assert line == "not measured: onnxruntime in bf16: onnxruntime is measured in float32 only, not in bfloat16"
    (line,) = mode_refusals(["cudagraph", "compile"], "cpu", ["fp32", "bf16"])
    assert line == "not measured: cudagraph in fp32, bf16: CUDA graphs need an NVIDIA GPU, and the device is cpu"
    assert runnable_modes(["compile", *ENGINES], CPU, "bf16") == ["eager", "compile", "openvino"]


def test_torch_compile_has_one_mode_on_a_cpu():
    """It freezes the weights, in place of any mode: the row would bear the name of what was not done."""
    for mode in ("max-autotune", "no-such-mode"):
        (line,) = mode_refusals([mode], "cpu", ["fp32"])
        assert line.startswith(f"not measured: {mode} in fp32: on a CPU a model is compiled with frozen weights")
        assert mode_refusals([mode], "cuda", ["fp32"]) == []
    assert runnable_modes(["max-autotune", "compile"], CPU, "fp32") == ["eager", "compile"]


@pytest.mark.parametrize("mode", ["compile", "openvino"])
def test_a_dense_model_is_prepared_once_for_inputs_alike(mode, fake_engines, monkeypatch):
    prepared = []
    monkeypatch.setattr(modes, "compiled", lambda model, *how: prepared.append(how) or model)
    monkeypatch.setattr(engines, "prepare", lambda engine, model, *how: prepared.append(how) or model)
    layer, x = nn.Linear(4, 2), torch.randn(3, 4)
    assert torch.equal(modes.dense_call(layer, mode, x)(), layer(x))
    assert torch.equal(modes.dense_call(layer, mode, x + 1)(), layer(x + 1))
    assert len(prepared) == 1, "values do not matter"
    for others in (x[:2], x.double()):
        modes.dense_call(layer, mode, others)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    modes.dense_call(layer, mode, x)
    assert len(prepared) == 4


def test_an_engine_is_prepared_once_for_a_model_batch_size_and_number_of_threads(fake_engines):
    one = replace(VIT, dense_modes=("openvino",))
    for case in (one, replace(one, sparsity=0.9), replace(one, batch_size=1), one):
        case.measure(CPU, SHORT)
    assert [(shape, threads) for _, _, shape, threads in fake_engines] == [((2, 3, 8, 8), 2), ((1, 3, 8, 8), 2)]
    torch.set_num_threads(1)
    try:
        one.measure(CPU, SHORT)
    finally:
        torch.set_num_threads(2)
    assert fake_engines[2:] == [("openvino", fake_engines[0][1], (2, 3, 8, 8), 1)]


def test_an_engine_that_computes_something_else_costs_its_own_row(fake_engines, monkeypatch):
    monkeypatch.setattr(engines, "prepare", lambda engine, model, *how: lambda x: 1.1 * model(x))
    failed = [row for row in LAYER.measure(CPU, SHORT) if row["metric"] == "failed"]
    assert [row["compile"] for row in failed] == list(ENGINES)
    assert all("differs from the dense result" in row["note"] for row in failed)


def test_a_linear_layer_compiled():
    rows = replace(LAYER, dense_modes=("compile",)).measure(CPU, SHORT)
    check_times(rows)
    assert set(by_backend(rows)) == {("dense", "eager"), ("dense", "compile"), ("gather", "eager")}


def test_without_a_backend_no_dense_mode_is_measured(fake_engines, monkeypatch):
    unavailable(monkeypatch, "gather")
    assert LAYER.keys(CPU) == []


def test_linear_cases_take_dense_modes():
    cases = linear_cases([[8, 4]], [5], [2], [0.5, 0.9], ["fp32"], ["gather"], ["compile", "openvino"])
    assert [case.dense_modes for case in cases] == [("compile", "openvino")] * 2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", [LAYER, MLP, VIT])
def test_an_installed_engine_agrees_with_the_dense_model(case, engine, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # OpenVINO takes no more than there are cores
    if reason := engines.refusal(engine, CPU, torch.float32):
        pytest.skip(reason)
    rows = replace(case, dense_modes=(engine,)).measure(CPU, SHORT)
    check_times(rows)
    assert ("dense", engine) in by_backend(rows)
    _forget_engines()


# --- ceilings and conversion -----------------------------------------------------------------------------------------


def test_ceilings():
    case = CeilingCase(size=256, copy_bytes=1 << 24)
    rows = {row["metric"]: row for row in case.measure(CPU, SHORT)}
    found = {metric: (row["model"], row["unit"]) for metric, row in rows.items()}
    assert found | {"fma_throughput": ("registers", "FLOP/s")} == {
        "matmul_throughput": ("256x256", "FLOP/s"),
        "copy_bandwidth": ("copy", "B/s"),
        "fma_throughput": ("registers", "FLOP/s"),
    }
    assert set(rows) == {key["metric"] for key in case.keys(CPU)}, "multiply-adds where the kernel can be built"
    fma = rows.pop("fma_throughput", None)
    assert fma is None or 1e9 < fma["value"] < 1e14
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows.values())
    assert 1e6 < rows["matmul_throughput"]["value"] < 1e14
    assert 1e6 < rows["copy_bandwidth"]["value"] < 1e13


def test_ceilings_are_work_over_time(monkeypatch):
    timing = Timing((1.0, 2.0, 4.0, 8.0, 16.0, 32.0))
    monkeypatch.setattr(device_cases, "interleave", lambda calls, **how: dict.fromkeys(calls, timing))
    rows = {row["metric"]: row for row in CeilingCase(size=8, copy_bytes=1200).measure(CPU, SHORT)}
    assert rows["matmul_throughput"]["value"] == 2 * 8**3 / 6
    assert rows["copy_bandwidth"]["value"] == 2 * 1200 / 6, "a byte copied is read and written"
    assert rows["copy_bandwidth"]["low"] == 2 * 1200 / 16 and rows["copy_bandwidth"]["high"] == 2 * 1200 / 2


def test_conversion_case():
    rows = ConversionCase("vit_digits", 16, 0.9).measure(CPU, SHORT)
    assert all(set(row) <= set(COLUMNS) for row in rows)
    found = {row["metric"]: row for row in rows}
    assert set(found) == {
        "dense_load_seconds", "convert_seconds", "load_seconds", "dense_bytes", "sparse_bytes", "file_bytes",
    }  # fmt: skip
    for metric, row in found.items():
        assert (row["model"], row["block_size"], row["sparsity"], row["scope"]) == ("vit_digits", 16, 0.9, "all")
        assert row["unit"] == ("s" if metric.endswith("seconds") else "B")
        assert row["value"] > 0
    value = {metric: row["value"] for metric, row in found.items()}
    assert found["convert_seconds"]["repeats"] == 2
    assert value["file_bytes"] < 0.4 * value["dense_bytes"]
    assert value["sparse_bytes"] < value["dense_bytes"]


def test_a_dense_checkpoint_is_loaded_whole(tmp_path):
    """What the time of ``blockvit.load`` is compared with has to give the model."""
    dense = vit.dense_model("vit_digits", CPU, torch.float32)
    torch.save(dense.state_dict(), tmp_path / "dense.pt")
    loaded = ConversionCase("vit_digits", 16, 0.9)._load_dense(tmp_path / "dense.pt").eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        assert torch.equal(loaded(x), dense(x))


def test_fold_differences_are_those_of_each_step(monkeypatch):
    masked = blockvit.sparsify(models.create("vit_digits"), 0.9, 16).eval()
    images = torch.randn(3, 3, 8, 8)
    folded, difference = fold_differences(masked, images, 16)
    assert tuple(difference) == DIFFERENCES
    assert difference["fold_difference"] == difference["load_difference"] == 0
    assert 0 <= difference["convert_difference"] < 1e-4
    assert supermask_layers(masked) and not supermask_layers(folded), "the masked model stays as it was"

    def wrongly(model):
        folded = blockvit.fold(model)
        folded.heads.head.bias.data += 2
        return folded

    monkeypatch.setattr(conversion, "fold", wrongly)
    assert fold_differences(masked, images, 16)[1]["fold_difference"] == pytest.approx(2)


def test_a_trained_model_comes_with_its_test_images(tmp_path):
    cell = AccuracyCell("digits", "vit_digits", 16, 0.9)
    masked, images = masked_model(cell, cache=tmp_path, recipe={"epochs": 2}, count=5)
    assert len(supermask_layers(masked)) == 13 and not masked.training
    assert images.shape == (5, 3, 8, 8) and images.dtype == torch.float32
    assert [path.parent.name for path in (tmp_path / "checkpoints").rglob("*.pt")] == ["digits"]


def test_cases_share_a_dense_model_without_harm():
    """The model is built under inference mode by one case and copied outside of it by the next."""
    vit.dense_model.cache_clear()
    ModelCase("vit_digits", "mlp", 1, 16, 0.5).measure(CPU, SHORT)
    ConversionCase("vit_digits", 16, 0.5).measure(CPU, SHORT)
    ModelCase("vit_digits", "all", 1, 16, 0.5).measure(CPU, SHORT)


@pytest.mark.parametrize("case", [LinearCase((48, 32), 5, 16, 0.5), ModelCase("vit_digits", "mlp", 1, 16, 0.5)])
def test_keys_are_key_columns(case):
    for key in case.keys(CPU):
        assert set(key) <= set(KEYS)


# --- the MLP on its own ----------------------------------------------------------------------------------------------


def test_mlp_case_measures_dense_and_sparse_in_one_group(monkeypatch):
    seen = {}

    def spy(calls, *, clock, effort):
        seen.update({name: call() for name, call in calls.items()})
        return {name: Timing((1.0,)) for name in calls}

    monkeypatch.setattr(variants, "interleave", spy)
    monkeypatch.setattr(modes, "compiled", lambda model, device, mode: model)
    modes._prepared.cache_clear()
    case = MLPCase(7, 16, 0.75, backends=("gather", "torch"), dense_modes=("compile",), width=32, hidden=64, seed=2)
    rows = case.measure(CPU, SHORT)
    modes._prepared.cache_clear()
    assert set(by_backend(rows)) == {("dense", "eager"), ("dense", "compile"), ("gather", "eager"), ("torch", "eager")}
    assert {(row["model"], row["scope"], row["tokens"], row["seed"]) for row in rows} == {("32x64x32", "mlp", 7, 2)}
    measured = {(key["backend"], key["compile"], key.get("sparsity")) for key in case.keys(CPU)}
    assert measured == {("gather", "eager", 0.75), ("torch", "eager", 0.75), ("dense", "compile", None)}
    dense, compiled, *ours = seen.values()
    assert torch.equal(dense, compiled) and dense.shape == (7, 32)
    assert len(ours) == 2 and not torch.allclose(ours[0], dense), "the sparse ones have their blocks dropped"
    torch.testing.assert_close(*ours)


def test_mlp_cases_are_the_full_grid():
    cases = mlp_cases([5, 7], [16, 32], [0.9, 0.5], ["fp32"], ["gather"])
    assert [(case.tokens, case.sparsity, case.block_size) for case in cases] == [
        (t, s, b) for t in (5, 7) for s in (0.9, 0.5) for b in (16, 32)
    ]


# --- attention on its own --------------------------------------------------------------------------------------------

needs_a_kernel = pytest.mark.skipif(cpu.load() is not None, reason="the CPU kernel could not be built")


@needs_a_kernel
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_is_timed_beside_dense_engines(precision, tmp_path):
    able = [engine for engine in engines.ENGINES if not engines.refusal(engine, CPU, bench.DTYPES[precision])]
    case = AttentionCase(9, 2, precision, dense_modes=tuple(engines.ENGINES), heads=3, size=8)
    store = Store(tmp_path)
    sweep([case], store, "attention", device="cpu", effort=SHORT)
    rows = store.read("attention")
    assert not len(rows[rows["metric"] == "failed"])
    assert {*zip(rows["backend"], rows["compile"], strict=True)} == {
        ("cpu", "eager"),
        *(("dense", mode) for mode in ("eager", *able)),
    }
    assert rows["group"].nunique() == 1 and set(rows["model"]) == {"3x8"} and set(rows["scope"]) == {"attention"}
    assert sweep([case], store, "attention", device="cpu", effort=SHORT).measured == 0


@needs_a_kernel
def test_attention_that_is_wrong_has_no_time(monkeypatch):
    monkeypatch.setattr(cpu_attention, "attend", lambda q, k, v: v)
    _, failed = AttentionCase(9, heads=3, size=8).measure(CPU, SHORT)
    assert failed["metric"] == "failed" and failed["backend"] == "cpu"


def test_attention_is_measured_where_our_kernel_runs():
    assert AttentionCase(9).keys(torch.device("meta")) == []
    assert AttentionCase(9, precision="fp16").keys(CPU) == []


def test_one_kernel_is_only_where_there_is_such_a_kernel():
    assert runnable(["gather", "gather+mlp"], CPU, "fp32", 16) == ["gather"]
    (line,) = refusals(["gather+mlp"], "cpu", ["fp32"], [16])
    assert line.endswith("only the backend 'triton' runs an MLP as one kernel")
    with pytest.raises(ValueError, match=r"'gather\+mpl' ends in '\+mpl'; expected '\+dense', '\+mlp'"):
        runnable(["gather+mpl"], CPU, "fp32", 16)
    mlp = nn.Sequential(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)))
    for layer in (mlp[0][0], mlp[0][2]):
        layer.weight.data[:16] = 0
    with pytest.raises(RuntimeError, match="not every MLP runs as one kernel"):
        variants.convert(mlp, "gather+mlp", 16)


# --- tuning ----------------------------------------------------------------------------------------------------------


def test_tuning_is_timed_once_and_what_is_tuned_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKVIT_TUNED", str(tmp_path / "tuned"))
    searched = []

    def search(case, device):
        searched.append(case)
        return None if case.block_size == 16 else tune.Found({"SPLIT_N": 1}, 1.0, 2.0)

    monkeypatch.setitem(tune.TUNERS, "torch_tuned", replace(tune.TUNERS["torch_tuned"], search=search))
    store = Store(tmp_path / "results")
    cases = tuning_cases(["torch_tuned", "gather"], [[64, 64], [32, 64]], [32], [32, 16], 0.5, ["bf16", "fp32", "tf32"])
    assert [(c.case.out_features, c.precision, c.case.block_size) for c in cases] == [
        (rows, precision, size) for rows in (64, 32) for precision in ("bf16", "fp32") for size in (32, 16)
    ], "in the given order; two dtypes"
    report = sweep(cases[:3], store, "tuning", effort=SHORT)
    rows = store.read("tuning")
    assert list(rows["metric"]) == ["tuning_seconds", "failed", "tuning_seconds"]
    assert set(rows["backend"]) == {"torch_tuned"} and "no launch parameters work" in str(report)
    again = sweep(cases[:3], store, "tuning", effort=SHORT)
    assert again.measured == 0 and len(searched) == 3
    assert cases[0].keys(CPU) == [] and cases[1].keys(CPU), "what was found is in the file, what failed in the table"


def test_a_search_that_raises_costs_its_own_case_only(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKVIT_TUNED", str(tmp_path))

    def search(case, device):
        raise RuntimeError("the compiler crashed")

    monkeypatch.setitem(tune.TUNERS, "torch_tuned", replace(tune.TUNERS["torch_tuned"], search=search))
    (case,) = tuning_cases(["torch_tuned"], [[64, 64]], [32], [32], 0.5, ["fp32"])
    (row,) = case.measure(CPU, SHORT)
    assert row["metric"] == "failed" and "RuntimeError: the compiler crashed" in row["note"]


def test_our_kernel_is_tuned_for_every_precision_class_and_pytorchs_for_every_dtype():
    cases = tuning_cases(["triton", "torch_tuned"], [[32, 64]], [32], [16], 0.5, ["fp32", "tf32", "bf16"])
    assert [(case.backend, case.precision) for case in cases] == [
        ("triton", "fp32"), ("triton", "tf32"), ("torch_tuned", "fp32"), ("triton", "bf16"), ("torch_tuned", "bf16"),
    ]  # fmt: skip


def test_a_precision_class_is_in_force_while_its_parameters_are_searched(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKVIT_TUNED", str(tmp_path))
    seen = []

    @contextmanager
    def as_on_a_gpu(precision, device):
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = {"fp32": "ieee", "tf32": "tf32"}[precision]
        yield torch.float32
        torch.backends.cuda.matmul.fp32_precision = before

    monkeypatch.setattr(device_cases, "precision_class", as_on_a_gpu)

    def search(case, device):
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return tune.Found({"SPLIT_N": 1}, 1.0, None)

    monkeypatch.setitem(tune.TUNERS, "triton", replace(tune.TUNERS["triton"], search=search))
    cases = tuning_cases(["triton"], [[32, 64]], [32], [16], 0.5, ["fp32", "tf32"])
    for case in cases:
        assert case.keys(CPU) and case.measure(CPU, SHORT)[0]["precision"] == case.precision
    assert seen == ["ieee", "tf32"]
    assert not any(case.keys(CPU) for case in cases), "each class has its own parameters"


# --- 2:4 -------------------------------------------------------------------------------------------------------------


def test_two_of_four_joins_where_the_device_has_it(monkeypatch):
    """With the products of a plain linear in place of the GPU's, the rows and the check are those of a GPU."""
    monkeypatch.setattr(semi_structured, "refusal", lambda *arguments: None)
    monkeypatch.setattr(semi_structured, "to_semi_structured", lambda model, targets: model)
    rows = LinearCase((32, 64), 5, 16, 0.75, semi_structured=True, backends=("gather",)).measure(CPU, SHORT)
    row = by_backend(rows)["2:4", "eager"]
    assert row["sparsity"] == 0.5 and "block_size" not in row
    case = ModelCase("vit_digits", "mlp", 1, 16, 0.9, semi_structured=True, memory=True)
    assert {"2:4", "gather", "dense"} == {backend for backend, _ in by_backend(case.measure(CPU, SHORT))}
    wrong = lambda model, targets: [m.weight.data.mul_(1.1) for m in model.modules() if hasattr(m, "weight")] and model  # noqa: E731
    monkeypatch.setattr(semi_structured, "to_semi_structured", wrong)
    failed = [row for row in case.measure(CPU, SHORT) if row["metric"] == "failed"]
    assert [row["backend"] for row in failed] == ["2:4"] and "differs from the dense result" in failed[0]["note"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_two_of_four_on_a_gpu(precision):
    case = ModelCase("vit_cifar", "mlp", 8, 64, 0.9, precision, backends=("torch",), semi_structured=True)
    found = by_backend(case.measure(torch.device("cuda"), SHORT))
    assert ("2:4", "eager") in found


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["cudagraph", "compile", pytest.param("max-autotune", marks=pytest.mark.slow)])
def test_modes_on_a_gpu(mode):
    case = ModelCase("vit_digits", "mlp", 8, 32, 0.5, "fp32", ("torch",), dense_modes=(mode,), sparse_modes=(mode,))
    rows = case.measure(torch.device("cuda"), SHORT)
    assert [row for row in rows if row["metric"] == "failed"] == []
    assert set(by_backend(rows)) == {(backend, m) for backend in ("dense", "torch") for m in ("eager", mode)}


# --- distributions, and dense layers on the kernel too ---------------------------------------------------------------


def test_tails_are_percentiles_of_that_many_samples():
    case = ModelCase("vit_digits", "mlp", 1, 16, 0.9, tails=12)
    rows = case.measure(CPU, SHORT)
    for backend in ("dense", "gather"):
        of = {row["metric"]: row for row in rows if row["backend"] == backend}
        assert of["latency"]["value"] <= of["latency_p90"]["value"] <= of["latency_p99"]["value"]
        assert {row["repeats"] for row in of.values()} == {12}
    assert {key["metric"] for key in case.keys(CPU)} == {"latency", "latency_p90", "latency_p99"}
    assert all(set(row) <= set(COLUMNS) for row in rows)


def test_layers_that_stay_dense_run_on_the_backend_too(monkeypatch):
    asked = []
    real = variants.to_block_sparse
    monkeypatch.setattr(
        variants,
        "to_block_sparse",
        lambda model, block_size, name, **how: asked.append((name, how)) or real(model, block_size, name, **how),
    )
    rows = ModelCase("vit_digits", "mlp", 1, 16, 0.9, backends=("gather", "gather+dense")).measure(CPU, SHORT)
    assert set(by_backend(rows)) == {("dense", "eager"), ("gather", "eager"), ("gather+dense", "eager")}
    assert [name for name, _ in asked] == ["gather"] * 2
    assert [how["dense_backend"] for _, how in asked] == [None, "gather"]
    assert refusals(["gather+dense"], "cpu", ["fp32"], [16]) == []
    with pytest.raises(ValueError, match="backend is 'gathr'"):
        runnable(["gathr+dense"], CPU, "fp32", 16)


def test_an_unpruned_model_runs_wholly_on_the_backend(monkeypatch):
    made = []
    real = vit.convert
    monkeypatch.setattr(vit, "convert", lambda *args: made.append(real(*args)) or made[-1])
    case = ModelCase("vit_digits", UNPRUNED, 1, 32, 0.0, backends=("gather+dense",), memory=True)
    rows = case.measure(CPU, SHORT)
    assert set(by_backend(rows)) == {("dense", "eager"), ("gather+dense", "eager")}
    row = by_backend(rows)["gather+dense", "eager"]
    assert (row["scope"], row["sparsity"], row["block_size"]) == ("none", 0.0, 32)
    sparse = [m for m in made[0].modules() if isinstance(m, blockvit.BlockSparseLinear)]
    assert len(sparse) == 18 and {m.bsr.sparsity for m in sparse} == {0.0}, "the patch embedding among them"


def test_threads_are_fewer_in_the_loop_only():
    everyone = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert [(count, torch.get_num_threads()) for count in fewer_threads([1, 2, 3, 8])] == [(1, 1), (2, 2)]
        assert torch.get_num_threads() == 3
        for _ in fewer_threads([1, 2]):
            break
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(everyone)
