"""What a caller may have meant by a path that is not there: one of the routes that anybody may know."""

from collections.abc import Collection

DID_YOU_MEAN = "There is no such route here; did you mean {}?"
LONGEST_PATH, MOST_PARTS = 120, 8
PREFIXES = ("", "/v1", "/api")
BEGINNINGS = {"/v1": "/v1/models", "/api": "/api/tags"}
VARIABLE = "/v1/models/"


def suggest(path: str, routes: Collection[str]) -> str:
    """The route of `routes` that differs in slashes, case, what stands in front or how far it goes; "" for none."""
    if len(path) > LONGEST_PATH:
        return ""
    parts = [part for part in path.lower().split("/") if part]
    if not 0 < len(parts) <= MOST_PARTS:
        return ""
    ends = ["/" + "/".join(parts[start:]) for start in range(len(parts))]
    # Half of a route is one, two letters are not.
    longer = [route for route in routes if route.startswith(ends[0])] if len(parts) > 1 and len(parts[-1]) > 2 else []
    found = (named for end in ends[1:] if (named := _named(end, routes)))
    return _named(ends[0], routes) or min(longer, key=len, default="") or next(found, "")


def _named(end: str, routes: Collection[str]) -> str:
    if end in BEGINNINGS:
        return BEGINNINGS[end]
    if end.startswith(VARIABLE):
        return VARIABLE + "{id}"
    return next((prefix + end for prefix in PREFIXES if prefix + end in routes), "")
