"""Training: the recipes of torchvision's reference (its names too), one loop, checkpoints that resume bit for bit.

    recipe.py     the recipes, as plain values
    loop.py       fit, and what a step does
    evaluation.py loss and accuracy, every image once
    batches.py    which images a step sees, and what chance does to them
    augment.py    augmentation of small images, in batches where they lie
    optimizer.py  parameter groups, moving average
    schedule.py   learning rate and sparsity, step by step
    processes.py  one process, or several through Accelerate
    resume.py     checkpoints
    weights.py    trained weights to begin with
    launcher.py   several processes, started from a notebook
    cost.py       what a training costs, on paper
    command.py    one training as a plain command: python -m blockvit.train

All randomness of an epoch (order, augmentation, mixing, dropout) is drawn from seeds made of the recipe's seed and
the epoch's number. So a run that was killed and resumed does what an uninterrupted one does, and a checkpoint, written
after each epoch, needs no generator states.
"""

from ..extras import of_the_study

with of_the_study():
    from .batches import epoch_order
    from .cost import days_on_nodes, grid_cost
    from .evaluation import evaluate
    from .launcher import launch
    from .loop import History, NonFiniteLossError, fit
    from .optimizer import ema_decay, parameter_groups
    from .recipe import RECIPES, Recipe, recipe_for
    from .resume import CheckpointError
    from .schedule import learning_rate, sparsity_share

__all__ = [
    "RECIPES",
    "CheckpointError",
    "History",
    "NonFiniteLossError",
    "Recipe",
    "days_on_nodes",
    "ema_decay",
    "epoch_order",
    "evaluate",
    "fit",
    "grid_cost",
    "launch",
    "learning_rate",
    "parameter_groups",
    "recipe_for",
    "sparsity_share",
]
