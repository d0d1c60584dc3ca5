"""One authentication dependency: every route names the scope it needs, or is public by name in `service.app`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from service.context import Context
from service.errors import Forbidden, Unauthenticated
from service.store.keys import Principal

_bearer = HTTPBearer(auto_error=False, description="An API key made by `perennial keys create`.")
_header = APIKeyHeader(name="x-api-key", auto_error=False, description="The same key, as Anthropic's clients send it.")


async def context_of(request: Request) -> Context:
    # Dependencies that do no I/O are coroutines: FastAPI runs plain functions on a thread, once per dependency.
    context: Context = request.app.state.context
    return context


Ctx = Annotated[Context, Depends(context_of)]


def principal(
    context: Ctx,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    header: Annotated[str | None, Depends(_header)],
) -> Principal:
    """The owner of the presented key."""
    key = credentials.credentials if credentials is not None else header
    if key is not None:
        with context.database.read() as s:
            found = context.keys.check(s, key)
        if found is not None:
            return found
    raise Unauthenticated("Send a valid API key: `Authorization: Bearer pk_...`.")


Caller = Annotated[Principal, Depends(principal)]


def requires(scope: str) -> Callable[[Principal], Awaitable[Principal]]:
    """A dependency that lets only keys of this scope pass."""

    async def guard(caller: Caller) -> Principal:
        if scope not in caller.scopes:
            raise Forbidden(f"This key lacks the scope '{scope}'.")
        return caller

    return guard


def _tenant(scope: str) -> Callable[[Principal], Awaitable[str]]:
    allowed = requires(scope)

    async def tenant(caller: Caller) -> str:
        if (owner := (await allowed(caller)).tenant_id) is None:
            raise Forbidden("A worker's key cannot act for a tenant.")
        return owner

    return tenant


# The calling tenant's id, by what its key must be allowed to do.
ChatTenant = Annotated[str, Depends(_tenant("chat"))]
FeedbackTenant = Annotated[str, Depends(_tenant("feedback:write"))]
JobsReader = Annotated[str, Depends(_tenant("jobs:read"))]
JobsWriter = Annotated[str, Depends(_tenant("jobs:write"))]
AdaptersReader = Annotated[str, Depends(_tenant("adapters:read"))]
AdaptersWriter = Annotated[str, Depends(_tenant("adapters:write"))]
WorkerKey = Annotated[Principal, Depends(requires("worker"))]
