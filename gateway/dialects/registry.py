"""The dialects that clients speak, and which one a path belongs to."""

from collections.abc import Callable, Mapping

from gateway.dialects.anthropic import Anthropic
from gateway.dialects.dialect import Dialect, Operation
from gateway.dialects.ollama import Ollama
from gateway.dialects.openai import OpenAI
from gateway.dialects.responses import Responses

# Paths of the OpenAI API's prefix that belong to other dialects.
OTHERS = {"messages": "anthropic", "responses": "responses"}

# Paths of the OpenAI dialect without the prefix /v1.
RERANK = frozenset({"/rerank", "/v2/rerank"})


def dialects() -> dict[str, Dialect]:
    """By name."""
    return {"ollama": Ollama(), "openai": OpenAI(), "anthropic": Anthropic(), "responses": Responses()}


def by_prefix(dialects: Mapping[str, Dialect]) -> Callable[[str], Dialect]:
    """A function that returns the dialect of a path: the path decides, never a header but for `/v1/models`."""

    def find(path: str) -> Dialect:
        if path == "/v1" or path.startswith("/v1/"):
            return dialects[OTHERS.get(path[4:].partition("/")[0], "openai")]
        return dialects["openai"] if path in RERANK else dialects["ollama"]

    return find


def operations(dialects: Mapping[str, Dialect]) -> dict[str, Operation]:
    """Those of all dialects, by path."""
    return {operation.path: operation for dialect in dialects.values() for operation in dialect.operations}
