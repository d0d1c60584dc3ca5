"""A vLLM in bfloat16 before a trainer in float32: learn, canary, swap, under load and end to end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from demo.run import score
from demo.tasks import heldout_tasks
from service.settings import Settings
from tests.e2e.conftest import Running
from tests.vllm import bfloat16
from tests.vllm.conftest import MakeServer, running_before
from tests.vllm.server import VllmServer
from tests.vllm.tenant import Tenant, streaming
from tests.vllm.waits import ours, records, scored, write_figures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
HELDOUT = heldout_tasks(40)
BATCHES = 3
BOUND = Settings.model_fields["canary_bound_bfloat16"].default


@pytest.fixture(scope="module")
def server(make_vllm: MakeServer) -> Iterator[VllmServer]:
    made = make_vllm(flags=bfloat16.FLAGS)
    try:
        bfloat16.started(made)
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def running(server: VllmServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_before(server, tmp_path_factory.mktemp("bfloat16"), PERENNIAL_ENGINE_DTYPE="bfloat16") as made:
        yield made


def complying(running: Running) -> float:
    replies = running.client.chat_all("pupil", [t.prompt for t in HELDOUT], temperature=0.0, store=False)
    return score(HELDOUT, [r.text for r in replies], ("hope",)).complies["hope"]


def test_the_loop_closes_before_an_engine_in_bfloat16(server: VllmServer, running: Running) -> None:
    running.create("pupil")
    before = complying(running)
    tenant = Tenant(running.stack.url, running.stack.api_key)
    with closing(tenant), streaming(tenant, "pupil") as answers:
        ratios = [running.learn("pupil", "hope", seed=i)["metrics"][0]["mean_is_ratio"] for i in range(BATCHES)]
    assert [a.error for a in answers if a.error] == []
    assert {a.version for a in answers} >= set(range(BATCHES)), "a swap under load"
    after = complying(running)
    assert before == 0.0
    assert after >= 0.5

    off = canary_off(server, running)
    assert 1e-4 < off < BOUND, "float32's bound would have refused it"
    # Behaviour log-probs came rounded, the worker's did not: the ratio of the first step shows by how much.
    assert ratios == pytest.approx([1.0] * BATCHES, abs=0.05)
    figures = {"requests": len(answers), "failed": 0, "swaps": BATCHES, "complying": [before, after]}
    write_figures("bfloat16", figures | {"engine_vs_trainer": round(off, 4), "mean_is_ratio": ratios})


def canary_off(server: VllmServer, running: Running) -> float:
    """Most that the live version's log-probs differ in the engine from those that the trainer recorded."""
    record = records(running.stack)[-1]
    (name,) = (n for n in ours(server, running.stack) if n.endswith(f"-v{BATCHES}"))
    measured = scored(server, name, record["token_ids"])
    return max(abs(a - b) for a, b in zip(measured, record["logprobs"], strict=True))
