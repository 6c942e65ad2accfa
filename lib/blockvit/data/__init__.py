"""Image classification data: scikit-learn's digits, CIFAR-10, and any ImageFolder (ImageNet).

Every split yields uint8 images; training augments and normalises them in batches, where they lie. Small images are
held in memory as one tensor (``ImageTensors``), large ones are decoded as they are needed (``ImageFiles``).

An image that cannot be decoded stops nothing and is never passed over in silence. From memory it is left out, with a
warning when the set is loaded. From files, training takes the next one in the list instead, nearly always of the same
class, so that batches stay full; evaluation gets it with the label ``DAMAGED``, to count it neither right nor wrong.
``damage_report`` tells which they were.
"""

from .images import DAMAGED, ImageFiles, Images, ImageTensors, damage_report, normalize, warn_of_damage
from .sets import NAMES, DataSplits, evaluation, label, load
from .transforms import eval_transform, train_transform

__all__ = [
    "DAMAGED",
    "NAMES",
    "DataSplits",
    "ImageFiles",
    "ImageTensors",
    "Images",
    "damage_report",
    "eval_transform",
    "evaluation",
    "label",
    "load",
    "normalize",
    "train_transform",
    "warn_of_damage",
]
