"""The processes that train one model together: one alone, or several through Hugging Face Accelerate.

``accelerate launch`` and ``accelerate.notebook_launcher`` start the processes and set ``WORLD_SIZE`` and ``RANK`` in
each; ``join`` reads them. A single process needs no Accelerate.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Result = TypeVar("Result")

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others before it ends with an error. Where a launcher watches over the processes, it
ends all of them seconds after one has died; this is for a whole node that is lost, or a process that hangs."""


class Alone:
    """The only process."""

    rank = 0
    count = 1
    is_main = True

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    def parallel(self, model: nn.Module) -> nn.Module:
        """``model``, whose backward pass averages the gradients over the processes."""
        return model

    def unsynchronized(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Backward passes of a ``parallel`` model in here only accumulate; the next one outside averages."""
        return nullcontext()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of each process's ``tensor``."""
        return tensor

    def on_main(self, work: Callable[[], Result]) -> Result:
        """What ``work()`` returns in the main process, the only one that calls it; its error is raised in every one."""
        return work()

    def main_first(self) -> AbstractContextManager[Any]:
        """A block that the first process of each node runs before the others do: for downloads and caches."""
        return nullcontext()

    def leave(self) -> None:
        """Part from the others, at the end of a program that trains no more."""


class Together(Alone):
    """One of several processes. Gradients, sums and objects travel through Accelerate (NCCL on GPUs, gloo on CPUs)."""

    def __init__(self, device: torch.device | str) -> None:
        try:
            from accelerate import Accelerator
            from accelerate.utils import InitProcessGroupKwargs
        except ImportError as error:
            raise ImportError(
                f"WORLD_SIZE is {os.environ.get('WORLD_SIZE')}, but Accelerate, which training in several processes "
                "stands on, cannot be imported; pip install accelerate, or start a single process"
            ) from error
        # The recipe says what is computed in which precision; Accelerate's own autocast would come on top.
        self._accelerator = Accelerator(
            cpu=torch.device(device).type == "cpu",
            mixed_precision="no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
        )
        self.device = self._accelerator.device
        self.rank = self._accelerator.process_index
        self.count = self._accelerator.num_processes
        self.is_main = self._accelerator.is_main_process
        if torch.device(device).type != self.device.type:
            raise ValueError(
                f"device is {device!s}, but this process already trains on {self.device}; use one kind of device for "
                "all that a process trains"
            )

    def parallel(self, model: nn.Module) -> nn.Module:  # noqa: D102 (as in Alone)
        return self._accelerator.prepare_model(model)

    def unsynchronized(self, model: nn.Module) -> AbstractContextManager[Any]:  # noqa: D102
        return self._accelerator.no_sync(model)

    def sum(self, tensor: Tensor) -> Tensor:  # noqa: D102
        return self._accelerator.reduce(tensor, reduction="sum")

    def on_main(self, work: Callable[[], Result]) -> Result:  # noqa: D102
        from accelerate.utils import broadcast_object_list

        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        result, error = broadcast_object_list(outcome)
        if error is not None:
            raise error
        return result

    def main_first(self) -> AbstractContextManager[Any]:  # noqa: D102
        return self._accelerator.local_main_process_first()

    def leave(self) -> None:  # noqa: D102
        self._accelerator.end_training()


def join(device: torch.device | str) -> Alone:
    """This process's place among those that were started with it; on ``device``, or its own of several GPUs.

    Raises:
        ImportError: there are several processes, and Accelerate is not installed.
        ValueError: ``device`` is of another kind than before in this process.
    """
    return Together(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Alone(device)
