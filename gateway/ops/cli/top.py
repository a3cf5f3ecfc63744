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
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """Lines that fit: what is in progress, the backends, queues, models, the busiest keys and models, in this order."""
    lately = seen["lately"] or {}
    lines = [*_head(seen, lately), ""]
    left = max(3, rows - len(lines))
    backends = _worst_first(seen["backends"])
    lines += _table(BACKENDS, [_backend(row) for row in backends], min(len(backends) + 1, max(3, left // 2)))
    for columns_of_table, found in ((QUEUES, _queues(seen)), (MODELS, _models(backends))):
        # With an empty line before it; what follows gets the other half.
        most = min(len(found) + 2, (rows - len(lines)) // 2)
        if found and most > 2:
            lines += ["", *_table(columns_of_table, found, most - 1)]
    for_busy = rows - len(lines) - 1
    if for_busy > 1:
        keys, models = ([write(row) for row in lately.get(name, [])] for name, write in BUSY.items())
        lines += ["", *_side_by_side(keys, models, for_busy)]
    return [plain(line)[:columns] for line in lines[:rows]]


def _head(seen: Mapping[str, Any], lately: Mapping[str, Any]) -> Iterator[str]:
    states = {name: "up" if up else "DOWN" for name, up in seen["stores"].items()}
    if states.get("postgresql") == "up" and not seen.get("postgresql_takes_writes", True):
        states["postgresql"] = "READ-ONLY"
    stores = "  ".join(f"{name} {state}" for name, state in states.items())
    yield f"gateway  {str(seen['at'])[:19].replace('T', ' ')}  processes {_known(seen['processes'])}  {stores}"
    backlog = _known(seen["audit_backlog"])
    waiting = f"waiting for a backend {_known(seen.get('waiting_for_backends'))}, for a key {seen['waiting']}"
    yield f"now      in progress {seen['in_flight']}  {waiting}  audit backlog {backlog}"
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
    yield f"per min  requests {rate:.1f}  tokens {tokens:.0f} ({sums})  backend s {seconds:.1f}"


BACKENDS = ("BACKEND", 14), ("STATE", 7), ("BREAKER", 9), ("SLOTS", 6), ("VRAM GB", 10), ("LATENCY", 7), ("LOADED", 21)
QUEUES = ("WAITING FOR", 28), ("CALLS", 7), ("TOKENS", 9), ("OLDEST", 8), ("NEXT IN", 8), ("LAST IN", 8)
MODELS = ("MODEL", 26), ("AT", 14), ("SLOTS", 7), ("VRAM GB", 8), ("STAYS", 8), ("TOK/S IN", 8), ("OUT", 5)


def _worst_first(backends: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """So that those with problems are not the ones left out."""
    return sorted(backends, key=lambda row: row["state"] == "up" and row["breaker"] == "closed" and not row["drained"])


def _backend(row: Mapping[str, Any]) -> list[str]:
    state = "drained" if row["drained"] else "down" if row["state"] == "away" else row["state"]
    breaker = row["breaker"] + (f" {row['open_for_s']:.0f}s" if row["open_for_s"] else "")
    places, memory = row.get("places", []), row.get("memory")
    loaded = [place["model"] for place in places if place["is_loaded"]]
    if row.get("loading"):
        loaded.insert(0, f"loading {row['loading']['model']}")
    vram = f"{_gb(memory['used'])}/{_gb(memory['seen'])}" if memory and memory["seen"] else "-"
    in_use = sum(place["in_use"] or 0 for place in places), sum(place["slots"] or 0 for place in places)
    slots = f"{in_use[0]}/{in_use[1]}" if places else "-"
    return [row["name"], state, breaker, slots, vram, _ms(row["latency_ms"]), row["error"] or ", ".join(loaded) or "-"]


def _queues(seen: Mapping[str, Any]) -> list[list[str]]:
    return [
        [row["model"], str(row["calls"]), str(row["tokens"]), *(_s(row[name]) for name in ("oldest_s", "first_s", "last_s"))]
        for row in seen.get("queues") or []
    ]


def _models(backends: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Those with the most calls first."""
    found = [(place, row["name"]) for row in backends for place in row.get("places", [])]
    return [_model(place, name) for place, name in sorted(found, key=lambda one: -(one[0]["in_use"] or 0))]


def _model(place: Mapping[str, Any], backend: str) -> list[str]:
    slots = f"{_known(place['in_use'])}/{_known(place['slots'])}"
    stays = "-" if not place["is_loaded"] else "always" if place["left_s"] is None else _s(place["left_s"])
    speeds = ("-" if place[name] is None else f"{place[name]:.0f}" for name in ("prefill_tps", "decode_tps"))
    return [place["model"], backend, slots, _gb(place["vram"]) if place["vram"] else "-", stays, *speeds]


def _table(columns: Sequence[tuple[str, int]], rows: Sequence[Sequence[str]], most: int) -> Iterator[str]:
    """The last column has no end of its own."""
    yield " ".join(name.ljust(width) for name, width in columns).rstrip()
    shown = rows if len(rows) < most else rows[: most - 2]
    for row in shown:
        cells = (cell[:width].ljust(width) for cell, (_, width) in zip(row[:-1], columns, strict=False))
        yield " ".join((*cells, row[-1])).rstrip()
    if left := rows[len(shown) :]:
        yield f"… and {len(left)} more" + (", all fine" if columns is BACKENDS and _all_fine(left) else "")


def _all_fine(rows: Sequence[Sequence[str]]) -> bool:
    return all(row[1:3] == ["up", "closed"] for row in rows)


def _busy_key(row: Mapping[str, Any]) -> str:
    limited = f"  AT {row['limit'] or 'a limit'} ({row['limited']})" if row["limited"] else ""
    return f"{(row['key'] or row['key_id'])[:18]:<18} {row['requests']:>6}{limited}"


def _busy_model(row: Mapping[str, Any]) -> str:
    return f"{row['model'][:22]:<22} {row['requests']:>6}  {_ms(row['ttfb_p50_ms'])}"


BUSY: dict[str, Callable[[Mapping[str, Any]], str]] = {"keys": _busy_key, "models": _busy_model}


def _side_by_side(keys: Sequence[str], models: Sequence[str], most: int) -> Iterator[str]:
    yield f"{'BUSIEST KEYS, 15 MIN':<42}BUSIEST MODELS"
    for n in range(min(most - 1, max(len(keys), len(models)))):
        left, right = (rows[n] if n < len(rows) else "" for rows in (keys, models))
        yield f"{left[:41]:<42}{right}".rstrip()


def _known(value: object) -> str:
    return "?" if value is None else str(value)


def _gb(value: float) -> str:
    return f"{value / 1e9:.1f}"


def _s(value: float | None) -> str:
    """Seconds, or minutes and hours if they are many."""
    if value is None:
        return "-"
    return f"{value / 3600:.1f}h" if value >= 7200 else f"{value / 60:.0f}m" if value >= 120 else f"{value:.1f}s"


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1000:.1f}s" if value >= 10_000 else f"{value:.0f}ms"
