"""Files that are there whole or not at all.

What is written goes to a temporary file beside the target, to the disk, and only then to its name. A reader, and a
run that resumes, sees the old content or the new, whatever happened in between: an exception, a kill, a full disk.
"""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_full(error: OSError) -> bool:
    """Whether something was not written for want of room: a full disk, a quota, a limit on the size of files."""
    return error.errno in _NO_ROOM


def write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Replace ``path`` by a file of ``content``; text as UTF-8. See ``replacing``."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path, size=len(data)) as file:
        file.write(data)


def save_atomically(state: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save`` as a whole file; see ``replacing``."""
    import torch  # here, because tables and figures write files too, and need none of it

    handled_already = sys.exception()
    with replacing(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch covers a failed write with a failed check of its own
            if isinstance(error.__context__, OSError) and error.__context__ is not handled_already:
                raise error.__context__ from error
            raise


@contextmanager
def replacing(path: str | os.PathLike[str], *, size: int | None = None) -> Iterator[BinaryIO]:
    """A file to write into, which takes the name ``path`` when the block ends without an exception.

    Folders on the way are made. A file that was there keeps its permissions; a new one has those of any new file. A
    link stays one: what it points to is replaced.

    Args:
        path: where the file goes.
        size: how many bytes will be written, if that is known, for the message of a full disk.

    Raises:
        OSError: the file cannot be written, of the kind that the system reported (``PermissionError``, ...). The
            message says what was needed, what is free, and what to do; ``path`` is as it was.
    """
    path = Path(path)
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")  # mkstemp's only their owner could read
    written, free = 0, None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("xb") as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
            finally:
                written, free = os.fstat(file.fileno()).st_size, shutil.disk_usage(path.parent).free
        with suppress(FileNotFoundError):
            unfinished.chmod(path.stat().st_mode)
        unfinished.replace(path)
    except OSError as error:
        about_this_file = error.filename is None or Path(str(error.filename)) in (unfinished, *unfinished.parents)
        if error.errno is None or not about_this_file:
            raise
        raise OSError(error.errno, _message(path, error, size, written, free)) from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


class _Enough(Exception):
    pass


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise ``OSError`` as ``replacing`` would, before there is anything to write; folders on the way are made."""
    if Path(path).is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{path} is a folder; name a file in it")
    with suppress(_Enough), replacing(path):
        raise _Enough


@contextmanager
def locked(path: str | os.PathLike[str], *, shared: bool = False, wait: bool = True) -> Iterator[io.FileIO | None]:
    """Hold a file or a folder against every other process that asks for it here; gives the file, open and unbuffered.

    The system lets go of it when the block or the process ends, however it ends. Where a system has no such locks
    (Windows) nothing is held, and what is done within is as safe as it is by itself.

    Args:
        path: a folder; or a file, which is made if there is none, open to be read and appended to.
        shared: hold it beside others who only read; the file, which must be there, is open to be read.
        wait: until nobody else holds it.

    Raises:
        BlockingIOError: somebody else holds it, and ``wait`` is False.
        OSError: the file cannot be opened, or its disk has no locks, as some network disks.
    """
    path = Path(path)
    try:
        import fcntl
    except ImportError:
        fcntl = None
    with ExitStack() as held:
        file = None if path.is_dir() else held.enter_context(path.open("rb" if shared else "a+b", buffering=0))
        if fcntl is not None:
            descriptor = os.open(path, os.O_RDONLY) if file is None else file.fileno()
            if file is None:
                held.callback(os.close, descriptor)
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
        yield file


def check_file(path: Path, remedy: str) -> None:
    """Raise ``FileNotFoundError`` or ``IsADirectoryError``, with what to do, if ``path`` is no file to be read."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file; {remedy}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {remedy}")


def slug(device: str) -> str:
    """A device's name as a file name: ``NVIDIA H100 80GB HBM3`` -> ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _message(path: Path, error: OSError, size: int | None, written: int, free: int | None) -> str:
    kept = "what was there before is unchanged" if path.exists() else "nothing of it was left behind"
    what = f"{error.strerror}: {path} was not written, {kept}"
    if not is_full(error):
        return f"{what}; name a file in a folder that can be written"
    needed = f"{size:,} bytes" if size is not None else f"more than the {written:,} bytes that were taken"
    return (
        f"{what}. It needs {needed}" + ("" if free is None else f", {free:,} are free there") + "; free some space, "
        "raise the quota or the limit on file sizes, or write to another disk"
    )
