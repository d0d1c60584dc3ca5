"""Requests that share a batch: none changes another's tokens, whenever they join or leave, whatever happens to them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from worker.engine.engine import Engine
from worker.engine.errors import GenerationFailedError, QueueFullError

PROMPTS = ["a", "a longer prompt, so that the rows are padded", "third", "now something quite different: 12345"]


def test_mixed_adapters_and_lengths_decode_as_alone(
    engine: Engine, submit: Any, reference: Any, make_adapter: Callable[..., Path]
) -> None:
    paths = {"base": None, "v1": make_adapter("v1", seed=1), "v2": make_adapter("v2", seed=2, r=6)}
    for name in ("v1", "v2"):
        engine.load_adapter(name, str(paths[name]))
    wanted = [
        (model, prompt, 8 + 5 * index + len(model))
        for index, prompt in enumerate(PROMPTS)
        for model in ("base", "v1", "v2")
    ]
    running = [submit(engine, prompt, model=model, max_tokens=count) for model, prompt, count in wanted]
    for (model, prompt, count), one in zip(wanted, running, strict=True):
        assert one.tokens() == reference.greedy(prompt, count, paths[model])


def test_requests_join_while_others_decode(engine: Engine, submit: Any, reference: Any) -> None:
    first = submit(engine, PROMPTS[0], max_tokens=60)
    started = [first.next().token_id for _ in range(10)]
    second = submit(engine, PROMPTS[1], max_tokens=10)
    assert second.tokens() == reference.greedy(PROMPTS[1], 10)
    assert started + first.tokens() == reference.greedy(PROMPTS[0], 60)


def test_cache_grows_beyond_its_first_capacity(engine: Engine, submit: Any, reference: Any) -> None:
    long = submit(engine, "x" * 100, max_tokens=250)
    short = submit(engine, "y", max_tokens=250)
    assert long.tokens() == reference.greedy("x" * 100, 250)
    assert short.tokens() == reference.greedy("y", 250)


def test_more_requests_than_slots_are_all_answered(
    start_engine: Callable[..., Engine], model_dir: Path, submit: Any, reference: Any
) -> None:
    engine = start_engine(model_dir, max_num_seqs=3)
    running = [submit(engine, str(number), max_tokens=4 + number % 5) for number in range(50)]
    for number, one in enumerate(running):
        assert one.tokens() == reference.greedy(str(number), 4 + number % 5)
    assert engine.loop.counts == (0, 0)


def test_at_most_max_loras_adapters_share_a_batch(
    start_engine: Callable[..., Engine], model_dir: Path, submit: Any, make_adapter: Callable[..., Path], reference: Any
) -> None:
    engine = start_engine(model_dir, max_loras=1)
    paths = {name: make_adapter(name, seed=seed) for seed, name in enumerate(("v1", "v2"), start=1)}
    for name, path in paths.items():
        engine.load_adapter(name, str(path))
    order: list[str] = []
    first = submit(engine, "one", model="v1", max_tokens=60, seen=lambda: order.append("v1"))
    second = submit(engine, "two", model="v2", seen=lambda: order.append("v2"))
    base = submit(engine, "three")
    assert first.tokens() == reference.greedy("one", 60, paths["v1"])
    assert second.tokens() == reference.greedy("two", 20, paths["v2"])
    assert base.tokens() == reference.greedy("three", 20)
    assert order == ["v1"] * 60 + ["v2"] * 20


def test_request_in_flight_keeps_its_weights(
    engine: Engine, submit: Any, reference: Any, make_adapter: Callable[..., Path]
) -> None:
    old, new = make_adapter("old", seed=1), make_adapter("new", seed=2)
    engine.load_adapter("name", str(old))
    running = submit(engine, "hold on", model="name", max_tokens=200)
    begun = [running.next().token_id]
    engine.unload_adapter("name")
    engine.load_adapter("name", str(new))
    fresh = submit(engine, "hold on", model="name", max_tokens=30)
    assert fresh.tokens() == reference.greedy("hold on", 30, new)
    assert begun + running.tokens() == reference.greedy("hold on", 200, old)


def test_not_finite_logits_fail_one_request_only(
    engine: Engine, submit: Any, reference: Any, make_adapter: Callable[..., Path]
) -> None:
    # Finite weights, but their product overflows: the loading checks cannot see it.
    engine.load_adapter("huge", str(make_adapter("huge", size=1e18)))
    neighbour = submit(engine, "fine", max_tokens=120)
    begun = [neighbour.next().token_id]
    broken = submit(engine, "broken and rather long so that it fills more of its slot than the next", model="huge")
    with pytest.raises(GenerationFailedError, match="not finite"):
        broken.rest()
    assert begun + neighbour.tokens() == reference.greedy("fine", 120)
    # Both slots are used again: nothing of the broken request may be left in them.
    again = [submit(engine, prompt, max_tokens=20) for prompt in ("short", "er")]
    assert [one.tokens() for one in again] == [reference.greedy(prompt, 20) for prompt in ("short", "er")]


def test_queue_is_bounded_and_recovers(start_engine: Callable[..., Engine], model_dir: Path, submit: Any) -> None:
    engine = start_engine(model_dir, max_num_seqs=1, max_waiting=2)
    running = submit(engine, max_tokens=4000)
    running.next()
    waiting = [submit(engine), submit(engine)]
    with pytest.raises(QueueFullError):
        submit(engine)
    running.generation.aborted = True
    for one in waiting:
        one.rest()
    assert len(submit(engine, max_tokens=3).tokens()) == 3


def test_aborted_requests_leave(start_engine: Callable[..., Engine], model_dir: Path, submit: Any) -> None:
    engine = start_engine(model_dir, max_num_seqs=1)
    running, waiting, last = submit(engine, max_tokens=4000), submit(engine, max_tokens=4000), submit(engine)
    running.next()
    running.generation.aborted = waiting.generation.aborted = True
    last.rest()
    assert waiting.events.empty()
    assert engine.loop.generated_tokens < 4000
