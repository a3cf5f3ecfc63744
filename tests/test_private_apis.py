"""The private parts of libraries that the code leans on for speed: each exists, is used, and is in the decision record."""

import inspect
import re
from functools import reduce

import aiohttp
import pytest
from aiohttp.client_proto import ResponseHandler
from prometheus_client import mmap_dict
from redis.asyncio import connection as redis_connection
from uvicorn.protocols.http import httptools_impl

from tests.support import documents
from tests.support.project import PROJECT

RECORD = "docs/decisions/0005-private-apis-for-speed.md"
# What the record's names stand for in the library that they belong to.
PARTS = {
    "ClientRequest": aiohttp,
    "TCPConnector": aiohttp,
    "StreamReader": aiohttp,
    "ResponseHandler": aiohttp.client_proto,
    "HttpToolsProtocol": httptools_impl,
    "RequestResponseCycle": httptools_impl,
    "STATUS_LINE": httptools_impl,
    "Connection": redis_connection,
    "MmapedDict": mmap_dict,
}
# Named to say what is not used.
AVOIDED = {"ClientSession.request"}


def named() -> list[tuple[str, str]]:
    """The private parts of the record's table, each with the file that uses it."""
    rows = documents.tables(documents.page(RECORD))
    return [
        (part, file.strip("`"))
        for _, parts, file, _ in rows
        for part in re.findall(r"`([\w.]+)`", parts)
        if part not in AVOIDED
    ]


@pytest.mark.parametrize(("part", "file"), named())
def test_every_recorded_private_api_exists_and_is_used(part: str, file: str) -> None:
    name, _, attribute = part.partition(".")
    found = getattr(PARTS[name], name)
    if attribute:
        sources = [inspect.getsource(base) for base in found.__mro__ if base is not object]
        assert any(re.search(rf"\b{attribute}\b", source) for source in sources), f"{part} is not in the installed library"
    source = (PROJECT / "gateway" / file).read_text(encoding="utf-8")
    used = attribute or name
    assert re.search(rf"\b{used}\b", source), f"gateway/{file} does not use {part}: take it out of {RECORD}"


def test_every_private_api_that_the_code_uses_is_recorded() -> None:
    """The linter is silenced on those lines. What a class uses of its parent needs no such comment: see the next test."""
    lines = [
        line
        for path in (PROJECT / "gateway").rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "SLF001" in line
    ]
    reached = set(re.findall(r"(?<!self)\.(_[a-z]\w*)", "\n".join(lines)))
    assert reached
    assert reached - {part.partition(".")[2] for part, _ in named()} == set(), f"add it to {RECORD}, with what it buys"


def test_the_classes_with_private_apis_are_those_of_the_record() -> None:
    from gateway.edge.protocol import Protocol
    from gateway.fleet.backends.http_client import BoundedResponseHandler, ConnectionPool, DirectReader

    parents = (httptools_impl.HttpToolsProtocol, aiohttp.StreamReader, aiohttp.TCPConnector, ResponseHandler)
    ours = (Protocol, DirectReader, ConnectionPool, BoundedResponseHandler)
    assert all(issubclass(child, parent) for child, parent in zip(ours, parents, strict=True))
    for child, parent in zip(ours, parents, strict=True):
        theirs = reduce(set.union, (_private_names(base) for base in parent.__mro__ if base is not object), set[str]())
        mine = _private_names(child) & theirs
        known = {part.partition(".")[2] for part, _ in named() if part.startswith(parent.__name__)}
        assert mine <= known, f"{child.__name__} uses {sorted(mine - known)} of {parent.__name__}: add it to {RECORD}"


def _private_names(kind: type) -> set[str]:
    found = re.findall(r"\bself\.(_[a-z]\w*)|def (_[a-z]\w*)", inspect.getsource(kind))
    return {name for pair in found for name in pair if name}
