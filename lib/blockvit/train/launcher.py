"""Several training processes started from a notebook or a script, by Accelerate's ``notebook_launcher``."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

from ..parallel import check_importable, map_cells


def launch(function: Callable[..., Any], *arguments: Any, num_processes: int) -> None:
    """Call ``function(*arguments)`` in ``num_processes`` processes of this machine, for ``fit`` to train in together.

    They start from a fresh process, so this one may have used the GPU and threads before (``notebook_launcher`` alone
    forks the notebook's own process, and then CUDA does not work). Nothing is returned: let ``function`` give ``fit`` a
    checkpoint; the same ``fit`` in this process then finds all epochs done and loads them. For several machines, use
    ``accelerate launch``.

    Args:
        function: one that a fresh process can import, from a module.
        arguments: picklable.
        num_processes: one a GPU.

    Raises:
        ValueError: ``function`` cannot be imported there, or ``num_processes`` is less than 1.
        parallel.CellError: a process failed or was killed, and so all were ended.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes is {num_processes}; expected at least 1")
    check_importable(function)
    for _ in map_cells(partial(_notebook_launcher, num_processes=num_processes), [(function, arguments)], workers=1):
        pass


def _notebook_launcher(cell: tuple[Callable[..., Any], tuple[Any, ...]], num_processes: int) -> None:
    from accelerate import notebook_launcher

    try:
        notebook_launcher(_trained, cell, num_processes=num_processes, use_port=str(_free_port()))
    except Exception as error:  # torch's own cannot be pickled
        raise RuntimeError(f"training in {num_processes} processes failed: {error}") from None


def _trained(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # The launching process ignores SIGINT; these get it when that one dies, and must then end.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    function(*arguments)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
