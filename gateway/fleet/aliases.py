"""MODEL_ALIASES: other names of models, each for one model or for a chain of them, and the parser of this setting."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from gateway.dialects.model_names import (
    NAME_RULE,
    REMEMBERED_NAMES,
    ModelName,
    canonical,
    glob_expression,
    is_glob,
    is_name,
)

MOST_ALIASES, LONGEST_CHAIN = 1000, 16
NOT_CLOUD = "aliases do not lead to cloud models, and have no names of cloud models"


@dataclass(frozen=True)
class Alias:
    """`written` is its name as the operator wrote it, `name` the canonical spelling of that, or a glob in lower case.

    `targets` are the canonical names of models, in the order in which they are tried.
    """

    written: str
    name: str
    targets: tuple[str, ...]

    @property
    def is_glob(self) -> bool:
        return is_glob(self.name)


@dataclass(frozen=True)
class Aliases:
    """All aliases: those of one name, and globs in the operator's order, of which the first that matches counts."""

    exact: Mapping[str, Alias] = field(default_factory=dict)
    globs: tuple[Alias, ...] = ()

    def __post_init__(self) -> None:
        expressions = [(re.compile(glob_expression(alias.name)), alias) for alias in self.globs]

        @lru_cache(maxsize=REMEMBERED_NAMES)
        def matching(name: str) -> Alias | None:
            # All are tried, so that the time does not show which of them matches.
            found = [alias for expression, alias in expressions if expression.fullmatch(name)]
            return found[0] if found else None

        object.__setattr__(self, "_matching", matching)

    def __iter__(self) -> Iterator[Alias]:
        yield from self.exact.values()
        yield from self.globs

    def of(self, name: ModelName) -> Alias | None:
        """The alias of this name. Every name of a local model takes the same steps."""
        glob: Alias | None = self._matching(name.canonical)  # type: ignore[attr-defined]
        return None if name.cloud else self.exact.get(name.canonical, glob)


NO_ALIASES = Aliases()


def read_aliases(text: str) -> Aliases:
    """Raises ValueError, whose message says what is wrong."""
    entries = _entries(text)
    found = [_alias(written, targets) for written, targets in entries]
    names: dict[str, Alias] = {}
    for alias in found:
        if names.setdefault(alias.name, alias) is not alias:
            raise ValueError(f"{names[alias.name].written!a} and {alias.written!a} are the same name")
    exact = {name: alias for name, alias in names.items() if not alias.is_glob}
    for alias in found:
        for target in alias.targets:
            if target in exact and target != alias.name:
                raise ValueError(f"{alias.written!a} leads to {target!a}, which is an alias: an alias leads to models only")
    return Aliases(exact, tuple(alias for alias in found if alias.is_glob))


def _entries(text: str) -> list[tuple[str, Any]]:
    try:
        entries = json.loads(text, object_pairs_hook=_Pairs)
    except ValueError as wrong:
        raise ValueError(f"the value is not valid JSON: {wrong}") from None
    except RecursionError:
        raise ValueError("the value is nested too deeply") from None
    if not isinstance(entries, _Pairs):
        raise ValueError('the value must be a JSON object, such as {"gpt-4o-mini": "llama3.2"}')
    if len(entries) > MOST_ALIASES:
        raise ValueError(f"there are {len(entries)} aliases; at most {MOST_ALIASES} are possible")
    return list(entries)


class _Pairs(list[tuple[str, Any]]):
    """The fields of a JSON object, also those that are there twice."""


def _alias(written: str, value: Any) -> Alias:
    name = _name(written, "")
    chain = [value] if isinstance(value, str) else value
    if not isinstance(chain, list) or isinstance(chain, _Pairs) or not chain:
        raise ValueError(f"{written[:64]!a} must lead to a model, or to a list of models")
    if len(chain) > LONGEST_CHAIN:
        raise ValueError(f"{written[:64]!a} leads to {len(chain)} models; at most {LONGEST_CHAIN} are possible")
    targets = tuple(_name(target, written) for target in chain)
    if globs := [target for target in targets if is_glob(target)]:
        raise ValueError(f"{written[:64]!a} leads to {globs[0][:64]!a}, which is a glob: name one model")
    if len(set(targets)) < len(targets):
        raise ValueError(f"{written[:64]!a} leads to one model twice")
    return Alias(written.strip(), name, targets)


def _name(value: Any, of: str) -> str:
    """The canonical spelling of a name, or a glob; `of` is the alias that it is a target of."""
    if not isinstance(value, str) or not is_name(value):
        which = f"a model of {of[:64]!a}" if of else f"{str(value)[:64]!a}"
        raise ValueError(f"{which} is no name: it {NAME_RULE}")
    name, is_cloud = canonical(value)
    if is_cloud:
        raise ValueError(f"{value[:64]!a} is a cloud model: {NOT_CLOUD}")
    return value.strip().lower() if is_glob(value) else name
