"""Independent cells of an experiment on several cores: one process a core, one thread each.

Small models are bound by overhead: four processes with one thread each do about four times the work of one process
with four threads.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import wait
from typing import Any, TypeVar

from .machine import usable_cores

Cell = TypeVar("Cell")
Result = TypeVar("Result")


class CellError(RuntimeError):
    """A cell failed; ``cell`` says which, ``__cause__`` holds the worker's exception with its traceback."""

    def __init__(self, message: str, cell: Any = None) -> None:
        super().__init__(message)
        self.cell = cell


def map_cells(
    fn: Callable[[Cell], Result], cells: Iterable[Cell], workers: int | None = None
) -> Iterator[tuple[Cell, Result]]:
    """Run ``fn(cell)`` for every cell in parallel processes; yield ``(cell, result)`` as they finish.

    Cells start in the given order. When a cell fails, on Ctrl-C, and when the caller stops iterating, the workers are
    killed at once: what a cell must not lose, it saves itself (``train.fit`` does, each epoch). Workers also end when
    this process does, however it ends.

    Args:
        fn: a function that a fresh process can import (spawned, so that CUDA and threads are safe): one from a module,
            or a ``functools.partial`` of one. A function defined in a notebook cannot be found there.
        cells: picklable arguments.
        workers: number of processes, at least 1; by default one for each core this process may use.

    Raises:
        ValueError: ``fn`` cannot be imported by a worker, or ``workers`` is less than 1.
        CellError: a cell raised (the message names the cell, the cause is chained), or a worker was killed.
    """
    check_importable(fn)
    cells = list(cells)
    workers = usable_cores() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers is {workers}; expected at least 1, or None for one a core")
    return _run(fn, cells, min(workers, len(cells))) if cells else iter(())


def _run(fn: Callable[[Cell], Result], cells: list[Cell], workers: int) -> Iterator[tuple[Cell, Result]]:
    others, mine = set(mp.active_children()), set()
    pool = ProcessPoolExecutor(workers, mp_context=mp.get_context("spawn"), initializer=_start_worker)
    try:
        futures = {pool.submit(fn, cell): cell for cell in cells}
        mine = set(mp.active_children()) - others  # later the caller may start processes of its own
        for future in as_completed(futures):
            yield futures[future], _result(future, futures)
    except BaseException:
        for child in mine:
            child.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _result(future: Future[Result], cells: dict[Future[Result], Any]) -> Result:
    try:
        return future.result()
    except BrokenProcessPool as error:
        # Every cell that had not finished gets this error, so it does not tell whose worker died.
        lost = [cell for other, cell in cells.items() if isinstance(other.exception(), BrokenProcessPool)]
        raise CellError(
            f"a worker process was killed (out of memory?) or could not start; unfinished: {lost}. Run with fewer "
            "workers; a script that calls map_cells needs its `if __name__ == '__main__':`"
        ) from error
    except Exception as error:
        raise CellError(f"cell {cells[future]!r} failed: {type(error).__name__}: {error}", cells[future]) from error


def check_importable(fn: Callable[..., Any]) -> None:
    """Raise ``ValueError`` if a fresh process cannot import ``fn``."""
    inner = fn.func if isinstance(fn, partial) else fn
    place = f"{getattr(inner, '__module__', None)}.{getattr(inner, '__qualname__', inner)}"
    if place.startswith("__main__.") or "<locals>" in place or "<lambda>" in place:
        raise ValueError(
            f"{place} cannot be imported by a worker process; expected a function at the top level of a module: "
            "move it into one (not a notebook cell, lambda or inner function)"
        )


def _start_worker() -> None:
    # Ctrl-C reaches the whole process group: the parent decides, the workers print no tracebacks of their own.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _exit_with_parent() -> None:
    parent = mp.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
