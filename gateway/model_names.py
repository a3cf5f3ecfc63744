"""When two spellings name one model, and which models an allow-list means.

Ollama takes `llama3.2`, `LLAMA3.2:Latest`, `library/llama3.2`, `https://registry.ollama.ai/library/llama3.2` and
`llama3.2:local` for one model (its types/model package and its `:cloud`/`:local` source suffixes); every decision here
is taken on one canonical spelling.
"""

import fnmatch
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

LONGEST_NAME = 350
SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://")
DEFAULT_HOST, DEFAULT_NAMESPACE = "registry.ollama.ai/", "library/"


class ModelName(NamedTuple):
    """`canonical` is lower case, without default host and namespace, always with a tag."""

    canonical: str
    cloud: bool


@lru_cache(maxsize=10_000)
def canonical(name: str) -> ModelName:
    plain = SCHEME.sub("", name.strip().lower(), count=1)
    cloud = plain.endswith(":cloud") or (":" in plain.rpartition("/")[2] and plain.endswith("-cloud"))
    while plain.endswith(":local"):
        plain = plain.removesuffix(":local")
    plain = plain.removeprefix(DEFAULT_HOST).removeprefix(DEFAULT_NAMESPACE)
    if ":" not in plain.rpartition("/")[2]:
        plain += ":latest"
    return ModelName(plain, cloud)


def is_plain(name: str, canonical_name: str) -> bool:
    """Whether a client's spelling is safe to send on as it is."""
    lowered = name.lower()
    return lowered == canonical_name or f"{lowered}:latest" == canonical_name


@dataclass(frozen=True)
class AllowList:
    """The models a key may use: globs; empty means all. A cloud model needs a pattern that names it as such."""

    patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        local = [_expression(pattern) for pattern in self.patterns] or [".*"]
        cloud = [_expression(pattern) for pattern in self.patterns if _names_cloud(pattern)]
        object.__setattr__(self, "_local", re.compile("|".join(local)))
        object.__setattr__(self, "_cloud", re.compile("|".join(cloud)) if cloud else None)

    def allows(self, name: str, *, cloud: bool = False) -> bool:
        """`name` must be canonical."""
        expression: re.Pattern[str] | None = self._cloud if cloud else self._local  # type: ignore[attr-defined]
        return expression is not None and expression.fullmatch(name) is not None


def _names_cloud(pattern: str) -> bool:
    return canonical(pattern).cloud or not _is_glob(pattern)


def _is_glob(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


def _expression(pattern: str) -> str:
    """`llama3.2` means `llama3.2:latest`; a glob without a tag means every tag."""
    plain = pattern.strip().lower()
    if not _is_glob(plain):
        return re.escape(canonical(plain).canonical)
    whole = fnmatch.translate(plain)
    return whole if ":" in plain else f"{whole}|{fnmatch.translate(plain + ':latest')}"


def rule_pattern(pattern: str) -> str:
    """One spelling for a rule that names one model; globs stay as they are."""
    return pattern if not pattern or _is_glob(pattern) else canonical(pattern).canonical


def split_patterns(text: str) -> tuple[str, ...]:
    """`MODELS="a b*"` of an operator: separated by blanks or commas."""
    return tuple(dict.fromkeys(text.replace(",", " ").split()))
