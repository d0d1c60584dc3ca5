"""Tools, calls of them, and the wanted format of an answer, in OpenAI's shape."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from api_schemas.base import Request, Text

MAX_TOOLS = 128
MAX_JSON_DEPTH = 32
MAX_JSON_NODES = 4096
"""A schema is compiled into a grammar by the engine: its size is bounded here."""
MAX_JSON_TEXT = 100_000
"""Characters of all strings and names together. vLLM took 20 s and more for 2.7 million of an `enum`; others waited."""
MAX_LITERAL = 512
"""Characters of one name, or of one value of an `enum`: ten of 9,000 took vLLM 37 s."""
MAX_COUNT = 65_536
COUNTS = frozenset(
    "minItems maxItems minLength maxLength minProperties maxProperties minContains maxContains".split()  # noqa: SIM905
)
"""What is counted is unrolled: `minItems` of 2**31 takes vLLM's engine 15 GB, one of 2**62 ends it."""


def _bounded(value: dict[str, Any]) -> dict[str, Any]:
    """Only what JSON in UTF-8 can hold, within the bounds."""
    level: list[Any] = [value]
    nodes = text = 0
    for _ in range(MAX_JSON_DEPTH):
        nodes += len(level)
        if nodes > MAX_JSON_NODES:
            raise ValueError(f"must have at most {MAX_JSON_NODES} values")
        text += sum(len(node) for node in level if isinstance(node, str))
        if text > MAX_JSON_TEXT:
            raise ValueError(f"must have at most {MAX_JSON_TEXT} characters")
        deeper: list[Any] = []
        for node in level:
            deeper += _inside(node)
        level = deeper
    if level:
        raise ValueError(f"must be nested at most {MAX_JSON_DEPTH} levels deep")
    return value


def _inside(node: Any) -> list[Any]:
    """What a node holds, keys too. Raises ValueError for a leaf that could neither be stored nor sent."""
    if isinstance(node, dict):
        _affordable(node)
        return [*node.keys(), *node.values()]
    if isinstance(node, list):
        return node
    if isinstance(node, str) and ("\x00" in node or not _encodable(node)):
        raise ValueError("must not contain NUL characters or lone surrogates")
    if isinstance(node, float) and not math.isfinite(node):
        raise ValueError("must not contain NaN or infinite numbers")
    return []


def _affordable(node: dict[str, Any]) -> None:
    """Raises ValueError for what an engine would unroll, or spell out, for too long."""
    for name in COUNTS & node.keys():
        if isinstance(count := node[name], int | float) and not 0 <= count <= MAX_COUNT:
            raise ValueError(f"{name} must lie between 0 and {MAX_COUNT}")
    values = node.get("enum")
    literals = [*node.keys(), node.get("const"), *(values if isinstance(values, list) else ())]
    if any(isinstance(literal, str) and len(literal) > MAX_LITERAL for literal in literals):
        raise ValueError(f"names and values of an enum must have at most {MAX_LITERAL} characters")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


JsonObject = Annotated[dict[str, Any], AfterValidator(_bounded)]
ToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
CallId = Annotated[Text, StringConstraints(min_length=1, max_length=128)]


class Function(Request):
    name: ToolName
    description: Text | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Request):
    type: Literal["function"]
    function: Function


class FunctionName(Request):
    name: ToolName


class NamedTool(Request):
    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def _shallow(arguments: str) -> str:
    """Engines read it as JSON again; what is none they take as it is."""
    if arguments.count("[") + arguments.count("{") <= MAX_JSON_DEPTH:
        return arguments
    try:
        level = [json.loads(arguments)]
        for _ in range(MAX_JSON_DEPTH):
            level = [inner for node in level for inner in _holds(node)]
    except ValueError:
        return arguments
    except RecursionError:
        level = [arguments]
    if level:
        raise ValueError(f"must be nested at most {MAX_JSON_DEPTH} levels deep")
    return arguments


def _holds(node: Any) -> Collection[Any]:
    return node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


class CalledFunction(Request):
    name: ToolName
    arguments: Annotated[Text, AfterValidator(_shallow)]
    """JSON, as the model wrote it."""


class ToolCall(Request):
    """A call that the model made in an earlier turn."""

    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    """Sent back by clients that put a stream together; not forwarded."""

    def plain(self) -> dict[str, Any]:
        return self.model_dump(exclude={"index"})


class JsonSchema(Request):
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Text | None = None
    schema_: Annotated[JsonObject | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Request):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema belongs to type json_schema, and to no other")
        return self

    @property
    def constrains(self) -> bool:
        return self.type != "text"

    def plain(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True, exclude_none=True)
