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


TYPICAL = 0.25
"""Share of the bound on one log-prob that all together (root mean square) may use: rounding hits tokens one by one, a
wrong scale or a layer that is left out hits most of them."""


def disagreement(canary: Canary, measured: list[float], bound: float) -> str | None:
    """Why these log-probs are not the version's, or None.

    `bound`: most that one log-prob may differ, nats; their root mean square a quarter of that. Where version and
    parent are further apart than an eighth, the engine must also be nearer to the version than to its parent.
    """
    if len(measured) != len(canary.logprobs) or not all(map(math.isfinite, measured)):
        return (
            f"canary: the engine gave {len(measured)} log-probs for {len(canary.logprobs)} tokens, or not finite ones."
        )
    most = max(abs(x - y) for x, y in zip(measured, canary.logprobs, strict=True))
    if most > bound:
        return f"canary: the engine's log-probs differ from the trainer's by up to {most:.6f}; {bound:g} is allowed."
    off, from_parent = distance(measured, canary.logprobs), distance(measured, canary.parent_logprobs)
    if distance(canary.logprobs, canary.parent_logprobs) > TYPICAL * bound / 2 and from_parent <= off:
        return f"canary: the engine answers as the parent does ({from_parent:.6f} from it, {off:.6f} from the version)."
    if off > TYPICAL * bound:
        return (
            f"canary: the engine's log-probs differ from the trainer's by {off:.6f} in general (root mean square); "
            f"{TYPICAL * bound:g} is allowed."
        )
    return None


def distance(a: list[float], b: list[float]) -> float:
    """Root mean square of the differences of two lists of the same length, at least one number each."""
    return math.dist(a, b) / math.sqrt(len(a))
