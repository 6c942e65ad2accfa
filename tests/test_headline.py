from __future__ import annotations

import pytest
from test_claims import CPU, vit

from blockvit import headline
from blockvit.results import Store

XEON = {"device": "Other CPU (8 cores)", "threads": 8}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "results")


def table(page: str) -> list[list[str]]:
    """The cells of the first table, head and all."""
    lines = [line for line in page.split("\n\n| A batch")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_nothing_measured(store):
    assert headline.markdown(store) == "No speed of a whole ViT-B/16 is in the tables yet.\n"
    assert headline.fastest(store).empty


def test_milliseconds_and_speedups_over_the_fastest_dense_engine(store):
    dense = {"eager": 0.2, "openvino": 0.1}
    store.append(vit(32, 0.9, 1, dense=dense, cpu=4.0, torch=0.5) + vit(64, 0.9, 1, dense=dense, scope="all", cpu=8.0))
    store.append(vit(32, 0.9, 1, dense={"eager": 0.2}, cpu=50.0))  # beside one engine only: a weaker field
    store.append(vit(32, 0.9, 1, dense={"eager": 0.4}, where=XEON, precision="bf16", cpu=2.0))
    store.append(vit(16, 0.9, 1, dense=dense, cpu=9.0) + vit(32, 0.9, 8, dense=dense, cpu=9.0))  # none of the table's
    head, _, lost, mine, other = table(page := headline.markdown(store))
    assert head[:2] == ["One image", "dense, eager PyTorch"]
    assert head[2:] == ["MLP, 90% in blocks of 32", "all linear layers, 90% in blocks of 64"]
    assert lost == ["points lost, published", "", "2.3", "none known"]
    cells = ["**2.00×ᵉ** (1.96–2.04), 100 → 50.0 ms", "**4.00×ᵉ** (3.92–4.08), 100 → 25.0 ms"]
    assert mine == [f"{CPU['device']}, fp32", "0.50×", *cells]
    assert other == [f"{XEON['device']}, bf16", "1.00×", "**2.00×ᵉ** (1.96–2.04), 400 → 200 ms", ""]
    assert page.splitlines()[:2] == [
        "- MLP, 90% in blocks of 32: **2.00×ᵉ** as fast; a published model lost 2.3 points of top-1.",
        "- all linear layers, 90% in blocks of 64: **4.00×ᵉ** as fast; no accurate model of this shape is known to us "
        "(with the MLP alone sparse a published one lost 19.0 points).",
    ]


def test_a_case_in_a_line_spans_the_machines(store):
    store.append(vit(32, 0.8, 1, cpu=1.5) + vit(32, 0.8, 1, where=XEON, cpu=2.5))
    assert "80% in blocks of 32: **1.50×ᵉ to 2.50×ᵉ** as fast; a published model lost 0.7" in headline.markdown(store)


def test_what_was_timed_eagerly_only_is_marked(store):
    rows = vit(32, 0.8, 1, cpu=1.5)
    rows += [{**row, "group": rows[0]["group"]} for row in vit(32, 0.8, 1, backend_compile="compile", cpu=1.8)[1:]]
    store.append(rows + vit(32, 0.9, 1, cpu=1.5))
    assert table(headline.markdown(store))[-1][-2:] == [
        "**1.80×** (1.76–1.84), 1000 → 556 ms",
        "**1.50×ᵉ** (1.47–1.53), 1000 → 667 ms",
    ]


def test_what_the_kernel_gives_without_sparsity_stands_among_the_dense(store):
    store.append(vit(32, 0.9, 1, cpu=2.0) + vit(32, 0.0, 1, scope="none", where=XEON, **{"cpu+dense": 1.25}))
    head, _, lost, mine, other = table(headline.markdown(store))
    assert head[-2:] == ["dense, on our kernel", "MLP, 90% in blocks of 32"] and lost[-2:] == ["", "2.3"]
    assert mine[-2] == "" and other[-2:] == ["**1.25×ᵉ** (1.23–1.28), 1000 → 800 ms", ""]


def test_the_way_that_is_surely_fastest_counts(store):
    lucky = vit(32, 0.9, 1, gather=3.0, width=0.6)
    store.append(lucky + [{**row, "group": lucky[0]["group"]} for row in vit(32, 0.9, 1, cpu=2.0)[1:]])
    assert "2.00×" in headline.markdown(store) and "3.00×" not in headline.markdown(store)


def test_the_posts_batch_has_a_table_of_its_own(store):
    store.append(vit(32, 0.8, 256, cpu=1.5) + vit(32, 0.9, 256, cpu=1.5) + vit(32, 0.9, 1, cpu=1.5))
    heads = [line.split("|")[1].strip() for line in headline.markdown(store).splitlines() if "eager PyTorch" in line]
    assert heads == ["One image", "A batch of 256"]
    assert "- MLP, 90% in blocks of 32, a batch of 256: **1.50×ᵉ** as fast" in headline.markdown(store)


def test_a_cpu_is_told_of_with_all_its_threads(store):
    store.append(vit(32, 0.9, 1, cpu=9.0, where={**CPU, "threads": 1}) + vit(32, 0.9, 1, cpu=1.5))
    assert "1.50×" in headline.markdown(store) and "9.00×" not in headline.markdown(store)


def test_of_a_processor_the_newest_run_counts_whatever_its_cores(store, on_a_day):
    small, large = ({"device": f"Some CPU ({cores} cores)", "threads": cores} for cores in (2, 16))
    on_a_day(2)
    store.append(vit(32, 0.9, 1, cpu=1.5, where=small))
    on_a_day(1)
    store.append(vit(32, 0.9, 1, cpu=9.0, where=large) + vit(32, 0.9, 1, cpu=2.0, where=large, precision="bf16"))
    machines = [cells[0] for cells in table(headline.markdown(store))[3:]]
    assert machines == ["Some CPU (2 cores), fp32", "Some CPU (16 cores), bf16"]


def test_the_weights_held_are_those_of_the_last_rows(store):
    rows = vit(32, 0.9, 1, cpu=2.0)
    bytes_of = {"metric": "model_bytes", "unit": "B", "low": None, "high": None}
    held = [{**rows[0], **bytes_of, "value": 346.2e6}, {**rows[-1], **bytes_of, "value": 143.2e6}]
    store.append(rows)
    assert "Weights held" not in headline.markdown(store)
    store.append({**row, "value": 2 * row["value"]} for row in held)
    store.append(held)
    told = "Weights held in memory (fp32): dense 346 MB; MLP, 90% in blocks of 32: 143 MB.\n"
    assert headline.markdown(store).endswith(told)
