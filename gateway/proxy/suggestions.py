"""What a caller may have meant by a path that is not there: one of the routes that anybody may know."""

from collections.abc import Collection

DID_YOU_MEAN = "There is no such route here; did you mean {}?"
LONGEST_PATH, MOST_PARTS = 120, 8
PREFIXES = ("", "/v1", "/api")
INSTEAD = {"/v1": "/v1/models", "/api": "/api/tags", "/responses": "/v1/chat/completions"}
VARIABLE = "/v1/models/"
# What paths of OpenAI's API begin with where a client's base URL lacks /v1, or has more in front of it.
OPENAIS = frozenset(
    "v1 openai assistants audio batches chat completions conversations embeddings evals files fine_tuning images models "
    "moderations realtime responses threads uploads vector_stores videos".split()
)


def suggest(path: str, routes: Collection[str]) -> str:
    """The route of `routes` that differs in slashes, case, what stands in front or how far it goes; "" for none."""
    parts = _parts(path)
    if not parts:
        return ""
    ends = ["/" + "/".join(parts[start:]) for start in range(len(parts))]
    # Half of a route is one, two letters are not.
    longer = [route for route in routes if route.startswith(ends[0])] if len(parts) > 1 and len(parts[-1]) > 2 else []
    found = (named for end in ends[1:] if (named := _named(end, routes)))
    return _named(ends[0], routes) or min(longer, key=len, default="") or next(found, "")


def beginning(path: str) -> str:
    """ "/v1" for what belongs to OpenAI's API, else ""."""
    parts = _parts(path)
    return "/v1" if parts and (parts[0] in OPENAIS or parts[:2] == ["api", "v1"]) else ""


def _parts(path: str) -> list[str]:
    """In lower case; none where they are too many."""
    parts = [part for part in path.lower().split("/") if part] if len(path) <= LONGEST_PATH else []
    return parts if len(parts) <= MOST_PARTS else []


def _named(end: str, routes: Collection[str]) -> str:
    if end in INSTEAD:
        return INSTEAD[end]
    if end.startswith(VARIABLE):
        return VARIABLE + "{id}"
    return next((prefix + end for prefix in PREFIXES if prefix + end in routes), "")
