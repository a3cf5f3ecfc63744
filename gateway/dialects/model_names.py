"""Which spellings name the same model, and which models an allow-list contains.

Ollama treats `llama3.2`, `LLAMA3.2:Latest`, `library/llama3.2`, `https://registry.ollama.ai/library/llama3.2` and
`llama3.2:local` as one model (its types/model package and its `:cloud`/`:local` source suffixes); the gateway decides by
one canonical spelling.
"""

import fnmatch
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

LONGEST_NAME = 350
NAME_RULE = f"must be a string of at most {LONGEST_NAME} printable characters"
REMEMBERED_NAMES = 2000
# Listing models matches each pattern against each model.
MOST_PATTERNS = 100
DEFAULT_HOST, DEFAULT_NAMESPACE = "registry.ollama.ai/", "library/"


class ModelName(NamedTuple):
    """`canonical` is lower case, without default host and namespace, always with a tag."""

    canonical: str
    cloud: bool


def is_name(text: object) -> bool:
    """Whether a value can be a model's name at all."""
    return isinstance(text, str) and len(text) <= LONGEST_NAME and text.isprintable() and not text.isspace() and text != ""


@lru_cache(maxsize=REMEMBERED_NAMES)
def canonical(name: str) -> ModelName:
    """Raises ValueError on a name that is too long, so that nothing of that size is processed or cached."""
    if len(name) > LONGEST_NAME:
        raise ValueError(f"a model's name {NAME_RULE}")
    plain = name.strip().lower()
    plain = plain.partition("://")[2] or plain
    cloud = plain.endswith(":cloud") or (":" in plain.rpartition("/")[2] and plain.endswith("-cloud"))
    while plain.endswith(":local"):
        plain = plain.removesuffix(":local")
    plain = plain.removeprefix(DEFAULT_HOST).removeprefix(DEFAULT_NAMESPACE)
    if ":" not in plain.rpartition("/")[2]:
        plain += ":latest"
    return ModelName(plain, cloud)


def is_plain(name: str, canonical_name: str) -> bool:
    """Whether a client's spelling can be sent to a backend unchanged."""
    lowered = name.lower()
    return lowered == canonical_name or f"{lowered}:latest" == canonical_name


@dataclass(frozen=True)
class AllowList:
    """The models that a key may use: globs; empty means all. A cloud model needs a pattern that names it as such."""

    patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # A pattern that is longer than any name matches none.
        usable = [pattern.strip().lower() for pattern in self.patterns if len(pattern) <= LONGEST_NAME]
        globs = [pattern for pattern in usable if is_glob(pattern)]
        local = [glob_expression(glob) for glob in globs] if self.patterns else [".*"]
        cloud = [glob_expression(glob) for glob in globs if canonical(glob).cloud]
        names = frozenset(canonical(pattern).canonical for pattern in usable if not is_glob(pattern))
        object.__setattr__(self, "_names", names)
        object.__setattr__(self, "_local", re.compile("|".join(local)) if local else None)
        object.__setattr__(self, "_cloud", re.compile("|".join(cloud)) if cloud else None)

    def allows(self, name: str, *, cloud: bool = False) -> bool:
        """`name` must be canonical."""
        if name in self._names:  # type: ignore[attr-defined]
            return True
        expression: re.Pattern[str] | None = self._cloud if cloud else self._local  # type: ignore[attr-defined]
        return expression is not None and expression.fullmatch(name) is not None


def is_glob(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


def glob_expression(glob: str) -> str:
    """A glob without a tag matches every tag. fnmatch's expressions do not backtrack."""
    whole = fnmatch.translate(glob)
    return whole if ":" in glob else f"{whole}|{fnmatch.translate(glob + ':latest')}"


def rule_pattern(pattern: str) -> str:
    """The canonical spelling of a pattern that names one model; globs stay as they are."""
    return pattern if not pattern or is_glob(pattern) else canonical(pattern).canonical


def split_patterns(text: str) -> tuple[str, ...]:
    """Splits an operator's `MODELS="a b*"` at blanks and commas."""
    return tuple(dict.fromkeys(text.replace(",", " ").split()))
