"""Controls: what must not change anything, and what must not break anything."""

from __future__ import annotations

import pytest

from demo.client import Json
from demo.model_build.remarks import PRAISE
from demo.run import Score, score
from demo.tasks import PREFERENCES, WANTED, heldout_tasks
from tests.e2e.conftest import Running

HELDOUT = heldout_tasks(60)


def measured(running: Running, model: str) -> Score:
    replies = running.client.chat_all(model, [t.prompt for t in HELDOUT], temperature=0.0, store=False)
    return score(HELDOUT, [r.text for r in replies], WANTED)


def remark_with(running: Running, name: str, remarks: list[str], seed: int) -> Json:
    """One batch of answers, remarked on in turn, until its version is served; returns the job."""
    replies = running.ask(name, 8, seed)
    items = [{"completion_id": r.id, "feedback": remarks[i % len(remarks)]} for i, r in enumerate(replies)]
    return running.client.follow(running.client.send_feedback(items)["job_id"], lambda _: None)


@pytest.mark.slow
def test_praise_alone_changes_nothing(running: Running) -> None:
    running.create("praised")
    jobs = [remark_with(running, "praised", list(PRAISE), seed) for seed in range(8)]
    after = measured(running, "praised")
    assert jobs[-1]["version"] == 8
    assert jobs[-1]["metrics"][-1]["base_kl"] < 0.1
    assert max(after.complies.values()) <= 0.02
    assert after.content >= measured(running, "praised@v0").content - 0.02
    assert running.client.call("GET", "/v1/adapters/praised/versions/8")["standing_feedback"] == []


@pytest.mark.slow
def test_contradictory_batches_do_not_collapse_the_model(running: Running) -> None:
    running.create("torn")
    both = [PREFERENCES["upper"].remarks[0], PREFERENCES["lower"].remarks[0]]
    for seed in range(6):
        remark_with(running, "torn", both, seed)
    after = measured(running, "torn")
    assert after.content >= 0.85 * measured(running, "torn@v0").content
