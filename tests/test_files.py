"""Whole files or none: what a failure, a full disk or a kill on the way leaves behind."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from blockvit import files


@contextmanager
def room_for(size: int):
    """No file may grow beyond ``size`` bytes: the system refuses in mid-write, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_whether_a_file_can_be_written_is_known_before_it_is(tmp_path):
    path = tmp_path / "new" / "a.txt"
    files.check_writable(path)
    assert names(path.parent) == []
    path.write_text("kept")
    files.check_writable(path)
    assert path.read_text() == "kept" and names(path.parent) == ["a.txt"]
    with pytest.raises(OSError, match=r"was not written, .*; name a file in a folder that can be written"):
        files.check_writable(path / "b.txt")
    with pytest.raises(IsADirectoryError, match="new is a folder; name a file in it"):
        files.check_writable(path.parent)


def test_content_is_written_and_replaced_and_folders_are_made(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    files.write(path, "grün\n")
    assert path.read_bytes() == "grün\n".encode()
    files.write(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    files.save_atomically({"a": torch.arange(3)}, str(path))
    assert torch.load(path)["a"].tolist() == [0, 1, 2]
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("target", ["there", "not yet there"])
def test_a_link_stays_one_and_what_it_points_to_is_replaced(tmp_path, target):
    path, link, second = tmp_path / "disk" / "a.txt", tmp_path / "a.txt", tmp_path / "b.txt"
    path.parent.mkdir()
    if target == "there":
        path.write_text("old")
        path.chmod(0o640)
    link.symlink_to("disk/a.txt")
    second.symlink_to(link)
    files.write(second, "new")
    assert link.is_symlink() and second.is_symlink() and not path.is_symlink()
    assert path.read_text() == link.read_text() == "new"
    assert target != "there" or path.stat().st_mode & 0o777 == 0o640
    assert names(path.parent) == ["a.txt"]


def test_the_name_is_taken_only_when_everything_is_on_the_disk(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    files.write(path, "old")
    synced = []
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_size, path.read_text()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write(path, "new content")
    assert synced == [(11, "old")]
    assert path.read_text() == "new content"


def test_permissions_of_a_new_file_are_the_usual_and_of_an_old_one_stay(tmp_path):
    path, plain = tmp_path / "a.txt", tmp_path / "plain"
    plain.touch()
    files.write(path, "a")
    assert path.stat().st_mode == plain.stat().st_mode
    path.chmod(0o640)
    files.write(path, "b")
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("there", [True, False], ids=["an old file", "no file"])
def test_a_full_disk_leaves_what_was_there_and_says_what_was_needed(tmp_path, there):
    path = tmp_path / "a.bin"
    if there:
        path.write_bytes(b"old")
    with room_for(10_000), pytest.raises(OSError) as caught:
        files.write(path, bytes(123_456))
    assert caught.value.errno == errno.EFBIG
    kept = "what was there before is unchanged" if there else "nothing of it was left behind"
    caught.match(rf"a\.bin was not written, {kept}\. It needs 123,456 bytes, [\d,]+ are free there; free some space")
    assert names(tmp_path) == ["a.bin"] * there
    assert not there or path.read_bytes() == b"old"


@pytest.mark.parametrize("size", [0, 1_000, 100_000], ids=["at once", "in its head", "in a tensor"])
def test_a_full_disk_under_torch_save_is_told_as_such(tmp_path, size):
    """torch.save covers the system's error with a failed check of its own zip writer."""
    path = tmp_path / "state.pt"
    files.save_atomically({"step": 1}, path)
    with room_for(size), pytest.raises(OSError) as caught:
        files.save_atomically({"step": 2, "weights": torch.zeros(1_000_000)}, path)
    assert caught.value.errno == errno.EFBIG
    caught.match(r"state\.pt was not written, what .* unchanged\. It needs more than the [\d,]+ bytes that were taken")
    assert torch.load(path) == {"step": 1}
    assert names(tmp_path) == ["state.pt"]


def test_a_writer_that_raises_leaves_the_old_file_and_its_own_error(tmp_path):
    path = tmp_path / "a.txt"
    files.write(path, "old")
    for error in (ValueError("my own"), KeyboardInterrupt(), FileNotFoundError(2, "No such file", "/elsewhere")):
        with pytest.raises(type(error)) as caught, files.replacing(path) as file:
            file.write(b"half of the ne")
            raise error
        assert caught.value is error
    full = r"No space left on device: .*a\.txt was not written.*more than the 4 bytes that were taken"
    with pytest.raises(OSError, match=full), files.replacing(path) as file:
        file.write(b"half")
        file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_an_error_of_torch_that_is_none_of_the_disks_stays_as_it_is(tmp_path):
    class Odd:
        def __reduce__(self):
            raise RuntimeError("cannot be pickled")

    try:
        raise OSError(errno.ENOSPC, "an error that is being handled already")
    except OSError:
        with pytest.raises(RuntimeError, match="cannot be pickled"):
            files.save_atomically({"odd": Odd()}, tmp_path / "state.pt")
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"File exists: .*a\.txt was not written.*; name a file in a folder that can be"):
        files.write(tmp_path / "file" / "a.txt", "a")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=r"Permission denied: .*a\.txt was not written.*in a folder that can be"):
        files.write(tmp_path / "a.txt", "a")


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    script = f"""
        import os, signal
        from blockvit import files
        with files.replacing({str(path)!r}) as file:
            file.write(b"half of the new content")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "a.txt"
    with files.replacing(path) as one, files.replacing(path) as other:
        one.write(b"1" * 10)
        other.write(b"2" * 20)
    assert path.read_bytes() == b"1" * 10  # the last to end


HOLDER = """
import sys
from blockvit import files
with files.locked({path!r}, shared={shared}):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_elsewhere(path: Path, *, shared: bool = False):
    """``path``, locked by another process."""
    command = [sys.executable, "-c", HOLDER.format(path=str(path), shared=shared)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        yield
        holder.stdin.close()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_lock_keeps_others_out_until_the_block_ends(tmp_path, what):
    path = tmp_path / "a" if what == "file" else tmp_path
    with held_elsewhere(path), pytest.raises(BlockingIOError), files.locked(path, wait=False):
        pass
    with files.locked(path, wait=False) as file:
        assert (file is None) == (what == "folder")
    with pytest.raises(ValueError), files.locked(path):
        raise ValueError
    with files.locked(path, wait=False):
        pass


def test_readers_share_a_lock_and_writers_do_not(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with held_elsewhere(path, shared=True):
        with files.locked(path, shared=True, wait=False) as file:
            assert file.read() == b"old"
        with pytest.raises(BlockingIOError), files.locked(path, wait=False):
            pass
    with files.locked(path) as file:
        file.write(b" and new")
        file.seek(0)
        assert file.read() == b"old and new"
    with pytest.raises(FileNotFoundError), files.locked(tmp_path / "b", shared=True):
        pass


WITHOUT_LOCKS = """
import sys
sys.modules["fcntl"] = None  # which makes its import fail, as on Windows
import blockvit.kernels.build, blockvit.pipeline
from blockvit import files, results
from blockvit.kernels import tuning
store = results.Store({root!r})
store.append([{{"experiment": "linear", "device": "a CPU", "metric": "latency", "value": 1.5}}])
assert store.read("linear")["value"].tolist() == [1.5]
tuning.store("a GPU", "triton", {{}}, {{}}, ms=1.0, seconds=1.0)
assert tuning.load("a GPU")["triton"][0]["ms"] == 1.0
with files.locked({root!r}), files.locked({root!r} + "/a", wait=False):
    pass
"""


def test_where_there_are_no_locks_everything_else_goes_on(tmp_path):
    environment = os.environ | {"BLOCKVIT_TUNED": str(tmp_path / "tuned")}
    script = WITHOUT_LOCKS.format(root=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_devices_name_becomes_a_file_name():
    assert files.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert files.slug("AMD EPYC (4 cores)") == "amd-epyc-4-cores"
