from __future__ import annotations

import ast
import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
from importlib.util import resolve_name
from pathlib import Path

import numpy as np
import pytest
from tidy_rows import DEVICE, dense, row

from blockvit import results
from blockvit.results import COLUMNS, Measured, Store

LIBRARY = Path(results.__file__).parent


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


def table_path(store: Store) -> Path:
    return store.path("linear", DEVICE)


# --- append and read -------------------------------------------------------------------------------------------------


def test_rows_come_back_as_they_went_in(store):
    store.append([row(), row(value=1 / 3, model='a "quoted", name', scope="mlp+attention", seed=None)])
    table = store.read("linear")
    assert list(table.columns) == COLUMNS
    assert table["value"].tolist() == pytest.approx([0.5, 1 / 3], rel=1e-9)
    assert table["model"].tolist() == ["768x3072", 'a "quoted", name']
    assert table["scope"].tolist() == ["", "mlp+attention"]
    assert table["sparsity"].tolist() == [0.9, 0.9]
    assert table["seed"].isna().all()
    assert (table["run"] == store.run).all() and len(store.run) == 8
    assert table["date"].str.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ").all()


def test_the_file_is_named_by_experiment_and_device_and_starts_with_the_header(store):
    store.append([row()])
    store.append([row()])
    path = store.root / "linear" / "example-cpu-4-cores.csv"
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS)
    assert len(lines) == 3


def test_rows_go_to_the_table_of_their_experiment_and_device(store):
    store.append([row(), row(device="NVIDIA H100 80GB HBM3", value=1), row(experiment="vit", value=2)])
    assert store.read("linear")["value"].tolist() == [0.5, 1]
    assert store.read("linear", device="NVIDIA H100 80GB HBM3")["value"].tolist() == [1]
    assert store.read("vit")["value"].tolist() == [2]
    assert store.read("linear", run="other").empty


def test_reading_what_was_never_measured_gives_an_empty_table_with_all_columns(store):
    assert list(store.read("vit").columns) == COLUMNS
    assert store.read("vit").empty


def test_group_and_run_ids_that_look_like_numbers_stay_text(store):
    store.append([row(group="12345678"), row(group="1e5")])
    assert store.read("linear")["group"].tolist() == ["12345678", "1e5"]


def test_line_breaks_in_a_text_do_not_break_the_table(store):
    store.append([row(model="two\nlines"), row(model="three\r\nmore\u2028lines")])
    assert store.read("linear")["model"].tolist() == ["two lines", "three more lines"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speedup": 2.0, "Value": 1}, r"unknown columns \['Value', 'speedup'\].*see results\.COLUMNS"),
        ({"value": None}, r"lacks \['value'\]"),
        ({"experiment": "", "metric": None}, r"lacks \['experiment', 'metric'\]"),
    ],
)
def test_a_wrong_row_is_refused_and_none_of_its_batch_written(store, changes, message):
    with pytest.raises(ValueError, match=message):
        store.append([row(), row(**changes)])
    assert not table_path(store).exists()


def test_the_run_id_is_kept_for_this_folder(store, tmp_path):
    assert Store(store.root).run == store.run
    assert Store(tmp_path / "elsewhere").run != store.run
    assert [p.name for p in store.root.iterdir()] == [".run"]


def test_the_folder_may_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("BLOCKVIT_RESULTS", str(tmp_path / "env"))
    assert Store().root == tmp_path / "env"
    assert Store(tmp_path / "given").root == tmp_path / "given"


# --- tables that are not what they should be -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    ["a,b,c\n1,2,3\n", ",".join(COLUMNS[:-1]) + "\n", "no newline at the end", "\n", ",".join(COLUMNS)],
    ids=["other columns", "one column less", "text", "blank", "header cut short"],
)
def test_a_foreign_table_is_kept_aside_whole(store, content):
    path = table_path(store)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.warns(UserWarning, match=r"another header than this version writes; it is kept as .*foreign"):
        store.append([row()])
    (kept,) = [p for p in path.parent.iterdir() if p != path]
    assert kept.read_text() == content
    assert kept.suffix != ".csv"
    assert len(store.read("linear")) == 1


def test_foreign_tables_kept_aside_do_not_overwrite_each_other(store):
    path = table_path(store)
    path.parent.mkdir(parents=True)
    for content in ("first,table\n", "second,table\n"):
        path.write_text(content)
        with pytest.warns(UserWarning, match="kept as"):
            store.append([row()])
        path.unlink()
    assert sorted(p.read_text() for p in path.parent.iterdir()) == ["first,table\n", "second,table\n"]


def test_reading_a_foreign_table_warns_and_leaves_it_alone(store):
    path = table_path(store)
    path.parent.mkdir(parents=True)
    path.write_text("a,b\n1,2\n")
    with pytest.warns(UserWarning, match="has a header that this version does not know; its rows are left out"):
        assert store.read("linear").empty
    assert path.read_text() == "a,b\n1,2\n"


def test_an_empty_file_is_a_table_without_rows(store):
    path = table_path(store)
    path.parent.mkdir(parents=True)
    path.touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.read("linear").empty
        store.append([row()])
        assert len(store.read("linear")) == 1


def test_a_row_cut_short_anywhere_is_left_out_and_those_behind_it_are_kept(store):
    store.append([row(value=1)])
    start = table_path(store).stat().st_size
    store.append([row(value=2, model='µ "quoted", name', unit="µs")])
    whole = table_path(store).read_bytes()
    for end in range(start + 1, len(whole) - 1):
        table_path(store).write_bytes(whole[:end])
        with pytest.warns(UserWarning, match="1 incomplete rows left out"):
            assert store.read("linear")["value"].tolist() == [1], whole[start:end]
    for end in range(start + 1, len(whole) - 1, 7):
        table_path(store).write_bytes(whole[:end])
        store.append([row(value=3)])
        with pytest.warns(UserWarning, match="1 incomplete rows left out"):
            assert store.read("linear")["value"].tolist() == [1, 3], whole[start:end]


def test_a_last_row_that_lacks_only_its_newline_is_kept(store):
    store.append([row(value=1)])
    table_path(store).write_bytes(table_path(store).read_bytes().rstrip(b"\n"))
    store.append([row(value=2)])
    assert store.read("linear")["value"].tolist() == [1, 2]


# --- several processes -----------------------------------------------------------------------------------------------

APPENDS = 60

# Without the package's __init__, which would import torch: that takes seconds in each process.
HEAD = f"""
import importlib, json, sys, types
package = sys.modules["blockvit"] = types.ModuleType("blockvit")
package.__path__ = [{str(LIBRARY)!r}]
results = importlib.import_module("blockvit.results")
store, row = results.Store(sys.argv[1]), json.loads(sys.argv[2])
"""


def start(body: str, store: Store, *arguments: str) -> subprocess.Popen:
    """A process that runs ``body`` with ``store`` and a ``row`` at hand, and ``arguments`` from ``sys.argv[3]`` on."""
    command = [sys.executable, "-c", HEAD + body, str(store.root), json.dumps(row()), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


APPEND_MANY = """
writer, appends = int(sys.argv[3]), int(sys.argv[4])
for i in range(appends):
    store.append([row | {"seed": writer, "epoch": i, "scope": "x" * (i % 50), "value": j} for j in range(3)])
"""


def test_processes_that_append_at_once_lose_and_break_nothing(store):
    writers = [start(APPEND_MANY, store, str(i), str(APPENDS)) for i in range(3)]
    for writer in writers:
        _, errors = writer.communicate(timeout=600)
        assert writer.returncode == 0, errors
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = store.read("linear")
    assert len(table) == 3 * APPENDS * 3
    assert table["run"].nunique() == 1  # they started in a fresh folder, and agree on the run
    assert set(zip(table["seed"], table["epoch"], table["value"], strict=True)) == {
        (w, i, j) for w in range(3) for i in range(APPENDS) for j in range(3)
    }
    # The rows of one append lie together.
    lines = table_path(store).read_text().splitlines()[1:]
    keys = [tuple(line.split(",")[COLUMNS.index(c)] for c in ("seed", "epoch")) for line in lines]
    assert all(len(set(keys[i : i + 3])) == 1 for i in range(0, len(keys), 3))


def test_a_writer_waits_for_another_one(store):
    store.append([row()])
    writer = threading.Thread(target=store.append, args=([row()],))
    with table_path(store).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writer.start()
        writer.join(0.5)
        assert len(table_path(store).read_text().splitlines()) == 2
    writer.join(120)
    assert len(store.read("linear")) == 2


def test_a_killed_writer_leaves_whole_rows(store):
    writer = start("i = 0\nwhile True: store.append([row | {'epoch': i}] * 5); i += 1", store)
    deadline = time.monotonic() + 300
    while not (table_path(store).exists() and table_path(store).stat().st_size > 20_000):
        assert writer.poll() is None, writer.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = store.read("linear")
        store.append([row(epoch=-1)])
        after = store.read("linear")
    assert len(before) % 5 == 0 and before["epoch"].nunique() == len(before) / 5
    assert len(after) == len(before) + 1


# --- no space, no permission -----------------------------------------------------------------------------------------

FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store.run
table = store.path(row["experiment"], row["device"])
before = table.read_bytes() if table.exists() else b""
resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    store.append([row] * 20)
except OSError as error:
    print(error)
    assert table.read_bytes() == before, "the table changed"
else:
    sys.exit("no error")
"""


@pytest.mark.parametrize("rows_before", [0, 2])
@pytest.mark.parametrize("room", [0, 150, 1000])
def test_a_full_disk_leaves_the_table_as_it_was(store, rows_before, room):
    store.append([row(), row()][:rows_before])
    process = start(FULL_DISK, store, str(room))
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "results were not written to" in out and str(store.root) in out
    assert "rows written before are intact" in out and "free some space" in out
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(store.read("linear")) == rows_before
        store.append([row()])  # there is space again
        assert len(store.read("linear")) == rows_before + 1


def test_a_full_disk_at_the_first_start_does_not_leave_an_empty_run_id(store, monkeypatch):
    def full(self: Path, text: str) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left") as error:
        _ = store.run
    assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert len(store.run) == 8
    assert [p.name for p in store.root.iterdir()] == [".run"]


def test_no_permission_says_what_to_do(store, monkeypatch):
    store.append([row()])
    real = Path.open

    def denied(self: Path, mode: str = "r", *args, **kwargs):
        if "a" in mode:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(PermissionError, match=r"cannot write results to .*results_dir parameter or \$BLOCKVIT_RESULTS"):
        store.append([row()])
    assert len(store.read("linear")) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(store):
    store.root.mkdir()
    store.root.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(PermissionError, match="cannot write results to"):
            store.append([row()])
    finally:
        store.root.chmod(stat.S_IRWXU)


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "results").write_text("precious")
    with pytest.raises(
        OSError, match=r"not written to .*: name another folder with the results_dir parameter .* and run again"
    ):
        Store(tmp_path / "results").append([row()])
    assert (tmp_path / "results").read_text() == "precious"


# --- what was measured already ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sparsity": 0.1 + 0.2},
        {"sparsity": 1 / 3},
        {"sparsity": 0, "seed": 0},
        {"sparsity": None, "block_size": None, "scope": None},
        {"sparsity": np.float64(0.9), "block_size": np.int64(32)},
        {"sparsity": np.float32(0.9)},
        {"torch": "2.11.0+cu128", "triton": "", "model": "two\nlines"},
        {"tokens": 197 * 256, "compile": "max-autotune, fullgraph"},
    ],
    ids=str,
)
def test_what_was_written_counts_as_measured(store, changes):
    assert row(**changes) not in store.measured("linear", DEVICE)
    store.append([row(**changes), row(model="other", seed=3)])  # another row types the columns differently
    assert row(**changes) in store.measured("linear", DEVICE)
    assert row(**changes) | {"value": 99, "repeats": 1, "group": "b"} in store.measured("linear", DEVICE)


@pytest.mark.parametrize(
    "changes",
    [{"sparsity": 0.8}, {"sparsity": None}, {"seed": 0}, {"torch": "2.12"}, {"metric": "memory"}, {"backend": "torch"}],
    ids=str,
)
def test_another_key_does_not_count_as_measured(store, changes):
    store.append([row()])
    assert row(**changes) not in store.measured("linear", DEVICE)


def test_whole_numbers_and_nan_match_what_tables_hold(store):
    store.append([row(block_size=32, seed=None)])
    measured = store.measured("linear", DEVICE)
    assert row(block_size=32.0, seed=float("nan")) in measured


def test_only_this_runs_rows_of_this_device_count_as_measured(store):
    store.append([row()])
    (store.root / ".run").write_text("cloned00")
    assert row() not in store.measured("linear", DEVICE)
    store.append([row(device="other")])
    assert row() not in store.measured("linear", DEVICE)
    assert row(device="other") in store.measured("linear", "other")


def test_measured_together_means_in_one_group(store):
    store.append([row(group="a"), row(**dense(), group="a"), row(sparsity=0.8, group="b")])
    store.append([row(backend="torch", metric=results.FAILED, group="a")])
    measured = store.measured("linear", DEVICE)
    assert measured.together([row(), row(**dense())]) and measured.together([row(sparsity=0.8)])
    assert not measured.together([row(), row(sparsity=0.8)]), "both are there, but not to be compared"
    assert not measured.together([row(), row(sparsity=0.7)])
    assert measured.together([row(), row(backend="torch")]), "what failed there was tried there"
    assert not measured.together([row(sparsity=0.8), row(backend="torch")])
    assert not measured.together([])


def test_nothing_measured_yet():
    assert row() not in Measured.none()


# --- no torch --------------------------------------------------------------------------------------------------------


WITHOUT_TORCH = {
    *("answers", "checkout", "claims", "comparisons", "goals", "headline"),
    *("limits", "literature", "losses", "plots", "results"),
}


def files_without_torch() -> list[str]:
    files = [
        file for file in LIBRARY.rglob("*.py") if file.relative_to(LIBRARY).with_suffix("").parts[0] in WITHOUT_TORCH
    ]
    return sorted(str(file.relative_to(LIBRARY)) for file in files)


@pytest.mark.parametrize("name", files_without_torch())
def test_tables_and_figures_need_no_torch(name):
    package = ".".join(["blockvit", *Path(name).parent.parts])
    imported = set()
    for node in ast.walk(ast.parse((LIBRARY / name).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            imported |= {f"{origin}.{alias.name}" for alias in node.names}
    assert not {module.split(".")[0] for module in imported} & {"torch", "torchvision"}
    siblings = {module.split(".")[1] for module in imported if module.startswith("blockvit.")}
    siblings -= {"files"}  # which imports it only to save what is torch's
    assert siblings <= WITHOUT_TORCH, "a module of this package that may import torch"
