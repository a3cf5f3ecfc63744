"""The verbs for keys: what they print, and what it opens."""

import json

import httpx
import pytest

from gateway.auth import key_format
from gateway.limits.quota import NAMES as LIMITS
from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend
from tests.support.operator import Operator
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway


def opens(gateway: RunningGateway, key: str) -> bool:
    return httpx.get(f"{gateway.url}/api/tags", headers={"x-api-key": key}, timeout=20).status_code == 200


def test_the_last_line_is_nothing_but_the_key(operator: Operator, start_gateway: StartGateway, alpha: FakeBackend) -> None:
    done = operator.types("key", "--name", "first")
    assert done.returncode == 0
    assert key_format.parse(done.stdout.removesuffix("\n")) is not None, "nothing else is on standard output"
    assert "shown only once" in done.stderr
    assert opens(start_gateway(alpha), done.stdout.strip())


def test_a_key_with_all_its_rights(operator: Operator) -> None:
    limits = ("--rpm", "5", "--tpm", "6", "--concurrent", "0")
    made = operator.gets_json("key", "--name", "all", "--models", "a, b*", "--expires", "30d", *limits, "--admin-models")
    assert made["name"] == "all" and key_format.parse(str(made["key"]))
    (row,) = operator.gets_json("keys").rows
    assert row["id"] == made["id"] and row["models"] == ["a", "b*"] and row["flags"] == ["admin_models"]
    assert (row["rpm"], row["tpm"], row["concurrent"], row["state"], row["secrets"]) == (5, 6, 0, "active", 1)
    assert row["expires_at"] and str(made["key"]) not in json.dumps(row)


def test_keys_are_listed_for_people(operator: Operator) -> None:
    assert "no keys yet: `make key NAME=…`" in operator.gets("keys")
    operator.gets("key", "--name", "first")
    operator.gets("key", "--name", "second", "--models", "llama*")
    operator.gets("revoke", "--key", "first")
    head, second, first = operator.gets("keys").splitlines()
    assert head.startswith("ID") and "LAST USED AT" in head
    assert "second" in second and "llama*" in second and "active" in second
    assert "first" in first and "(all)" in first and "revoked" in first


def test_rotation(operator: Operator, start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    first = operator.gets("key", "--name", "mine").strip()
    second = operator.gets("rotate", "--key", "mine").splitlines()[-1]
    assert opens(gateway, first) and opens(gateway, second), "both work for a day"
    third = operator.gets_json("rotate", "--key", first.split("_")[1], "--overlap", "0")
    until(lambda: not opens(gateway, first) and not opens(gateway, second), 1)
    assert opens(gateway, str(third["key"])) and third["id"] == first.split("_")[1]


def test_revocation_by_name_and_by_id(operator: Operator, start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    by_name, by_id = (operator.gets("key", "--name", name).strip() for name in ("one", "two"))
    assert opens(gateway, by_name) and opens(gateway, by_id)
    assert "at once" in operator.gets("revoke", "--key", "one")
    assert operator.gets_json("revoke", "--key", by_id.split("_")[1])["everywhere"] == "at once"
    until(lambda: not opens(gateway, by_name) and not opens(gateway, by_id), 1)


def test_revocation_without_redis_shows_when_it_takes_effect(operator: Operator) -> None:
    operator.gets("key", "--name", "mine", REDIS_URL="unix:///nowhere/redis.sock")
    printed = operator.gets("revoke", "--key", "mine", REDIS_URL="unix:///nowhere/redis.sock", REDIS_KEY_CACHE_TTL_S="7")
    assert "within 7 s (Redis did not answer)" in printed


def test_a_name_used_twice_and_an_unknown_key(operator: Operator) -> None:
    operator.gets("key", "--name", "mine")
    assert "choose another name, or rotate or revoke it" in operator.is_refused("key", "--name", "mine")
    assert operator.is_refused("revoke", "--key", "nobody") == "error: there is no active key 'nobody': see `make keys`\n"
    assert "see `make keys`" in operator.is_refused("rotate", "--key", "nobody")


@pytest.mark.parametrize("name", ["", "x" * 201, "a\nb", "a\tb", "a\udcffb"])
def test_names_that_cannot_be_read(operator: Operator, name: str) -> None:
    assert "choose another name" in operator.is_refused("key", "--name", name)


def test_the_share_of_a_key(operator: Operator) -> None:
    options = ("--weight", "2.5", "--heartbeat-after-s", "15", "--day-seconds", "60", "--batch", "--sub-users")
    operator.gets("key", "--name", "mine", *options)
    (row,) = operator.gets_json("keys").rows
    assert (row["weight"], row["heartbeat_after_s"], row["day_seconds"], row["month_seconds"]) == (2.5, 15, 60, None)
    assert row["flags"] == ["batch", "sub_users"]
    now = operator.gets_json("limit", "--key", "mine", "--weight", "unset", "--month-seconds", "unlimited")
    assert (now["weight"], now["heartbeat_after_s"], now["day_seconds"], now["month_seconds"]) == (1, 15, 60, "unlimited")
    now = operator.gets_json("limit", "--key", "mine", "--heartbeat-after-s", "unset", "--weight", "1000")
    assert (now["weight"], now["heartbeat_after_s"]) == (1000, None)
    of_rule = operator.gets_json("limit", "--key", "mine", "--model", "llama*", "--day-seconds", "5")
    assert of_rule.value == {
        "key": row["id"],
        "model": "llama*",
        **dict.fromkeys(LIMITS),
        "day_seconds": 5,
        "everywhere": "at once",
    }
    refused = operator.is_refused("limit", "--key", "mine", "--model", "llama*", "--weight", "2")
    assert refused == "error: WEIGHT can only be set for a key as a whole, not for some of its models\n"
    (row,) = operator.gets_json("keys").rows
    assert row["rules"] == ["llama*: day_seconds=5"]


@pytest.mark.parametrize("weight", ["0", "-1", "1001", "x", "1e3", "0.0000001", ""])
def test_weights_that_are_refused(operator: Operator, weight: str) -> None:
    assert "a number above 0 and at most 1000" in operator.is_refused("key", "--name", "mine", f"--weight={weight}", code=2)
