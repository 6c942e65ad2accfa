import multiprocessing as mp
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest

from blockvit.parallel import CellError, map_cells

HERE = Path(__file__).parent


# What workers run: at the top level, where a spawned process can import it.
def threads_and_pid(cell):
    import torch

    return torch.get_num_threads(), os.getpid()


def fail_on_three(cell):
    if cell == 3:
        raise ArithmeticError("three is too many")
    return cell


def die(cell):
    os.kill(os.getpid(), signal.SIGKILL)


def note_and_sleep(cell, folder):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(600)


def test_results_come_with_their_cells():
    assert sorted(map_cells(partial(pow, 2), range(5), workers=2)) == [(i, 2**i) for i in range(5)]


def test_workers_have_one_thread_and_are_other_processes():
    ((_, (threads, pid)),) = map_cells(threads_and_pid, ["cell"])
    assert threads == 1
    assert pid != os.getpid()


def test_no_cells():
    assert list(map_cells(threads_and_pid, [])) == []


def test_failure_names_the_cell_and_keeps_earlier_results():
    results = map_cells(fail_on_three, [1, 3, 5], workers=1)
    assert next(results) == (1, 1)
    with pytest.raises(CellError, match="cell 3 failed: ArithmeticError: three is too many") as raised:
        next(results)
    assert raised.value.cell == 3
    assert isinstance(raised.value.__cause__, ArithmeticError)


def test_killed_worker_is_an_error_not_a_hang():
    with pytest.raises(CellError, match=r"killed .*unfinished: \['a', 'b'\]"):
        list(map_cells(die, ["a", "b"], workers=1))


@pytest.mark.parametrize("workers", [0, -1])
def test_workers_must_be_positive(workers):
    with pytest.raises(ValueError, match=f"workers is {workers}; expected at least 1"):
        map_cells(threads_and_pid, [1], workers=workers)


def test_function_that_workers_cannot_import():
    def inner(cell):
        return cell

    for fn in (inner, lambda cell: cell, partial(inner)):
        with pytest.raises(ValueError, match="cannot be imported by a worker process; expected a function at the top"):
            map_cells(fn, [1])


def test_function_defined_in_a_notebook():
    notebook = {"__name__": "__main__"}
    exec("def train_cell(cell): return cell", notebook)
    with pytest.raises(ValueError, match=r"__main__\.train_cell cannot be imported"):
        map_cells(notebook["train_cell"], [1])


def pids_then_sleep(path):
    """Returns at once the first time; hangs after that."""
    path.touch()
    if path.name == "second":
        time.sleep(600)
    return os.getpid()


def alive(pid):
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" if Path("/proc").is_dir() else True
    except (ProcessLookupError, FileNotFoundError):  # it may end between the two
        return False


def wait_until(condition, seconds=120):  # a new process imports torch first, which takes long on a busy machine
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


@pytest.fixture
def sleepers(tmp_path):
    """A process whose two workers are busy for ten minutes, and the workers' process ids."""
    script = f"""
        import signal, sys; sys.path.insert(0, {str(HERE)!r})
        from functools import partial
        from blockvit.parallel import map_cells
        from test_parallel import note_and_sleep
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what they run in the background ignore it
        if __name__ == "__main__":
            list(map_cells(partial(note_and_sleep, folder={str(tmp_path / "pids")!r}), [1, 2, 3], workers=2))
    """
    (tmp_path / "pids").mkdir()
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    process = subprocess.Popen([sys.executable, tmp_path / "script.py"], stderr=subprocess.PIPE)
    pids = tmp_path / "pids"
    try:
        wait_until(lambda: len(list(pids.iterdir())) == 2 or process.poll() is not None)
        yield process, [int(file.name) for file in pids.iterdir()]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "killed"])
def test_no_worker_outlives_the_caller(sleepers, how):
    process, pids = sleepers
    assert len(pids) == 2
    process.send_signal(how)
    wait_until(lambda: process.poll() is not None)
    wait_until(lambda: not any(map(alive, pids)))
    assert process.returncode != 0


def test_a_caller_who_stops_iterating_leaves_no_worker(tmp_path):
    results = map_cells(pids_then_sleep, [tmp_path / "first", tmp_path / "second"], workers=1)
    _, pid = next(results)
    wait_until(lambda: (tmp_path / "second").exists())
    results.close()
    wait_until(lambda: not alive(pid))


def test_processes_of_the_caller_outlive_workers_that_are_stopped():
    results = map_cells(threads_and_pid, [1, 2, 3], workers=1)
    next(results)
    own = mp.get_context("spawn").Process(target=time.sleep, args=(600,))
    own.start()
    try:
        results.close()
        assert own.is_alive()
    finally:
        own.kill()
        own.join()
