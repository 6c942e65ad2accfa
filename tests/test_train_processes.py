"""Training in two processes on the CPU, started as users start them; what they must agree on, and what ends them."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_files import room_for
from test_train import EVERYTHING, TINY, same_weights, tiny_data, tiny_model

from blockvit import train
from blockvit.parallel import CellError
from blockvit.train import command
from blockvit.train.processes import TIMEOUT, join

pytest.importorskip("accelerate")

EPOCHS = replace(EVERYTHING, epochs=4, ra_sampler=True, sparsity_schedule="cubic")
UNEVEN = 33  # images to evaluate; two processes take 17 and 16


def splits():
    return replace(tiny_data(64), test=tiny_data(UNEVEN).test)


def fit(recipe=EPOCHS, model=None, **kwargs):
    model = model or tiny_model()
    return model, train.fit(model, splits(), recipe, progress=False, **kwargs)


# What runs in each of the two processes


def train_until_killed(checkpoint):
    """The second process dies in the third of four epochs."""
    model, steps = tiny_model(), []

    def die(module, args):
        steps.extend([1] * module.training)
        if len(steps) == 8 + 8 + 3 and join("cpu").rank == 1:  # eight steps an epoch
            os.kill(os.getpid(), signal.SIGKILL)

    model.register_forward_pre_hook(die)
    fit(model=model, checkpoint=checkpoint)


def error_of(work):
    try:
        work()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def train_together(folder):
    """Everything that two processes can find out in one start: written to a file for each."""
    folder, processes = Path(folder), join("cpu")
    resumed, history = fit(model=tiny_model(seed=processes.rank), checkpoint=folder / "killed.pt", accumulate=2)
    evaluated = train.evaluate(resumed, splits().test, processes=processes)

    def break_one(module, args, output):
        return output * math.nan if module.training and processes.rank == 1 else output

    broken = tiny_model()
    broken.register_forward_hook(break_one)
    fresh, _ = fit(TINY, tiny_model(seed=processes.rank), checkpoint=folder / "kept.pt")
    kept = (folder / "kept.pt").read_bytes()
    nan = error_of(lambda: fit(TINY, broken, checkpoint=folder / "kept.pt", resume=False))
    with room_for(1000 if processes.is_main else 10**9):
        full = error_of(lambda: fit(TINY, checkpoint=folder / "kept.pt", resume=False))
    found = {
        "weights": resumed.state_dict(),
        "fresh": fresh.state_dict(),
        "history": history.epochs,
        "evaluated": evaluated,
        "nan": nan,
        "full": full,
        "kept": (folder / "kept.pt").read_bytes() == kept,
        "batch": error_of(lambda: fit(replace(TINY, batch_size=9))),
        "other": error_of(lambda: fit(replace(TINY, lr=1e-3 * (1 + processes.rank)))),
        "other checkpoint": error_of(lambda: fit(replace(TINY, batch_size=16), checkpoint=folder / "kept.pt")),
        "main": error_of(lambda: processes.on_main(lambda: 1 / 0)),
    }
    torch.save(found, folder / f"rank{processes.rank}.pt")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    started = time.monotonic()
    with pytest.raises(CellError) as caught:
        train.launch(train_until_killed, folder / "killed.pt", num_processes=2)
    return folder, str(caught.value), time.monotonic() - started, torch.load(folder / "killed.pt")


@pytest.fixture(scope="module")
def together(killed):
    train.launch(train_together, str(killed[0]), num_processes=2)
    return [torch.load(killed[0] / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone():
    return fit()


# Faults


def test_a_killed_process_ends_the_run_with_an_error(killed):
    _, message, seconds, checkpoint = killed
    assert "training in 2 processes failed" in message  # by SIGKILL, or by the other's loss of it: whoever tells first
    assert seconds < TIMEOUT.total_seconds(), "it did not wait for the dead one"
    assert len(checkpoint["history"]) == 2


def test_a_killed_run_resumed_is_the_uninterrupted_one(together, alone):
    model, history = alone
    for found in together:
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=2e-4)
        assert [epoch["processes"] for epoch in found["history"]] == [2] * 4
        for one, two in zip(history.epochs, found["history"], strict=True):
            for key in ("epoch", "train_loss", "test_loss", "test_top1", "lr"):
                assert two[key] == pytest.approx(one[key], abs=1e-4), key
    other, _ = fit(replace(EPOCHS, seed=1))
    assert max((a - b).abs().max() for a, b in zip(model.parameters(), other.parameters(), strict=True)) > 5e-3


def test_another_number_of_processes_goes_on(killed, together, alone):
    folder = killed[0]
    torch.save(killed[3], folder / "for_one.pt")
    model, history = fit(model=tiny_model(seed=5), checkpoint=folder / "for_one.pt")
    for one, other in zip(alone[0].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=2e-4)
    assert [epoch["processes"] for epoch in history.epochs] == [2, 2, 1, 1]


def test_every_process_ends_up_with_the_same_weights(together):
    assert all(torch.equal(together[0]["weights"][name], weight) for name, weight in together[1]["weights"].items())


def test_initial_weights_are_those_of_the_main_process(together):
    model, _ = fit(TINY, tiny_model(seed=0))
    for found in together:
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(found["fresh"][name], weight, rtol=0, atol=2e-4)


def test_every_image_is_evaluated_once(together):
    model = tiny_model()
    model.load_state_dict(together[0]["weights"])
    expected = train.evaluate(model, splits().test)
    assert expected["top1"] * UNEVEN == pytest.approx(round(expected["top1"] * UNEVEN))
    for found in together:
        assert found["evaluated"] == pytest.approx(expected)
        assert found["history"][-1]["test_top1"] == pytest.approx(expected["top1"])


def test_a_loss_that_is_nan_in_one_process_stops_both(together):
    for found in together:
        name, message = found["nan"]
        assert name == "NonFiniteLossError"
        assert "became nan in epoch 1, step 1 of 8, at learning rate" in message
        assert found["kept"]


def test_a_full_disk_under_the_main_process_stops_both(together):
    for found in together:
        name, message = found["full"]
        assert name == "OSError" and "kept.pt was not written" in message and "free some space" in message


def test_processes_must_train_the_same_thing(together):
    assert together[0]["other"][0] == together[1]["other"][0] == "ValueError"
    assert "1 of 2 processes were started for another run" in together[0]["other"][1]
    assert "recipe: lr is 0.001 there and 0.002 here" in together[1]["other"][1]
    for found in together:
        assert "batch_size is 9 for 2 processes; expected a multiple" in found["batch"][1]
        assert (
            "kept.pt belongs to another run: recipe: batch_size is 8 there and 16 here" in found["other checkpoint"][1]
        )
        assert found["main"][0] == "ZeroDivisionError"


# The launchers


@pytest.mark.slow
def test_accelerate_launch_trains_the_model_of_one_process(tmp_path):
    options = [
        *["--dataset", "digits", "--model", "vit_digits", "--sparsity", "0.8", "--block-size", "16", "--device", "cpu"],
        *["--epochs", "1", "--lr-warmup-epochs", "0", "--batch-size", "128", "--mixup-alpha", "0.2", "--seed", "3"],
    ]
    launcher = [Path(sys.executable).with_name("accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    quiet = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    two = subprocess.Popen(
        [*launcher, *quiet, "-m", "blockvit.train", *options, "--output", tmp_path / "two"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert command.main([*options, "--output", str(tmp_path / "one"), "--accumulate", "2"]) == 0
    output = two.communicate(timeout=600)[0]
    assert two.returncode == 0, output
    assert output.count("processes = 2\n") == output.count("epoch 1/1") == 1  # the main process alone prints
    one, two = (torch.load(tmp_path / name / "checkpoint.pt")["state"]["model"] for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-3)
    assert (tmp_path / "two" / "model.safetensors").stat().st_size == (
        tmp_path / "one" / "model.safetensors"
    ).stat().st_size


def test_launch_needs_a_function_that_a_fresh_process_can_import():
    with pytest.raises(ValueError, match="cannot be imported by a worker process"):
        train.launch(lambda: None, num_processes=2)
    with pytest.raises(ValueError, match="num_processes is 0; expected at least 1"):
        train.launch(train_until_killed, "x", num_processes=0)


def test_several_processes_need_accelerate(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"WORLD_SIZE is 2, but Accelerate.* pip install accelerate"):
        join("cpu")


def test_one_process_needs_no_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    model, _ = fit(TINY)
    assert not same_weights(model, tiny_model())
