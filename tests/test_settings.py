"""The settings: each wrong value is refused with one line that names valid values."""

import json
import math
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import settings
from gateway.core.errors import SettingsError
from gateway.fleet.backends.config import ModelConfig
from gateway.settings import Settings
from tests.support import fork_server
from tests.support.processes import environment

CANARY = "canary-7d1f0b"
SECRETS = ["DATABASE_URL", "REDIS_URL", "OLLAMA_AUTH_TOKEN", "OLLAMA_BACKENDS", "METRICS_TOKEN"]
GOOD_SECRET = {
    "DATABASE_URL": f"postgresql://u:{CANARY}@h/d",
    "REDIS_URL": f"redis://u:{CANARY}@h:6379/0",
    "OLLAMA_AUTH_TOKEN": CANARY,
    "METRICS_TOKEN": CANARY,
    "OLLAMA_BACKENDS": json.dumps([{"name": "a", "base_url": "http://a", "auth_token": CANARY}]),
}


def load(**names: str) -> Settings:
    return settings.load(names, None)


def refusal(**names: str) -> str:
    """The one line of the error."""
    with pytest.raises(SettingsError) as refused:
        load(**names)
    words = str(refused.value)
    assert "\n" not in words and len(words) < 400
    return words


BAD = {
    "DASHBOARD_ENABLED": ["oui"],
    "METRICS_TOKEN": ["two\nlines"],
    "METRICS_ALLOW": ["here", "127.0.0.1,there", "10.0.0.0/40", "300.1.1.1"],
    "GATEWAY_BIND_HOST": ["a b", "http://x", "x/y"],
    "GATEWAY_BIND_PORT": ["http", "-1", "65536", "80.5", "1e3", " ", "8080 8081", "0x50", "9" * 40],
    "GATEWAY_WORKERS": ["0", "65", "two", "auto"],
    "GATEWAY_LOG_LEVEL": ["loud", "10", "INFO,DEBUG"],
    "GATEWAY_LOG_FORMAT": ["xml", "json console"],
    "GATEWAY_REQUEST_ID_HEADER": ["X Request", "X-Id:", "X-Ü"],
    "GATEWAY_TRUSTED_PROXIES": ["10.0.0.0/99", "a b", "proxy!", "127.0.0.1;10.0.0.1", "::1/200"],
    "GATEWAY_DRAIN_S": ["-1", "nan", "inf", "30s", "1e9", "3601"],
    "OLLAMA_BASE_URL": ["ollama:11434", "ftp://h", "http://", "http://h:99999", "http://h/?a=b", "http://[::1", "http://h h"],
    "OLLAMA_CONNECT_TIMEOUT_S": ["0", "five", "301", "nan"],
    "OLLAMA_READ_TIMEOUT_S": ["0", "-5", "10m"],
    "OLLAMA_IDLE_TIMEOUT_S": ["0", "none"],
    "OLLAMA_TOTAL_TIMEOUT_S": ["0", "86401"],
    "OLLAMA_SLOTS": ["-1", "10001", "x"],
    "OLLAMA_MAX_CONNECTIONS": ["0", "many"],
    "OLLAMA_AUTH_TOKEN": ["two words", "tökén", "line\nbreak"],
    "OLLAMA_AUTH_HEADER": ["Author ization", "A:b"],
    "OLLAMA_AUTH_SCHEME": ["Bearer token"],
    "DIGEST_PARITY": ["error", "1"],
    "LOADED_MODELS_REFRESH_S": ["0", "3601", "x"],
    "ROUTING": ["fastest", "1"],
    "ROUTING_SPILL_S": ["-1", "always", "86401"],
    "ROUTING_STICKY_S": ["-1", "10m"],
    "QUEUE_WAIT_S": ["-1", "never"],
    "QUEUE_SIZE": ["-1", "1000001", "many"],
    "QUEUE_TOKENS": ["-1", "4M"],
    "SUB_USER_HEADER": ["X User", "a:b"],
    "MODEL_DISCOVERY_REFRESH_S": ["0", "0.1", "never"],
    "MODEL_DISCOVERY_CACHE_TTL_S": ["0", "x"],
    "DATABASE_URL": ["mysql://u:p@h/d", "h/d", "postgresql://u:p@h:port/d", "postgresql://u:p@h:70000/d", " postgresql://h/d"],
    "DATABASE_POOL_SIZE": ["0", "1001", "x"],
    "DATABASE_POOL_OVERFLOW": ["-1", "x"],
    "REDIS_URL": [
        "http://h",
        "h:6379",
        "redis://h:x/0",
        "redis://h/zero",
        "unix://",
        "redis+sentinel://a:1,b:x/m",
        "redis://[::1",
    ],
    "REDIS_KEY_CACHE_TTL_S": ["0", "1d"],
    "DEFAULT_RPM": ["-1", "60/min", "1.5"],
    "DEFAULT_TPM": ["-1", "100k"],
    "DEFAULT_CONCURRENT": ["-1", "no"],
    "CACHED_TOKENS_WEIGHT": ["-0.1", "1.1", "1.000001", "2", "0.1234567", "1e-1", "0,1", "10%", ".", "0.", "nan", "00"],
    "MAX_QUEUE_WAIT_S": ["-1", "601", "5s"],
    "LIMITS_WITHOUT_REDIS": ["open", "1"],
    "MAX_REQUEST_BODY_BYTES": ["1023", "256K", "-1"],
    "MAX_UPLOAD_BYTES": ["1023", "25M", "-1"],
    "MAX_NUM_PREDICT": ["0", "-1", "x"],
    "MAX_KEEP_ALIVE_S": ["0", "-1", "30m"],
    "STRIP_VOLATILE_PROMPT_LINES": ["maybe"],
    "ARGON2_TIME_COST": ["0", "101"],
    "ARGON2_MEMORY_COST_KIB": ["7", "64MiB"],
    "ARGON2_PARALLELISM": ["0", "65"],
    "AUTH_FAILURE_RATE_LIMIT_PER_IP_PER_MIN": ["0", "off"],
    "AUDIT_BUFFER_SIZE": ["0", "x"],
    "PROMPT_LOG_DEFAULT_RETENTION_DAYS": ["0", "30d"],
    "AUDIT_LOG_DEFAULT_RETENTION_DAYS": ["0", "1y"],
    "PLAYGROUND_ENABLED": ["maybe", "2", "enabled"],
    "DOCS_ENABLED": ["oui"],
    "MODEL_ALIASES": ["[]", "not json", "1", '{"a": []}', '{"a": 1}', '{"a": "b", "A:latest": "c"}', "{" * 100_000],
    "OLLAMA_BACKENDS": ["{}", "[]", "not json", "[1]", "[" * 100_000],
}
FREE_TEXT = {"PLAYGROUND_FILE"}
# The errors of settings that are JSON begin with their names.
LISTS = ("MODEL_ALIASES: ", "OLLAMA_BACKENDS: ")


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_wrong_value_is_refused_with_its_name_and_valid_values(name: str, value: str) -> None:
    assert refusal(**{name: value}).startswith((f"{name} must be ", *LISTS))


def test_the_list_has_every_setting_that_can_be_wrong() -> None:
    names = {declared.name.upper() for declared in settings.declarations()}
    assert names - FREE_TEXT == set(BAD)


def test_the_error_has_valid_values_and_the_wrong_one() -> None:
    assert refusal(GATEWAY_BIND_PORT="http") == "GATEWAY_BIND_PORT must be an integer from 0 to 65535, not 'http'"
    assert refusal(GATEWAY_LOG_FORMAT="xml") == "GATEWAY_LOG_FORMAT must be json or console, not 'xml'"
    assert refusal(DOCS_ENABLED="oui") == "DOCS_ENABLED must be true or false, not 'oui'"


@given(name=st.sampled_from(sorted(BAD)), value=st.text(st.characters(exclude_characters="\0"), min_size=1))
def test_any_value_is_either_accepted_or_refused(name: str, value: str) -> None:
    try:
        load(**{name: value})
    except SettingsError as refused:
        assert str(refused).startswith((f"{name} must be ", *LISTS)) and "\n" not in str(refused)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("GATEWAY_BIND_PROT", "did you mean GATEWAY_BIND_PORT?"),
        ("GATEWAY_WORKER", "did you mean GATEWAY_WORKERS?"),
        ("GATEWAY_PORT", "did you mean GATEWAY_"),
        ("GATEWAY_XYZZY_QUUX_FROBNICATE", "see .env.example"),
    ],
)
def test_an_unknown_name_is_refused_with_a_suggestion(name: str, advice: str) -> None:
    words = refusal(**{name: "1"})
    assert words.startswith(f"{name} is not a setting of the gateway: ") and advice in words


@pytest.mark.parametrize(
    ("name", "meant"),
    [("OLLAMA_BACKEND", "OLLAMA_BACKENDS"), ("DEFAULT_RPMS", "DEFAULT_RPM"), ("DASHBOARD", "DASHBOARD_ENABLED")],
)
def test_names_similar_to_settings_are_refused_in_the_file_only(tmp_path: Path, name: str, meant: str) -> None:
    others = "COMPOSE_PROFILES=ollama\nPOSTGRES_PASSWORD=x\nREDIS_PASSWORD=y\nOLLAMA_LOAD_TIMEOUT=5m\nTZ=UTC\n"
    (tmp_path / ".env").write_text(others)
    settings.load({name: "5"}, tmp_path / ".env")
    (tmp_path / ".env").write_text(f"{others}{name}=5\n")
    with pytest.raises(SettingsError, match=f"{name} is not a setting of the gateway: did you mean {meant}"):
        settings.load({}, tmp_path / ".env")


def test_an_unknown_name_in_the_file_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("GATEWAY_LOGLEVEL=DEBUG\n")
    with pytest.raises(SettingsError, match="did you mean GATEWAY_LOG_LEVEL"):
        settings.load({}, tmp_path / ".env")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GATEWAY_SERVICE_HOST", "10.0.0.1"),
        ("GATEWAY_SERVICE_PORT", "8080"),
        ("GATEWAY_SERVICE_PORT_HTTP", "8080"),
        ("GATEWAY_PORT", "tcp://10.0.0.1:8080"),
        ("GATEWAY_PORT_8080_TCP", "tcp://10.0.0.1:8080"),
        ("GATEWAY_PORT_8080_TCP_PROTO", "tcp"),
        ("GATEWAY_METRICS_SERVICE_HOST", "10.0.0.1"),
        ("GATEWAY_METRICS_PORT", "udp://10.0.0.1:90"),
        ("GATEWAY_METRICS_PORT_90_UDP_ADDR", "10.0.0.1"),
    ],
)
def test_variables_of_kubernetes_are_accepted(name: str, value: str) -> None:
    assert load(**{name: value}).gateway_bind_port == 8080


def test_other_names_are_ignored() -> None:
    assert load(PATH="/bin", OLLAMA_MODELS="/models", REDIS_PASSWORD="x", gateway_workers="x").gateway_workers == 1


@pytest.mark.parametrize("name", settings.COMPOSE_ONLY)
def test_names_that_only_compose_reads_are_accepted(name: str) -> None:
    load(**{name: "anything"})


@pytest.mark.parametrize("name", SECRETS)
def test_every_secret_can_come_from_a_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(GOOD_SECRET[name] + "\n")
    from_file, from_environment = load(**{f"{name}_FILE": str(file)}), load(**{name: GOOD_SECRET[name]})
    assert getattr(from_file, name.lower()) == getattr(from_environment, name.lower())
    assert from_file.backends == from_environment.backends
    assert from_file.sources[name.lower()] == f"{name}_FILE"


def test_the_list_has_every_secret() -> None:
    assert [n for n in SECRETS if settings.is_secret(n.lower())] == SECRETS
    assert {declared.name.upper() for declared in settings.declarations() if declared.metadata["secret"]} == set(SECRETS)


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_and_its_file_together_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(GOOD_SECRET[name])
    words = refusal(**{name: GOOD_SECRET[name], f"{name}_FILE": str(tmp_path / "secret")})
    assert words == f"{name} and {name}_FILE are both set: keep one"


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe"])
@pytest.mark.parametrize("name", SECRETS)
def test_a_file_that_cannot_be_used(name: str, content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "secret").write_bytes(content)
    assert refusal(**{f"{name}_FILE": str(tmp_path / "secret")}).startswith(f"{name}_FILE must name a ")


@pytest.mark.parametrize("name", SECRETS)
def test_a_wrong_secret_is_not_shown(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{CANARY} : is wrong for all of them [")
    assert CANARY not in refusal(**{f"{name}_FILE": str(tmp_path / "secret")})


def test_other_settings_have_no_file_variant() -> None:
    assert "did you mean GATEWAY_WORKERS?" in refusal(GATEWAY_WORKERS_FILE="/x")


def test_the_environment_overrides_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("# comment\nDEFAULT_RPM=7\nDEFAULT_TPM=8\nGATEWAY_LOG_FORMAT='console'\n\nMAX_NUM_PREDICT=\n")
    found = settings.load({"DEFAULT_RPM": "5", "DEFAULT_CONCURRENT": ""}, file)
    assert (found.default_rpm, found.sources["default_rpm"]) == (5, "environment")
    assert (found.default_tpm, found.sources["default_tpm"]) == (8, ".env")
    assert (found.gateway_log_format, found.sources["gateway_log_format"]) == ("console", ".env")
    assert (found.default_concurrent, found.sources["default_concurrent"]) == (8, "default")
    assert (found.max_num_predict, found.sources["max_num_predict"]) == (32768, "default")


def test_overrides_replace_only_defaults(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("DEFAULT_TPM=8\n")
    overrides = {"DEFAULT_RPM": ("1", "local run"), "DEFAULT_TPM": ("1", "local run"), "MAX_NUM_PREDICT": ("2", "local run")}
    found = settings.load({"DEFAULT_RPM": "5"}, file, overrides)
    assert (found.default_rpm, found.default_tpm, found.max_num_predict) == (5, 8, 2)
    assert found.sources["max_num_predict"] == "local run"


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"DEFAULT_RPM=\xff\n")
    with pytest.raises(SettingsError, match=r"\.env must be a readable text file in UTF-8"):
        settings.load({}, tmp_path / ".env")


def test_a_missing_file_counts_as_no_file(tmp_path: Path) -> None:
    assert settings.load({}, tmp_path / ".env") == settings.load({}, None)


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        load().default_rpm = 3  # type: ignore[misc]


def test_equivalent_spellings() -> None:
    assert [load(DOCS_ENABLED=word).docs_enabled for word in ("true", "TRUE", "1", "yes", "0", "No")] == [True] * 4 + [
        False
    ] * 2
    assert load(GATEWAY_LOG_LEVEL="debug").gateway_log_level == "DEBUG"
    assert load(DATABASE_URL="postgresql+asyncpg://u:p@h/d").database_url == "postgresql://u:p@h/d"
    assert load(GATEWAY_TRUSTED_PROXIES=" 10.0.0.0/8 , ::1,nginx-proxy,").gateway_trusted_proxies == (
        "10.0.0.0/8",
        "::1",
        "nginx-proxy",
    )


ADDRESSES = [
    ("DATABASE_URL", f"postgresql://user:{CANARY}@h:5432/d"),
    ("DATABASE_URL", f"postgresql+asyncpg://user:x@{CANARY}@h/d"),
    ("DATABASE_URL", f"postgresql://user:x:{CANARY}@h1:1,h2:2/d"),
    ("DATABASE_URL", f"postgresql://h/d?user=u&password={CANARY}&sslmode=require"),
    ("DATABASE_URL", f"postgresql://h/d?p%61ssword={CANARY}"),
    ("REDIS_URL", f"redis://:{CANARY}@h:6379/0"),
    ("REDIS_URL", f"rediss://user:{CANARY}@h:6379/0"),
    ("REDIS_URL", f"redis://h:6379/0?password={CANARY}"),
    ("REDIS_URL", f"unix:///run/redis.sock?db=0&password={CANARY}"),
    ("REDIS_URL", f"unix://user:{CANARY}@/run/redis.sock"),
    ("REDIS_URL", f"redis+sentinel://user:{CANARY}@one:26379,two:26379/master/0"),
    ("REDIS_URL", f"rediss+sentinel://:{CANARY}@one,two/master"),
    ("OLLAMA_AUTH_TOKEN", CANARY),
    ("OLLAMA_BACKENDS", f'[{{"name":"a","base_url":"http://a","auth_token":"{CANARY}"}}]'),
    ("OLLAMA_BACKENDS", f'[{{"name":"a","base_url":"http://a","auth_\\u0074oken" : "{CANARY}"}}]'),
    ("OLLAMA_BACKENDS", f'[{{"auth_token":"x\\"{CANARY}","auth_token":"{CANARY}\\\\","name":"a","base_url":"http://a"}}]'),
]


@pytest.mark.parametrize(("name", "value"), ADDRESSES)
def test_secrets_are_neither_shown_nor_represented(name: str, value: str) -> None:
    found = load(**{name: value})
    shown = {row_name: row_value for row_name, row_value, _ in found.shown()}
    assert CANARY not in str(found.shown()) + repr(found) + str(found) + repr(found.backends)
    assert "***" in shown[name]


@pytest.mark.parametrize(
    ("written", "millionths", "shown"),
    [
        ("0.1", 100_000, "0.1"),
        (".25", 250_000, "0.25"),
        ("0", 0, "0"),
        ("1.000", 10**6, "1"),
        ("0.000001", 1, "0.000001"),
        ("0.999999", 999_999, "0.999999"),
    ],
)
def test_a_weight_is_exact_and_shown_as_written(written: str, millionths: int, shown: str) -> None:
    found = load(CACHED_TOKENS_WEIGHT=written)
    assert found.cached_tokens_weight == millionths
    assert ("CACHED_TOKENS_WEIGHT", shown, "environment") in found.shown()


def test_other_values_are_shown() -> None:
    found = load(**GOOD_SECRET, GATEWAY_DRAIN_S="2.50", DOCS_ENABLED="yes", OLLAMA_BASE_URL="http://h/")
    shown = {name: (value, source) for name, value, source in found.shown()}
    assert shown["DATABASE_URL"] == ("postgresql://u:***@h/d", "environment")
    assert shown["REDIS_URL"] == ("redis://u:***@h:6379/0", "environment")
    assert shown["OLLAMA_AUTH_TOKEN"] == ("***", "environment")
    assert shown["OLLAMA_BACKENDS"][0] == '[{"name": "a", "base_url": "http://a", "auth_token": "***"}]'
    assert shown["GATEWAY_DRAIN_S"] == ("2.5", "environment") and shown["DOCS_ENABLED"] == ("true", "environment")
    assert shown["GATEWAY_TRUSTED_PROXIES"] == ("127.0.0.1,nginx-proxy", "default")
    assert list(shown) == [declared.name.upper() for declared in settings.declarations()]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", f"postgresql://u:{CANARY}@h:port/d"),
        ("DATABASE_URL", f"postgresql://u:{CANARY}℀@h/d"),
        ("DATABASE_URL", f"postgresql://u:{CANARY}@[h/d"),
        ("REDIS_URL", f"redis://u:{CANARY}℀@h/0"),
        ("REDIS_URL", f"redis://u:{CANARY}@h/name"),
        ("OLLAMA_BASE_URL", f"http://u:{CANARY}@h"),
        ("OLLAMA_AUTH_TOKEN", f"Bearer {CANARY}"),
        ("OLLAMA_AUTH_SCHEME", f"Bearer {CANARY}"),
        ("OLLAMA_AUTH_HEADER", f"Authorization: Bearer {CANARY}"),
        ("OLLAMA_BACKENDS", f'[{{"auth_token":"{CANARY}","name":"a"}}]'),
        ("OLLAMA_BACKENDS", f'[{{"auth_token":"{CANARY} x","name":"a","base_url":"http://a"}}]'),
        ("OLLAMA_BACKENDS", f'[{{"auth_token":"{CANARY}","name":"a","base_url":"http://u:{CANARY}@a"}}]'),
        ("OLLAMA_BACKENDS", f'[{{"auth_token":"{CANARY}","name":"a","base_url":"http://a"]'),
        ("OLLAMA_BACKENDS", CANARY),
    ],
)
def test_no_error_shows_a_secret(name: str, value: str) -> None:
    words = refusal(**{name: value})
    assert words.startswith((f"{name} must be ", *LISTS)) and CANARY not in words


@pytest.mark.parametrize(
    ("names", "variable"),
    [
        ({"DATABASE_URL": "postgresql://gateway:gateway@h/d"}, "DATABASE_URL"),
        ({"DATABASE_URL": "postgresql://gateway@h/d"}, "DATABASE_URL"),
        ({"DATABASE_URL": "postgresql://u:change%2Dme@h/d"}, "DATABASE_URL"),
        ({"DATABASE_URL": "postgresql://u:Password@h1,h2/d"}, "DATABASE_URL"),
        ({"DATABASE_URL": "postgresql://averylongname:averylongname@h/d"}, "DATABASE_URL"),
        ({"DATABASE_URL": "postgresql:///d?host=db.example&user=u&password=postgres"}, "DATABASE_URL"),
        ({"REDIS_URL": "redis://:secret@h/0"}, "REDIS_URL"),
        ({"REDIS_URL": "redis://:a,b@h/0"}, "REDIS_URL"),
        ({"REDIS_URL": "redis+sentinel://:redis@one,two/m"}, "REDIS_URL"),
        ({"REDIS_URL": "redis://h/0?password=changeme"}, "REDIS_URL"),
        ({"OLLAMA_AUTH_TOKEN": "change-me"}, "OLLAMA_AUTH_TOKEN"),
        ({"OLLAMA_BACKENDS": '[{"name":"a","base_url":"http://a","auth_token":"ToKen"}]'}, "OLLAMA_BACKENDS"),
    ],
)
def test_weak_secrets_are_refused(names: dict[str, str], variable: str) -> None:
    with pytest.raises(SettingsError) as refused:
        settings.refuse_weak_secrets(load(**{"DATABASE_URL": f"postgresql://u:{CANARY}@h/d", **names}))
    assert str(refused.value).startswith(variable) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "names",
    [
        GOOD_SECRET,
        {"DATABASE_URL": "postgresql://gateway@/gateway?host=/run/postgres&port=5432", "REDIS_URL": "unix:///run/r.sock"},
        {"DATABASE_URL": f"postgresql://h/d?user=u&password={CANARY}", "REDIS_URL": "redis://h/0"},
        {"DATABASE_URL": f"postgresql://u:{CANARY}@h1:5432,h2:5432/d", "REDIS_URL": "redis+sentinel://one,two/m"},
    ],
)
def test_strong_secrets_and_sockets_are_accepted(names: dict[str, str]) -> None:
    settings.refuse_weak_secrets(load(**names))


def test_a_backend_has_its_position_as_tier_and_its_own_or_the_shared_slots() -> None:
    listed = [
        {"name": "a", "base_url": "http://a", "tier": 3, "slots": 7},
        {"name": "b", "base_url": "http://b"},
        {"name": "c", "base_url": "http://c", "tier": 2},
    ]
    found = load(OLLAMA_BACKENDS=json.dumps(listed), OLLAMA_SLOTS="5").backends
    assert [(backend.tier, backend.slots) for backend in found] == [(3, 7), (2, 5), (2, 5)]
    assert load(OLLAMA_BACKENDS=json.dumps(listed)).backends[1].slots == 0, "it is to be found out"
    (single,) = load(OLLAMA_SLOTS="4").backends
    assert (single.tier, single.slots, single.models) == (1, 4, {})


def test_models_of_a_backend_are_found_under_their_canonical_names() -> None:
    models = {
        "Library/Qwen3:8B": {"slots": 2, "num_ctx": "raise", "keep_alive": "1h30m"},
        "llama3.2": {"num_ctx": 8192, "keep_alive": -1},
        "https://hf.co/Org/M:Q4": {},
    }
    (backend,) = load(OLLAMA_BACKENDS=json.dumps([{"name": "a", "base_url": "http://a", "models": models}])).backends
    assert backend.models == {
        "qwen3:8b": ModelConfig(2, "raise", 5400.0),
        "llama3.2:latest": ModelConfig(None, 8192, math.inf),
        "hf.co/org/m:q4": ModelConfig(),
    }


def test_the_single_backend_is_called_default() -> None:
    (backend,) = load(OLLAMA_BASE_URL="http://one:1/", OLLAMA_AUTH_TOKEN="tt", OLLAMA_READ_TIMEOUT_S="7").backends
    assert (backend.name, backend.base_url, backend.kind) == ("default", "http://one:1", "ollama")
    assert (backend.read_timeout_s, backend.connect_timeout_s, backend.max_connections) == (7.0, 5.0, 64)
    assert backend.auth() == {"Authorization": "Bearer tt"}


def test_a_list_of_backends_replaces_the_single_one() -> None:
    listed = json.dumps(
        [{"name": "two", "base_url": "http://two"}, {"name": "one", "base_url": "http://one", "kind": "openai"}]
    )
    found = load(OLLAMA_BASE_URL="http://single", OLLAMA_AUTH_TOKEN="tt", OLLAMA_BACKENDS=listed)
    assert [(backend.name, backend.kind) for backend in found.backends] == [("two", "ollama"), ("one", "openai")]
    assert all(backend.auth() == {} for backend in found.backends), "the single backend's token is not for others"


def test_a_backend_has_its_own_timeouts_or_the_shared_ones() -> None:
    own = {"connect_timeout_s": 1, "read_timeout_s": 2.5, "idle_timeout_s": 3, "total_timeout_s": 4, "max_connections": 5}
    listed = json.dumps([{"name": "own", "base_url": "http://a", **own}, {"name": "shared", "base_url": "http://b"}])
    found = load(OLLAMA_BACKENDS=listed, OLLAMA_IDLE_TIMEOUT_S="33", OLLAMA_MAX_CONNECTIONS="9")
    first, second = found.backends
    assert {name: getattr(first, name) for name in own} == own
    assert (second.idle_timeout_s, second.max_connections, second.total_timeout_s) == (33.0, 9, 3600.0)


@pytest.mark.parametrize(
    ("header", "scheme", "sent"),
    [
        (None, None, {"Authorization": "Bearer tt"}),
        ("authorization", "Token", {"authorization": "Token tt"}),
        ("Authorization", "", {"Authorization": "tt"}),
        ("X-Api-Key", None, {"X-Api-Key": "tt"}),
        ("X-Api-Key", "Bearer", {"X-Api-Key": "tt"}),
    ],
)
def test_an_auth_scheme_is_for_the_authorization_header_only(
    header: str | None, scheme: str | None, sent: dict[str, str]
) -> None:
    auth = {"auth_header": header, "auth_scheme": scheme}
    entry = {"name": "a", "base_url": "http://a", "auth_token": "tt", **{k: v for k, v in auth.items() if v is not None}}
    (backend,) = load(OLLAMA_BACKENDS=json.dumps([entry])).backends
    assert backend.auth() == sent


@pytest.mark.parametrize(
    ("entries", "advice"),
    [
        ([{"base_url": "http://a"}], "OLLAMA_BACKENDS: entry 1 has no 'name'"),
        ([{"name": "a"}], "entry 1 has no 'base_url'"),
        ([{"name": "a", "base_url": "http://a"}, {"name": "a", "base_url": "http://b"}], "the name 'a' is used more than once"),
        ([{"name": "a", "base_url": "http://a"}, 3], "entry 2 must be an object"),
        ([{"name": "a b", "base_url": "http://a"}], "'name' of entry 1 must be 1 to 63 letters, digits"),
        ([{"name": 1, "base_url": "http://a"}], "'name' of entry 1 must be a string"),
        ([{"name": "a", "base_url": "a:80"}], "'base_url' of entry 1 must be an address"),
        ([{"name": "a", "base_url": "http://a", "kind": "vllm"}], "'kind' of entry 1 must be 'ollama' or 'openai'"),
        ([{"name": "a", "base_url": "http://a", "token": "x"}], "entry 1 has an unknown field 'token'; the fields are name"),
        ([{"name": "a", "base_url": "http://a", "auth_header": "A b"}], "'auth_header' of entry 1 must be"),
        ([{"name": "a", "base_url": "http://a", "read_timeout_s": 0}], "'read_timeout_s' of entry 1 must be"),
        ([{"name": "a", "base_url": "http://a", "read_timeout_s": "5"}], "'read_timeout_s' of entry 1 must be"),
        ([{"name": "a", "base_url": "http://a", "idle_timeout_s": True}], "'idle_timeout_s' of entry 1 must be"),
        ([{"name": "a", "base_url": "http://a", "max_connections": 1.5}], "'max_connections' of entry 1 must be"),
        ([{"name": "a", "base_url": "http://a", "tier": 0}], "'tier' of entry 1 must be an integer from 1 to 1000000"),
        ([{"name": "a", "base_url": "http://a", "slots": 0}], "'slots' of entry 1 must be an integer from 1 to 10000"),
        ([{"name": "a", "base_url": "http://a", "slots": True}], "'slots' of entry 1 must be an integer from 1 to 10000"),
        (
            [{"name": "a", "base_url": "http://a", "models": ["m"]}],
            "'models' of entry 1 must be an object from names of models to",
        ),
    ],
)
def test_an_invalid_list_of_backends_is_refused_with_the_place(entries: list[object], advice: str) -> None:
    assert advice in refusal(OLLAMA_BACKENDS=json.dumps(entries))


@pytest.mark.parametrize(
    ("models", "advice"),
    [
        ({"m": 3}, "in which 'm' has an object with slots, num_ctx, keep_alive"),
        ({"m": {"slot": 3}}, "in which 'm' has only the fields slots, num_ctx, keep_alive, not 'slot'"),
        ({"m": {"slots": 10_001}}, "in which 'slots' of 'm' is an integer from 1 to 10000"),
        ({"m": {"num_ctx": "fixed"}}, "in which 'num_ctx' of 'm' is 'pass', 'raise' or an integer from 1 to"),
        ({"m": {"num_ctx": True}}, "in which 'num_ctx' of 'm' is 'pass', 'raise' or an integer from 1 to"),
        ({"m": {"keep_alive": "5 minutes"}}, "in which 'keep_alive' of 'm' is a number of seconds or a duration such as '5m'"),
        ({"": {}}, "in which each name must be a string of at most 350 printable characters"),
        ({"llama*": {}}, "in which each name must be a string of at most 350 printable characters, without '*'"),
        ({"m": {}, "library/M:latest": {}}, "that names each model once ('library/M:latest' is the same as a name before it)"),
    ],
)
def test_invalid_models_of_a_backend_are_refused_with_the_place(models: object, advice: str) -> None:
    entries = [{"name": "a", "base_url": "http://a"}, {"name": "b", "base_url": "http://b", "models": models}]
    assert f"'models' of entry 2 must be an object {advice}" in refusal(OLLAMA_BACKENDS=json.dumps(entries))


@pytest.mark.parametrize(
    ("names", "line"),
    [
        ({"GATEWAY_BIND_PORT": "http"}, "error: GATEWAY_BIND_PORT must be an integer from 0 to 65535, not 'http'"),
        (
            {"GATEWAY_BIND_PROT": "1"},
            "error: GATEWAY_BIND_PROT is not a setting of the gateway: did you mean GATEWAY_BIND_PORT?",
        ),
        ({"OLLAMA_BACKENDS": f'[{{"auth_token":"{CANARY}"'}, "error: OLLAMA_BACKENDS: the value is not valid JSON: "),
        ({"DATABASE_URL": ""}, "error: DATABASE_URL must be set, as postgresql+asyncpg://"),
        ({"DATABASE_URL": "postgresql://u:gateway@h/d"}, "error: DATABASE_URL must carry a password nobody can guess"),
        ({"REDIS_URL": f"redis://:{CANARY}@h:x/0"}, "error: REDIS_URL must be an address such as redis://"),
    ],
)
def test_a_failed_start_prints_one_line(names: dict[str, str], line: str, tmp_path: Path) -> None:
    names = environment({"DATABASE_URL": f"postgresql://u:{CANARY}@127.0.0.1:1/d", **names})
    done = fork_server.gateway().run("gateway", ["serve"], tmp_path, names)
    assert (done.returncode, done.stdout) == (2, "")
    (only,) = done.stderr.splitlines()
    assert only.startswith(line) and CANARY not in only
