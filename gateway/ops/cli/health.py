"""`health`: whether the gateway of these settings is alive, for a container's health check."""

import urllib.request
from http.client import HTTPException

from gateway.core.errors import CommandFailed
from gateway.settings import Settings

DEADLINE_S = 3


def check(settings: Settings) -> int:
    """An exit status. Raises CommandFailed where nothing answers."""
    host = settings.gateway_bind_host if settings.gateway_bind_host not in ("0.0.0.0", "::") else "127.0.0.1"  # noqa: S104 # nosec B104
    url = f"http://{f'[{host}]' if ':' in host else host}:{settings.gateway_bind_port}/healthz"
    # A proxy that the environment may name is not for our own address.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=DEADLINE_S) as answer:
            return 0 if answer.status == 200 else 1
    except (OSError, HTTPException) as error:
        raise CommandFailed(f"no gateway answers at {url}: {error}") from None
