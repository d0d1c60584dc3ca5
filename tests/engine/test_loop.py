"""How the decoding loop ends and what it survives, with the real model and a runner that can be made to fail."""

import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from worker.engine.errors import EngineDeadError, EngineError, GenerationFailedError
from worker.engine.generation import Failure, Generation, Limits, Step
from worker.engine.loop import DecodeLoop
from worker.engine.runner import ModelRunner
from worker.engine.sampling import Sampling


@pytest.fixture
def start_loop() -> Iterator[Callable[[Any], DecodeLoop]]:
    loops: list[DecodeLoop] = []

    def start(runner: Any) -> DecodeLoop:
        loops.append(DecodeLoop(runner, max_loras=1, max_waiting=8))
        loops[-1].start()
        return loops[-1]

    yield start
    for loop in loops:
        loop.close()


@pytest.fixture
def generation(model_dir: Path) -> Callable[..., tuple[Generation, "queue.SimpleQueue[Step | Failure]"]]:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def make(max_tokens: int = 20) -> tuple[Generation, "queue.SimpleQueue[Step | Failure]"]:
        events: queue.SimpleQueue[Step | Failure] = queue.SimpleQueue()
        made = Generation(
            [5, 6, 7],
            weights=None,
            sampling=Sampling(temperature=0),
            limits=Limits(max_tokens=max_tokens),
            top_count=0,
            decode=tokenizer.decode,
            sink=events.put,
        )
        return made, events

    return make


def error_of(events: "queue.SimpleQueue[Step | Failure]") -> EngineError:
    while isinstance(event := events.get(timeout=30), Step):
        assert event.finish_reason is None, "the generation ended without an error"
    return event.error


def test_close_fails_what_is_left(runner: ModelRunner, start_loop: Any, generation: Any) -> None:
    loop = start_loop(runner)
    running, events = generation(max_tokens=100_000)
    loop.submit(running)
    assert isinstance(events.get(timeout=30), Step)
    loop.close()
    assert isinstance(error_of(events), EngineDeadError)
    assert not loop.alive
    with pytest.raises(EngineDeadError):
        loop.submit(running)


def test_internal_error_ends_the_loop_and_is_seen(
    runner: ModelRunner, failing: Any, start_loop: Any, generation: Any
) -> None:
    loop = start_loop(failing(runner, 5, ZeroDivisionError("a defect")))
    running, events = generation()
    loop.submit(running)
    assert isinstance(error_of(events), EngineDeadError)
    assert not loop.alive


def test_out_of_memory_fails_the_batch_and_not_the_loop(
    runner: ModelRunner, failing: Any, start_loop: Any, generation: Any
) -> None:
    loop = start_loop(failing(runner, 5, torch.OutOfMemoryError("no memory")))
    running, events = generation()
    loop.submit(running)
    assert isinstance(error_of(events), GenerationFailedError)
    after, events = generation()
    loop.submit(after)
    steps = [events.get(timeout=30) for _ in range(20)]
    assert steps[-1].finish_reason == "length"
    assert loop.alive


def test_a_sink_that_is_gone_frees_the_slot(runner: ModelRunner, start_loop: Any, generation: Any) -> None:
    def closed(event: Step | Failure) -> None:
        raise RuntimeError("Event loop is closed")

    loop = start_loop(runner)
    lost, _ = generation(max_tokens=100_000)
    lost._sink = closed
    after, events = generation()
    loop.submit(lost)
    loop.submit(after)
    assert [events.get(timeout=30) for _ in range(20)][-1].finish_reason == "length"
    assert lost.aborted
    assert loop.counts[1] == 0
