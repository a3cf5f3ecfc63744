"""`make top`: the installation in a terminal of 80 by 24, every two seconds, from the admin API."""

import argparse
import asyncio
import getpass
import json
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any

from gateway.core.errors import CommandFailed
from gateway.ops.cli.console import plain
from gateway.settings import Settings

KEY_VARIABLE = "ADMIN_KEY"
EVERY_S = 2.0
DEADLINE_S = 5.0
SMALLEST = (80, 24)
NEEDED = {"at", "processes", "in_flight", "waiting", "audit_backlog", "backends", "stores", "lately"}
ENTER, LEAVE, HOME = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l", "\x1b[H"
CLEAR_LINE, CLEAR_BELOW = "\x1b[K", "\x1b[J"
ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 # where it listens, asked from here  # nosec B104


async def watch(settings: Settings, arguments: argparse.Namespace) -> None:
    key = admin_key()
    url = arguments.url or address_of(settings)
    if arguments.json or arguments.once or not sys.stdout.isatty():
        seen = await asyncio.to_thread(overview, url, key)
        print(json.dumps(seen) if arguments.json else "\n".join(frame(seen, *SMALLEST)))
        return
    with _screen():
        while True:
            try:
                lines = frame(await asyncio.to_thread(overview, url, key), *shutil.get_terminal_size(SMALLEST))
            except CommandFailed as failed:
                lines = [plain(f"error: {failed}")[: shutil.get_terminal_size(SMALLEST)[0]], "", "retrying; Ctrl-C quits"]
            sys.stdout.write(
                HOME + "".join(f"{line}{CLEAR_LINE}\n" for line in lines[:-1]) + lines[-1] + CLEAR_LINE + CLEAR_BELOW
            )
            sys.stdout.flush()
            await asyncio.sleep(EVERY_S)


def admin_key() -> str:
    """A key for the admin API: from the environment, where `ps` does not show it, else from a prompt."""
    key = os.environ.get(KEY_VARIABLE) or (getpass.getpass("admin key: ") if sys.stdin.isatty() else "")
    if not key:
        raise CommandFailed(
            f"set {KEY_VARIABLE} in the environment to an admin key; `make key NAME=ops ROLE=admin` creates one"
        )
    return key


@contextmanager
def _screen() -> Iterator[None]:
    """Restores afterwards what was on the screen before."""
    sys.stdout.write(ENTER)
    try:
        yield
    finally:
        sys.stdout.write(LEAVE)
        sys.stdout.flush()


def address_of(settings: Settings) -> str:
    host = ANYWHERE.get(settings.gateway_bind_host, settings.gateway_bind_host)
    return f"http://{f'[{host}]' if ':' in host and '[' not in host else host}:{settings.gateway_bind_port}"


def overview(url: str, key: str) -> dict[str, Any]:
    """Raises CommandFailed."""
    if not url.startswith(("http://", "https://")):
        raise CommandFailed(f"{url!a} is not an address: write http://host:port")
    if not (key.isascii() and key.isprintable()):
        raise CommandFailed("the admin key has characters that no key has: check ADMIN_KEY")
    headers = {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{url.rstrip('/')}/admin/v1/overview", headers=headers)  # noqa: S310 # checked above
    # A proxy that the environment may name is not for our own address.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), Staying)
    try:
        with direct.open(request, timeout=DEADLINE_S) as answer:
            found: dict[str, Any] = json.loads(answer.read())
    except urllib.error.HTTPError as refused:
        raise CommandFailed(plain(f"{url} answers {refused.code}: {_words(refused.read())}")) from None
    except (OSError, HTTPException, ValueError) as wrong:
        raise CommandFailed(plain(f"no gateway answers at {url}: {wrong}")) from None
    if not isinstance(found, dict) or not found.keys() >= NEEDED:
        raise CommandFailed(plain(f"what answers at {url} is not a gateway of this version: check URL="))
    return found


class Staying(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: a key goes to the address that the operator gave and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _words(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return "not an answer of a gateway"


def frame(seen: Mapping[str, Any], columns: int, rows: int) -> list[str]:
    """Lines that fit: what is in progress, the backends, the busiest keys and models, in order of importance."""
    backends, lately = seen["backends"], seen["lately"] or {}
    head = list(_head(seen, lately))
    left = max(3, rows - len(head) - 2)
    keys, models = lately.get("keys", []), lately.get("models", [])
    for_backends = min(len(backends) + 1, max(3, left // 2))
    for_busy = max(0, left - for_backends - 1)
    lines = [*head, "", *_table(BACKENDS, [_backend(row) for row in _worst_first(backends)], for_backends)]
    if for_busy > 1:
        lines += ["", *_side_by_side([_busy_key(row) for row in keys], [_busy_model(row) for row in models], for_busy)]
    return [plain(line)[:columns] for line in lines[:rows]]


def _head(seen: Mapping[str, Any], lately: Mapping[str, Any]) -> Iterator[str]:
    states = {name: "up" if up else "DOWN" for name, up in seen["stores"].items()}
    if states.get("postgresql") == "up" and not seen.get("postgresql_takes_writes", True):
        states["postgresql"] = "READ-ONLY"
    stores = "  ".join(f"{name} {state}" for name, state in states.items())
    yield f"gateway  {str(seen['at'])[:19].replace('T', ' ')}  processes {_known(seen['processes'])}  {stores}"
    backlog = _known(seen["audit_backlog"])
    yield f"now      in progress {seen['in_flight']}  waiting for a slot {seen['waiting']}  audit rows waiting {backlog}"
    if not lately:
        yield "15 min   unknown while PostgreSQL is unreachable"
        return
    yield (
        f"15 min   requests {lately['requests']}  failed {lately['failures']}  refused {lately['refused']}  "
        f"first byte p50 {_ms(lately['ttfb_p50_ms'])} p99 {_ms(lately['ttfb_p99_ms'])}"
    )
    minutes = 15
    rate, tokens = lately["requests"] / minutes, (lately["prompt_tokens"] + lately["completion_tokens"]) / minutes
    cached = f", {lately['cached_tokens']} cached" if lately.get("cached_tokens") else ""
    sums = f"{lately['prompt_tokens']} in{cached}, {lately['completion_tokens']} out"
    seconds = lately.get("backend_s", 0.0) / minutes
    yield f"per min  requests {rate:.1f}  tokens {tokens:.0f} ({sums})  backend seconds {seconds:.1f}"


BACKENDS = ("BACKEND", 18), ("STATE", 8), ("BREAKER", 10), ("IN FLIGHT", 10), ("LATENCY", 9), ("MODELS", 6), ("", 13)


def _worst_first(backends: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """So that those with problems are not the ones left out."""
    return sorted(backends, key=lambda row: row["state"] == "up" and row["breaker"] == "closed" and not row["drained"])


def _backend(row: Mapping[str, Any]) -> list[str]:
    state = "drained" if row["drained"] else "down" if row["state"] == "away" else row["state"]
    breaker = row["breaker"] + (f" {row['open_for_s']:.0f}s" if row["open_for_s"] else "")
    load = f"{row['in_flight']}/{row['max_connections']}"
    return [row["name"], state, breaker, load, _ms(row["latency_ms"]), str(row["models"]), row["error"]]


def _table(columns: Sequence[tuple[str, int]], rows: Sequence[Sequence[str]], most: int) -> Iterator[str]:
    yield " ".join(name.ljust(width) for name, width in columns).rstrip()
    shown = rows if len(rows) < most else rows[: most - 2]
    for row in shown:
        yield " ".join(cell[:width].ljust(width) for cell, (_, width) in zip(row, columns, strict=True)).rstrip()
    if left := rows[len(shown) :]:
        yield f"… and {len(left)} more" + (", all fine" if _all_fine(left) else "")


def _all_fine(rows: Sequence[Sequence[str]]) -> bool:
    return all(row[1:3] == ["up", "closed"] for row in rows)


def _busy_key(row: Mapping[str, Any]) -> str:
    limited = f"  AT {row['limit'] or 'a limit'} ({row['limited']})" if row["limited"] else ""
    return f"{(row['key'] or row['key_id'])[:18]:<18} {row['requests']:>6}{limited}"


def _busy_model(row: Mapping[str, Any]) -> str:
    return f"{row['model'][:22]:<22} {row['requests']:>6}  {_ms(row['ttfb_p50_ms'])}"


def _side_by_side(keys: Sequence[str], models: Sequence[str], most: int) -> Iterator[str]:
    yield f"{'BUSIEST KEYS, 15 MIN':<42}BUSIEST MODELS"
    for n in range(min(most - 1, max(len(keys), len(models)))):
        left, right = (rows[n] if n < len(rows) else "" for rows in (keys, models))
        yield f"{left[:41]:<42}{right}".rstrip()


def _known(value: object) -> str:
    return "?" if value is None else str(value)


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1000:.1f}s" if value >= 10_000 else f"{value:.0f}ms"
