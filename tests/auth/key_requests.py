"""Requests with a key, and keys that were never made."""

import httpx

from gateway.auth import key_format
from tests.support.running_gateway import RunningGateway


def status(gateway: RunningGateway, key: str) -> int:
    return ask(gateway, key).status_code


def ask(gateway: RunningGateway, key: str) -> httpx.Response:
    return httpx.get(f"{gateway.url}/api/tags", headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=20)


def forged(secret_id: str) -> str:
    """A key in the right format that was never made."""
    body = f"{key_format.PREFIX}_{secret_id}_{key_format.mint().whole.split('_')[2][: -key_format.CHECKSUM_CHARACTERS]}"
    return body + key_format._checksum(body)
