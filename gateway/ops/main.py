"""`python -m gateway VERB`: what operators type; the Makefile's targets call these."""

import argparse
import asyncio
import errno
import os
import re
import sys
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, NoReturn

from gateway.core.errors import CommandFailed, SettingsError, StoreUnavailable
from gateway.ops.cli import audit, backends, console, database, explain, health, installation, keys, models, options, serve, top
from gateway.ops.doctor import report
from gateway.ops.drill import command
from gateway.ops.local import demo_backend
from gateway.settings import Settings
from gateway.stores.postgres import advice_for


class Verb(NamedTuple):
    run: Callable[[Settings, argparse.Namespace], Coroutine[Any, Any, None]]
    add_options: Callable[[argparse.ArgumentParser], None]
    summary: str


VERBS = {
    "migrate": Verb(database.migrate, options.none, "bring the database's schema up to date"),
    "key": Verb(keys.make_key, options.new_key, "create a key and print it, once"),
    "keys": Verb(keys.list_keys, options.none, "list all keys"),
    "rotate": Verb(keys.rotate_key, options.rotation, "give a key a new secret; the old one works for the overlap"),
    "limit": Verb(keys.limit_key, options.limits_of_key, "set a key's limits, everywhere at once"),
    "revoke": Verb(keys.revoke_key, options.one_key, "revoke a key, everywhere at once"),
    "models": Verb(backends.list_models, options.none, "list the models of all backends"),
    "refresh": Verb(backends.refresh, options.none, "poll all backends for their models now"),
    "probe": Verb(backends.probe, options.none, "try every backend: reachable, latency, version, models, token"),
    "warm": Verb(
        models.warm, options.model_on_a_backend, "load a model into a backend's memory, before the first call needs it"
    ),
    "unload": Verb(models.unload, options.model_on_a_backend, "throw a model out of a backend's memory"),
    "pull": Verb(models.pull, options.pull, "download a model on all Ollama backends at once"),
    "audit": Verb(audit.list_audit, options.audit, "list requests, the newest first"),
    "usage": Verb(audit.sum_audit, options.usage, "sum requests and tokens"),
    "audit-verify": Verb(audit.verify_audit, options.none, "check that the audit has not been changed"),
    "purge": Verb(audit.purge, options.none, "delete expired audit rows and prompts now"),
    "forget": Verb(audit.forget, options.one_key, "delete a key's prompts and answers now"),
    "explain": Verb(
        explain.explain_call, options.explanation, "show where a call would be sent now, and why; nothing is sent or counted"
    ),
    "trace": Verb(audit.trace, options.trace, "show what happened to one request"),
    "drain": Verb(backends.drain_backend, options.one_backend, "stop sending new requests to a backend, in every process"),
    "undrain": Verb(backends.undrain_backend, options.one_backend, "resume sending requests to a backend"),
    "top": Verb(top.watch, options.top, "watch backends, requests, busy keys and models in the terminal"),
    "doctor": Verb(report.examine, options.none, "check the whole installation: what is fine, what is not, what to do"),
    "drill": Verb(command.drill, options.drill, "break things on fake backends beside this installation, and report what held"),
    "config": Verb(installation.show_config, options.none, "print the settings in force and where each comes from"),
}

# These open no stores, or open them themselves.
PROGRAMS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "serve": lambda _: serve.serve(installation.for_serving()),
    "run": lambda _: serve.run(),
    "worker": lambda arguments: serve.worker(installation.read(), arguments.descriptor, arguments.parent),
    "demo": lambda arguments: demo_backend.serve(arguments.descriptor, arguments.parent),
    "health": lambda _: health.check(installation.read()),
    "config": lambda arguments: asyncio.run(VERBS["config"].run(installation.shown(), arguments)),
}


class Parser(argparse.ArgumentParser):
    """Names a missing or wrong option also as the Makefile's variable, which is what most operators type."""

    def error(self, message: str) -> NoReturn:
        named = re.sub(r"--([a-z-]+)", lambda found: f"{found[1].upper().replace('-', '_')}= (--{found[1]})", message)
        self.exit(2, f"error: {named}; see `{self.prog} --help`\n")


UNWRITABLE = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EBADF, errno.EIO)


def parser() -> argparse.ArgumentParser:
    whole = Parser(prog="python -m gateway", description="A gateway in front of your own model servers.")
    verbs = whole.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("serve", help="serve, with the stores that the environment names")
    verbs.add_parser("run", help="serve on this machine, with a private PostgreSQL and Redis where none are named")
    for name, verb in VERBS.items():
        verb_parser = verbs.add_parser(name, help=verb.summary, description=verb.summary)
        verb_parser.add_argument("--json", action="store_true", help="print JSON instead of text")
        verb.add_options(verb_parser)
    shell = verbs.add_parser("psql", help="open the database's own shell")
    shell.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on to psql")
    verbs.add_parser("health", help="exit 0 if the gateway of these settings is alive (for containers)")
    for name in ("worker", "demo"):
        inner = verbs.add_parser(name)
        inner.add_argument("descriptor", type=int)
        inner.add_argument("parent", type=int)
    return whole


def main(words: list[str] | None = None) -> int:
    arguments = parser().parse_args(_with_psql_options(sys.argv[1:] if words is None else words))
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except SettingsError as error:
        console.notify(f"error: {error}")
        return 2
    except CommandFailed as error:
        console.notify(f"error: {error}")
    except StoreUnavailable as error:
        console.notify(f"error: {advice_for(error)}")
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        if error.errno != errno.EPIPE:
            console.notify(f"error: the output cannot be written: {error.strerror}")
        # The output has no reader any more; what is left to write must not fail again at the exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _with_psql_options(words: list[str]) -> list[str]:
    """All words after `psql` are for psql, including options, which argparse would treat as ours."""
    is_ours = words[:1] != ["psql"] or words[1:2] in (["-h"], ["--help"], ["--"])
    return words if is_ours else ["psql", "--", *words[1:]]


def _run(arguments: argparse.Namespace) -> int:
    if arguments.verb in PROGRAMS:
        return PROGRAMS[arguments.verb](arguments) or 0
    if arguments.verb == "drill":
        command.restart_with_own_names()
    stores_of = report.stores_if_any if arguments.verb == "doctor" else installation.stores_of
    with stores_of() as settings:
        if arguments.verb == "psql":
            return database.psql(
                settings, arguments.arguments[1:] if arguments.arguments[:1] == ["--"] else arguments.arguments
            )
        asyncio.run(VERBS[arguments.verb].run(settings, arguments))
    return 0
