"""Block-sparse linear kernels: a backend per file, one registry, one contract.

To add a backend, write a module here with a subclass of ``registry.Backend``, decorate it with ``@register``, and
import it below. ``cpu_attention`` is no backend: it multiplies no weight.
"""

# Each registers itself.
from . import blksprs_bsr, cpu, dense, gather, torch_bsr, torch_tuned, torchao_bsr, triton  # noqa: F401
from .registry import ACTIVATIONS, Backend, BackendUnavailableError, backends, named, register, resolve

__all__ = ["ACTIVATIONS", "Backend", "BackendUnavailableError", "backends", "named", "register", "resolve"]
