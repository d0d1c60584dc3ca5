"""One authentication dependency: every route names the scope it needs, or is public by name in `service.app`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPBearer

from service.context import Context
from service.db.glance import NotNow
from service.errors import Forbidden, Unauthenticated
from service.store.keys import Principal

_bearer = HTTPBearer(auto_error=False, description="An API key made by `perennial keys create`.")
_header = APIKeyHeader(name="x-api-key", auto_error=False, description="The same key, as Anthropic's clients send it.")


FEEDBACK_SCOPE = "feedback:write"
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


async def context_of(request: Request) -> Context:
    # Dependencies that do no I/O are coroutines: FastAPI runs plain functions on a thread, once per dependency.
    context: Context = request.app.state.context
    return context


Ctx = Annotated[Context, Depends(context_of)]


class KeyFirst(APIRoute):
    """Checks the key before the body is read: who has none makes us parse nothing."""

    def get_route_handler(self) -> Handler:
        handler = self.after_key()

        async def checked(request: Request) -> Response:
            request.state.principal = await principal(request)
            return await handler(request)

        return checked

    def after_key(self) -> Handler:
        """What answers once the key's owner is in `request.state.principal`."""
        return super().get_route_handler()


def guarded(*, route_class: type[KeyFirst] = KeyFirst, **options: Any) -> APIRouter:
    """A router of which every route needs a key."""
    return APIRouter(route_class=route_class, dependencies=[Depends(_bearer), Depends(_header)], **options)


async def principal(request: Request) -> Principal:
    """The owner of the presented key."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key")
    if key and (found := await owner_of(request.app.state.context, key)) is not None:
        return found
    raise Unauthenticated("Send a valid API key: `Authorization: Bearer pk_...`.")


async def owner_of(context: Context, key: str) -> Principal | None:
    """Looked up each time: none is remembered. Where that takes more than a glance, requests that come together are
    looked up together."""
    try:
        return context.keys.glance(context.database.glance, key)
    except NotNow:
        return await context.callers.submit(key)


async def _checked(request: Request) -> Principal:
    found: Principal = request.state.principal
    return found


Caller = Annotated[Principal, Depends(_checked)]


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
chat_tenant = _tenant("chat")
ChatTenant = Annotated[str, Depends(chat_tenant)]
FeedbackTenant = Annotated[str, Depends(_tenant(FEEDBACK_SCOPE))]
JobsReader = Annotated[str, Depends(_tenant("jobs:read"))]
JobsWriter = Annotated[str, Depends(_tenant("jobs:write"))]
AdaptersReader = Annotated[str, Depends(_tenant("adapters:read"))]
AdaptersWriter = Annotated[str, Depends(_tenant("adapters:write"))]
WorkerKey = Annotated[Principal, Depends(requires("worker"))]
