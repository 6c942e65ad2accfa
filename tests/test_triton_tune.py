"""The command that finds parameters of our own kernel; without a GPU, its search runs in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton_interpreter import run_interpreted

from blockvit import tune
from blockvit.kernels import tuning
from blockvit.kernels.triton import packing, parameters
from blockvit.tune import search, triton_linear

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GPU = "NVIDIA H100 80GB HBM3"
START = {"GROUP": 2, "BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
SHARED = 227 * 1024


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty folder of tuned parameters, and a GPU as far as the command asks for one."""
    monkeypatch.setenv("BLOCKVIT_TUNED", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    parameters.linear.cache_clear()
    yield tmp_path
    parameters.linear.cache_clear()


def test_neighbours_differ_by_one_step_of_one_choice():
    found = list(triton_linear.neighbours(START))
    assert len(found) == 12
    for other in found:
        changed = {name for name in START if other[name] != START[name]}
        assert len(changed - {"BLOCK_N"}) <= 1 and changed
    assert [(n["GROUP"], n["BLOCK_N"]) for n in found[:2]] == [(4, 64), (1, 16)]
    edge = {**START, "GROUP": 8, "BLOCK_M": 256, "BLOCK_N": 128, "num_stages": 5, "num_warps": 8, "BLOCK_K": 128}
    assert len(list(triton_linear.neighbours(edge))) == 6
    assert next(triton_linear.neighbours(edge))["BLOCK_N"] == 64


@pytest.mark.parametrize(
    "changes, block_size, itemsize, precision, shared, fit",
    [
        ({}, 16, 2, "ieee", SHARED, True),
        ({"BLOCK_N": 64}, 16, 2, "ieee", SHARED, False),  # wider than the group
        ({"GROUP": 8}, 16, 2, "ieee", SHARED, True),
        ({"GROUP": 8}, 16, 4, "tf32", SHARED, False),  # a group too wide for four bytes a number
        ({"GROUP": 1}, 256, 2, "ieee", SHARED, True),  # what is no group may be as wide as it likes
        ({"BLOCK_K": 128}, 16, 4, "tf32", SHARED, False),  # a tile too long
        ({"BLOCK_K": 128}, 16, 2, "ieee", SHARED, True),
        ({"BLOCK_M": 256, "num_stages": 5}, 16, 2, "ieee", SHARED, True),
        ({"BLOCK_M": 256, "num_stages": 5}, 16, 2, "ieee", 163 * 1024, False),  # shared memory
        ({"BLOCK_M": 256, "BLOCK_N": 128}, 64, 2, "ieee", SHARED, False),  # 256 sums a thread
        ({"BLOCK_M": 256, "BLOCK_N": 128, "num_warps": 8}, 64, 2, "ieee", SHARED, True),
        ({"BLOCK_M": 256, "num_warps": 4, "BLOCK_K": 32}, 16, 4, "tf32", SHARED, True),
        ({"BLOCK_M": 256, "num_warps": 4, "BLOCK_K": 32}, 16, 4, "tf32x3", SHARED, False),  # x in registers too
    ],
)
def test_only_what_fits_is_compiled(changes, block_size, itemsize, precision, shared, fit):
    assert triton_linear.fits({**START, **changes}, block_size, itemsize, precision, shared) is fit


def test_what_is_compiled_as_fitting_spills_nothing_on_hopper():
    pytest.importorskip("triton")
    from blockvit.kernels.triton import survey

    widest = {**START, "BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 4, "GROUP": 2}
    assert triton_linear.fits(widest, 64, 2, "ieee", SHARED)
    sizes = {name: value for name, value in widest.items() if name != "GROUP"}
    report, _ = survey.linear(90, "bf16", 64, 2, "ieee", **sizes)
    assert report.spills == 0


def test_the_search_goes_to_the_best_and_measures_nothing_twice():
    best = {**START, "GROUP": 4, "BLOCK_N": 64, "BLOCK_M": 256, "num_warps": 8, "num_stages": 2}
    measured = []

    def measure(candidate):
        measured.append(tuple(candidate.items()))
        if candidate["num_stages"] == 4:
            return None  # does not run
        return 1.0 + sum(
            abs(triton_linear.CHOICES[n].index(candidate[n]) - triton_linear.CHOICES[n].index(best[n])) for n in best
        )

    assert search.descend(START, triton_linear.neighbours, measure) == best
    assert len(measured) == len(set(measured)) < 40
    assert search.descend(START, triton_linear.neighbours, lambda candidate: None) is None
    assert search.descend(START, lambda candidate: [], lambda candidate: 1.0) == START


def test_a_search_ends_with_the_best_so_far_when_its_time_is_up(monkeypatch):
    now, measured = [0.0], []

    def measure(candidate):
        now[0] += 10
        measured.append(candidate)
        return 100.0 - len(measured)  # the longer, the better

    limited = search.in_time(measure, clock=lambda: now[0])
    found = search.descend(START, triton_linear.neighbours, limited)
    assert measured[0] == START and found == measured[-1] and len(measured) == search.SEARCH_SECONDS / 10


def test_a_candidate_that_is_wrong_or_cannot_run_has_no_time(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.testing, "do_bench", lambda call, return_mode, **effort: effort.get("rep", 0.0))
    right = torch.randn(8, 8)
    assert search.timed(lambda: right + 1e-6, right, "fp32", rep=5) == 5
    assert search.timed(lambda: right + 0.1, right, "fp32") is None
    assert search.timed(lambda: right.where(right < right.max(), torch.nan), right, "fp32") is None, "left unwritten"
    results = iter([right, right + 1e-6])
    assert search.timed(lambda: next(results), right, "fp32") is None, "each time another"

    def failing(error):
        def call():
            raise error

        return call

    for error in (RuntimeError("PassManager::run failed"), triton.OutOfResources(1, 0, "shared memory")):
        assert search.timed(failing(error), right, "fp32") is None
    with pytest.raises(TypeError, match="a mistake of ours"):
        search.timed(failing(TypeError("a mistake of ours")), right, "fp32")


def test_expected_is_what_the_layers_compute():
    case = tune.Case(128, 32, 5, 16, torch.float32, 0.5)
    assert case.activation == "gelu" and tune.Case(96, 32, 5, 16, torch.float32, 0.5).activation is None
    x, first, bias1 = tune.make_operands(case, CPU)
    _, second, bias2 = tune.make_operands(replace(case, out_features=32, in_features=128), CPU)
    layers = [(first, bias1, case.activation), (second, bias2, None)]
    hidden = torch.nn.functional.gelu(x @ first.to_dense().T + bias1)
    torch.testing.assert_close(tune.cases.expected(x, layers), hidden @ second.to_dense().T + bias2)


def test_what_is_found_is_what_the_layer_looks_up(store):
    cases = tune.make_cases([(100, 200)], tokens=[50], block_sizes=[64, 16], dtypes=[torch.bfloat16], sparsities=[0.5])
    found = {"GROUP": 2, "BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 64, "num_warps": 2, "num_stages": 4}
    tuner = tune.Tuner("triton", tune.triton_key, lambda case, device: tune.Found(found, 1.0, 2.0))
    assert len(tune.tune(tuner, cases, CPU)) == 2 and tune.tune(tuner, cases, CPU) == []
    for case in cases:
        x, matrix, _ = tune.make_operands(case, CPU)
        weight = (*matrix.padded_shape, case.block_size, case.dtype, matrix.nnz)
        assert parameters.group(CPU, *weight) == 2
        other_shape = matrix.padded_shape[0] + 128, *weight[1:]
        assert parameters.group(CPU, *other_shape) is None, "pairs of rows that pay for one weight cost another"
        assert parameters.group(CPU, *weight[:-1], 1) is None, "nor does a sparser one have as many columns in common"
        entries = packing.pack(matrix, 2).values.shape[0]
        used = parameters.linear(CPU, 50, *weight, "ieee", 2, entries)
        assert {"GROUP": 2, **used} == found
        key = tuning.key(*matrix.padded_shape, len(x), case.block_size, case.dtype, matrix.nnz, "ieee")
        assert tune.triton_key(case) == key


@pytest.mark.parametrize("arguments, dtypes", [([], ["bfloat16", "float32"]), (["--tf32"], ["bfloat16", "tf32"])])
def test_the_command_tunes_our_kernel(store, monkeypatch, capsys, arguments, dtypes):
    before = torch.get_float32_matmul_precision()
    found = replace(tune.TUNERS["triton"], search=lambda case, device: tune.Found(START, 1.0, 1.5))
    monkeypatch.setitem(tune.TUNERS, "triton", found)
    try:
        options = ["--backend", "triton", "--shapes", "128x64", "--tokens", "256", "--block-sizes", "32", *arguments]
        assert tune.main(options) == 0
    finally:
        torch.set_float32_matmul_precision(before)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"tuning triton on {GPU}: 2 cases, 300 s"
    assert "1.50x over the defaults' 1.500 ms" in lines[1]
    stored = tuning.load(GPU)
    assert set(stored) == {"triton"} and {entry["key"]["dtype"] for entry in stored["triton"]} == set(dtypes)


SEARCH = """
import torch, triton.testing
from blockvit import tune
from blockvit.kernels.triton import linear
from blockvit.tune import search, triton_linear

launched, launch = [], linear.launch
def recorded(*args, parameters, **options):
    launched.append(parameters)
    return launch(*args, parameters=parameters, **options)
linear.launch = recorded

def do_bench(call, return_mode, warmup=None, rep=None):
    y = call()
    assert torch.isfinite(y).all()
    # As if short tiles were best, and two stages.
    return launched[-1]["BLOCK_M"] / 100 + abs(launched[-1]["num_stages"] - 2)
triton.testing.do_bench = do_bench

search.SEARCH_SECONDS = float("inf")  # it is slow here
case = tune.Case(64, 48, 40, 16, torch.float32, 0.5)
found = tune.triton_linear.find(case, torch.device("cpu"))
assert found.parameters["BLOCK_M"] == 16 and found.parameters["num_stages"] == 2, found
assert found.ms == 0.16 <= found.default_ms, found
assert set(found.parameters) == set(triton_linear.CHOICES), found
assert all(type(value) is int for value in found.parameters.values()), found

from triton.runtime.errors import PTXASError

for error in (triton.OutOfResources(1, 0, "shared memory"), PTXASError("Insufficient registers")):
    def do_bench(call, **options):
        raise error
    triton.testing.do_bench = do_bench
    assert tune.triton_linear.find(case, torch.device("cpu")) is None
print("done")
"""


def test_the_search_runs_in_the_interpreter():
    pytest.importorskip("triton")
    run_interpreted(SEARCH)


@pytest.mark.gpu
@pytest.mark.slow
def test_tuning_on_a_gpu_finds_parameters_that_run(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKVIT_TUNED", str(tmp_path))
    case = tune.Case(256, 256, 1000, 64, torch.bfloat16, 0.9)
    (tuned,) = tune.tune(tune.TUNERS["triton"], [case], CUDA)
    assert tuned.found is not None and tuned.found.ms <= tuned.found.default_ms
