"""Lua scripts that run in Redis."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Script(NamedTuple):
    sha: str
    text: str


def read_scripts(*folders: Path) -> dict[str, Script]:
    """All Lua scripts of the folders by name; each begins with those of its folder whose names begin with `common`."""
    return {name: script for folder in folders for name, script in _scripts_in(folder)}


def _scripts_in(folder: Path) -> Iterator[tuple[str, Script]]:
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.lua"))}
    common = "".join(texts.pop(name) for name in list(texts) if name.startswith("common"))
    for name, text in texts.items():
        whole = common + text
        yield name, Script(hashlib.sha1(whole.encode(), usedforsecurity=False).hexdigest(), whole)
