"""The life of a key: made, rotated, revoked, expired; only its hash is stored."""

import time
from datetime import timedelta

import pytest

from gateway.auth import key_format
from gateway.auth.key_store import NewKey
from gateway.core.errors import CommandFailed
from tests.auth.key_requests import forged, status
from tests.conftest import StartGateway, TestStores
from tests.support.audit_rows import sql
from tests.support.fake_backend.backend import FakeBackend
from tests.support.processes import until
from tests.support.store_dump import dump_postgres, dump_redis


def test_after_a_rotation_both_secrets_work_for_the_overlap(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    old = gateway.key(name="mine")
    key_id, new = gateway.call(gateway.key_store().rotate("mine", timedelta(seconds=1.2)))
    rotated = time.monotonic()
    assert (status(gateway, old), status(gateway, new)) == (200, 200)
    until(lambda: status(gateway, old) == 401, 4)
    assert time.monotonic() - rotated > 1.0
    assert status(gateway, new) == 200
    (row,) = gateway.call(gateway.key_store().all())
    assert (row["id"], row["secrets"]) == (key_id, 1)


def test_without_overlap_the_old_secret_stops_in_every_process(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    one, two = start_gateway(alpha), start_gateway(alpha)
    old = one.key(name="mine")
    assert (status(one, old), status(two, old)) == (200, 200)
    _, new = one.call(one.key_store().rotate("mine", timedelta()))
    until(lambda: (status(one, old), status(two, old)) == (401, 401), 1)
    assert (status(one, new), status(two, new)) == (200, 200)


def test_a_second_rotation_does_not_revive_an_ended_secret(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    first = gateway.key(name="mine")
    gateway.call(gateway.key_store().rotate("mine", timedelta()))
    _, third = gateway.call(gateway.key_store().rotate("mine", timedelta(hours=1)))
    assert (status(gateway, first), status(gateway, third)) == (401, 200)


def test_a_revoked_key_stops_on_every_gateway_within_a_second(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    one, two = start_gateway(alpha), start_gateway(alpha)
    key, other = one.key(name="mine"), one.key(name="others")
    assert {status(gateway, each) for gateway in (one, two) for each in (key, other)} == {200}
    key_id, at_once = one.call(one.key_store().revoke("mine"))
    assert at_once and key_id in key
    until(lambda: (status(one, key), status(two, key)) == (401, 401), 1)
    assert (status(one, other), status(two, other)) == (200, 200)


def test_all_secrets_of_a_revoked_key_stop(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    old = gateway.key(name="mine")
    _, new = gateway.call(gateway.key_store().rotate("mine", timedelta(hours=1)))
    assert (status(gateway, old), status(gateway, new)) == (200, 200)
    # By the id of its newest secret.
    gateway.call(gateway.key_store().revoke(new.split("_")[1]))
    until(lambda: (status(gateway, old), status(gateway, new)) == (401, 401), 1)


def test_an_expired_key_stops_although_it_is_cached(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    key = gateway.key(name="short", lifetime=timedelta(seconds=1))
    assert status(gateway, key) == 200
    until(lambda: status(gateway, key) == 401, 3)
    with pytest.raises(CommandFailed, match="'short' has expired: revoke it"):
        gateway.call(gateway.key_store().rotate("short", timedelta()))
    gateway.call(gateway.key_store().revoke("short"))


def test_a_key_with_a_lifetime_of_zero_expires_at_once(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    assert status(gateway, gateway.key(lifetime=timedelta())) == 401


def test_two_active_keys_cannot_have_the_same_name(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    first = gateway.key(name="mine")
    with pytest.raises(CommandFailed, match="a key named 'mine' exists"):
        gateway.key(name="mine")
    gateway.call(gateway.key_store().revoke("mine"))
    second = gateway.key(name="mine")
    until(lambda: (status(gateway, first), status(gateway, second)) == (401, 200), 1)
    states = [(row["name"], row["revoked_at"] is None) for row in gateway.call(gateway.key_store().all())]
    assert states == [("mine", True), ("mine", False)]


@pytest.mark.parametrize("name", ["", "x" * 201, "a\nb", "a\0b", "a\udcffb"])
def test_unprintable_and_too_long_names_are_refused(start_gateway: StartGateway, alpha: FakeBackend, name: str) -> None:
    gateway = start_gateway(alpha)
    with pytest.raises(CommandFailed, match="1 to 200 printable characters"):
        gateway.call(gateway.key_store().make(NewKey(name)))
    with pytest.raises(CommandFailed, match="no active key"):
        gateway.call(gateway.key_store().revoke(name))


def test_unknown_and_revoked_keys_cannot_be_changed(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    gateway.key(name="mine")
    gateway.call(gateway.key_store().revoke("mine"))
    for name in ("mine", "never", "%", "mine' OR '1'='1"):
        with pytest.raises(CommandFailed, match="there is no active key"):
            gateway.call(gateway.key_store().revoke(name))
        with pytest.raises(CommandFailed, match="see `make keys`"):
            gateway.call(gateway.key_store().rotate(name, timedelta()))


def test_only_the_hash_of_a_key_is_stored(start_gateway: StartGateway, stores: TestStores, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    old = gateway.key("llama*", name="mine", rpm=5, flags=("show_backend",))
    _, new = gateway.call(gateway.key_store().rotate("mine", timedelta(hours=1)))
    wrong = forged(old.split("_")[1])
    assert [status(gateway, key) for key in (old, new, wrong)] == [200, 200, 401]
    hashes = sql(stores.database_url, "SELECT hash FROM secrets")
    assert len(hashes) == 2 and all(stored.startswith("$argon2id$v=19$m=64,t=1,p=1$") for stored in hashes)
    gateway.audit_rows()
    stored = dump_postgres(stores)
    assert "mine" in stored
    kept = dump_redis(stores)
    assert "mine" in kept
    for key in (old, new, wrong):
        for part in (key, key.split("_")[2], key.split("_")[2][: -key_format.CHECKSUM_CHARACTERS]):
            assert part not in stored and part not in kept
