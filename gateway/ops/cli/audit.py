"""The verbs for the audit: list, sum, trace and verify it, delete what has expired, delete a key's prompts."""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Any

from gateway.audit import hash_chain, reports, retention
from gateway.audit.reports import AuditFilter
from gateway.core.errors import CommandFailed
from gateway.dialects.model_names import canonical
from gateway.ops.cli import console
from gateway.ops.cli.database import current_database
from gateway.settings import Settings

STATEMENT_S = 600.0

MOST_ROWS = 20
# Why a backend was chosen, by `chosen_because`.
BECAUSE = {
    "order": "it was the first in order with a free slot",
    "loaded": "it had the model loaded",
    "home": "it had the conversation cached",
    "load": "it loaded the model for this call",
    "join": "it was loading the model already",
    "tier": "it had the model loaded, and those of a higher tier did not",
    "spill": "those of a higher tier would have taken much longer",
}


async def list_audit(settings: Settings, arguments: argparse.Namespace) -> None:
    printer = _printer(arguments)
    async with current_database(settings) as database:
        key_id = (await reports.key_named(database, arguments.key))["id"] if arguments.key else None
        wanted = AuditFilter(key_id, arguments.model, arguments.since, arguments.status, arguments.outcome, arguments.limit)
        async with aclosing(reports.stream_requests(database, wanted, timeout_s=STATEMENT_S)) as rows:
            is_empty = True
            async for row in rows:
                printer.add(row if arguments.json or arguments.csv else _line(row))
                is_empty = False
    printer.end()
    if is_empty:
        console.notify("no such request in the audit")


def _printer(arguments: argparse.Namespace) -> console.Table | console.Lines | console.Csv:
    if arguments.json and arguments.csv:
        raise CommandFailed("JSON=1 and CSV=1 exclude each other: set one of them")
    return console.printer(as_json=arguments.json, as_csv=arguments.csv)


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "time": row["at"].astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S"),
        "key": row["key"] or row["key_id"],
        **{name: row[name] or None for name in ("client", "model")},
        "as": row["answered_as"] if _is_another(row) else None,
        **{name: row[name] or None for name in ("backend", "status", "outcome")},
        "tokens": f"{row['prompt_tokens']}+{row['completion_tokens']}",
        "cached": row["cached_tokens"],
        "counted": row["tokens_from"],
        "backend_ms": _rounded(row["backend_ms"]),
        "load_ms": _rounded(row["load_ms"]) if row["loaded"] else None,
        "because": row["chosen_because"] or None,
        "place": row["queue_position"] or None,
        "wait_ms": _rounded(row["queue_ms"]) or None,
        "estimated_ms": _rounded(row["estimated_ms"]),
        "ttfb_ms": _rounded(row["ttfb_ms"]),
        "total_ms": _rounded(row["total_ms"]),
    }


def _is_another(row: Mapping[str, Any]) -> bool:
    """Whether a model of another name answered."""
    return bool(row["answered_as"]) and canonical(row["answered_as"]) != canonical(row["model"])


def _rounded(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else round(milliseconds, 1)


async def sum_audit(settings: Settings, arguments: argparse.Namespace) -> None:
    printer = _printer(arguments)
    async with current_database(settings) as database:
        rows = await reports.usage(database, arguments.by, arguments.since, timeout_s=STATEMENT_S)
    for row in rows:
        printer.add(_sums(row, arguments))
    printer.end()
    if not rows:
        console.notify(f"no requests since {arguments.since:%Y-%m-%d %H:%M} UTC")


def _sums(row: Mapping[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The requested groups first, in that order, then the sums; the key's id only in JSON and CSV."""
    facts = {name: (row["key"] or row["key_id"]) if name == "key" else row[name] for name in arguments.by}
    if "key" in arguments.by and (arguments.json or arguments.csv):
        facts["key_id"] = row["key_id"]
    numbers = "requests answered failures refused prompt_tokens completion_tokens cached_tokens billed_tokens".split()
    facts |= {name: row[name] for name in numbers}
    facts |= {"backend_s": round(row["backend_s"], 3), "load_s": round(row["load_s"], 3), "loads": row["loads"]}
    return facts | {f"ttfb_{name}_ms": _rounded(row[f"ttfb_{name}"]) for name in ("p50", "p95", "p99")}


async def trace(settings: Settings, arguments: argparse.Namespace) -> None:
    since = arguments.since or datetime.now(UTC) - timedelta(days=settings.audit_log_default_retention_days)
    async with current_database(settings) as database:
        rows = await reports.trace(database, arguments.id, since, MOST_ROWS)
    if arguments.json:
        console.show(rows, as_json=True, empty="")
        return
    for number, row in enumerate(rows):
        print(("\n" if number else "") + "\n".join(_story(row)))


def _story(row: Mapping[str, Any]) -> Iterator[str]:
    stamp = row["at"].astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    yield f"request {row['request_id']} (id {row['id']})"
    yield f"  {stamp} UTC  {row['method']} {row['route']}, {row['bytes_in']} bytes"
    agent = console.cell(row["agent"] or "no user agent")
    yield f"  key      {row['key'] or '-'} ({row['key_id']}) from {row['client']}, {agent}"
    yield f"  model    {row['model'] or '-'}{', streamed' if row['stream'] else ''}"
    if row["queue_ms"]:
        yield f"  queue    waited {row['queue_ms']:.1f} ms for a slot"
    for attempt in row["attempts"]:
        yield f"  attempt  {attempt['backend']}: {attempt['fault']}{_detail(attempt)} after {attempt['ms']:.1f} ms"
    if row["backend"]:
        yield f"  backend  {row['backend']}, as {row['answered_as'] or row['model']}"
    if row["chosen_because"]:
        yield f"  chosen   {row['chosen_because']}: {BECAUSE.get(row['chosen_because'], 'a rule of another version')}"
    if row["translated_to"]:
        yield f"  way      translated to {row['translated_to']}"
    if row["dropped"]:
        yield f"  dropped  {console.cell(row['dropped'])}"
    if row["ttfb_ms"] is not None:
        estimated = "" if row["estimated_ms"] is None else f", {row['estimated_ms']:.1f} ms were estimated"
        yield f"  ttfb     {row['ttfb_ms']:.1f} ms{estimated}"
    tokens = f"{row['prompt_tokens']} prompt + {row['completion_tokens']} completion ({row['tokens_from']})"
    yield f"  tokens   {tokens}{_billed(row)}"
    if row["backend_ms"] is not None:
        yield f"  seconds  {row['backend_ms'] / 1000:.3f} of backends ({row['seconds_from']}){_parts(row)}"
    ended = (
        "its process ended first" if row["total_ms"] is None else f"after {row['total_ms']:.1f} ms, {row['bytes_out']} bytes"
    )
    yield f"  end      {row['status'] or '-'} {row['outcome']}{_detail(row)}, {ended}"


def _billed(row: Mapping[str, Any]) -> str:
    if row["cached_tokens"] is None:
        return ""
    counted = "all" if row["billed_tokens"] is None else row["billed_tokens"]
    return f", {row['cached_tokens']} of the prompt cached; {counted} count for limits"


def _parts(row: Mapping[str, Any]) -> str:
    """The seconds as the backend reported them, by what it did."""
    load = "for the load that it caused" if row["loaded"] else "for loading"
    words = {"load_ms": load, "prefill_ms": "for the prompt", "decode_ms": "for the answer"}
    parts = [f"{row[name] / 1000:.3f} {word}" for name, word in words.items() if row[name] is not None]
    return f": {', '.join(parts)}" if parts else ""


def _detail(row: Mapping[str, Any]) -> str:
    return f" ({row['detail']})" if row.get("detail") else ""


async def verify_audit(settings: Settings, arguments: argparse.Namespace) -> None:
    async with current_database(settings) as database:
        verdict = await hash_chain.verify(database, console.notify)
    facts = {
        "whole": not verdict.count,
        "batches": verdict.batches,
        "rows": verdict.rows,
        "purged": verdict.purged,
        "newest_batch": verdict.newest_batch,
        "digest": verdict.digest.hex(),
    }
    findings = [dict(vars(finding)) for finding in verdict.findings]
    if arguments.json:
        console.show_facts({**facts, "findings": findings}, as_json=True)
    else:
        console.show_facts(facts, as_json=False)
        if findings:
            print()
            console.show(findings, as_json=False, empty="")
    if verdict.count:
        shown = f", the first {len(findings)} are shown" if verdict.count > len(findings) else ""
        raise CommandFailed(f"the audit is not as it was written: {verdict.count} findings{shown}")


async def purge(settings: Settings, arguments: argparse.Namespace) -> None:
    keep = timedelta(days=settings.audit_log_default_retention_days)
    async with current_database(settings) as database:
        went = await retention.apply(database, keep, console.notify)
    if went.is_busy_elsewhere:
        raise CommandFailed("another process is purging at the moment: try again when it has finished")
    facts = {"audit_rows": went.rows, "whole_months": went.partitions, "prompts": went.prompts}
    console.show_facts(facts, as_json=arguments.json)


async def forget(settings: Settings, arguments: argparse.Namespace) -> None:
    async with current_database(settings) as database:
        key = await reports.key_named(database, arguments.key)
        deleted = await retention.forget(database, key["id"], console.notify)
    console.show_facts({"key": key["id"], "name": key["name"], "prompts_deleted": deleted}, as_json=arguments.json)
