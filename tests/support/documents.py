"""The documents of the repository, as its tests read them."""

import re
from collections.abc import Iterator
from pathlib import Path

from tests.support.project import PROJECT


def pages() -> dict[str, str]:
    """The text of every page, by its path in the repository."""
    paths = [PROJECT / "README.md", *PROJECT.glob("docs/**/*.md"), *PROJECT.glob(".github/**/*.md")]
    return {str(path.relative_to(PROJECT)): path.read_text(encoding="utf-8") for path in sorted(paths)}


def page(name: str) -> str:
    return (PROJECT / name).read_text(encoding="utf-8")


def section(name: str, heading: str) -> str:
    """What stands under a heading of a page, down to the next heading of the same level or a higher one."""
    pattern = rf"^(#+) {re.escape(heading)}\n(.*?)(?=^(?!\1#)#+ |\Z)"
    match = re.search(pattern, without_comments(page(name)), re.MULTILINE | re.DOTALL)
    assert match, f"{name} has no section {heading!r}"
    return match[2]


def without_comments(text: str) -> str:
    """A comment of a shell example begins as a heading does."""

    def indented(block: re.Match[str]) -> str:
        return re.sub(r"^#", " #", block[0], flags=re.MULTILINE)

    return re.sub(r"^```.*?^```", indented, text, flags=re.MULTILINE | re.DOTALL)


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", without_comments(text), re.MULTILINE)


def anchors(text: str) -> set[str]:
    """As GitHub makes them: a heading that stands twice gets a number."""
    found: set[str] = set()
    for heading in headings(text):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = 0
        while (anchor := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(anchor)
    return found


def links(text: str) -> list[str]:
    """Targets of links and pictures, without those in code."""
    prose = re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def blocks(text: str, language: str = r"\w*") -> list[str]:
    """The code of fenced blocks, of one language or of all; a block in a list is indented."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", body, flags=re.MULTILINE) for indent, body in found]


def code(text: str) -> Iterator[str]:
    """All that is written as code, in blocks and between words."""
    yield from blocks(text)
    yield from spans(text)


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))


def tables(text: str) -> list[list[str]]:
    """The cells of all rows of tables, heads and rules left out."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    rules = {number for number, row in enumerate(cells) if all(re.fullmatch(r":?-+:?", cell) for cell in row)}
    return [row for number, row in enumerate(cells) if number not in rules and number + 1 not in rules]


def exists(name: str) -> bool:
    return any((PROJECT / folder / name).exists() for folder in (".", "gateway"))


def relative(page_name: str, target: str) -> Path:
    """The file that a link of a page leads to."""
    return (PROJECT / page_name).parent / target
