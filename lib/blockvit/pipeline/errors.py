"""Why a run does not begin or end well, and the exit code of each reason."""

from __future__ import annotations

from ..notebook import NotebookError, PublishError


class UsageError(ValueError):
    """A profile, notebook or parameter that does not exist or does not fit."""


class MissingDeviceError(RuntimeError):
    """The profile requires a device that this machine lacks."""


class BusyError(RuntimeError):
    """Another run of the same profile is under way."""


class FailedTestsError(RuntimeError):
    """The tests that the profile names did not pass."""


EXIT_CODES = {
    NotebookError: 1,
    PublishError: 1,
    FailedTestsError: 1,
    UsageError: 2,
    MissingDeviceError: 3,
    BusyError: 4,
}
