"""URLs of stores, which may name several hosts; `urlsplit` of some Python versions refuses those."""

import re
from urllib.parse import SplitResult

# RFC 3986, appendix B.
PARTS = re.compile(r"(?:([^:/?#]+):)?(?://([^/?#]*))?([^?#]*)(?:\?([^#]*))?(?:#(.*))?", re.DOTALL)


def split(text: str) -> SplitResult:
    found = PARTS.fullmatch(text)
    assert found is not None, "the expression matches every text"
    scheme, netloc, path, query, fragment = (part or "" for part in found.groups())
    return SplitResult(scheme.lower(), netloc, path, query, fragment)
