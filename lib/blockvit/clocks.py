"""How a call is timed: by the monotonic clock on a CPU, by events of the device on a GPU."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch


@dataclass(frozen=True)
class Timing:
    """Seconds a call, from ``len(samples)`` samples."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The 50th percentile, in seconds."""
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        """The 20th percentile, in seconds."""
        return float(np.quantile(self.samples, 0.2))

    @property
    def high(self) -> float:
        """The 80th percentile, in seconds."""
        return float(np.quantile(self.samples, 0.8))


class Clock:
    """Times calls on a CPU by the monotonic clock."""

    SETTLED, LOOK, LOOKS = 0.2, 2e-3, 75
    """Share of one core below which this process counts as idle, seconds of a look at it, and how many at most."""

    WARM, LONG = 0.03, 0.5
    """Seconds. Before a sample the call is repeated untimed for ``WARM``, at least once; calls of ``LONG`` are not."""

    def ready(self, call: Callable[[], Any], estimate: float) -> None:
        """Undo what the call before has left behind: threads that spin on a core, and threads that sleep.

        After a call ONNX Runtime's threads spin for 50 ms and OpenMP's for 10, in the way of what comes next: measured
        in turn with ONNX Runtime, a linear layer took 1.5 times as long. And a call would be charged with waking its
        own threads, two of which may find themselves on one core for some time slices. From 768 to 3072 features, 90%
        sparse and timed in turn with two engines, the median of 15 samples was 0.6 to 1.2 ms after 20 or 50 ms of
        warm-up, and 1.1 and 4.5 ms after a single call; a sparse ViT-B/16 of 52 ms took up to 132 ms in every fifth
        call, and 58 ms after an untimed one.
        """
        for _ in range(self.LOOKS):
            spent = time.process_time()
            time.sleep(self.LOOK)
            if time.process_time() - spent < self.SETTLED * self.LOOK:
                break
        if estimate >= self.LONG:
            return
        end = time.perf_counter() + self.WARM
        while True:
            call()
            if time.perf_counter() >= end:
                break

    def seconds(self, call: Callable[[], Any], repeats: int) -> float:
        """Seconds that ``repeats`` calls took in all."""
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return time.perf_counter() - start


class Cuda:
    """The little that the clocks ask of a GPU: the seam at which a test puts a simulated device."""

    CYCLES_A_SECOND = 2.0e9
    """Above the clock of the NVIDIA GPUs there are, so that ``hold`` never ends early; longer does no harm."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._scratch: torch.Tensor | None = None

    def event(self) -> torch.cuda.Event:
        """Record an event on the current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Seconds between two events; both must have happened."""
        return start.elapsed_time(end) / 1e3

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        torch.cuda.synchronize(self.device)

    def hold(self, seconds: float) -> None:
        """Let the current stream idle for ``seconds`` or a little more, without the host waiting for it."""
        with torch.cuda.device(self.device):  # it takes the current one's stream
            torch.cuda._sleep(int(seconds * self.CYCLES_A_SECOND))

    def evict(self) -> None:
        """Push everything else out of the L2 cache: write twice its size."""
        if self._scratch is None:
            size = 2 * torch.cuda.get_device_properties(self.device).L2_cache_size
            self._scratch = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._scratch.zero_()


class CudaClock(Clock):
    """Times calls on a GPU back to back, as a program makes them: what the host needs to launch them counts."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def ready(self, call: Callable[[], Any], estimate: float) -> None:
        """Nothing to undo: the device is idle between two samples."""

    def seconds(self, call: Callable[[], Any], repeats: int) -> float:
        """Seconds between an event before the first and one behind the last of ``repeats`` calls."""
        self.cuda.synchronize()
        start = self.cuda.event()
        for _ in range(repeats):
            call()
        end = self.cuda.event()
        self.cuda.synchronize()
        return self.cuda.between(start, end)


class ColdCudaClock(CudaClock):
    """Times a GPU's kernels alone: each call finds the L2 cache without its operands, and no gap of the host in it.

    The device is held until the host has enqueued all calls of a sample, as NVBench does; the cache is emptied before
    each call, as ``triton.testing.do_bench`` does. A call that waits for the device itself cannot be enqueued ahead;
    its time then holds the wait, which it would cost anywhere.
    """

    MOST = 0.02
    """Seconds that the device is held at most: a first call, which compiles, takes the host longer than any later."""

    def __init__(self, cuda: Cuda) -> None:
        super().__init__(cuda)
        self._host_seconds: WeakKeyDictionary[Callable, float] = WeakKeyDictionary()  # least seen a call

    def seconds(self, call: Callable[[], Any], repeats: int) -> float:
        """Seconds that the device spent on ``repeats`` calls, without what emptied the cache."""
        known = self._host_seconds.get(call, 0.0)
        self.cuda.synchronize()
        self.cuda.hold(min(1.5 * known * repeats, self.MOST))
        began = time.perf_counter()
        pairs = []
        for _ in range(repeats):
            self.cuda.evict()
            start = self.cuda.event()
            call()
            pairs.append((start, self.cuda.event()))
        host = (time.perf_counter() - began) / repeats
        self.cuda.synchronize()
        self._host_seconds[call] = min(host, known or host)
        return sum(self.cuda.between(*pair) for pair in pairs)


def clock_for(device: torch.device | str, *, cold: bool = False) -> Clock:
    """The clock that times work on ``device``; ``cold`` for kernels alone, their operands not cached (GPU only)."""
    device = torch.device(device)
    if device.type != "cuda":
        return Clock()
    return (ColdCudaClock if cold else CudaClock)(Cuda(device))


def cuda_graph(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Capture ``call`` into a CUDA graph; returns what replays it and gives its result, in the same memory each time.

    Raises:
        RuntimeError: the call waits for the device or allocates in a way that cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is allocated or compiled at first must not be captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            result = call()
    except BaseException:
        # PyTorch 2.11 leaves its stream the current one and the random numbers' generator capturing, for good.
        torch.cuda.set_stream(before)
        with warnings.catch_warnings(), torch.cuda.graph(torch.cuda.CUDAGraph()):
            warnings.simplefilter("ignore")  # of an empty graph; that its capture succeeds sets the generator right
        raise

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    replay.call = call  # what it holds, weights and inputs, is the memory that the graph reads
    return replay
