from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from blockvit import bench, comparisons
from blockvit.bench import (
    Effort,
    interleave,
    peak_memory,
    precision_class,
    sweep,
    timing_row,
)
from blockvit.clocks import Clock, Timing
from blockvit.kernels import backends
from blockvit.results import Store
from blockvit.workloads import CeilingCase, ConversionCase, LinearCase, ModelCase

CPU = torch.device("cpu")
SHORT = Effort(min_repeats=2, max_repeats=2, seconds=0, min_sample=0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


class FakeClock(Clock):
    """Time that passes only as scripted: ``cost(name, now)`` seconds a call, and nothing between calls."""

    def __init__(self, cost):
        self.cost, self.now, self.calls, self.readied = cost, 0.0, [], []

    def ready(self, call, estimate):
        self.readied.append(call())

    def seconds(self, call, repeats):
        name = call()
        taken = sum(self.cost(name, self.now) for _ in range(repeats))
        self.calls.append((name, repeats))
        self.now += taken
        return taken


def variants(*names: str) -> dict:
    return {name: (lambda name=name: name) for name in names}


def interleaved(cost, names="abc", **effort) -> tuple[dict[str, Timing], FakeClock, list[list[str]]]:
    """Timings, the clock, and the order of the calls in each round."""
    clock = FakeClock(cost)
    how = Effort(**{"min_repeats": 5, "max_repeats": 50, "seconds": 0, "min_sample": 0, **effort})
    timings = interleave(variants(*names), clock=clock, effort=how)
    order = [name for name, _ in clock.calls[how.warmup * len(names) :]]
    return timings, clock, [order[i : i + len(names)] for i in range(0, len(order), len(names))]


# --- Timing ----------------------------------------------------------------------------------------------------------


def test_percentiles():
    timing = Timing(tuple(float(x) for x in (5, 1, 4, 2, 3, 6)))
    assert (timing.low, timing.median, timing.high) == (2.0, 3.5, 5.0)
    assert Timing((7.0,)).low == Timing((7.0,)).median == Timing((7.0,)).high == 7.0


def test_timing_row():
    row = timing_row(Timing((1.0, 2.0, 3.0, 4.0, 5.0, 60.0)), model="m", metric="latency")
    assert row == {
        "model": "m", "metric": "latency", "value": 3.5, "low": 2.0, "high": 5.0, "unit": "s", "repeats": 6,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup": 0}, "warmup is 0; expected at least 1"),
        ({"min_repeats": 0}, "min_repeats is 0, max_repeats 50"),
        ({"min_repeats": 9, "max_repeats": 8}, "min_repeats is 9, max_repeats 8; expected 1 <= min <= max"),
    ],
)
def test_effort_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        Effort(**changes)


# --- interleave ------------------------------------------------------------------------------------------------------


def test_every_round_has_every_variant_once_and_the_order_changes():
    timings, _, rounds = interleaved(lambda name, now: 1.0, min_repeats=12, max_repeats=12)
    assert [sorted(r) for r in rounds] == [["a", "b", "c"]] * 12
    assert all(len(timing.samples) == 12 for timing in timings.values())
    assert len(set(map(tuple, rounds))) >= 4
    assert set(Counter(r[0] for r in rounds)) == {"a", "b", "c"}, "each variant comes first at times"


def test_before_each_sample_the_clock_makes_ready_for_its_variant():
    _, clock, rounds = interleaved(lambda name, now: 1.0, min_repeats=4, max_repeats=4)
    assert clock.readied == [name for order in rounds for name in order]


def test_order_is_the_same_each_time():
    assert interleaved(lambda n, t: 1.0)[2] == interleaved(lambda n, t: 1.0)[2]


def test_each_variant_gets_its_own_time():
    timings, _, _ = interleaved(lambda name, now: {"a": 1.0, "b": 2.0, "c": 4.0}[name])
    assert {name: t.median for name, t in timings.items()} == {"a": 1.0, "b": 2.0, "c": 4.0}


@pytest.mark.parametrize("warmup", [1, 3])
def test_warm_up_is_outside(warmup):
    slow_first = Counter()

    def cost(name, now):
        slow_first[name] += 1
        return 100.0 if slow_first[name] <= warmup else 1.0

    timings, clock, _ = interleaved(cost, warmup=warmup)
    assert all(set(timing.samples) == {1.0} for timing in timings.values())
    assert Counter(name for name, _ in clock.calls) == dict.fromkeys("abc", 5 + warmup)


class Wall:
    """``time.perf_counter`` that advances by ``step`` each time it is read."""

    def __init__(self, step):
        self.step, self.now = step, 0.0

    def __call__(self):
        self.now += self.step
        return self.now


@pytest.mark.parametrize(("step", "rounds"), [(100.0, 3), (1.0, 10), (0.0, 20)])
def test_rounds_go_on_till_the_time_is_spent_between_the_bounds(monkeypatch, step, rounds):
    monkeypatch.setattr(bench.time, "perf_counter", Wall(step))
    how = {"min_repeats": 3, "max_repeats": 20, "seconds": 8.0}
    timings, _, _ = interleaved(lambda name, now: 1.0, **how)
    assert {len(timing.samples) for timing in timings.values()} == {rounds}


@pytest.mark.parametrize(("cost", "repeats"), [(1e-4, 10), (0.7e-3, 2), (1e-3, 1), (5.0, 1)])
def test_short_calls_are_repeated_within_a_sample(cost, repeats):
    timings, clock, _ = interleaved(lambda name, now: cost, min_sample=1e-3)
    assert {r for _, r in clock.calls[3:]} == {repeats}
    assert repeats * cost >= 1e-3
    assert timings["a"].median == pytest.approx(cost), "seconds are those of one call"


def test_slow_drift_cancels_in_the_ratio():
    def cost(name, now):  # everything becomes three times as slow during the measurement
        return {"a": 1.0, "b": 2.0}[name] * (1 + now / 100)

    timings, _, _ = interleaved(cost, "ab", min_repeats=40, max_repeats=40)
    first, last = timings["a"].samples[0], timings["a"].samples[-1]
    assert last > 2 * first, "the drift is there"
    assert timings["b"].median / timings["a"].median == pytest.approx(2.0, rel=0.05)


def test_a_jump_in_the_middle_falls_on_all_alike():
    timings, _, _ = interleaved(lambda name, now: 1.0 if now < 60 else 5.0, "ab", min_repeats=30, max_repeats=30)
    slow = {name: sum(s > 2 for s in timing.samples) for name, timing in timings.items()}
    assert min(slow.values()) > 0 and abs(slow["a"] - slow["b"]) <= 1


def test_the_real_clock_counts_all_repeats():
    calls, before = [], time.perf_counter()
    taken = Clock().seconds(lambda: (calls.append(1), time.sleep(0.002)), 5)
    assert len(calls) == 5
    assert 0.01 <= taken <= time.perf_counter() - before


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_peak_memory_on_a_gpu():
    size = 64 << 20
    assert peak_memory(lambda: torch.ones(size, dtype=torch.uint8, device="cuda"), "cuda") >= size
    assert torch.cuda.memory_allocated() < size, "the result is not held"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_linear_case_on_a_gpu(precision):
    case = LinearCase((768, 768), 512, 32, 0.9, precision, ("torch", "gather"))
    rows = case.measure(torch.device("cuda"), SHORT)
    assert rows[0]["backend"] == "dense" and len(rows) > 1


# --- precision, correctness, memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_precision_class_sets_and_restores(name, dtype):
    torch.set_float32_matmul_precision("high")
    try:
        with precision_class(name, "cpu") as given:
            assert given == dtype
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_precision_class_restores_after_an_error():
    with pytest.raises(KeyError), precision_class("tf32", "cuda"):
        assert torch.get_float32_matmul_precision() == "high"
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_precision_set_in_pytorchs_other_way_is_an_error_that_says_what_to_do():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with (
            pytest.raises(RuntimeError, match=r"set_float32_matmul_precision\('highest'\)"),
            precision_class("fp32", CPU),
        ):
            pytest.fail("the body ran")
    finally:
        torch.set_float32_matmul_precision("highest")
    with precision_class("fp32", CPU):
        assert torch.get_float32_matmul_precision() == "highest"


def test_tf32_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="precision is 'tf32', which cpu does not have"), precision_class("tf32", CPU):
        pytest.fail("the body ran")


def test_unknown_precision():
    with (
        pytest.raises(ValueError, match=r"precision is 'fp8'; expected one of .*'fp32', 'tf32', 'bf16', 'fp16'"),
        precision_class("fp8", CPU),
    ):
        pytest.fail("the body ran")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_peak_memory_sees_what_was_freed_again():
    size = 200 << 20

    def call():
        torch.ones(size, dtype=torch.uint8)

    call()
    peak = peak_memory(call, CPU)
    if peak is None:
        pytest.skip("the kernel does not let a process reset its high-water mark here")
    assert 0.9 * size <= peak < 2 * size
    assert peak_memory(lambda: None, CPU) < 0.2 * size, "an earlier peak is forgotten"


# --- sweep -----------------------------------------------------------------------------------------------------------


class Fake:
    """A group of two variants that takes no time; remembers how often it was measured."""

    def __init__(self, number, error=None, then=None):
        self.number, self.error, self.then, self.times = number, error, then, 0

    def __repr__(self):
        return f"Fake({self.number})"

    def keys(self, device):
        return [{"model": f"m{self.number}", "backend": name, "metric": "latency"} for name in ("dense", "gather")]

    def measure(self, device, effort):
        self.times += 1
        if self.error:
            raise self.error
        if self.then:
            self.then()
        return [{**key, "value": self.number + 1, "unit": "s"} for key in self.keys(device)]


@pytest.mark.parametrize("device, budget_s, most", [("cuda", 40, 40), ("cuda", None, math.inf), ("cpu", 40, math.inf)])
def test_on_a_gpu_a_budget_is_the_deadline_of_what_takes_long_to_prepare(store, monkeypatch, device, budget_s, most):
    monkeypatch.setattr(bench, "environment", lambda device: {"device": "a GPU"})
    monkeypatch.setattr(bench, "gpu_note", lambda device: [])
    given, case = [], Fake(0)
    monkeypatch.setattr(case, "measure", lambda device, effort: given.append(effort) or [])
    before = time.perf_counter()
    sweep([case], store, "linear", device=device, effort=SHORT, budget_s=budget_s)
    assert before + most <= given[0].deadline <= time.perf_counter() + most
    assert replace(given[0], deadline=math.inf) == SHORT


def test_rows_are_written_group_by_group(store):
    seen = []
    cases = [Fake(i, then=lambda: seen.append(len(Store(store.root).read("linear")))) for i in range(3)]
    report = sweep(cases, store, "linear", notes=["a note"])
    assert seen == [0, 2, 4]
    rows = store.read("linear")
    assert len(rows) == 6
    assert rows.groupby("model")["group"].nunique().eq(1).all() and rows["group"].nunique() == 3
    here = bench.environment("cpu")
    assert set(rows["device"]) == {here["device"]} and set(rows["threads"]) == {float(torch.get_num_threads())}
    assert set(rows["torch"]) == {here["torch"]}
    assert (report.measured, report.kept, report.left) == (3, 0, 0)
    lines = str(report).splitlines()
    assert re.fullmatch(r"3 groups measured in \d+ s, 0 were there already", lines[0]) and "a note" in lines


def test_what_was_measured_is_kept(store):
    cases = [Fake(i) for i in range(3)]
    sweep(cases[:2], store, "linear")
    report = sweep(cases, store, "linear")
    assert (report.measured, report.kept, report.left) == (1, 2, 0)
    report = sweep(cases, store, "linear")
    assert (report.measured, report.kept) == (0, 3)
    assert [case.times for case in cases] == [1, 1, 1]


def test_an_experiment_has_its_own_measurements(store):
    case = Fake(1)
    sweep([case], store, "linear")
    assert sweep([case], store, "vit").measured == 1


def test_remeasure(store):
    cases = [Fake(i) for i in range(2)]
    sweep(cases, store, "linear")
    report = sweep(cases, store, "linear", remeasure=True)
    assert (report.measured, report.kept) == (2, 0)
    assert len(store.read("linear")) == 8


def test_a_busy_machine_is_told_of_where_something_is_measured(store, monkeypatch):
    monkeypatch.setattr(bench, "busy_note", lambda: ["busy"])
    assert sweep([Fake(1)], store, "linear").notes == ["busy"]
    assert sweep([Fake(1)], store, "linear").notes == []


def test_what_a_case_before_measures_is_measured_once(store):
    cases = [Fake(1), Fake(1), Fake(2)]
    report = sweep(cases, store, "linear")
    assert (report.measured, report.kept, report.left) == (2, 0, 0)
    assert [case.times for case in cases] == [1, 0, 1]


def test_half_a_group_is_measured_again(store):
    case = Fake(1)
    store.append([{**bench.environment("cpu"), "experiment": "linear", "value": 1, **case.keys(CPU)[0]}])
    assert sweep([case], store, "linear").measured == 1


def test_other_threads_and_versions_are_measured_again(store, monkeypatch):
    case = Fake(1)
    sweep([case], store, "linear")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert sweep([case], store, "linear").measured == 1
    monkeypatch.setattr(bench.machine, "versions", lambda: {"torch": "9.9", "triton": ""})
    assert sweep([case], store, "linear").measured == 1


def test_rows_of_another_working_copy_are_not_ours(store):
    case = Fake(1)
    sweep([case], store, "linear")
    (store.root / ".run").unlink()
    assert Store(store.root).run
    report = sweep([case], store, "linear")
    assert (report.measured, report.kept) == (1, 0)
    assert store.read("linear")["run"].nunique() == 2


def test_a_case_that_cannot_run_here_is_left_out(store):
    class Nothing(Fake):
        def keys(self, device):
            return []

    report = sweep([Nothing(0), Fake(1)], store, "linear", notes=["not measured: because"])
    assert (report.measured, report.kept, report.left) == (1, 0, 0)


def test_a_spent_budget_stops_and_the_next_sweep_finishes(store, monkeypatch):
    cases = [Fake(i) for i in range(5)]
    with monkeypatch.context() as patch:
        patch.setattr(bench.time, "perf_counter", Wall(1.0))
        report = sweep(cases, store, "linear", budget_s=2.5)
    assert (report.measured, report.left) == (2, 3)
    assert "3 groups left for the next run: the time budget was spent" in str(report)
    report = sweep(cases, store, "linear")
    assert (report.measured, report.kept, report.left) == (3, 2, 0)
    assert [case.times for case in cases] == [1] * 5


def test_the_environment_limits_every_budget_and_never_raises_one(store, monkeypatch):
    monkeypatch.setenv("BLOCKVIT_BUDGET_S", "0")
    for budget_s in (None, 100):
        assert sweep([Fake(0)], store, "linear", budget_s=budget_s).left == 1
    monkeypatch.setenv("BLOCKVIT_BUDGET_S", "100")
    assert sweep([Fake(0)], store, "linear", budget_s=0).left == 1
    assert sweep([Fake(0)], store, "linear").left == 0


@pytest.mark.parametrize("text", ["soon", "-1", "nan"])
def test_a_limit_that_is_no_number_of_seconds_is_an_error(store, monkeypatch, text):
    monkeypatch.setenv("BLOCKVIT_BUDGET_S", text)
    with pytest.raises(ValueError, match=f"BLOCKVIT_BUDGET_S is '{text}'; expected a number of seconds"):
        sweep([Fake(0)], store, "linear")


def test_no_budget_at_all_measures_nothing(store):
    report = sweep([Fake(0)], store, "linear", budget_s=0)
    assert (report.measured, report.left) == (0, 1)
    assert store.read("linear").empty


def test_a_failing_case_keeps_what_was_measured_before(store):
    cases = [Fake(0), Fake(1, error=ArithmeticError("wrong")), Fake(2)]
    with pytest.raises(ArithmeticError, match="wrong"):
        sweep(cases, store, "linear")
    assert set(store.read("linear")["model"]) == {"m0"}
    cases[1].error = None
    assert sweep(cases, store, "linear").measured == 2


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_bench import CPU, Fake, Store, sweep
import torch
torch.set_num_threads(2)
cases = [Fake(i) for i in range(6)]
cases[3].then = lambda: os.kill(os.getpid(), signal.SIGKILL)
sweep(cases, Store(sys.argv[1]), "linear")
"""


def test_a_killed_sweep_goes_on_where_it_stopped(store):
    command = [sys.executable, "-c", KILLED, str(store.root), str(Path(__file__).parent)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ})
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert set(store.read("linear")["model"]) == {"m0", "m1", "m2"}
    cases = [Fake(i) for i in range(6)]
    report = sweep(cases, store, "linear")
    assert (report.measured, report.kept) == (3, 3)
    assert [case.times for case in cases] == [0, 0, 0, 1, 1, 1]
    rows = store.read("linear")
    assert Counter(rows["model"]) == {f"m{i}": 2 for i in range(6)}
    assert rows["run"].nunique() == 1


# --- the real cases: what a rerun looks for is what was written -------------------------------------------------------

REAL = [
    LinearCase((48, 32), 5, 16, 0.5),
    LinearCase((48, 40), 5, 16, 1 / 3, "bf16", ("gather", "torch")),
    ModelCase("vit_digits", "mlp", 2, 16, 0.9, memory=True, backends=("torch", "gather")),
    ModelCase("vit_digits", "all", 1, 32, 0.8, seed=3),
    CeilingCase(size=64, copy_bytes=1 << 16),
    CeilingCase("bf16", size=32, copy_bytes=1 << 12),
    ConversionCase("vit_digits", 16, 0.9),
]


@pytest.mark.parametrize("case", REAL, ids=lambda case: f"{type(case).__name__}-{getattr(case, 'precision', '')}")
def test_a_second_sweep_of_a_real_case_measures_nothing(store, case):
    assert sweep([case], store, "linear", effort=SHORT).measured == 1
    rows = len(store.read("linear"))
    report = sweep([case], store, "linear", effort=SHORT)
    assert (report.measured, report.kept) == (0, 1)
    assert len(store.read("linear")) == rows


@pytest.mark.parametrize("field", ["block_size", "sparsity", "seed", "backends", "precision"])
def test_another_case_is_not_taken_for_measured(store, field):
    case = LinearCase((48, 32), 5, 16, 0.5, backends=("gather",))
    other = {"block_size": 8, "sparsity": 0.75, "seed": 1, "backends": ("gather", "torch"), "precision": "bf16"}
    sweep([case], store, "linear", effort=SHORT)
    changed = LinearCase(**{**vars(case), field: other[field]})
    assert sweep([changed], store, "linear", effort=SHORT).measured == 1


def wrong(*arguments):
    return RIGHT(*arguments) * 1.01


def out_of_memory(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB\nsecond line")


RIGHT = backends()["gather"].linear


@pytest.mark.parametrize("case", [LinearCase((48, 32), 5, 16, 0.5), REAL[2]], ids=["linear", "model"])
@pytest.mark.parametrize(
    ("linear", "reason"),
    [
        (wrong, r"ArithmeticError: backend 'gather' differs from the dense result by"),
        (out_of_memory, r"OutOfMemoryError: CUDA out of memory. Tried to allocate 3.00 GiB$"),
    ],
)
def test_a_failing_backend_costs_its_own_row_only(store, monkeypatch, case, linear, reason):
    monkeypatch.setattr(backends()["gather"], "linear", staticmethod(linear))
    report = sweep([case], store, "linear", effort=SHORT)
    (note,) = report.notes[-1:]
    assert re.search(r"not measured: backend gather, .*: " + reason, note) and note in str(report)
    rows = store.read("linear")
    assert set(rows[rows["metric"] == "latency"]["backend"]) == {"dense"} | set(case.backends) - {"gather"}
    failed = rows[rows["metric"] == bench.FAILED]
    assert list(failed["backend"]) == ["gather"] and set(failed["group"]) == set(rows["group"])
    assert comparisons.speedups(rows)["backend"].isin(["torch"]).all()
    monkeypatch.undo()
    assert sweep([case], store, "linear", effort=SHORT).kept == 1, "what failed is not tried again ..."
    assert sweep([case], store, "linear", effort=SHORT, remeasure=True).measured == 1, "... unless asked to"


def test_a_failing_baseline_is_an_error(store, monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "forward", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        sweep([LinearCase((48, 32), 5, 16, 0.5)], store, "linear", effort=SHORT)
    assert store.read("linear").empty


def test_a_gpu_that_others_use_is_told(monkeypatch):
    gib = 1 << 30
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * gib)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (69 * gib, 80 * gib))
    assert bench.gpu_note(torch.device("cuda")) == [] == bench.gpu_note(CPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * gib, 80 * gib))
    (note,) = bench.gpu_note(torch.device("cuda"))
    assert note == "other processes hold 30 GiB of the GPU: ratios may be off"


def test_speedups_of_a_real_sweep(store):
    sweep([LinearCase((64, 64), 32, 16, 0.75)], store, "linear", effort=SHORT)
    pairs = comparisons.speedups(store.read("linear"))
    assert isinstance(pairs, pd.DataFrame) and set(pairs["backend"]) == {"torch", "gather"}
    assert (pairs["speedup_low"] <= pairs["speedup"]).all() and (pairs["speedup"] <= pairs["speedup_high"]).all()
