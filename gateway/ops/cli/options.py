"""The options of each verb."""

import argparse
from argparse import ArgumentParser
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

from gateway.admin import values
from gateway.admin.values import BadValue

LIMITS = {
    "rpm": "requests per minute",
    "tpm": "tokens per minute",
    "concurrent": "requests at once",
    "day": "tokens per day (UTC)",
    "month": "tokens per calendar month (UTC)",
    "day_seconds": "seconds of backends per day (UTC)",
    "month_seconds": "seconds of backends per calendar month (UTC)",
}
OPTIONS = {
    "weight": "its share of the backends while calls wait, relative to other keys",
    "heartbeat_after_s": "seconds after which its waiting streams get a heartbeat",
}


def read_by(reader: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type for argparse that reports what is wrong in the words of BadValue."""

    def read(text: str) -> Any:
        try:
            return reader(text)
        except BadValue as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def none(verb: ArgumentParser) -> None:
    pass


def new_key(verb: ArgumentParser) -> None:
    verb.add_argument("--name", required=True, help="the key's name; unique among active keys")
    verb.add_argument("--models", default="", help="allowed models: names or globs, separated by spaces; all by default")
    verb.add_argument("--expires", type=read_by(values.lifetime), help="when it expires, from now: 12h, 30d, 8w")
    _limits(verb, None)
    verb.add_argument("--prompt-log", action="store_true", help="keep this key's prompts and answers in the database")
    verb.add_argument("--retention", type=read_by(values.retention), help="how long prompts and answers are kept: 12h, 7d")
    verb.add_argument("--audit-retention", type=read_by(values.retention), help="how long its audit rows are kept: 90d")
    verb.add_argument("--admin-models", action="store_true", help="may pull, create and delete models on a backend")
    verb.add_argument("--show-backend", action="store_true", help="answers name the backend in X-Gateway-Backend")
    verb.add_argument(
        "--keep-volatile-lines",
        action="store_true",
        help="pass on lines of a system prompt that differ in each request, such as Claude Code's billing header",
    )
    verb.add_argument("--batch", action="store_true", help="its calls yield to those of other keys while they wait")
    verb.add_argument("--sub-users", action="store_true", help="a header of its requests names the user of each")
    verb.add_argument("--role", choices=("user", "admin"), default="user", help="admin: may use /admin/v1")
    verb.add_argument(
        "--show-overhead", action="store_true", help="answers give the time that the gateway added in X-Gateway-Overhead-Ms"
    )


def limits_of_key(verb: ArgumentParser) -> None:
    verb.add_argument(
        "--model", default="", help="limit only models that match this name or glob, in addition to the key's own limits"
    )
    _limits(verb, argparse.SUPPRESS)
    one_key(verb)


def _limits(verb: ArgumentParser, default: str | None) -> None:
    for name, meaning in LIMITS.items():
        described = f"{meaning}: a number, unlimited, or unset for the default"
        verb.add_argument(_written(name), type=read_by(values.limit), default=default, help=described)
    for name, meaning in OPTIONS.items():
        described = f"{meaning}: {values.OPTIONS[name]}, or unset for the default"
        verb.add_argument(_written(name), type=read_by(partial(values.option, name)), default=default, help=described)


def _written(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def one_key(verb: ArgumentParser) -> None:
    verb.add_argument("--key", required=True, help="the key's id or name")


def rotation(verb: ArgumentParser) -> None:
    one_key(verb)
    overlap = read_by(values.duration)
    verb.add_argument("--overlap", type=overlap, default=timedelta(hours=24), help="how long the old key still works: 24h, 0")


def one_backend(verb: ArgumentParser) -> None:
    verb.add_argument("--backend", required=True, help="the backend's name")


def model_on_a_backend(verb: ArgumentParser) -> None:
    one_model(verb)
    verb.add_argument("--backend", default="", help="only on this backend")


def one_model(verb: ArgumentParser) -> None:
    verb.add_argument("--model", required=True, type=read_by(values.model_name), help="the model's name")


def pull(verb: ArgumentParser) -> None:
    one_model(verb)
    verb.add_argument(
        "--backends", type=values.names, default=[], help="only on these: alpha,beta; all Ollama backends by default"
    )


def explanation(verb: ArgumentParser) -> None:
    one_key(verb)
    verb.add_argument("--model", required=True, type=read_by(values.model_name), help="the model, as a client would write it")
    clients = "ollama, openai, anthropic, responses, or a route such as /v1/embeddings"
    verb.add_argument("--client", default="openai", help=clients)
    tokens = read_by(values.tokens)
    verb.add_argument("--prompt", type=tokens, default=1, help="the tokens of its prompt; 1 by default")
    verb.add_argument("--output", type=tokens, help="the most tokens of its answer; no maximum by default")


def trace(verb: ArgumentParser) -> None:
    verb.add_argument("--id", required=True, help="the request's id: X-Request-ID of its answer, or the id in the log")
    verb.add_argument("--since", type=read_by(values.since), help="how far back to search: 24h, 7d, 2026-01-31")


def audit(verb: ArgumentParser) -> None:
    verb.add_argument("--csv", action="store_true", help="print CSV instead of a table")
    verb.add_argument("--key", help="only of this key: its id or name; it may be revoked")
    verb.add_argument("--model", type=read_by(values.model_filter), help="only for this model, or models that match a glob")
    verb.add_argument("--since", type=read_by(values.since), help="only since then: 24h, 7d, 2026-01-31")
    verb.add_argument("--status", type=read_by(values.status), help="only with this status, or of its class: 429, 4xx")
    verb.add_argument(
        "--outcome", type=read_by(values.words), help="only with this outcome, or any outcome that starts with it: refused"
    )
    verb.add_argument("--limit", type=read_by(values.count), help="at most this many")


def usage(verb: ArgumentParser) -> None:
    verb.add_argument("--csv", action="store_true", help="print CSV instead of a table")
    verb.add_argument("--by", type=read_by(values.groups), default=["key"], help="what to group by: key,model,backend,day")
    verb.add_argument("--since", type=read_by(values.since), default="30d", help="since when: 24h, 30d, 2026-01-31")


def top(verb: ArgumentParser) -> None:
    verb.add_argument("--url", default="", help="the gateway's address; by default that of these settings")
    verb.add_argument("--once", action="store_true", help="print it once and exit")


def drill(verb: ArgumentParser) -> None:
    verb.add_argument("--only", type=str.split, default=[], help="only these faults, by name, separated by spaces")
