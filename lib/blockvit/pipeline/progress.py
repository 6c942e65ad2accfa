"""How far a run is, for a terminal or a log."""

from __future__ import annotations

import threading
import time
from typing import TextIO


class Progress:
    """Elapsed time of one step, and its cell: a living line on a terminal, else a line now and then for the log.

    ``note``, where it is set, is shown at the end.
    """

    def __init__(self, label: str, output: TextIO, cells: int | None = None) -> None:
        self._label, self._cells, self._output = label, cells, output
        self.note = ""
        self._live = output.isatty()
        self._number = 0
        self._begin = time.monotonic()
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Progress:
        self._show("")
        self._ticker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._ticker.join()
        self._show("stopped" if kind else "done", last=True)

    def cell(self, number: int) -> None:
        """Note that a cell has started."""
        self._number = number
        if self._live:
            self._show("")

    def _tick(self) -> None:
        while not self._ended.wait(1 if self._live else 60):
            self._show("")

    def _show(self, state: str, *, last: bool = False) -> None:
        seconds = round(time.monotonic() - self._begin)
        elapsed = f"{seconds // 60}:{seconds % 60:02}"
        cell = "" if self._cells is None else f"cell {self._number}/{self._cells}"
        line = "  ".join(part for part in (self._label, cell, elapsed, state, self.note) if part)
        self._output.write(f"\r\x1b[2K{line}" + "\n" * last if self._live else f"{line}\n")
        self._output.flush()
