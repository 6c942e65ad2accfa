"""What the tables say, in sentences and small tables: the notebooks' answers, computed. No torch, no drawing.

- ``rows``: which rows of the tables they are about.
- ``trainings`` (of notebook 1), ``folding`` (2), ``speed`` (3, 4, 7), ``trade`` (5), ``decided`` (6): what they say.
"""

from ..comparisons import beside_most_engines, where
from .decided import claims_list, goals_by_device
from .folding import conversion
from .rows import AT, by_threads, timed_alone, timed_together, with_dense, with_speed
from .speed import (
    batch_line,
    break_even_text,
    break_evens,
    linear,
    linear_summary,
    memory_line,
    model_summary,
    model_table,
    on_device,
    whole_model,
)
from .trade import accuracy, accuracy_lost, learning, missing_variants, trade_text
from .trainings import (
    NO_THIRD_SPLIT,
    accuracy_text,
    kept_by_row,
    masks_text,
    recipe_in_force,
    short_names,
    step_text,
    training,
)

__all__ = [
    "AT",
    "NO_THIRD_SPLIT",
    "accuracy",
    "accuracy_lost",
    "accuracy_text",
    "batch_line",
    "beside_most_engines",
    "break_even_text",
    "break_evens",
    "by_threads",
    "claims_list",
    "conversion",
    "goals_by_device",
    "kept_by_row",
    "learning",
    "linear",
    "linear_summary",
    "masks_text",
    "memory_line",
    "missing_variants",
    "model_summary",
    "model_table",
    "on_device",
    "recipe_in_force",
    "short_names",
    "step_text",
    "timed_alone",
    "timed_together",
    "trade_text",
    "training",
    "where",
    "whole_model",
    "with_dense",
    "with_speed",
]
