"""Other people's GPU kernels as backends, their tuned parameters, and the command that finds these.

Without a GPU the kernels run in Triton's interpreter, in a process of their own: the switch is read at import.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import textwrap
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from triton_interpreter import run_interpreted, slow

from blockvit import BlockSparseLinear, BSRMatrix, backends, tune
from blockvit.kernels import resolve, torch_tuned, torchao_bsr, tuning
from blockvit.kernels.torch_bsr import pad_tokens

ROOT = Path(__file__).parents[1]
BASELINES = ["torch_tuned", "torchao", "blksprs"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GPU = "NVIDIA H100 80GB HBM3"
PARAMETERS = {"GROUP_SIZE_ROW": 2, "SPLIT_N": 8, "num_stages": 3, "num_warps": 4}

every_baseline = pytest.mark.parametrize("name", BASELINES)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty folder of tuned parameters."""
    monkeypatch.setenv("BLOCKVIT_TUNED", str(tmp_path))
    return tmp_path


@pytest.fixture
def gpu(monkeypatch):
    """A GPU, as far as refusals and the tuning command ask for one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def entry(*, shape=(3072, 768), tokens=1024, block_size=64, dtype="bfloat16", sparsity=0.9, split=8) -> tuning.Entry:
    key = {
        "block_size": block_size,
        "dtype": dtype,
        "in_features": shape[1],
        "out_features": shape[0],
        "sparsity": sparsity,
        "tokens": tokens,
    }
    return {"key": key, "parameters": {**PARAMETERS, "SPLIT_N": split}, "ms": 1.0, "default_ms": 2.0, "seconds": 3.0}


# --- what runs where -------------------------------------------------------------------------------------------------


@every_baseline
def test_auto_never_takes_a_baseline(name):
    assert backends()[name].preference(CUDA, torch.float32, 32, 0.99) == float("-inf")


@every_baseline
def test_refuses_the_cpu(name):
    assert "run on NVIDIA GPUs only" in backends()[name].refusal(CPU, torch.float32, 32)


@every_baseline
@pytest.mark.parametrize(
    "dtype, block_size, why",
    [
        (torch.float64, 32, "float32, float16 and bfloat16 only"),
        (torch.float32, 8, "a power of two and at least 16"),
        (torch.float32, 48, "a power of two and at least 16"),
    ],
)
def test_refuses_what_its_kernels_cannot_run(name, dtype, block_size, why):
    assert why in backends()[name].refusal(CUDA, dtype, block_size)


@pytest.mark.parametrize("name", ["torch", "torch_tuned", "torchao"])
def test_pytorchs_kernel_is_refused_where_it_takes_minutes_to_compile(name, store, gpu, monkeypatch):
    monkeypatch.setattr(torchao_bsr, "missing", lambda: None)
    for block_size, dtype in [(64, torch.float32), (128, torch.bfloat16), (128, torch.float32)]:
        tuning.store(GPU, "torch_tuned", entry(block_size=block_size, dtype=str(dtype)[6:])["key"], {}, ms=1, seconds=1)
    refusal = backends()[name].refusal
    assert refusal(CUDA, torch.float32, 64) is None and refusal(CUDA, torch.bfloat16, 128) is None
    assert "take minutes to compile for float32 in blocks larger than 64" in refusal(CUDA, torch.float32, 128)


def test_auto_takes_our_kernel_where_pytorchs_takes_minutes_to_compile(gpu):
    pytest.importorskip("triton")
    chosen = [resolve("auto", CUDA, torch.float32, block_size).name for block_size in (64, 128)]
    assert chosen == ["torch", "triton"]


@pytest.mark.parametrize("name, says", [("torchao", "torchao 0.14"), ("blksprs", "blksprs 2.5")])
def test_says_how_to_install_what_is_missing(monkeypatch, name, says):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    refusal = backends()[name].refusal(CUDA, torch.float32, 32)
    assert refusal == f"{says} is not installed: pip install 'blockvit[baselines]'"


def test_a_torchao_without_the_layer_is_refused_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "torchao"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    spec = importlib.util.spec_from_file_location(
        "torchao", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: spec)
    assert re.search(r"torchao .* has no torchao\.sparsity\.blocksparse; 0\.14 has", torchao_bsr.missing())
    (package / "sparsity").mkdir()
    (package / "sparsity" / "blocksparse.py").write_text("")
    assert torchao_bsr.missing() is None


def test_tuned_refuses_without_a_gpu(store, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "there is no GPU" in backends()["torch_tuned"].refusal(CUDA, torch.float32, 32)


def test_tuned_refuses_what_was_not_tuned_and_says_how(store, gpu):
    refusal = backends()["torch_tuned"].refusal
    tuning.store(GPU, "torch_tuned", entry()["key"], PARAMETERS, ms=1.0, seconds=2.0)
    assert refusal(CUDA, torch.bfloat16, 64) is None
    for dtype, block_size in [(torch.float32, 64), (torch.bfloat16, 32)]:
        why = refusal(CUDA, dtype, block_size)
        short = str(dtype).removeprefix("torch.")
        assert GPU in why and why.endswith(f"python -m blockvit.tune --block-sizes {block_size} --dtypes {short}")


def test_a_damaged_file_refuses_the_tuned_backend_alone(store, gpu):
    tuning.path(GPU).write_text("{")
    assert "holds no tuned parameters" in backends()["torch_tuned"].refusal(CUDA, torch.bfloat16, 64)
    assert resolve("auto", CUDA, torch.bfloat16, 64).name not in BASELINES


def test_baselines_are_pinned_and_stay_out_of_the_lock():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert groups["baselines"] == ["torchao==0.14.0", "blksprs==2.5"]
    assert not re.search(r"^(torchao|blksprs)\b", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert "--all-extras" not in (ROOT / "Makefile").read_text()


# --- tokens and parameters -------------------------------------------------------------------------------------------


def test_padding_adds_rows_of_zeros_only_where_needed():
    x = torch.randn(48, 6)
    assert pad_tokens(x, 16) is x
    padded = pad_tokens(x[:37].t().contiguous().t(), 16)
    assert padded.shape == (48, 6)
    assert torch.equal(padded[:37], x[:37]) and not padded[37:].any()


LIKE = entry()["key"]
CANDIDATES = [
    entry(),
    entry(sparsity=0.8, split=1),
    entry(tokens=128, split=2),
    entry(shape=(768, 3072), split=4),
    entry(shape=(768, 3072), sparsity=0.5, split=16),
    entry(shape=(768, 768), sparsity=0.5, split=2),
    entry(dtype="float32", split=16),
    entry(block_size=32, sparsity=0.7, split=32),
]


@pytest.mark.parametrize(
    "asked, chosen",
    [
        ({}, 0),
        ({"sparsity": 0.82}, 1),
        ({"tokens": 200}, 2),
        ({"tokens": 4096}, 0),
        ({"sparsity": 0.83, "tokens": 128}, 1),  # of one shape the sparsity counts before the number of tokens
        ({"out_features": 768, "in_features": 3072, "sparsity": 0.6}, 4),
        ({"out_features": 768, "in_features": 3072, "tokens": 128}, 3),  # the shape counts before all else
        ({"out_features": 1024, "in_features": 768, "sparsity": 0.5}, 5),
        ({"dtype": "float32", "sparsity": 0.5, "tokens": 16}, 6),
        ({"block_size": 32}, 7),
    ],
)
def test_the_nearest_entry_is_chosen(asked, chosen):
    for candidates in (CANDIDATES, CANDIDATES[::-1]):
        assert tuning.nearest(candidates, {**LIKE, **asked}) is CANDIDATES[chosen]


def test_no_entry_of_the_block_size_and_dtype_is_none():
    assert tuning.nearest(CANDIDATES, {**LIKE, "dtype": "float16"}) is None
    assert tuning.nearest(CANDIDATES, {**LIKE, "block_size": 128}) is None
    assert tuning.nearest([], LIKE) is None


@pytest.mark.parametrize(
    "tuned_tokens, split, tokens, expected_split, padded",
    [
        (1024, 8, 1024, 8, 1024),  # a tile of 128, as tuned
        (1024, 8, 2048, 16, 2048),
        (1000, 8, 1000, 8, 1024),  # tuned for tokens that the block size padded
        (1024, 8, 2000, 16, 2048),
        (50432, 197, 788, 7, 896),  # a tile of 256 would pad by a third: one of 128 pads 64 more than blocks do
        (50432, 197, 197, 1, 256),
        (50432, 197, 5, 1, 64),  # never below a block
    ],
)
def test_the_tile_is_kept_and_its_number_counted_anew(tuned_tokens, split, tokens, expected_split, padded):
    parameters, length = torch_tuned.fit(entry(tokens=tuned_tokens, split=split), tokens)
    assert (parameters, length) == ({**PARAMETERS, "SPLIT_N": expected_split}, padded)


def test_a_tile_that_is_no_power_of_two_is_an_error():
    with pytest.raises(ValueError, match=r"SPLIT_N=10 cuts 1024 tokens into tiles of 102\.4; expected a power of two"):
        torch_tuned.fit(entry(split=10), 1024)


def test_a_key_holds_the_sparsity_rounded():
    key = tuning.key(3072, 768, 1024, 64, torch.bfloat16, 58)
    assert key == {**LIKE, "sparsity": 0.9}


# --- the store -------------------------------------------------------------------------------------------------------


def test_what_is_stored_is_found_and_replaced(store):
    assert tuning.load(GPU) == {} and tuning.find(GPU, "torch_tuned", LIKE) is None
    first = tuning.store(GPU, "torch_tuned", LIKE, PARAMETERS, ms=0.5, default_ms=0.75, seconds=12.34)
    tuning.store(GPU, "ours", {"block_size": 32}, {"num_warps": 8}, ms=0.5, seconds=1.0)
    tuning.store(GPU, "torch_tuned", {**LIKE, "tokens": 16}, PARAMETERS, ms=0.5, seconds=1.0)
    assert tuning.find(GPU, "torch_tuned", LIKE) == first
    assert {"ms": 0.5, "default_ms": 0.75, "seconds": 12.3}.items() <= first.items()
    assert first["torch"] and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first["date"])

    tuning.store(GPU, "torch_tuned", LIKE, {**PARAMETERS, "num_warps": 8}, ms=0.4, seconds=1.0)
    assert tuning.find(GPU, "torch_tuned", LIKE)["parameters"]["num_warps"] == 8
    assert {name: len(entries) for name, entries in tuning.load(GPU).items()} == {"ours": 1, "torch_tuned": 2}
    assert [file.name for file in store.iterdir()] == ["nvidia-h100-80gb-hbm3.json"]


def test_a_look_up_is_remembered_until_something_is_stored(store):
    asked = []

    @tuning.remembered
    def look_up(tokens, *, dtype=None):
        asked.append(tokens)
        return tuning.find(GPU, "torch_tuned", {"tokens": tokens})

    assert [look_up(16), look_up(16), look_up(32, dtype="float32")] == [None] * 3 and asked == [16, 32]
    entry = tuning.store(GPU, "torch_tuned", {"tokens": 16}, PARAMETERS, ms=1.0, seconds=1.0)
    assert [look_up(16), look_up(16)] == [entry] * 2 and asked == [16, 32, 16]
    tuning._remembered.remove(look_up)


def test_what_the_backends_look_up_is_forgotten_when_something_is_stored():
    pytest.importorskip("triton")
    from blockvit.kernels.triton import mlp, parameters

    assert {torch_tuned._launch, parameters.linear, mlp._parameters} <= set(tuning._remembered)


def test_the_file_is_sorted_and_readable(store):
    for tokens in (50432, 197, 3152):
        tuning.store(GPU, "torch_tuned", {"tokens": tokens, "block_size": 64}, PARAMETERS, ms=1.0, seconds=1.0)
    text = tuning.path(GPU).read_text()
    assert json.loads(text)["device"] == GPU
    assert re.findall(r'^      \{"key": \{"block_size": 64, "tokens": (\d+)\}', text, re.MULTILINE) == [
        "197",
        "3152",
        "50432",
    ]


def test_another_gpu_has_nothing(store):
    tuning.store(GPU, "torch_tuned", LIKE, PARAMETERS, ms=1.0, seconds=1.0)
    assert tuning.load("NVIDIA A100-SXM4-80GB") == {}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"backends": {"torch_tuned": [{"key": 1}]}}'])
def test_a_damaged_file_is_an_error_and_left_alone(store, content):
    tuning.path(GPU).write_text(content)
    for attempt in (
        lambda: tuning.load(GPU),
        lambda: tuning.store(GPU, "torch_tuned", LIKE, PARAMETERS, ms=1.0, seconds=1.0),
    ):
        with pytest.raises(
            tuning.TuningFileError, match=r"nvidia-h100-80gb-hbm3\.json holds no tuned parameters.*tune"
        ):
            attempt()
    assert tuning.path(GPU).read_text() == content


def test_a_folder_that_cannot_be_made_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BLOCKVIT_TUNED", str(tmp_path / "file" / "tuned"))
    with pytest.raises(OSError, match=r"set \$BLOCKVIT_TUNED to a folder that can be written"):
        tuning.store(GPU, "torch_tuned", LIKE, PARAMETERS, ms=1.0, seconds=1.0)


def test_files_lie_in_the_package_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("BLOCKVIT_TUNED", raising=False)
    assert tuning.folder() == ROOT / "lib" / "blockvit" / "kernels" / "tuned"


@pytest.mark.slow
def test_two_processes_lose_nothing_of_each_others(store):
    script = textwrap.dedent(
        f"""
        import sys
        from blockvit.kernels import tuning
        for tokens in range(20):
            tuning.store({GPU!r}, "torch_tuned", {{"tokens": tokens, "who": sys.argv[1]}}, {{}}, ms=1.0, seconds=1.0)
        """
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, who]) for who in "ab"]
    assert [writer.wait(timeout=300) for writer in writers] == [0, 0]
    assert len(tuning.load(GPU)["torch_tuned"]) == 40


# --- tuning ----------------------------------------------------------------------------------------------------------


class Clock:
    """Stands still unless a search takes time."""

    def __init__(self) -> None:
        self.now = 100.0
        self.searched: list[tune.Case] = []

    def __call__(self) -> float:
        return self.now

    def search(self, case: tune.Case, device: torch.device) -> tune.Found:
        self.now += 40.0
        self.searched.append(case)
        return tune.Found({**PARAMETERS, "SPLIT_N": case.tokens // case.block_size}, 1.0, 1.5)


def tune_torch_bsr(cases, device, *, search, **options):
    return tune.tune(replace(tune.TUNERS["torch_tuned"], search=search), cases, device, **options)


CASES = tune.make_cases([(128, 64), (64, 128)], tokens=[256], block_sizes=[64, 16])


def test_cases_come_in_order_of_importance():
    order = [(c.out_features, c.block_size, c.dtype) for c in CASES]
    first = [(128, size, dtype) for dtype in (torch.bfloat16, torch.float32) for size in (64, 16)]
    assert order == first + [(64, size, dtype) for _, size, dtype in first]


def test_tuning_stores_each_case_and_leaves_out_what_is_stored(store, gpu):
    clock, reported = Clock(), []
    done = tune_torch_bsr(CASES[:2], CUDA, clock=clock, search=clock.search, report=reported.append)
    assert [tuned.seconds for tuned in done] == [40.0, 40.0] and reported == done
    assert str(done[0]) == (
        "128x64, 256 tokens, blocks of 64, bfloat16, sparsity 0.9: 1.000 ms, 1.50x over the defaults' 1.500 ms, "
        "found in 40 s"
    )
    for case in CASES[:2]:
        found = tuning.find(GPU, "torch_tuned", tune.case_key(case))
        assert (found["ms"], found["default_ms"], found["seconds"]) == (1.0, 1.5, 40.0)

    assert len(tune_torch_bsr(CASES[:3], CUDA, clock=clock, search=clock.search)) == 1
    assert clock.searched == CASES[:3]
    assert len(tune_torch_bsr(CASES[:3], CUDA, clock=clock, search=clock.search, force=True)) == 3


@pytest.mark.parametrize("seconds, cases", [(0, 0), (1, 1), (40, 1), (41, 2), (100, 3), (None, 8)])
def test_no_case_begins_after_the_time_is_over(store, gpu, seconds, cases):
    clock = Clock()
    tune_torch_bsr(CASES, CUDA, seconds=seconds, clock=clock, search=clock.search)
    assert clock.searched == CASES[:cases]


def test_a_case_that_nothing_works_for_is_reported_and_not_stored(store, gpu):
    (tuned,) = tune_torch_bsr(CASES[:1], CUDA, search=lambda case, device: None)
    assert tuned.found is None and "no parameters work" in str(tuned)
    assert tuning.load(GPU) == {}


def test_a_case_is_stored_under_the_key_that_its_operands_look_up():
    for case in tune.make_cases([(100, 200)], tokens=[50], block_sizes=[64, 16], sparsities=[0.0, 0.5, 0.9]):
        x, matrix, bias = tune.make_operands(case, CPU)
        rows, cols = matrix.padded_shape
        assert x.shape == (50, cols) and bias.shape == (rows,) and matrix.values.dtype == case.dtype
        key = tuning.key(rows, cols, 50, case.block_size, case.dtype, matrix.nnz)
        assert tune.case_key(case) == key


def test_short_benchmarks_end_with_their_block():
    testing = pytest.importorskip("triton.testing")
    original, asked = testing.do_bench, {}
    testing.do_bench = lambda fn, **options: asked.update(options)
    try:
        pretended = testing.do_bench
        with pytest.raises(RuntimeError, match="in the middle"), tune.torch_bsr.short_benchmarks(warmup=3, rep=4):
            testing.do_bench(lambda: None, warmup=500, rep=100, return_mode="median")
            raise RuntimeError("in the middle")
        assert asked == {"warmup": 3, "rep": 4, "return_mode": "median"}
        assert testing.do_bench is pretended
    finally:
        testing.do_bench = original


def test_the_search_leaves_out_float32_tiles_that_compile_for_minutes(monkeypatch):
    pytest.importorskip("triton")
    import torch.sparse._triton_ops as ops

    ran = []
    monkeypatch.setattr(ops, "bsr_dense_addmm", lambda added, bsr, dense, *, meta: ran.append((dense.dtype, meta)))
    pretended = ops.bsr_dense_addmm
    for dtype in (torch.float32, torch.bfloat16):
        dense = torch.zeros(64, 256, dtype=dtype)
        weight = torch.eye(64, dtype=dtype).to_sparse_bsr((64, 64))
        with tune.torch_bsr.quick_to_compile():
            ops.bsr_dense_addmm(None, weight, dense, meta={"SPLIT_N": 4, "num_warps": 4})
            slow = {"SPLIT_N": 2, "num_warps": 1}  # 64 x 128 sums in 32 threads
            if dtype is torch.float32:
                with pytest.raises(RuntimeError, match="8192 sums in 1 warps take too long to compile"):
                    ops.bsr_dense_addmm(None, weight, dense, meta=slow)
            else:
                ops.bsr_dense_addmm(None, weight, dense, meta=slow)
    assert len(ran) == 3 and ops.bsr_dense_addmm is pretended


def test_benchmarks_end_when_the_time_is_up_and_the_search_with_what_it_has():
    testing = pytest.importorskip("triton.testing")
    from torch.sparse._triton_ops_meta import minimize

    original, now, timed = testing.do_bench, [100.0], []
    testing.do_bench = lambda fn, **options: fn()
    try:
        with tune.torch_bsr.short_benchmarks(seconds=5, clock=lambda: now[0]):

            def target(parameters):
                def kernel():
                    now[0] += 1
                    timed.append(parameters["tile"])
                    return 100.0 / parameters["tile"]

                return testing.do_bench(kernel, warmup=500, rep=100)

            found, *_ = minimize(target, {"tile": 1}, {"tile": 1}, lambda name, value, step, all: value + step)
            with pytest.raises(RuntimeError, match="time is up"):
                testing.do_bench(lambda: pytest.fail("compiled"))
    finally:
        testing.do_bench = original
    assert len(timed) == 5 and found == {"tile": max(timed)}


def test_what_takes_minutes_to_compile_is_not_searched():
    assert tune.torch_bsr.find(tune.Case(128, 128, 128, 128, torch.float32, 0.5), CPU) is None


def test_the_command_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 3
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "no NVIDIA GPU" in err


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--shapes", "3072"], "expected OUTxIN"),
        (["--block-sizes", "24"], "24 is no block size"),
        (["--dtypes", "int8"], "invalid choice: 'int8'"),
        (["--sparsity", "1"], "1 is no sparsity"),
        (["--tokens", "0"], "expected at least 1"),
        (["--backend", "torchao"], "invalid choice: 'torchao'"),
    ],
)
def test_the_command_refuses_wrong_arguments(arguments, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        tune.main(arguments)
    assert says in capsys.readouterr().err


def test_the_command_prints_a_line_a_case(store, gpu, monkeypatch, capsys):
    monkeypatch.setitem(tune.TUNERS, "torch_tuned", replace(tune.TUNERS["torch_tuned"], search=Clock().search))
    arguments = ["--shapes", "128x64", "--tokens", "256", "--block-sizes", "64", "16"]
    assert tune.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0] == f"tuning torch_tuned on {GPU}: 4 cases, 300 s"
    assert "blocks of 64, bfloat16" in lines[1] and "blocks of 16, float32" in lines[4]
    assert lines[5].startswith("4 of 4 cases searched") and lines[5].endswith(".json")
    assert tune.main(arguments) == 0
    assert "0 of 4 cases searched" in capsys.readouterr().out


# --- results, in the interpreter -------------------------------------------------------------------------------------

PREPARED = """
import torch
import torch.nn.functional as F
import torch.utils._triton
import triton.runtime.autotuner

# PyTorch and torchao define their kernels only where they see a GPU, and ask for its name.
torch.utils._triton.has_triton = lambda *_, **__: True
torch.cuda.get_device_name = lambda *_: "interpreter"
triton.runtime.autotuner.Autotuner._bench = lambda *_, **__: [1.0, 1.0, 1.0]  # there is nothing to choose here

from blockvit import BSRMatrix, backends
from blockvit.kernels import torch_tuned, tuning
"""
"""What keeps these libraries from running in the interpreter."""

PRODUCTS = """
name = sys.argv[1]
torch.manual_seed(0)
ROWS, COLS = 96, 64
for b in (16, 32):
    key = tuning.key(ROWS, COLS, 4 * b, b, torch.float32, 3)
    parameters = dict(GROUP_SIZE_ROW=2, SPLIT_N=2, num_stages=1, num_warps=4)
    tuning.store("cpu", "torch_tuned", key, parameters, ms=1.0, seconds=1.0)
    for tokens, kept, with_bias, activation in [
        (40, 0.4, True, "gelu"), (5, 0.4, False, None), (64, 0.4, True, None), (40, 0.0, True, "gelu_tanh"),
        (40, 0.0, False, None),
    ]:
        mask = torch.rand(ROWS // b, COLS // b) < kept
        mask[0] = False  # an empty row
        mask[-1, 0] = kept > 0
        weight = torch.randn(ROWS, COLS) * mask.repeat_interleave(b, 0).repeat_interleave(b, 1)
        bias = torch.randn(ROWS) if with_bias else None
        x = torch.randn(COLS, tokens).t() if tokens == 40 else torch.randn(tokens, COLS)
        packed = backends()[name].pack(BSRMatrix.from_dense(weight, b))
        assert all(type(tensor) is torch.Tensor for tensor in packed.values())
        with torch.no_grad():
            y = backends()[name].linear(x, packed, bias, activation)
        expected = F.linear(x.double(), weight.double(), bias.double() if with_bias else None)
        if activation:
            expected = F.gelu(expected, approximate="tanh" if activation == "gelu_tanh" else "none")
        assert type(y) is torch.Tensor and y.shape == expected.shape and y.dtype == torch.float32
        error = (y - expected).abs().max() / expected.abs().max().clamp_min(1)
        assert error < 1e-5, f"blocks of {b}, {tokens} tokens, {kept} kept, bias {with_bias}: error {error:.1e}"
    rest = {"torch_tuned": [ROWS, torch.randn(ROWS)], "torchao": [ROWS], "blksprs": []}[name]
    parts = [*packed.values()][:3]  # the fourth of BSR, an empty tensor, stands for ROWS
    op = getattr(torch.ops.blockvit, f"{name}_linear")
    torch.library.opcheck(op, (torch.randn(24, COLS), *parts, *rest), test_utils=("test_schema", "test_faketensor"))
print("done")
"""


SEARCH = """
import triton.testing

asked = []
def do_bench(fn, warmup=None, rep=None, return_mode="mean"):
    asked.append((warmup, rep, return_mode))
    fn()
    return 9.0 if len(asked) == 1 else 1.0 + 0.001 * len(asked)
triton.testing.do_bench = do_bench

from blockvit import tune

tune.search.SEARCH_SECONDS = float("inf")  # it is slow here
found = tune.torch_bsr.find(tune.Case(32, 48, 60, 16, torch.float32, 0.5), torch.device("cpu"))
assert sorted(found.parameters) == ["GROUP_SIZE_ROW", "SPLIT_N", "num_stages", "num_warps"], found
assert all(type(value) is int for value in found.parameters.values()), found
assert found.ms <= found.default_ms, found
searched, timed = asked[:-2], asked[-2:]
assert len(searched) > 10 and set(searched) == {(25, 50, "mean")}, asked
assert timed == [(None, None, "median")] * 2, asked
assert triton.testing.do_bench is do_bench
print("done")
"""


@pytest.mark.slow
def test_pytorchs_search_runs_in_the_interpreter(store):
    pytest.importorskip("triton")
    run_interpreted(PREPARED + SEARCH)


@pytest.mark.slow
@every_baseline
def test_result_equals_dense_in_the_interpreter(name, store):
    for package in ("triton", *({name} - {"torch_tuned"})):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    run_interpreted(PREPARED + PRODUCTS, name)


@pytest.mark.slow
def test_importing_blksprs_leaves_the_compilers_settings():
    pytest.importorskip("triton")
    if importlib.util.find_spec("blksprs") is None:
        pytest.skip("blksprs is not installed")
    script = (
        "import torch._dynamo.config as c; before = c.capture_scalar_outputs; from blockvit.kernels import blksprs_bsr;"
        "blksprs_bsr._library(); assert c.capture_scalar_outputs == before"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


# --- results, on a GPU -----------------------------------------------------------------------------------------------

ON_GPU = [*BASELINES, "torch"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def tolerance(name: str, dtype: torch.dtype) -> float:
    tf32 = name == "blksprs" and dtype == torch.float32  # its only precision for float32
    return 5e-3 if tf32 else TOLERANCE[dtype]


def runnable_on_gpu(name: str, dtype: torch.dtype, block_size: int) -> None:
    """Skip unless it can run; gives ``torch_tuned`` PyTorch's default tile, and parameters unlike the defaults."""
    if name == "torch_tuned":
        key = tuning.key(256, 384, 8 * block_size, block_size, dtype, 1)
        parameters = {"GROUP_SIZE_ROW": 2, "SPLIT_N": 8, "num_stages": 2 if block_size < 64 else 1, "num_warps": 4}
        gpu_name = tuning.device_name(torch.device("cuda", torch.cuda.current_device()))
        tuning.store(gpu_name, name, key, parameters, ms=1.0, seconds=1.0)
    if refusal := backends()[name].refusal(CUDA, dtype, block_size):
        pytest.skip(refusal)


def layer_on_gpu(
    name: str,
    dtype: torch.dtype,
    block_size: int,
    *,
    kept: float = 0.3,
    bias: bool = True,
    activation: str | None = None,
) -> tuple[BlockSparseLinear, torch.nn.Linear]:
    """A layer of 300 x 400, so no multiple of a block, with an empty block row; and the dense one that it equals."""
    dense = torch.nn.Linear(400, 300, bias=bias)
    mask = torch.rand(-(-300 // block_size), -(-400 // block_size)) < kept
    mask[-1] = False
    elements = mask.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)[:300, :400]
    with torch.no_grad():
        dense.weight.normal_().mul_(elements)
    dense = dense.to(CUDA, dtype)
    return BlockSparseLinear.from_dense(dense, block_size, backend=name, activation=activation), dense


def run(name: str, sparse, x: torch.Tensor) -> torch.Tensor:
    """The result; skips where the library's own launch parameters need more shared memory than this GPU has."""
    import triton

    try:
        with torch.no_grad():
            return sparse(x)
    except triton.OutOfResources as error:
        if name in ("torchao", "blksprs"):
            pytest.skip(f"{name} asks for too much: {error}")
        raise


def assert_close(
    y: torch.Tensor, x: torch.Tensor, dense: torch.nn.Linear, activation: str | None, limit: float
) -> None:
    bias = None if dense.bias is None else dense.bias.detach().double()
    expected = F.linear(x.double(), dense.weight.detach().double(), bias)
    expected = F.gelu(expected) if activation else expected
    assert y.dtype == x.dtype and y.shape == expected.shape
    assert torch.isfinite(y).all()
    error = (y.double() - expected).abs().max() / expected.abs().max().clamp_min(1)
    assert error <= limit, f"relative error {error:.1e} exceeds {limit:.0e}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
@pytest.mark.parametrize(
    "dtype, block_size",
    [
        (torch.bfloat16, 32),
        *(slow(torch.bfloat16, size) for size in (16, 64, 128)),
        *(slow(torch.float32, size) for size in (16, 64)),
        slow(torch.float16, 32),
    ],
)
def test_result_equals_dense_on_gpu(store, name, dtype, block_size):
    runnable_on_gpu(name, dtype, block_size)
    for kept, bias, activation in [(0.3, True, "gelu"), (0.3, False, None), (0.0, True, None), (0.0, False, None)]:
        sparse, dense = layer_on_gpu(name, dtype, block_size, kept=kept, bias=bias, activation=activation)
        # Fewer tokens than a tile, between one and two tiles, a multiple, and many; one layout that is not contiguous.
        for tokens in (1, 5, block_size + 7, 4 * block_size, 1000):
            x = torch.randn(tokens, 400, device=CUDA, dtype=dtype)
            x = x.t().contiguous().t() if tokens == 1000 else x
            assert_close(run(name, sparse, x), x, dense, activation, tolerance(name, dtype))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ON_GPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_on_gpu(store, name, dtype):
    runnable_on_gpu(name, dtype, 32)
    torch._dynamo.reset()
    sparse, dense = layer_on_gpu(name, dtype, 32, activation="gelu")
    compiled = torch.compile(sparse, fullgraph=True)
    for shape in [(2, 50, 400), (3, 50, 400), (64, 400)]:
        x = torch.randn(*shape, device=CUDA, dtype=dtype)
        assert_close(run(name, compiled, x), x, dense, "gelu", tolerance(name, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
@pytest.mark.parametrize("dtype, tokens", [(torch.bfloat16, 100), slow(torch.float32, 128)])
def test_replays_as_a_cuda_graph(store, name, dtype, tokens):
    runnable_on_gpu(name, dtype, 32)
    sparse, dense = layer_on_gpu(name, dtype, 32, activation="gelu")
    x = torch.randn(tokens, 400, device=CUDA, dtype=dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, tunes, and builds the layouts that are kept
            run(name, sparse, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = sparse(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert_close(y, x, dense, "gelu", tolerance(name, dtype))


@pytest.mark.gpu
@pytest.mark.slow
def test_tuning_finds_parameters_that_run(store):
    case = tune.Case(256, 256, 1000, 64, torch.bfloat16, 0.9)
    (tuned,) = tune.tune(tune.TUNERS["torch_tuned"], [case], CUDA)
    assert tuned.found is not None and tuned.seconds > 0
    assert tuned.found.default_ms is None or tuned.found.ms <= tuned.found.default_ms
    x, matrix, bias = tune.make_operands(case, CUDA)
    sparse = BlockSparseLinear(BSRMatrix(matrix.crow_indices, matrix.col_indices, matrix.values, matrix.shape), bias)
    expected = sparse(x)
    sparse.requested_backend = "torch_tuned"
    sparse._pack()
    torch.testing.assert_close(sparse(x), expected, rtol=2e-2, atol=2e-1)
