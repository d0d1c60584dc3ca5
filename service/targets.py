"""From the name in a request to the version that answers it."""

from __future__ import annotations

from dataclasses import dataclass

import anyio

from service.context import Context
from service.db.glance import NotNow
from service.errors import NotFound
from service.serving.names import served_name
from service.store import versions


@dataclass(frozen=True)
class Target:
    """Who answers: a version of an adapter, or the base model (`n` 0)."""

    adapter_id: str | None
    adapter: str | None
    n: int
    base_model: str

    @property
    def model(self) -> str:
        """What the answer says: always the exact version."""
        return self.base_model if self.adapter is None else f"{self.adapter}@v{self.n}"

    @property
    def served(self) -> str:
        """The engine's name of it."""
        return served_name(self.adapter_id, self.n) if self.adapter_id is not None and self.n else self.base_model


async def resolve_target(context: Context, tenant_id: str, model: str) -> Target:
    """`name`, `name@v7` or the base model. Raises NotFound, Gone, Unprocessable for a rejected version."""
    if model == context.base_model:
        return Target(None, None, 0, context.base_model)
    name, at, version = model.partition("@v")
    if at and not (version.isascii() and version.isdigit() and len(version) < 10):
        raise NotFound(
            f"'{model[:80]}' is not a model: versions are written name@v7.", code="model_not_found", param="model"
        )
    wanted = tenant_id, name, int(version) if at else None
    try:
        found = versions.glance_served(context.database.glance, *wanted)
    except NotNow:
        found = await anyio.to_thread.run_sync(_read, context, *wanted)
    if found is None:
        raise NotFound(f"There is no model '{model[:80]}'.", code="model_not_found", param="model")
    return Target(found.adapter_id, name, found.n, found.base_model)


def _read(context: Context, tenant_id: str, name: str, n: int | None) -> versions.Found | None:
    with context.database.read() as s:
        return versions.find_served(s, tenant_id, name, n)
