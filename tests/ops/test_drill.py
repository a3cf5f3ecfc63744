"""The drill: this gateway passes it, it leaves nothing behind, and each broken promise fails at its line."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from argon2 import PasswordHasher

from gateway.auth.key_store import KeyStore
from gateway.ops.drill.environment import LIMITS
from gateway.ops.drill.faults import BY_NAME
from gateway.ops.drill.redis_proxy import RedisProxy, can_be_proxied
from gateway.stores import redis_keys
from gateway.stores.postgres import Database
from tests.conftest import TestStores
from tests.support.audit_rows import in_database
from tests.support.gateway_settings import QUICK
from tests.support.processes import environment, operate, until
from tests.support.redis_server import server
from tests.support.store_dump import dump_postgres

LONGEST_S = 120
# Code that breaks a promise, run in each process of the drill before the gateway's own; with the lines that must notice it,
# and what they must report.
SWITCHES: Mapping[str, tuple[Mapping[str, str], str]] = {
    "other bytes": (
        {"bytes": "other bytes than the backend's"},
        """
        from gateway.edge import application
        send = application.Response.send
        async def send_others(self, message):
            if b"tide" in message.get("body", b""):
                message["body"] = message["body"].replace(b"tide", b"TIDE")
            await send(self, message)
        application.Response.send = send_others
        """,
    ),
    "pieces are collected": (
        {"pieces": "the first piece waited for the second"},
        """
        from gateway.edge import application
        send, kept = application.Response.send, {}
        async def send_at_the_end(self, message):
            if message["type"] == "http.response.body":
                kept[self] = kept.get(self, b"") + message.get("body", b"")
                if message.get("more_body", False):
                    return
                message["body"] = kept.pop(self)
            await send(self, message)
        application.Response.send = send_at_the_end
        """,
    ),
    "the first backend is the only one": (
        {
            "refused": "status 50",
            "frozen": "status 50",
            "failing": "status 50",
            "garbage": "status 50",
            "native": "status 50",
        },
        """
        from gateway.fleet import failover
        choose = failover.choose
        failover.choose = lambda *of: choose(*of)[:1]
        """,
    ),
    "a first frame is not judged": (
        {"garbage": "the answer is the faulty backend's"},
        """
        from gateway.dialects import ollama
        ollama.Ollama.judge_frame = lambda self, payload: None
        """,
    ),
    "connections to a failed backend stay open": (
        {"frozen": "two backends were at work"},
        """
        from aiohttp.connector import Connection
        kept = []  # Python closes what nothing refers to.
        Connection.close = lambda self: kept.append(self)
        """,
    ),
    "a cut stream looks complete": (
        {"dying": "the answer looks complete"},
        """
        from gateway.dialects import ollama
        ollama.Ollama.error_frame = lambda self, error, tail=(): b'{"done":true,"done_reason":"stop"}\\n'
        """,
    ),
    "a backend's API is not found out": (
        {"native": "which was not found out"},
        """
        from gateway.fleet import routes
        from gateway.ops.drill import agent_faults
        async def find_none(backend, known):
            return ()
        routes.find, agent_faults.FOUND_S = find_none, 1.0
        """,
    ),
    "a cut stream of an agent looks complete": (
        {"cut": "/v1/messages: the answer looks complete"},
        """
        from gateway.dialects import anthropic
        frame = b'event: message_stop\\ndata: {"type":"message_stop"}\\n\\n'
        anthropic.Anthropic.error_frame = lambda self, error, tail=(): frame
        """,
    ),
    "a cut stream of an agent ends as if it were another's": (
        {"cut": "/v1/responses: the answer ends without an error"},
        """
        from gateway.dialects import openai
        from gateway.dialects import responses
        error_frame = openai.OpenAI.error_frame
        responses.Responses.error_frame = lambda self, error, tail=(): error_frame(self._openai, error)
        """,
    ),
    "nobody checks whether the caller is there": (
        {"left": "still works"},
        """
        from gateway.edge import cycle
        cycle.Cycle.watch = lambda self, gone: None
        """,
    ),
    "errors of the other dialect": (
        {"dialect": "/v1/chat/completions: not in the form"},
        """
        from gateway.dialects import ollama
        from gateway.dialects import openai
        openai.OpenAI.error = ollama.Ollama.error
        """,
    ),
    "no Retry-After": (
        {"down": "does not say when to retry", "requests": "does not say when to retry"},
        """
        from gateway.edge import application
        headers_of = application.error_headers
        application.error_headers = lambda *of, **how: [h for h in headers_of(*of, **how) if not h[0].startswith(b"retry")]
        """,
    ),
    "a wrong key is answered as forbidden": (
        {"key": "status 403 instead of 401"},
        """
        from gateway.core import errors
        errors.WrongKey.status = 403
        """,
    ),
    "a revocation reaches nobody": (
        {"revoke": "the key still works"},
        """
        from gateway.auth import authenticator
        authenticator.Authenticator.forget = lambda self, key_id: None
        authenticator.Authenticator.forget_all = lambda self: None
        """,
    ),
    "an unknown model can be told from a forbidden one": (
        {"unknown": "statuses 404 and 403"},
        """
        from gateway.fleet import catalog
        from gateway.core import errors
        find = catalog.Catalog.find
        def find_or_reveal(self, name, patterns):
            if name.canonical not in self.models:
                raise errors.UnknownRoute
            return find(self, name, patterns)
        catalog.Catalog.find = find_or_reveal
        """,
    ),
    "an unknown model can be told from a forbidden one by an agent": (
        {"unknown": "/v1/messages: the answers differ"},
        """
        import itertools
        from gateway.dialects import anthropic
        error, number = anthropic.Anthropic.error, itertools.count()
        anthropic.Anthropic.error = lambda self, *of: error(self, *of) + b" " * next(number)
        """,
    ),
    "any key may change models": (
        {"verbs": "status"},
        """
        from gateway.proxy import passthrough
        passthrough.Passthrough._backend_for = lambda self, key, scope: self._backends["drill-sound"]
        """,
    ),
    "keys are passed on": (
        {"secrets": "a key reached a backend"},
        """
        from gateway.proxy import exchange
        passed_on = exchange._passed_on
        def with_key(headers, request_id):
            return passed_on(headers, request_id) + b"X-Caller: " + dict(headers)[b"authorization"] + b"\\r\\n"
        exchange._passed_on = with_key
        """,
    ),
    "each process counts for itself": (
        {
            "requests": "of 60 admitted, the limit is 20",
            "slots": "of 16 admitted, the limit is 4",
            "busy": "calls at once",
        },
        """
        import os, sys
        if "worker" in sys.orig_argv:
            os.environ["NEURONETZ_NAMES_IN_REDIS"] += f"-{os.getpid()}"
        """,
    ),
    "slots of backends are not counted": (
        {"busy": "calls at once on a backend"},
        """
        from gateway.fleet import claim
        arguments = claim.Place.arguments
        claim.Place.arguments = lambda self: arguments(self)[:3] + (10_000,) + arguments(self)[4:]
        """,
    ),
    "who leaves stays in the queue": (
        {"queue": "a caller still waits"},
        """
        from gateway.fleet import queue
        queue.FleetQueue._leave = lambda self, waiting: None
        """,
    ),
    "tokens are not counted": (
        {"tokens": "tokens on a limit of 100"},
        """
        from gateway.dialects import dialect
        from gateway.dialects import ollama
        ollama.Ollama.usage_of = lambda self, answer: dialect.Usage(0, 0)
        """,
    ),
    "a refusal counts as a request": (
        {"none": "refused requests were counted"},
        """
        import os
        from gateway.core import errors
        from gateway.limits import limiter
        from gateway.dialects import tokens
        admit = limiter.Limiter.admit
        async def admit_twice(self, ticket):
            try:
                await admit(self, ticket._replace(id=os.urandom(16).hex(), need=tokens.NO_TOKENS, info=b""))
            except errors.LimitReached:
                pass
            return await admit(self, ticket)
        limiter.Limiter.admit = admit_twice
        """,
    ),
    "calls wait for Redis": (
        {"redis": "it took"},
        """
        from gateway.stores import redis_connection
        from gateway.stores import redis_client
        redis_connection.CALL_DEADLINE_S = redis_client.CALL_DEADLINE_S = 2.5
        """,
    ),
    "leases do not expire": (
        {"killed": "the slot is still in use", "orphans": "the slots are still in use"},
        """
        from gateway.fleet import board
        from gateway.fleet import presence
        from gateway.limits import lease_renewal
        from gateway.ops.drill import fleet_faults
        from gateway.ops.drill import limit_faults
        lease_renewal.LEASE_MS, presence.ACTIVE_MS, board.LEASE_MS = 600_000, 600_000, 600_000
        limit_faults.LEASE_S, fleet_faults.LEASE_S = 2.0, 2.0
        """,
    ),
    "SIGTERM ends what runs": (
        {"drain": "the stream in progress was not completed"},
        """
        from gateway.edge import server
        begin = server.Server.__init__
        def begin_without_patience(self, *parts, drain_s, **more):
            begin(self, *parts, drain_s=0.0, **more)
        server.Server.__init__ = begin_without_patience
        """,
    ),
    "rows are lost": (
        {"books": "requests are not in the audit"},
        """
        from gateway.audit import table
        from gateway.ops.drill import limit_faults
        write = table.write
        async def write_less(database, rows, *more):
            return await write(database, rows[1:], *more)
        table.write = write_less
        limit_faults.AUDIT_S = 3.0
        """,
    ),
}
# Switches that do not disturb each other's lines share a drill, each with a line that none of them breaks.
TOGETHER: Mapping[str, tuple[str, ...]] = {
    "down": (
        "other bytes",
        "pieces are collected",
        "errors of the other dialect",
        "a revocation reaches nobody",
        "an unknown model can be told from a forbidden one by an agent",
        "any key may change models",
        "tokens are not counted",
    ),
    "verbs": (
        "the first backend is the only one",
        "a cut stream looks complete",
        "a cut stream of an agent looks complete",
        "nobody checks whether the caller is there",
        "no Retry-After",
        "an unknown model can be told from a forbidden one",
        "keys are passed on",
        "slots of backends are not counted",
        "SIGTERM ends what runs",
    ),
    "dialect": (
        "a wrong key is answered as forbidden",
        "a first frame is not judged",
        "a backend's API is not found out",
        "a cut stream of an agent ends as if it were another's",
        "who leaves stays in the queue",
        "a refusal counts as a request",
        "rows are lost",
    ),
    "dying": ("connections to a failed backend stay open", "each process counts for itself"),
    "key": ("calls wait for Redis", "leases do not expire"),
}


def drill(
    stores: TestStores, folder: Path, only: str, switches: Sequence[str] = (), **names: str
) -> tuple[int, list[dict[str, Any]], str]:
    """The exit status, the rows, and standard error."""
    if switches:
        # Each has global names of its own.
        programs = [f"exec({dedent(switch)!r}, {{}})" for switch in switches]
        (folder / "sitecustomize.py").write_text("\n".join(programs))
        names["PYTHONPATH"] = f"{folder}:{environment({})['PYTHONPATH']}"
        # Otherwise the command restarts itself to set this, which takes half of the time.
        names[redis_keys.PREFIX_VARIABLE] = redis_keys.new_drill_prefix()
    variables = {**QUICK, "DATABASE_URL": stores.database_url, "REDIS_URL": stores.redis_url, **names}
    command = [sys.executable, "-m", "gateway", "drill", "--json", "--only", only]
    done = subprocess.run(
        command, cwd=folder, env=environment(variables), capture_output=True, text=True, timeout=LONGEST_S, check=False
    )
    return done.returncode, json.loads(done.stdout or "[]"), done.stderr


@pytest.mark.long(seconds=35)
@pytest.mark.timeout(150)
def test_the_drill_passes_and_leaves_nothing_behind(stores: TestStores, tmp_path: Path) -> None:
    code, rows, errors = drill(stores, tmp_path, "")
    assert [(row["line"], row["result"], row["why"]) for row in rows] == [(name, "held", None) for name in BY_NAME], errors
    assert (code, sum(row["seconds"] for row in rows) < LONGEST_S) == (0, True)
    with stores.client() as redis:
        assert [name for name in redis.scan_iter("nz*") if b"drill" in name] == []
    assert states_of_keys(stores, tmp_path) == {"revoked"}
    assert dump_postgres(stores).count("drill-sound") > 100
    in_database(stores.database_url, it_is_not_counted_as_traffic)


async def it_is_not_counted_as_traffic(database: Database) -> None:
    """It appears neither in operators' figures nor, two days later, among the keys; all of it is in the audit."""
    long_ago = datetime.now(UTC) - timedelta(days=1)
    for query in ("busiest_keys", "busiest_models"):
        assert await database.rows(query, long_ago, 10) == []
    assert await database.rows("series", long_ago, timedelta(minutes=1)) == []
    sums = await database.row("recent_sums", long_ago)
    assert sums is not None and sums["requests"] == 0
    key_store = KeyStore(database, PasswordHasher(), None)
    await key_store.drop_drill_keys(timedelta(hours=1))
    assert len(await key_store.all()) == len(LIMITS)
    await key_store.drop_drill_keys(timedelta(0))
    assert await key_store.all() == []


def states_of_keys(stores: TestStores, folder: Path) -> set[str]:
    names = {**QUICK, "DATABASE_URL": stores.database_url, "REDIS_URL": stores.redis_url}
    return {row["state"] for row in json.loads(operate(folder, names, "keys", "--json"))}


@pytest.mark.parametrize("control", TOGETHER)
def test_a_broken_promise_fails_on_its_own_line(stores: TestStores, tmp_path: Path, control: str) -> None:
    """And `control`, a promise that the switches do not touch, still holds."""
    switches = [SWITCHES[name] for name in TOGETHER[control]]
    expected = {line: why for lines, _ in switches for line, why in lines.items()}
    status, rows, errors = drill(stores, tmp_path, " ".join([*expected, control]), [code for _, code in switches])
    found = {row["line"]: row["result"] for row in rows}
    assert found == {**dict.fromkeys(expected, "BROKEN"), control: "held"}, (rows, errors)
    reported = {row["line"]: row["why"] for row in rows if row["result"] == "BROKEN"}
    assert {line: why for line, why in reported.items() if expected[line] not in why} == {}
    assert status == 1


def test_every_line_fails_when_its_feature_is_broken() -> None:
    tried = [name for names in TOGETHER.values() for name in names]
    assert sorted(tried) == sorted(SWITCHES)
    assert {line for lines, _ in SWITCHES.values() for line in lines} == BY_NAME.keys()
    for control, names in TOGETHER.items():
        lines = [line for name in names for line in SWITCHES[name][0]]
        assert len({*lines, control}) == len(lines) + 1


@pytest.mark.parametrize(
    ("url", "wired"),
    [
        ("redis://user:p%40ss@redis:6379/2", "redis://user:p%40ss@127.0.0.1:PORT/2"),
        ("redis://redis", "redis://127.0.0.1:PORT"),
        ("rediss://:secret@redis.example:6380/0", "redis://:secret@127.0.0.1:PORT/0"),
        ("redis://redis:6379?db=2&password=secret", "redis://127.0.0.1:PORT?db=2&password=secret"),
        ("rediss://redis.example?db=2", "redis://127.0.0.1:PORT?db=2"),
        ("unix:///run/redis.sock?db=3", "redis://127.0.0.1:PORT?db=3"),
        ("rediss://redis.example?ssl_ca_certs=/ca.pem", None),
        ("redis+cluster://one:6379,two:6379", None),
        ("redis+sentinel://one:26379/master/0", None),
    ],
)
def test_which_redis_urls_can_be_frozen_for_the_drill(url: str, wired: str | None) -> None:
    assert can_be_proxied(url) is (wired is not None)

    async def address() -> str:
        async with RedisProxy(url) as proxy:
            return proxy.url

    if wired is not None:
        assert re.sub(r"(127\.0\.0\.1):\d+", r"\1:PORT", asyncio.run(address())) == wired


def test_an_unknown_line_is_named(stores: TestStores, tmp_path: Path) -> None:
    status, rows, errors = drill(stores, tmp_path, "bytes teapot")
    assert (status, rows) == (1, []) and "unknown fault 'teapot'; choose from" in errors


def test_a_drill_that_cannot_start_reports_what_to_do(stores: TestStores, tmp_path: Path) -> None:
    status, _, errors = drill(stores, tmp_path, "bytes", DATABASE_URL="postgresql://gateway@127.0.0.1:9/gateway")
    assert status == 1 and "PostgreSQL does not answer" in errors
    status, _, errors = drill(stores, tmp_path, "bytes", REDIS_URL="redis://127.0.0.1:9")
    assert status == 1 and "Redis" in errors and "does not answer" in errors and "make doctor" in errors


RIGHTS = "user default off", "user gateway on >word ~nz:* &nz:* +@all", "user other on >word ~other:* &other:* +@all"


def test_a_redis_that_allows_the_gateway_only_its_own_names(stores: TestStores, tmp_path: Path) -> None:
    with server(tmp_path, *RIGHTS) as (_, port):
        url = f"redis://127.0.0.1:{port}?db=3&password=word&username="
        status, rows, errors = drill(stores, tmp_path, "redis revoke slots", REDIS_URL=f"{url}gateway")
        assert (status, [row["result"] for row in rows]) == (0, ["held"] * 3), (rows, errors)
        status, rows, errors = drill(stores, tmp_path, "redis revoke slots", REDIS_URL=f"{url}other")
    assert (status, rows) == (1, []) and "Redis refuses names that begin with nz:drill-" in errors and "~nz:* &nz:*" in errors


@contextmanager
def drill_in_progress(stores: TestStores, folder: Path) -> Iterator[subprocess.Popen[str]]:
    variables = {**QUICK, "DATABASE_URL": stores.database_url, "REDIS_URL": stores.redis_url, "TMPDIR": str(folder)}
    command = [sys.executable, "-m", "gateway", "drill", "--only", "bytes killed"]
    # Redis is checked all the time: a check after the names are deleted would leave one.
    (folder / "sitecustomize.py").write_text("from gateway.stores import redis_client\nredis_client.CHECK_EVERY_S = 0.005\n")
    variables["PYTHONPATH"] = f"{folder}:{environment({})['PYTHONPATH']}"
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment(variables), **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("bytes")
        yield process


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(child) for child in children.read_text().split()]


def names_in_redis(stores: TestStores) -> list[bytes]:
    with stores.client() as redis:
        return list(redis.scan_iter("nz:drill-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_drill_that_is_stopped_leaves_nothing(stores: TestStores, tmp_path: Path, number: signal.Signals) -> None:
    with drill_in_progress(stores, tmp_path) as process:
        assert len(workers_of(process)) >= 2 and names_in_redis(stores)
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, "the drill was stopped" in errors) == (1, True), errors
    assert names_in_redis(stores) == [] and not list(tmp_path.glob("nz-drill-*"))
    assert states_of_keys(stores, tmp_path) == {"revoked"}


def test_the_gateways_of_a_killed_drill_end_and_the_next_drill_removes_its_names(stores: TestStores, tmp_path: Path) -> None:
    with drill_in_progress(stores, tmp_path) as process:
        workers = workers_of(process)
        process.kill()
    until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), 20)
    left = names_in_redis(stores)
    assert left
    # Names of killed drills are removed after ten minutes, as the keys expire.
    old = [re.sub(rb"nz:drill-\d+", b"nz:drill-1", name) for name in left]
    with stores.client() as redis:
        for name, new in zip(left, old, strict=True):
            redis.rename(name, new)
        redis.set(b"nz:drilled:by another", b"")
    [folder] = tmp_path.glob("nz-drill-*")
    os.utime(folder, (1, 1))
    drill(stores, tmp_path, "dialect", TMPDIR=str(tmp_path))
    assert names_in_redis(stores) == [] and not folder.exists()
    with stores.client() as redis:
        assert redis.exists(b"nz:drilled:by another")
