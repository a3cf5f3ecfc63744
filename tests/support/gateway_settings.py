"""Settings for tests: cheap argon2, short timeouts, more slots than tests have calls, the given backends in order."""

import json
from typing import Any

from gateway import settings
from gateway.settings import Settings

QUICK = {
    "ARGON2_TIME_COST": "1",
    "ARGON2_MEMORY_COST_KIB": "64",
    "ARGON2_PARALLELISM": "1",
    "DATABASE_POOL_SIZE": "4",
    "DATABASE_POOL_OVERFLOW": "0",
    "DEFAULT_RPM": "1000000",
    "DEFAULT_TPM": "1000000000",
    "DEFAULT_CONCURRENT": "10000",
    "GATEWAY_BIND_HOST": "127.0.0.1",
    "GATEWAY_BIND_PORT": "0",
    "GATEWAY_DRAIN_S": "5",
    "GATEWAY_LOG_FORMAT": "json",
    "GATEWAY_TRUSTED_PROXIES": "",
    "OLLAMA_SLOTS": "1000",
    "OLLAMA_CONNECT_TIMEOUT_S": "5",
    "OLLAMA_READ_TIMEOUT_S": "10",
    "OLLAMA_IDLE_TIMEOUT_S": "10",
    "MODEL_DISCOVERY_REFRESH_S": "30",
    "MODEL_DISCOVERY_CACHE_TTL_S": "120",
    "LOADED_MODELS_REFRESH_S": "30",
    "AUTH_FAILURE_RATE_LIMIT_PER_IP_PER_MIN": "1000",
}


def environment_for(*backends: Any, **names: str) -> dict[str, str]:
    """Each backend is a FakeBackend or a dict as in OLLAMA_BACKENDS."""
    entries = [backend if isinstance(backend, dict) else entry_of(backend) for backend in backends]
    listed = {"OLLAMA_BACKENDS": json.dumps(entries)} if entries else {}
    return {**QUICK, **listed, **names}


def entry_of(backend: Any, **more: Any) -> dict[str, Any]:
    return {"name": backend.healthy.name, "base_url": backend.url, "kind": backend.healthy.kind, **more}


def settings_for(*backends: Any, **names: str) -> Settings:
    return settings.load(environment_for(*backends, **names), None)
