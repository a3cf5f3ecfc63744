"""How a backend can answer a call: its bytes are passed through, or the call is translated to a path that it has."""

from collections.abc import Collection
from typing import NamedTuple, cast

from gateway.dialects import registry
from gateway.dialects.dialect import Call, Kind
from gateway.dialects.translation import translators
from gateway.dialects.translation.translators import Translator
from gateway.fleet.catalog import Offer

# The route for conversations of each dialect.
CHATS = {
    "ollama": "/api/chat",
    "openai": "/v1/chat/completions",
    "anthropic": "/v1/messages",
    "responses": "/v1/responses",
}
OPERATIONS = registry.operations(registry.dialects())


class Way(NamedTuple):
    """`translator` is None where bytes are passed through; `path` is the one at the backend."""

    path: str
    translator: Translator | None = None


def way_of(offer: Offer, call: Call) -> Way | None:
    """None if the backend of this offer cannot be asked for an answer to the call."""
    operation, kind = call.operation, cast("Kind", offer.kind)
    if kind in operation.kinds:
        return Way(operation.path)
    if operation.path in offer.routes and (operation.passes is None or operation.passes(call.body, kind)):
        return Way(operation.path)
    translator = translators.find(call, kind)
    return Way(translator.path, translator) if translator is not None else None


def speaks(kind: str, routes: Collection[str]) -> list[str]:
    """The dialects in which a backend itself answers conversations."""
    return [dialect for dialect, path in CHATS.items() if kind in OPERATIONS[path].kinds or path in routes]


def translated(kind: str, routes: Collection[str]) -> list[str]:
    """The dialects from which conversations are translated for a backend."""
    known, own = translators.TRANSLATORS, speaks(kind, routes)
    return [dialect for dialect, path in CHATS.items() if dialect not in own and path in known and kind in known[path].kinds]
