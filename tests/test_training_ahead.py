"""The next micro-batch crosses while this one is worked on: the same steps, nothing waited for."""

import dataclasses
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from support import small_stage
from support.devices import devices

from pipelines.records import tracking
from pipelines.training.ahead import Ahead
from pipelines.training.feeds import Part
from pipelines.training.loop import train_stage


def made(result=None, error: Exception | None = None) -> "Future":
    future: Future = Future()
    if error is not None:
        future.set_exception(error)
    elif result is not None:
        future.set_result(result)
    return future


@pytest.fixture
def given(tmp_path):
    run = small_stage.recipe(tmp_path, steps=3)
    return list(small_stage.inputs(run).batches(range(3)))


class Counted(small_stage.MemoryFetched):
    times = 0

    def decode(self, device="cpu"):
        Counted.times += 1
        return super().decode(device)


def counted(batch):
    Counted.times = 0
    (part,) = batch.parts
    fetched = Counted(**vars(part.fetched))
    return dataclasses.replace(batch, parts=[Part(part.places, fetched)])


def equal(arrived, batch) -> bool:
    assert torch.equal(arrived.pixels().cpu(), batch.pixels)
    targets, valid = arrived.targets()
    assert valid.cpu().tolist() == batch.valid.tolist()
    return all(
        torch.equal(ours.cpu(), theirs)
        for name, wanted in batch.targets("cpu").items()
        for ours, theirs in zip(targets[name], wanted, strict=True)
    )


@devices
def test_what_was_sent_is_what_is_taken_and_is_decoded_once(given, device):
    ahead, coming = Ahead(torch.device(device)), counted(given[1])
    assert equal(ahead.take(given[0]), given[0])
    ahead.send(made(coming))
    assert Counted.times == 1
    # The loop is told how long it waited: another object, of the same tensors.
    arrived = ahead.take(dataclasses.replace(coming, wait_seconds=1.0))
    assert Counted.times == 1
    assert equal(arrived, given[1])


@devices
def test_a_batch_that_is_not_made_is_not_waited_for(given, device):
    ahead = Ahead(torch.device(device))
    ahead.send(None)
    ahead.send(made())
    cancelled: Future = Future()
    cancelled.cancel()
    ahead.send(cancelled)
    ahead.send(made(error=OSError("the disk is gone")))  # raised where the batch is asked for
    assert equal(ahead.take(given[1]), given[1])


@devices
def test_another_batch_than_was_sent_is_brought_itself(given, device):
    ahead = Ahead(torch.device(device))
    ahead.send(made(given[1]))
    assert equal(ahead.take(given[2]), given[2])
    assert equal(ahead.take(given[1]), given[1])


@devices
def test_nothing_is_written_over_while_it_is_read(given, device):
    """Memory goes from batch to batch: twenty of them, each read late, by a slow kernel."""
    ahead, read = Ahead(torch.device(device)), []
    batches = [
        dataclasses.replace(given[0], pixels=torch.full((8, 3, 256, 256), value, dtype=torch.uint8))
        for value in range(20)
    ]
    slow = torch.ones(2000 if device == "cuda" else 2, device=device).diag()
    for batch, coming in zip(batches, [*batches[1:], None], strict=True):
        arrived = ahead.take(batch)
        pixels = arrived.pixels()
        for _ in range(4):
            slow = slow @ slow
        read.append((pixels.float() * slow[0, 0]).mean((1, 2, 3)))
        del arrived, pixels
        ahead.send(None if coming is None else made(coming))
    assert [each.tolist() for each in read] == [[float(value)] * 8 for value in range(20)]


@devices
def test_steps_are_the_same_with_and_without(tmp_path, device):
    found = []
    for known in (False, True):
        run = small_stage.recipe(tmp_path / str(known), micro_batch=4, steps=6)
        inputs = small_stage.inputs(run, invalid=[3])

        def batches(steps, inputs=inputs, known=known):
            every = list(inputs.batches(steps))
            for batch, coming in zip(every, [*every[1:], None], strict=True):
                future = made(coming) if known and coming is not None else None
                yield dataclasses.replace(batch, coming=future)

        train_stage(
            run,
            run.stage("stage2"),
            dataclasses.replace(inputs, batches=batches),
            tmp_path / str(known) / "stage2",
            device=device,
        )
        lines = tracking.read(tmp_path / str(known) / "stage2" / tracking.METRICS_FILE)
        found.append([line["loss/total"] for line in lines if "loss/total" in line])
    assert len(found[0]) == 6
    assert found[0] == found[1]
    assert np.isfinite(found[0]).all()
