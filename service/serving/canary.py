"""The canary: does this engine compute what the trainer computed? Asked once per load, before any client is answered.

A wrong scale, a stale cache, a wrong base or a kernel that ignores some layers all load with 200 and answer fluently.
So the trainer records the log-probs of fixed tokens under the new version (and under its parent), and every engine
scores the same tokens after loading.
"""

from __future__ import annotations

import math

from api_schemas.worker import Canary
from service.engine_client import EngineClient
from service.errors import VersionRejected
from service.serving.artifacts import Artifact
from service.settings import Settings


async def check(engine: EngineClient, artifact: Artifact, settings: Settings) -> None:
    """Raises VersionRejected (`canary_failed`, with figures) when this engine and the trainer disagree.

    A version without a record, such as an upload, must at least answer with finite numbers.
    """
    if not settings.canary:
        return
    if artifact.canary is None:
        await engine.probe(artifact.name)
        return
    measured = await engine.score(artifact.name, artifact.canary.token_ids)
    if failure := disagreement(artifact.canary, measured, settings.canary_bound(artifact.canary.dtype)):
        raise VersionRejected(failure, code="canary_failed")


def disagreement(canary: Canary, measured: list[float], bound: float) -> str | None:
    """Why these log-probs are not the version's, or None.

    `bound`: most that one log-prob may differ, nats. Where version and parent are further apart than that, the engine
    must also be nearer to the version than to its parent.
    """
    if len(measured) != len(canary.logprobs) or not all(map(math.isfinite, measured)):
        return (
            f"canary: the engine gave {len(measured)} log-probs for {len(canary.logprobs)} tokens, or not finite ones."
        )
    off = distance(measured, canary.logprobs)
    if off > bound:
        return f"canary: the engine's log-probs differ from the trainer's by up to {off:.6f}; {bound:g} is allowed."
    learnt, from_parent = distance(canary.logprobs, canary.parent_logprobs), distance(measured, canary.parent_logprobs)
    if learnt > bound and from_parent <= off:
        return f"canary: the engine answers as the parent does ({from_parent:.6f} from it, {off:.6f} from the version)."
    return None


def distance(a: list[float], b: list[float]) -> float:
    """Largest difference of two lists of the same length."""
    return max((abs(x - y) for x, y in zip(a, b, strict=True)), default=0.0)
