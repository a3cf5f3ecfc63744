"""The public route that a caller may have meant by a path that does not exist."""

from collections.abc import Collection

DID_YOU_MEAN = "There is no such route here; did you mean {}?"
LONGEST_PATH, MOST_PARTS = 120, 8
PREFIXES = ("", "/v1", "/api")
INSTEAD = {"/v1": "/v1/models", "/api": "/api/tags"}
VARIABLE = "/v1/models/"
# How paths of OpenAI's API begin where a client's base URL lacks /v1 or has something in front of it.
OPENAIS = frozenset(
    "v1 openai assistants audio batches chat completions conversations embeddings evals files fine_tuning images messages "
    "models moderations realtime responses threads uploads vector_stores videos".split()
)


def suggest(path: str, routes: Collection[str]) -> str:
    """The route that differs only in slashes, case, a prefix or its length; "" for none."""
    parts = _parts(path)
    if not parts:
        return ""
    ends = ["/" + "/".join(parts[start:]) for start in range(len(parts))]
    # The beginning of a route is enough, unless its last part has only two letters.
    longer = [route for route in routes if route.startswith(ends[0])] if len(parts) > 1 and len(parts[-1]) > 2 else []
    found = (named for end in ends[1:] if (named := _named(end, routes)))
    return _named(ends[0], routes) or min(longer, key=len, default="") or next(found, "")


def beginning(path: str) -> str:
    """ "/v1" for paths of OpenAI's API, else ""."""
    parts = _parts(path)
    return "/v1" if parts and (parts[0] in OPENAIS or parts[:2] == ["api", "v1"]) else ""


def _parts(path: str) -> list[str]:
    """The parts in lower case; none where there are too many."""
    parts = [part for part in path.lower().split("/") if part] if len(path) <= LONGEST_PATH else []
    return parts if len(parts) <= MOST_PARTS else []


def _named(end: str, routes: Collection[str]) -> str:
    if end in INSTEAD:
        return INSTEAD[end]
    if end.startswith(VARIABLE):
        return VARIABLE + "{id}"
    return next((prefix + end for prefix in PREFIXES if prefix + end in routes), "")
