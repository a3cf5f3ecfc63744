"""Verifies the hash chain of the audit from its beginning: finds rows changed, deleted or added since they were written."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime

from gateway.stores.postgres import Database, Row

EMPTY_CHAIN = bytes(32)
BATCHES_AT_ONCE, ROWS_AT_ONCE = 1000, 10_000
STATEMENT_S = 120.0
REPORT_EVERY_S = 2.0
MOST_FINDINGS = 1000
HASH_BYTES = 32


@dataclass(frozen=True)
class Finding:
    """What is wrong with a batch; its day, time and expected rows are unknown if the batch itself is missing."""

    found: str
    batch: int
    day: date | None = None
    at: datetime | None = None
    rows_expected: int | None = None
    rows_found: int = 0


@dataclass
class Verdict:
    """`rows` were found, `purged` were deleted by retention. `findings` are the first of `count`."""

    batches: int = 0
    rows: int = 0
    purged: int = 0
    newest_batch: int = 0
    digest: bytes = EMPTY_CHAIN
    findings: list[Finding] = field(default_factory=list)
    count: int = 0

    def add(self, findings: Sequence[Finding]) -> None:
        self.count += len(findings)
        self.findings += findings[: MOST_FINDINGS - len(self.findings)]


async def verify(database: Database, report: Callable[[str], None]) -> Verdict:
    """Compares each batch with its digest and with the batch before it. Raises StoreUnavailable."""
    walk = Walk(database)
    verdict, reported_at = walk.verdict, time.monotonic()
    await walk.go_to_start()
    while await walk.step():
        if time.monotonic() - reported_at > REPORT_EVERY_S:
            reported_at = time.monotonic()
            report(f"{verdict.batches} batches with {verdict.rows} rows checked, {verdict.count} findings")
    outside = await walk.fetch("audit_rows_outside_chain", MOST_FINDINGS)
    verdict.add([Finding("added: the chain has no such batch", row["batch"], rows_found=row["found"]) for row in outside])
    return verdict


class Walk:
    """Reads some batches a step, in a short transaction, so that the gateway can write and purge meanwhile."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.verdict = Verdict()

    async def go_to_start(self, *, least: int = 0) -> bool:
        """Begins where purging has ended; false if that is before batch `least`."""
        found = await self.fetch("audit_anchor")
        if not found or found[0]["batch"] < least:
            return False
        self.verdict.newest_batch, self.verdict.digest = found[0]["batch"], found[0]["digest"]
        return True

    async def step(self) -> bool:
        """Returns false at the end of the chain."""
        after = self.verdict.newest_batch
        links = await self.fetch("audit_batches_after", after, BATCHES_AT_ONCE, ROWS_AT_ONCE)
        findings = list(_findings(links, after, self.verdict.digest))
        # Purging may have moved the beginning past these batches; before it the chain need not be whole.
        if findings and await self.go_to_start(least=after + 1):
            return True
        self._count([link for link in links if link["digest"] is not None])
        self.verdict.add(findings)
        return bool(links)

    def _count(self, links: Sequence[Row]) -> None:
        verdict = self.verdict
        for link in links:
            verdict.batches += 1
            verdict.rows += len(link["hashes"]) // HASH_BYTES
            verdict.purged += link["expected"] if link["gone"] else len(link["purged"]) // HASH_BYTES
            verdict.newest_batch, verdict.digest = link["batch"], link["digest"]

    async def fetch(self, query: str, *values: object) -> Sequence[Row]:
        async with self._database.connection() as connection:
            return await connection.fetch(self._database.sql(query), *values, timeout=STATEMENT_S)


def _findings(links: Sequence[Row], after: int, digest: bytes) -> Iterator[Finding]:
    """What is wrong with these batches, of which the first follows batch `after` with this digest."""
    orphans = {link["batch"]: len(link["hashes"]) // HASH_BYTES for link in links if link["digest"] is None}
    for link in links:
        if link["digest"] is None:
            continue
        if link["batch"] > after + 1:
            yield _gap(after + 1, link["batch"] - 1, orphans)
        previous = digest if link["batch"] == after + 1 else link["previous"]
        if words := _fault(link, previous):
            rows = len(_hashes(link))
            yield Finding(words, link["batch"], link["day"], link["at"], 0 if link["gone"] else link["expected"], rows)
        after, digest = link["batch"], link["digest"]


def _gap(first: int, last: int, orphans: Mapping[int, int]) -> Finding:
    words = "missing: the batch" if first == last else f"missing: all batches up to {last}"
    return Finding(words, first, rows_found=sum(rows for batch, rows in orphans.items() if first <= batch <= last))


def _hashes(link: Row) -> list[bytes]:
    whole = link["hashes"] + link["purged"]
    return sorted(whole[start : start + HASH_BYTES] for start in range(0, len(whole), HASH_BYTES))


def _fault(link: Row, previous: bytes) -> str:
    hashes, expected = _hashes(link), 0 if link["gone"] else link["expected"]
    if len(hashes) != expected:
        missing = expected - len(hashes)
        return f"missing rows: {missing}" if missing > 0 else f"added rows: {-missing}"
    if link["previous"] != previous:
        return "broken chain: this batch does not continue the one before it"
    if not link["gone"] and hashlib.sha256(previous + b"".join(hashes)).digest() != link["digest"]:
        return "changed: at least one row is not as it was written"
    return ""
