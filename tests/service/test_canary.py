"""After each load the engine's log-probs are compared with the trainer's: who disagrees serves nobody."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from api_schemas.worker import Canary
from service.serving.canary import disagreement
from service.serving.names import served_name
from service.settings import Settings
from tests.service import peft_files
from tests.service.fake_engine import LIKELIEST, LIKELIEST_VALUE
from tests.service.fleet import FakeFleet
from tests.service.harness import Stack, error_of

IDS = [5, 6, 7, 8]
NEW, PARENT = [-1.0, -2.0, -3.0], [-1.5, -2.0, -3.5]
RECORD = {"token_ids": IDS, "logprobs": NEW, "parent_logprobs": PARENT, "dtype": "float32"}


def commit(stack: Stack, **record: object) -> str:
    job = str(stack.alice.feedback("x")["job_id"])
    lease = stack.worker.must_lease()
    files = peft_files.manifest(peft_files.write_version(stack.root, lease))
    answer = stack.worker.commit(lease, files, canary=RECORD | record)
    assert answer.status_code == 200, answer.text
    return job


@pytest.fixture
def helper(stack: Stack) -> Stack:
    stack.alice.create()
    stack.converge()
    return stack


def name(stack: Stack, n: int = 1) -> str:
    return served_name(stack.alice.adapter()["id"], n)


def off(by: float) -> list[float]:
    return [NEW[0] + by, *NEW[1:]]


def test_an_engine_that_agrees_serves(helper: Stack) -> None:
    helper.engine.scores[name(helper)] = off(4e-5)
    job = commit(helper)
    helper.converge()
    assert helper.alice.job(job)["published"] is True
    assert helper.engine.probes.count(name(helper)) == len(NEW), "each token once per load"


@pytest.mark.parametrize(("measured", "published"), [(off(4e-5), True), (off(2e-4), False)])
def test_an_engine_of_processed_values_is_held_to_the_same(
    helper: Stack, measured: list[float], published: bool
) -> None:
    """There a token that alone may be drawn has the log-prob 0."""
    helper.engine.logprobs_mode = "processed_logprobs"
    helper.engine.scores[name(helper)] = measured
    job = commit(helper)
    helper.converge()
    assert helper.alice.job(job)["published"] is published


def test_an_engine_that_draws_nothing_for_texts_scores_the_prompt(helper: Stack) -> None:
    """The embedded one; vLLM's would end of it."""
    helper.engine.texts = False
    helper.engine.scores[name(helper)] = off(4e-5)
    job = commit(helper)
    helper.converge()
    assert helper.alice.job(job)["published"] is True
    assert not helper.engine.dead


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_the_likeliest_token_has_its_own_value(helper: Stack, mode: str) -> None:
    helper.engine.logprobs_mode = mode
    record = {"token_ids": [5, LIKELIEST, 7, 8], "logprobs": [LIKELIEST_VALUE, *NEW[1:]]}
    helper.engine.scores[name(helper)] = NEW
    job = commit(helper, **record)
    helper.converge()
    assert helper.alice.job(job)["published"] is True


@pytest.mark.parametrize("measured", [off(2e-4), PARENT, [-0.5] * 3, off(1e300)], ids=["off", "parent", "other", "far"])
def test_an_engine_that_disagrees_never_serves_it(helper: Stack, measured: list[float]) -> None:
    helper.engine.scores[name(helper)] = measured
    job = commit(helper)
    helper.converge()
    told = helper.alice.job(job)
    assert (told["status"], told["error"]["code"]) == ("failed", "canary_failed")
    assert "trainer's by up to" in told["error"]["message"]
    view = helper.alice.adapter()
    assert (view["live_version"], view["head_version"]) == (0, 0)
    assert helper.engine.adapters == {}, "withdrawn"
    assert [e for e in helper.engine.events if e[0] == "chat"] == []
    assert helper.alice.ok("GET", "/v1/adapters/helper/versions/1")["status"] == "rejected"


def test_only_the_replica_that_is_wrong_loses_it(make_stack: Callable[..., Stack]) -> None:
    fleet = FakeFleet(2)
    stack = make_stack(fleet, engine_urls=fleet.urls)
    stack.alice.create()
    stack.converge()
    served = name(stack)
    fleet.engines[0].scores[served] = PARENT
    fleet.engines[1].scores[served] = NEW
    job = commit(stack)
    stack.converge()
    assert stack.alice.job(job)["published"] is True
    assert [served in e.adapters for e in fleet.engines] == [False, True]
    for i in range(4):
        stack.alice.chat("helper", f"question {i}")
    assert fleet.chats() == [0, 4]


def test_a_live_version_that_a_restarted_engine_gets_wrong_is_not_served_by_it(helper: Stack) -> None:
    helper.engine.scores[name(helper)] = NEW
    commit(helper)
    helper.converge()
    helper.engine.scores[name(helper)] = PARENT
    helper.engine.forget()
    helper.converge()
    chat = {"model": "helper", "messages": [{"role": "user", "content": "x"}]}
    error_of(helper.alice.post("/v1/chat/completions", chat), 503, "version_unavailable")
    assert helper.alice.adapter()["live_version"] == 1


def test_the_bound_follows_the_less_exact_side(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack(engine_dtype="bfloat16")
    stack.alice.create()
    stack.converge()
    stack.engine.scores[name(stack)] = off(0.2)
    job = commit(stack)
    stack.converge()
    assert stack.alice.job(job)["published"] is True
    settings = stack.context.settings
    assert settings.canary_bound("float32") == settings.canary_bound_bfloat16


def test_an_engine_that_dies_of_the_canary_is_no_verdict(helper: Stack) -> None:
    helper.engine.dead = True
    job = commit(helper)
    helper.converge()
    assert helper.alice.job(job)["status"] == "succeeded"
    helper.engine.dead = False
    helper.engine.scores[name(helper)] = NEW
    helper.converge()
    assert helper.alice.job(job)["published"] is True


def test_workers_are_told_what_to_score(helper: Stack, make_stack: Callable[..., Stack]) -> None:
    helper.alice.feedback("x")
    lease = helper.worker.must_lease()
    assert lease.canary_prompt == helper.context.settings.canary_prompt
    helper.worker.call(lease, "release")
    off = make_stack(helper.engine, canary=False)
    assert off.worker.must_lease().canary_prompt is None


def test_a_record_of_the_wrong_length_is_refused(helper: Stack) -> None:
    helper.alice.feedback("x")
    lease = helper.worker.must_lease()
    files = peft_files.manifest(peft_files.write_version(helper.root, lease))
    answer = helper.worker.commit(lease, files, canary=RECORD | {"token_ids": [1, 2]})
    error_of(answer, 422, "invalid_parameter")


def record(new: list[float], parent: list[float]) -> Canary:
    return Canary(token_ids=[1] * (len(new) + 1), logprobs=new, parent_logprobs=parent, dtype="bfloat16")


def test_nearer_to_the_parent_than_to_the_version_is_a_disagreement() -> None:
    """Within the bound of both, as bfloat16 allows: then the nearer one counts."""
    it = record([-1.0, -1.0], [-1.06, -1.0])
    assert disagreement(it, [-1.01, -1.0], 0.05) is None
    assert "answers as the parent does" in str(disagreement(it, [-1.04, -1.0], 0.05))


def rounded(seed: int, tokens: int = 59) -> list[float]:
    """Differences like those of a real vLLM in bfloat16 (docs/operations.md)."""
    return list(np.random.default_rng(seed).normal(0.0, 0.047, tokens).clip(-0.23, 0.23))


@pytest.mark.parametrize("learnt", [0.0, 0.02, 0.065, 0.13, 0.3, 3.0])
def test_roundings_of_bfloat16_are_no_disagreement_however_little_was_learnt(learnt: float) -> None:
    bound = Settings().canary_bound_bfloat16
    for seed in range(50):
        base = [-2.0] * 59
        new = list(base + np.random.default_rng(1000 + seed).normal(0.0, learnt, 59))
        assert disagreement(record(new, base), [v + e for v, e in zip(new, rounded(seed), strict=True)], bound) is None


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
def test_an_engine_that_applies_another_scale_is_seen_through_the_roundings(scale: float) -> None:
    """A version that moved its log-probs by 0.3 in general, and by no more than the bound."""
    for seed in range(50):
        base = [-2.0] * 59
        moved = np.random.default_rng(1000 + seed).choice((-0.3, 0.3), 59)
        new = [b + d for b, d in zip(base, moved, strict=True)]
        measured = [b + scale * d + e for b, d, e in zip(base, moved, rounded(seed), strict=True)]
        said = disagreement(record(new, base), measured, Settings().canary_bound_bfloat16)
        assert said is not None
        assert scale or "answers as the parent does" in said or "by up to" in said


def test_a_version_that_learnt_nothing_may_equal_its_parent() -> None:
    it = record([-1.0, -1.0], [-1.0, -1.0])
    assert disagreement(it, [-1.0, -1.0], 1e-4) is None


@pytest.mark.parametrize("measured", [[-1.0], [-1.0, float("nan")], [-1.0, float("-inf")], []])
def test_what_cannot_be_compared_is_a_disagreement(measured: list[float]) -> None:
    assert disagreement(record([-1.0, -1.0], [-1.0, -1.0]), measured, 0.05) is not None
