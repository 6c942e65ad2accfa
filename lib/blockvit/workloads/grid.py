"""Which cells of a whole model are measured, and in which order: a budget may end a sweep at any of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ..answers import AT
from ..convert import DENSE_BLOCK_SIZE
from ..headline import CASES
from .variants import DENSE_TOO
from .vit import UNPRUNED, ModelCase

SLOW_MODES = frozenset({"max-autotune", "max-autotune-no-cudagraphs"})
"""Ways to compile that take minutes. A group's rows are written together, so the first groups do without them."""


@dataclass(frozen=True, kw_only=True)
class ModelGrid:
    """The cells of one model, by sparsity, batch size and way to run, and of a larger one.

    Attributes:
        model: see ``models.names``.
        scopes: what is sparse (``vit.SCOPES``); the first is measured first.
        precisions, block_sizes, sparsities: of which each combination is measured at ``batch_size``.
        batch_size: of the sweep over sparsities.
        batch_sizes: further ones, at 90%.
        backends: through which every cell is measured; ``"2:4"`` is 2:4 sparsity, at the largest blocks.
        contenders: further ones, with the MLP at 90% and ``batch_size`` only.
        dense_modes: ways to run the dense model besides eager.
        sparse_modes: ways to run dense and sparse models besides eager, at 90% and the largest blocks.
        batch_modes: as ``sparse_modes``, at every one of ``batch_sizes``.
        large_model: measured in the first precision at ``batch_size``, the largest blocks and ``large_sparsities``.
    """

    model: str
    scopes: Sequence[str]
    precisions: Sequence[str]
    block_sizes: Sequence[int]
    sparsities: Sequence[float]
    batch_size: int
    batch_sizes: Sequence[int] = ()
    backends: Sequence[str] = ()
    contenders: Sequence[str] = ()
    dense_modes: Sequence[str] = ()
    sparse_modes: Sequence[str] = ()
    batch_modes: Sequence[str] = ()
    large_model: str | None = None
    large_sparsities: Sequence[float] = ()

    def cases(self) -> list[ModelCase]:
        """The cells in the order of importance, each once."""
        return list(dict.fromkeys(self._cases()))

    def _cases(self) -> Iterator[ModelCase]:
        cells, largest = list(product(self.precisions, self.block_sizes)), max(self.block_sizes)
        graphs, sparse_modes = tuple(self.batch_modes), tuple(self.sparse_modes)
        first, *others = self.scopes
        if SLOW_MODES & set(self.dense_modes):
            quick = tuple(mode for mode in self.dense_modes if mode not in SLOW_MODES)
            for cell in cells:
                yield replace(self._case(first, self.sparsities[0], *cell), dense_modes=quick)
        for sparsity, cell in product(self.sparsities, cells):
            yield self._case(first, sparsity, *cell)
        for batch, cell in product(self.batch_sizes, cells):
            yield replace(self._case("mlp", AT, *cell, batch), dense_modes=graphs, sparse_modes=graphs)
        for precision in self.precisions if sparse_modes else ():
            ways = tuple(dict.fromkeys([*self.dense_modes, *sparse_modes]))
            yield replace(self._case("mlp", AT, precision, largest), dense_modes=ways, sparse_modes=sparse_modes)
        for scope, sparsity, cell in product(others, self.sparsities, cells):
            yield self._case(scope, sparsity, *cell)
        for sparsity in self.large_sparsities if self.large_model else ():
            case = self._case("mlp", sparsity, self.precisions[0], largest)
            yield replace(case, model=self.large_model, sparse_modes=sparse_modes)

    def _case(
        self, scope: str, sparsity: float, precision: str, block_size: int, batch_size: int | None = None
    ) -> ModelCase:
        batch_size = self.batch_size if batch_size is None else batch_size
        everything = scope == "mlp" and sparsity == AT and batch_size == self.batch_size
        chosen = [*self.backends, *(self.contenders if everything else [])]
        return ModelCase(
            self.model,
            scope,
            batch_size,
            block_size,
            sparsity,
            precision,
            backends=tuple(backend for backend in chosen if backend != "2:4"),
            dense_modes=tuple(self.dense_modes),
            semi_structured="2:4" in chosen and block_size == max(self.block_sizes),
            memory=everything,
        )


@dataclass(frozen=True, kw_only=True)
class DeviceGrid:
    """The cells of one model on one device, most of them one image at a time, and of a small model.

    Attributes:
        model: see ``models.names``.
        small_model: likewise; one image, at 90% and the first block size.
        scopes: what is sparse (``vit.SCOPES``).
        precision: the class of all of them.
        block_sizes: with ``sparsities``, of which each combination is measured with one image.
        sparsities: see ``block_sizes``.
        batch_sizes: further ones, at 90% and the first block size, beside the engines that need no compilation.
        backends: through which every cell is measured.
        engines: ways to run the dense model besides eager.
        sparse_modes: ways to run the sparse ones besides eager: one image, in the cells that README tells of
            (``headline.CASES``), at 90% in the first block size, and of the model that is not pruned.
        samples: of the distribution of latencies: one image, the last scope at 90% in the first block size.
    """

    model: str
    small_model: str
    scopes: Sequence[str]
    precision: str
    block_sizes: Sequence[int]
    sparsities: Sequence[float]
    batch_sizes: Sequence[int] = ()
    backends: Sequence[str] = ()
    engines: Sequence[str] = ()
    sparse_modes: Sequence[str] = ()
    samples: int = 0

    def cases(self) -> list[ModelCase]:
        """The cells in the order of importance, each once: what README tells of comes first.

        Before the rest of the grid stands the dense model wholly on our kernels: it tells what of a speedup is
        theirs and what that of sparsity.
        """
        grid = [(scope, s, block) for s, scope, block in product(self.sparsities, self.scopes, self.block_sizes)]
        *others, sampled = self._at_90()
        told = dict.fromkeys([sampled, *(cell for cell in CASES if cell in grid), *others])
        first = [self._case(*cell, samples=self.samples if cell == sampled else 0, compiled=True) for cell in told]
        rest = [self._case(*cell) for cell in grid if cell not in told]
        small = [replace(self._case(*cell, compiled=True), model=self.small_model) for cell in self._at_90()]
        batches = [self._lasting(*cell, batch) for batch in self.batch_sizes for cell in self._at_90()]
        return [*first, *self._unpruned(), *rest, *small, *batches]

    def at_90(self) -> list[ModelCase]:
        """One image at 90% and the first block size, beside the engines that need no compilation."""
        return [self._lasting(*cell, 1) for cell in self._at_90()]

    def _at_90(self) -> list[tuple[str, float, int]]:
        return [(scope, AT, self.block_sizes[0]) for scope in self.scopes]

    def _unpruned(self) -> list[ModelCase]:
        backends = tuple(name for name in self.backends if name.endswith(DENSE_TOO))
        case = self._case(UNPRUNED, 0.0, DENSE_BLOCK_SIZE, compiled=True)
        return [replace(case, backends=backends, memory=True)] if backends else []

    def _lasting(self, scope: str, sparsity: float, block_size: int, batch_size: int) -> ModelCase:
        engines = tuple(engine for engine in self.engines if engine != "compile")
        case = replace(self._case(scope, sparsity, block_size), batch_size=batch_size, dense_modes=engines)
        return replace(case, memory=batch_size == 1)

    def _case(
        self, scope: str, sparsity: float, block_size: int, *, samples: int = 0, compiled: bool = False
    ) -> ModelCase:
        return ModelCase(
            self.model,
            scope,
            1,
            block_size,
            sparsity,
            self.precision,
            tuple(self.backends),
            dense_modes=tuple(self.engines),
            sparse_modes=tuple(self.sparse_modes) if compiled else (),
            memory=sparsity == AT,
            tails=samples,
        )
