from __future__ import annotations

import subprocess
import sys
import warnings
from contextlib import contextmanager

import pytest
import torch

from blockvit import clocks
from blockvit.bench import Effort, interleave
from blockvit.clocks import Clock, ColdCudaClock, Cuda, CudaClock, Timing, clock_for, cuda_graph


class SimulatedGpu(Cuda):
    """A stream on which time passes as scripted, and a host that takes ``launch`` seconds to enqueue a kernel.

    Work is enqueued at the host's time and begins when the device is done with what came before. The cache holds
    nothing after ``evict``; ``cached`` tells whether a kernel found its operands there.
    """

    def __init__(self, monkeypatch, launch: float = 0.0):
        self.launch, self.host, self.device_time = launch, 0.0, 0.0
        self.cached, self.log, self.held = True, [], []
        monkeypatch.setattr("blockvit.clocks.time.perf_counter", lambda: self.host)

    def run(self, seconds: float) -> None:
        self.device_time = max(self.device_time, self.host) + seconds

    def kernel(self, warm: float, cold: float | None = None, waits: bool = False):
        def call():
            self.host += self.launch
            self.log.append("cached" if self.cached else "cold")
            self.run(warm if self.cached else cold or warm)
            self.cached = True
            if waits:
                self.synchronize()

        return call

    def event(self):
        self.run(0.0)
        return self.device_time

    def between(self, start, end):
        assert self.host >= end, "read before the device was done"
        return end - start

    def synchronize(self):
        self.host = max(self.host, self.device_time)

    def hold(self, seconds):
        self.held.append(seconds)
        self.run(seconds)

    def evict(self):
        self.host += self.launch
        self.run(30e-6)
        self.cached = False


def test_percentiles():
    timing = Timing(tuple(float(x) for x in (5, 1, 4, 2, 3, 6)))
    assert (timing.low, timing.median, timing.high) == (2.0, 3.5, 5.0)
    assert Timing((7.0,)).low == Timing((7.0,)).median == Timing((7.0,)).high == 7.0


def test_back_to_back_calls_count_from_the_first_event_to_the_last(monkeypatch):
    gpu = SimulatedGpu(monkeypatch)
    assert CudaClock(gpu).seconds(gpu.kernel(0.25), 4) == pytest.approx(1.0)
    assert gpu.log == ["cached"] * 4 and not gpu.held


def test_back_to_back_calls_count_what_the_host_needs_to_launch(monkeypatch):
    gpu = SimulatedGpu(monkeypatch, launch=50e-6)
    taken = CudaClock(gpu).seconds(gpu.kernel(10e-6), 100)
    assert taken / 100 == pytest.approx(50e-6, rel=0.02)


def test_a_cold_clock_times_the_kernel_and_neither_launch_nor_eviction(monkeypatch):
    gpu = SimulatedGpu(monkeypatch, launch=50e-6)
    clock, call = ColdCudaClock(gpu), gpu.kernel(5e-6, cold=10e-6)
    clock.seconds(call, 1)  # learns how long the host takes
    assert clock.seconds(call, 20) / 20 == pytest.approx(10e-6)
    assert set(gpu.log) == {"cold"}
    assert gpu.held[0] == 0 and gpu.held[1] >= 20 * 100e-6, "held until all is enqueued"


def test_a_first_call_that_compiles_does_not_hold_the_device_for_as_long(monkeypatch):
    gpu = SimulatedGpu(monkeypatch, launch=5.0)
    clock, call = ColdCudaClock(gpu), gpu.kernel(10e-6)
    clock.seconds(call, 1)
    gpu.launch = 50e-6
    for _ in range(3):
        taken = clock.seconds(call, 2)
    assert gpu.held[1] == ColdCudaClock.MOST, "the compilation's ten seconds are no estimate"
    assert gpu.held[3] == pytest.approx(1.5 * 2 * 100e-6, rel=0.01)
    assert taken / 2 == pytest.approx(10e-6)


def test_a_call_that_waits_for_the_device_does_not_make_the_hold_grow(monkeypatch):
    gpu = SimulatedGpu(monkeypatch, launch=10e-6)
    clock, call = ColdCudaClock(gpu), gpu.kernel(1e-3, waits=True)
    samples = [clock.seconds(call, 1) for _ in range(50)]
    assert max(gpu.held) <= 2e-3
    assert samples[-1] == pytest.approx(1e-3, rel=0.1)


def test_interleaving_on_a_simulated_gpu(monkeypatch):
    gpu = SimulatedGpu(monkeypatch, launch=20e-6)
    calls = {"fast": gpu.kernel(1e-5, cold=2e-5), "slow": gpu.kernel(3e-5, cold=6e-5)}
    effort = Effort(min_repeats=5, max_repeats=5, seconds=0, warmup=2, min_sample=1e-4)
    timings = interleave(calls, clock=ColdCudaClock(gpu), effort=effort)
    assert timings["fast"].median == pytest.approx(2e-5)
    assert timings["slow"].median == pytest.approx(6e-5)


class Spinning:
    """Time in which threads keep a core busy for ``seconds``, as an engine's workers do after a call."""

    def __init__(self, seconds: float, monkeypatch):
        self.now, self.seconds = 0.0, seconds
        for name in ("perf_counter", "process_time", "sleep"):
            monkeypatch.setattr(clocks.time, name, getattr(self, name))

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return min(self.now, self.seconds)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_sample_begins_when_the_threads_of_the_call_before_have_come_to_rest(monkeypatch):
    time, called = Spinning(0.05, monkeypatch), []

    def call():
        called.append(time.now)
        time.sleep(1e-3)

    Clock().ready(call, 1e-3)
    assert called[0] >= 0.05, "the spinning was over when a short call was made untimed ..."
    assert called[-1] - called[0] == pytest.approx(Clock.WARM, abs=2e-3), "... for a while"
    before = len(called)
    Clock().ready(lambda: (call(), time.sleep(0.1)), 0.1)
    assert len(called) == before + 1, "one that takes longer is made once"
    Clock().ready(call, 1.0)
    assert len(called) == before + 1, "a long one not at all"


def test_it_does_not_wait_for_ever(monkeypatch):
    time = Spinning(1.0, monkeypatch)
    Clock().ready(lambda: None, 1.0)
    assert time.now < 0.9


def test_clock_for():
    assert type(clock_for("cpu")) is Clock and type(clock_for("cpu", cold=True)) is Clock
    assert type(clock_for("cuda:1")) is CudaClock and clock_for("cuda:1").cuda.device == torch.device("cuda:1")
    assert type(clock_for("cuda", cold=True)) is ColdCudaClock


class Captures:
    """CUDA graphs as PyTorch 2.11 captures them: a capture that fails leaves its stream and its mode behind."""

    def __init__(self, monkeypatch):
        self.current, self.capturing, self.graphs = "own", False, 0
        for name in ("graph", "stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", self.new_graph)
        monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream("side"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(self.current))
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "current", stream.name))

    def new_graph(self):
        self.graphs += 1
        return self

    def replay(self):
        pass

    @contextmanager
    def stream(self, stream):
        yield

    @contextmanager
    def graph(self, graph):
        before, self.current, self.capturing = self.current, "capture", True
        yield  # an error leaves all as it is
        if self.graphs == 2:  # the one that is captured to end the mode
            warnings.warn("The CUDA Graph is empty", stacklevel=2)
        self.current, self.capturing = before, False


class Stream:
    def __init__(self, name):
        self.name = name

    def wait_stream(self, other):
        pass


def test_a_capture_that_fails_leaves_nothing_behind(monkeypatch):
    cuda, calls = Captures(monkeypatch), []

    def call():
        calls.append(cuda.capturing)
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="not permitted"):
            cuda_graph(call)
    assert calls == [False] * 3 + [True]
    assert (cuda.current, cuda.capturing, cuda.graphs) == ("own", False, 2)
    assert cuda_graph(lambda: "result")() == "result" and cuda.graphs == 3, "one that succeeds needs no second"


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture
def matrices():
    return torch.randn(2, 4096, 4096, device="cuda").unbind()


@pytest.mark.gpu
@pytest.mark.parametrize("cold", [False, True])
def test_cuda_clocks_wait_for_the_device(matrices, cold):
    a, b = matrices
    call, clock = (lambda: a @ b), clock_for("cuda", cold=cold)
    clock.seconds(call, 2)
    few, many = clock.seconds(call, 10), clock.seconds(call, 100)
    assert many / few == pytest.approx(10, rel=0.5)
    assert 2 * 4096**3 * 10 / few < 1e15, "faster than any GPU: the clock did not wait"


@pytest.mark.gpu
def test_hold_holds_at_least_as_long(matrices):
    cuda = Cuda(torch.device("cuda"))
    cuda.hold(1e-3)
    cuda.synchronize()
    start = cuda.event()
    cuda.hold(5e-3)
    end = cuda.event()
    cuda.synchronize()
    assert 5e-3 <= cuda.between(start, end) < 50e-3


@pytest.mark.gpu
def test_a_cold_clock_times_small_kernels_without_their_launches():
    x = torch.randn(1024, device="cuda")
    cold, warm = clock_for("cuda", cold=True), clock_for("cuda")

    def call():
        return x.add(1).add(1).add(1).add(1)

    for clock in (cold, warm):
        clock.seconds(call, 10)
    assert cold.seconds(call, 10) < 1.5 * warm.seconds(call, 10)


class Unevicted(Cuda):
    def evict(self):
        pass


@pytest.mark.gpu
def test_eviction_makes_a_cached_read_slower():
    x = torch.randn(2 << 20, device="cuda")  # 8 MB: a fraction of the L2 cache
    call = lambda: x.sum()  # noqa: E731
    cold, warm = (ColdCudaClock(kind(torch.device("cuda"))) for kind in (Cuda, Unevicted))  # alike in all else
    for clock in (cold, warm):
        clock.seconds(call, 20)
    assert min(cold.seconds(call, 20) for _ in range(5)) > 1.1 * min(warm.seconds(call, 20) for _ in range(5))


@pytest.mark.gpu
def test_a_cuda_graph_computes_anew_each_time(matrices):
    a, b = matrices
    replay = cuda_graph(lambda: a @ b)
    assert torch.equal(replay(), a @ b)
    a.normal_()
    assert torch.equal(replay(), a @ b)


CAPTURES = """
import torch
from blockvit.clocks import cuda_graph

a, b = torch.randn(2, 64, 64, device="cuda").unbind()
before = torch.cuda.current_stream()
try:
    cuda_graph(lambda: a @ b * float(b.sum()))
except RuntimeError:
    assert torch.cuda.current_stream() == before
    assert torch.randn(3, device="cuda").isfinite().all(), "random numbers are drawn outside of a graph again"
    assert torch.equal(cuda_graph(lambda: a @ b)(), a @ b)
    print("refused")
"""


@pytest.mark.gpu
def test_what_waits_for_the_device_cannot_be_captured_and_does_no_harm():
    # In a process of its own: were it to do harm, every test behind it would fail.
    process = subprocess.run([sys.executable, "-c", CAPTURES], capture_output=True, text=True, timeout=300)
    assert process.stdout == "refused\n", process.stdout + process.stderr
