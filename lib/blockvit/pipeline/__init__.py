"""The study in one call: runs the notebooks in order and writes their outputs and one report.

``python -m blockvit.pipeline --profile gpu`` executes ``notebooks/NN_*.ipynb`` by name. A notebook's own defaults are
the laptop profile; ``notebooks/profiles/<profile>.yaml`` and then the command line override them. Executed copies and
``report.html`` go to ``build/<profile>/``. Measured rows are kept by the library: a rerun measures what is missing.
A profile may have tests run first: what computes wrongly is not worth timing.

A run holds a lock on its profile's build folder. Two runs of one profile would write the same copies and, worse, time
the same rows on one machine at once; the second is refused and loses nothing by waiting.

- ``profiles``: what to run, with which parameters. ``checks``: what must be so before. ``run``: doing it.
- ``readme``: the sections that are written from the tables. ``progress``, ``errors``, ``command``: what is seen of it.
"""

from ..notebook import NotebookError, PublishError
from .checks import run_tests
from .command import main
from .errors import BusyError, FailedTestsError, MissingDeviceError, UsageError
from .profiles import Profile, find_notebooks, plan, read_profile
from .readme import refresh_readme
from .run import reproduce

__all__ = [
    "BusyError",
    "FailedTestsError",
    "MissingDeviceError",
    "NotebookError",
    "Profile",
    "PublishError",
    "UsageError",
    "find_notebooks",
    "main",
    "plan",
    "read_profile",
    "refresh_readme",
    "reproduce",
    "run_tests",
]
