"""Learning from what the teacher writes, through the whole stack."""

from __future__ import annotations

import pytest

from demo.run import score
from demo.tasks import heldout_tasks
from tests.e2e.conftest import Running

HELDOUT = heldout_tasks(60)


@pytest.mark.slow
@pytest.mark.parametrize("rollouts", ["teacher", "both"])
def test_a_preference_is_learnt_from_answers_of_the_teacher(running: Running, rollouts: str) -> None:
    name = f"guided-{rollouts}"
    running.create(name, rollouts=rollouts, learning_rate=7e-4, steps=8)
    jobs = [running.learn(name, "hope", seed=seed) for seed in range(4)]
    for job in jobs:
        assert all(6 <= step["teacher_written"] <= 8 for step in job["metrics"]), "it ends its answers, by and large"
    replies = running.client.chat_all(name, [t.prompt for t in HELDOUT], temperature=0.0, store=False)
    after = score(HELDOUT, [r.text for r in replies], ["hope"])
    assert after.complies["hope"] >= 0.9
    assert after.content >= 0.9
    assert running.client.call("GET", f"/v1/adapters/{name}/versions/4")["training"]["rollouts"] == rollouts
