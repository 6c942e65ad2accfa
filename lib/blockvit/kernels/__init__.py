"""Block-sparse linear kernels: a backend per file, one registry, one contract.

To add a backend, write a module here with a subclass of ``registry.Backend``, decorate it with ``@register``, and
import it below.
"""

from . import cpu, dense, gather, torch_bsr  # noqa: F401  (importing a backend registers it)
from .registry import ACTIVATIONS, Backend, BackendUnavailableError, backends, register, resolve

__all__ = ["ACTIVATIONS", "Backend", "BackendUnavailableError", "backends", "register", "resolve"]
