"""Parameters of our fused MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels import resolve
from ..kernels.triton import packing, parameters
from .cases import Case, expected, held_to, make_operands
from .search import REP_MS, WARMUP_MS, Found, descend, in_time, timed
from .triton_linear import neighbours

CHOICES = {
    "BLOCK_M": (32, 64, 128, 256),
    "PROGRAMS": (1, 2, 3, 4),
    "num_warps": (4, 8, 16),
    "num_stages": (2, 3, 4, 5),
}
"""What may be chosen, what is expected to matter most first."""


def find(case: Case, device: torch.device) -> Found | None:
    """Parameters of our fused MLP: its first layer is that of the case, its second leads back. None if none work.

    Its default is not to be used: ``default_ms`` is the time of the layers one by one, with what was tuned for them.
    """
    from ..kernels.triton import mlp

    backend = resolve(parameters.LINEAR, device, case.dtype, case.block_size)
    x, first, bias1 = make_operands(case, device)
    _, second, bias2 = make_operands(
        replace(case, out_features=case.in_features, in_features=case.out_features), device
    )
    weights = [backend.pack(matrix) for matrix in (first, second)]
    packed = [packing.Packed(*map(weight.get, ("crow", "col", "values", "rows"))) for weight in weights]
    height = max(p.values.shape[1] for p in packed)
    precision, shared = parameters.precision(case.dtype), parameters.resources(device)["shared"]
    schedules = mlp.schedules(*packed)

    def fused(candidate: Mapping[str, int]) -> Tensor:
        return mlp.launch(
            x,
            schedules[0],
            packed[0].values,
            bias1,
            schedules[1],
            packed[1].values,
            bias2,
            sizes=(first.padded_shape[0], second.padded_shape[0]),
            activations=("gelu", None),
            precision=precision,
            parameters=candidate,
        )

    def one_by_one() -> Tensor:
        return backend.linear(backend.linear(x, weights[0], bias1, "gelu"), weights[1], bias2, None)

    wanted, precision_held = expected(x, [(first, bias1, "gelu"), (second, bias2, None)]), held_to(case.dtype)
    itemsize = case.dtype.itemsize
    best = descend(
        mlp.default_parameters(height, itemsize, shared),
        lambda candidate: (n for n in neighbours(candidate, CHOICES) if mlp.fits(n, height, itemsize, shared)),
        in_time(
            lambda candidate: timed(lambda: fused(candidate), wanted, precision_held, warmup=WARMUP_MS, rep=REP_MS)
        ),
    )
    if best is None:
        return None
    ms = timed(lambda: fused(best), wanted, precision_held)  # once more: a race shows only sometimes
    return None if ms is None else Found(best, ms, timed(one_by_one, wanted, precision_held))
