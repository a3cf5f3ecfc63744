"""The list of models as Anthropic's clients read it, a page at a time."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from gateway.core.errors import BadRequest
from gateway.dialects.model_entries import context_of

MOST_OF_A_PAGE = 1000


def model_info(entry: Mapping[str, Any]) -> dict[str, Any]:
    """One model, from its entry in OpenAI's list."""
    name, context = str(entry["id"]), context_of(dict(entry))
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": _time(entry.get("created")),
        "lifecycle": "active",
        **({"max_input_tokens": context} if context else {}),
    }


def models_page(entries: Sequence[Mapping[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """`query` may have `limit`, and `after_id` or `before_id`; raises BadRequest where they are wrong.

    Without a limit the page has 1000 models, not 20 as Anthropic's: most clients read one page only.
    """
    names = [str(entry["id"]) for entry in entries]
    limit, begin, end = _limit(query), 0, len(names)
    if "after_id" in query and "before_id" in query:
        raise BadRequest("after_id and before_id cannot be used together")
    if "after_id" in query:
        begin = _place("after_id", query, names) + 1
    elif "before_id" in query:
        end = _place("before_id", query, names)
        begin = max(0, end - limit)
    page = entries[begin : min(end, begin + limit)]
    has_more = begin > 0 if "before_id" in query else begin + limit < end
    return {
        "data": [model_info(entry) for entry in page],
        "has_more": has_more,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
    }


def _limit(query: Mapping[str, str]) -> int:
    text = query.get("limit", str(MOST_OF_A_PAGE))
    if not (text.isascii() and text.isdecimal() and len(text) < 6 and 1 <= int(text) <= MOST_OF_A_PAGE):
        raise BadRequest(f"limit must be an integer from 1 to {MOST_OF_A_PAGE}")
    return int(text)


def _place(name: str, query: Mapping[str, str], names: Sequence[str]) -> int:
    try:
        return names.index(query[name])
    except ValueError:
        raise BadRequest(f"{name} names no model of this list") from None


def _time(created: object) -> str:
    """The Unix time as RFC 3339; the epoch where it is not known."""
    try:
        found = datetime.fromtimestamp(created if isinstance(created, int | float) else 0, UTC)
    except (ValueError, OverflowError, OSError):
        found = datetime.fromtimestamp(0, UTC)
    return found.strftime("%Y-%m-%dT%H:%M:%SZ") if found.year >= 1000 else "1970-01-01T00:00:00Z"
