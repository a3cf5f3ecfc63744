"""`python -m gateway VERB`: what operators type; the Makefile's targets call these."""

import argparse
import asyncio
import errno
import os
import re
import sys
import urllib.request
from collections.abc import Callable, Coroutine
from datetime import timedelta
from http.client import HTTPException
from typing import Any, NoReturn

from gateway.admin import values
from gateway.admin.values import BadValue
from gateway.core.errors import CommandFailed, SettingsError, StoreUnavailable
from gateway.ops.cli import audit, console, explain, installation, keys, serve, top
from gateway.ops.doctor import report
from gateway.ops.drill import command
from gateway.ops.local import demo_backend
from gateway.settings import Settings
from gateway.stores.postgres import advice_for

Command = Callable[[Settings, argparse.Namespace], Coroutine[Any, Any, None]]

VERBS: dict[str, tuple[Command, str]] = {
    "migrate": (keys.migrate, "bring the database's schema up to date"),
    "key": (keys.make_key, "make a key and print it, this once"),
    "keys": (keys.list_keys, "list all keys"),
    "rotate": (keys.rotate_key, "give a key a new secret; the old one works for the overlap"),
    "limit": (keys.limit_key, "set a key's limits, everywhere at once"),
    "revoke": (keys.revoke_key, "end a key, everywhere at once"),
    "models": (keys.list_models, "list the models of all backends"),
    "refresh": (keys.refresh, "ask all backends for their models now"),
    "probe": (keys.probe, "try every backend: reachable, latency, version, models, token"),
    "audit": (audit.list_audit, "list requests, the newest first"),
    "usage": (audit.sum_audit, "sum requests and tokens"),
    "audit-verify": (audit.verify_audit, "check that the audit is as it was written"),
    "purge": (audit.purge, "delete now what is kept no longer"),
    "forget": (audit.forget, "delete a key's prompts and answers now"),
    "explain": (explain.explain_call, "say where a call would go now, and why; no backend is asked, nothing is taken"),
    "trace": (explain.trace, "tell what became of one request"),
    "drain": (explain.drain_backend, "give a backend no new requests, in every process, until undrain"),
    "undrain": (explain.undrain_backend, "give a backend requests again"),
    "top": (top.watch, "watch backends, requests, busy keys and models in the terminal, from the admin API"),
    "doctor": (report.examine, "check the whole installation: what is well, what is not, what to do"),
    "drill": (command.drill, "break what can break, on played backends beside this installation, and see what holds"),
    "config": (keys.show_config, "print the settings in force and where each comes from"),
}


LIMITS = {
    "rpm": "requests per minute",
    "tpm": "tokens per minute",
    "concurrent": "requests at once",
    "day": "tokens per day (UTC)",
    "month": "tokens per calendar month (UTC)",
}


class Parser(argparse.ArgumentParser):
    """Names a missing or wrong option also as the Makefile's variable, which is what most operators type."""

    def error(self, message: str) -> NoReturn:
        told = re.sub(r"--([a-z-]+)", lambda found: f"{found[1].upper().replace('-', '_')}= (--{found[1]})", message)
        self.exit(2, f"error: {told}; see `{self.prog} --help`\n")


def read_by(reader: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type for argparse, whose error has the words of BadValue."""

    def read(text: str) -> Any:
        try:
            return reader(text)
        except BadValue as wrong:
            raise argparse.ArgumentTypeError(str(wrong)) from None

    return read


UNWRITABLE = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EBADF, errno.EIO)


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="python -m gateway", description="One door in front of your own model servers.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("serve", help="serve, with the stores that the environment names")
    verbs.add_parser("run", help="serve on this machine, with a private PostgreSQL and Redis where none are named")
    for name, (_, summary) in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=summary)
        verb.add_argument("--json", action="store_true", help="print JSON for machines")
        _add_options(name, verb)
        _add_audit_options(name, verb)
    shell = verbs.add_parser("psql", help="open the database's own shell")
    shell.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to psql")
    verbs.add_parser("health", help="exit 0 if the gateway of these settings is alive (for containers)")
    for name in ("worker", "demo"):
        inner = verbs.add_parser(name)
        inner.add_argument("descriptor", type=int)
        inner.add_argument("parent", type=int)
    return top


def _add_options(name: str, verb: argparse.ArgumentParser) -> None:
    if name == "key":
        verb.add_argument("--name", required=True, help="what the key is called; unique among active keys")
        verb.add_argument("--models", default="", help="allowed models, globs separated by blanks; none means all")
        verb.add_argument("--expires", type=read_by(values.lifetime), help="lifetime: 12h, 30d, 8w")
        _add_limits(verb, None)
        verb.add_argument("--prompt-log", action="store_true", help="keep this key's prompts and answers in the database")
        verb.add_argument("--retention", type=read_by(values.retention), help="how long they are kept: 12h, 7d")
        verb.add_argument("--audit-retention", type=read_by(values.retention), help="how long its audit rows are kept: 90d")
        verb.add_argument("--admin-models", action="store_true", help="may pull, create and delete models on a backend")
        verb.add_argument("--show-backend", action="store_true", help="answers name the backend in X-Gateway-Backend")
        verb.add_argument("--role", choices=("user", "admin"), default="user", help="admin: may use /admin/v1")
        verb.add_argument("--show-overhead", action="store_true", help="answers say in X-Gateway-Overhead-Ms what was added")
    if name == "limit":
        verb.add_argument("--model", default="", help="limit only the models that match this glob, beside the key's own limits")
        _add_limits(verb, argparse.SUPPRESS)
    if name in ("rotate", "revoke", "limit", "forget", "explain"):
        verb.add_argument("--key", required=True, help="the key's id or name")
    if name == "explain":
        verb.add_argument(
            "--model",
            required=True,
            type=read_by(values.model_name),
            help="the model, as a client would write it",
        )
        verb.add_argument("--client", default="openai", help="ollama, openai, or a route such as /v1/embeddings")
    if name == "top":
        verb.add_argument("--url", default="", help="the gateway's address; by default that of these settings")
        verb.add_argument("--once", action="store_true", help="print it once and end")
    if name == "trace":
        verb.add_argument("--id", required=True, help="the request's id: X-Request-ID of its answer, or the id in the log")
        verb.add_argument("--since", type=read_by(values.since), help="look no further back: 24h, 7d, 2026-01-31")
    if name == "drill":
        verb.add_argument("--only", type=str.split, default=[], help="only these lines, by their names, separated by blanks")
    if name in ("drain", "undrain"):
        verb.add_argument("--backend", required=True, help="the backend's name")
    if name == "rotate":
        verb.add_argument(
            "--overlap",
            type=read_by(values.duration),
            default=timedelta(hours=24),
            help="how long the old key works: 24h, 0",
        )


def _add_audit_options(name: str, verb: argparse.ArgumentParser) -> None:
    if name in ("audit", "usage"):
        verb.add_argument("--csv", action="store_true", help="print CSV for machines")
    if name == "audit":
        verb.add_argument("--key", help="only of this key: its id or name, also of one that was revoked")
        verb.add_argument("--model", type=read_by(values.model_filter), help="only of this model, or of those matching a glob")
        verb.add_argument("--since", type=read_by(values.since), help="only since then: 24h, 7d, 2026-01-31")
        verb.add_argument("--status", type=read_by(values.status), help="only with this status, or of its class: 429, 4xx")
        verb.add_argument("--outcome", type=read_by(values.words), help="only with this outcome, or a beginning of it: refused")
        verb.add_argument("--limit", type=read_by(values.count), help="at most this many")
    if name == "usage":
        verb.add_argument("--by", type=read_by(values.groups), default=["key"], help="what to sum by: key,model,backend,day")
        verb.add_argument("--since", type=read_by(values.since), default="30d", help="since when: 24h, 30d, 2026-01-31")


def _add_limits(verb: argparse.ArgumentParser, unsaid: str | None) -> None:
    for name, words in LIMITS.items():
        told = f"{words}: a number, unlimited, or unset for the default"
        verb.add_argument(f"--{name}", type=read_by(values.limit), default=unsaid, help=told)


def main(arguments: list[str] | None = None) -> int:
    said = parser().parse_args(_with_psqls_own(sys.argv[1:] if arguments is None else arguments))
    try:
        code = _carry_out(said)
        sys.stdout.flush()
        return code
    except SettingsError as wrong:
        console.say(f"error: {wrong}")
        return 2
    except CommandFailed as failed:
        console.say(f"error: {failed}")
    except StoreUnavailable as unavailable:
        console.say(f"error: {advice_for(unavailable)}")
    except KeyboardInterrupt:
        return 130
    except OSError as wrong:
        if wrong.errno not in UNWRITABLE:
            raise
        if wrong.errno != errno.EPIPE:
            console.say(f"error: the output cannot be written: {wrong.strerror}")
        # Nobody reads on; what is left to write must not fail again at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _with_psqls_own(arguments: list[str]) -> list[str]:
    """What stands behind `psql` is psql's, options too, which argparse would take for ours."""
    is_ours = arguments[:1] != ["psql"] or arguments[1:2] in (["-h"], ["--help"], ["--"])
    return arguments if is_ours else ["psql", "--", *arguments[1:]]


def _carry_out(said: argparse.Namespace) -> int:
    if said.verb == "serve":
        serve.serve(installation.for_serving())
    elif said.verb == "run":
        serve.run()
    elif said.verb == "worker":
        serve.worker(installation.read(), said.descriptor, said.parent)
    elif said.verb == "demo":
        demo_backend.serve(said.descriptor, said.parent)
    elif said.verb == "health":
        return _health(installation.read())
    elif said.verb == "config":
        asyncio.run(keys.show_config(installation.shown(), said))
    else:
        return _speak_to_stores(said)
    return 0


def _speak_to_stores(said: argparse.Namespace) -> int:
    if said.verb == "drill":
        command.with_names_of_its_own()
    stores_of = report.stores_if_any if said.verb == "doctor" else installation.stores_of
    with stores_of() as settings:
        if said.verb == "psql":
            own = said.arguments[1:] if said.arguments[:1] == ["--"] else said.arguments
            return keys.psql(settings, own)
        asyncio.run(VERBS[said.verb][0](settings, said))
    return 0


def _health(settings: Settings) -> int:
    host = settings.gateway_bind_host if settings.gateway_bind_host not in ("0.0.0.0", "::") else "127.0.0.1"  # noqa: S104 # nosec B104
    url = f"http://{f'[{host}]' if ':' in host else host}:{settings.gateway_bind_port}/healthz"
    # Ours is no address for a proxy that the environment may name.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=3) as answer:
            return 0 if answer.status == 200 else 1
    except (OSError, HTTPException) as wrong:
        raise CommandFailed(f"no gateway answers at {url}: {wrong}") from None
