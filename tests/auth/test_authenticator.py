"""Keys: their form, where a request may carry one, their life from made to revoked, and stores that are away."""

import asyncio
import base64
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import asyncpg
import httpx
import pytest
from argon2 import PasswordHasher
from hypothesis import given
from hypothesis import strategies as st

from gateway.auth import key_format
from gateway.auth import verifier as auth_verifier
from gateway.auth.authenticator import Authenticator
from gateway.auth.key_store import NewKey
from gateway.core.errors import CommandFailed, ConflictingKeys, MissingKey, Overloaded
from gateway.ops.local import stores as local_stores
from tests.conftest import StartGateway, TestStores
from tests.support.fake_backend.backend import FakeBackend
from tests.support.gateway_settings import settings_for
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway
from tests.support.store_dump import dump_postgres, dump_redis

CHARACTERS = st.characters(codec="utf-8")
IN_ANY_KEY = st.sampled_from(sorted(key_format.ALPHABET | {"_"}))


def status(gateway: RunningGateway, key: str) -> int:
    return ask(gateway, key).status_code


def ask(gateway: RunningGateway, key: str) -> httpx.Response:
    return httpx.get(f"{gateway.url}/api/tags", headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=20)


def forged(secret_id: str) -> str:
    """A key that was never made, of a right form."""
    body = f"{key_format.PREFIX}_{secret_id}_{key_format.mint().whole.split('_')[2][: -key_format.CHECKSUM_CHARACTERS]}"
    return body + key_format._checksum(body)


def sql(url: str, *statements: str) -> list[asyncpg.Record]:
    async def run() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(url)
        try:
            return [row for statement in statements for row in await connection.fetch(statement)]
        finally:
            await connection.close()

    return asyncio.run(run())


# ── the form ──


def test_a_key_has_its_form_and_is_never_the_same() -> None:
    minted = {key_format.mint().whole for _ in range(200)}
    assert len(minted) == 200
    assert all(re.fullmatch(r"nz_[a-z2-7]{8}_[a-z2-7]{38}", whole) for whole in minted)
    assert key_format.SECRET_BYTES * 8 >= 160


def test_a_key_is_read_as_it_was_made_and_not_represented() -> None:
    minted = key_format.mint()
    assert key_format.parse(minted.whole) == minted
    assert minted.whole not in repr(minted) and minted.secret_id in minted.whole


@given(at=st.integers(0, 48), character=CHARACTERS | IN_ANY_KEY)
def test_every_change_of_one_character_is_refused_by_arithmetic(at: int, character: str) -> None:
    whole = key_format.mint().whole
    changed = whole[:at] + character + whole[at + 1 :]
    assert changed == whole or key_format.parse(changed) is None


@given(at=st.integers(0, 49), text=st.text(CHARACTERS | IN_ANY_KEY, min_size=1, max_size=3))
def test_what_is_longer_is_refused(at: int, text: str) -> None:
    whole = key_format.mint().whole
    assert key_format.parse(whole[:at] + text + whole[at:]) is None


@given(st.integers(0, 48))
def test_what_is_shorter_or_swapped_is_refused(at: int) -> None:
    whole = key_format.mint().whole
    assert key_format.parse(whole[:at]) is None and key_format.parse(whole[:at] + whole[at + 1 :]) is None
    swapped = whole[:at] + whole[at : at + 2][::-1] + whole[at + 2 :]
    assert swapped == whole or key_format.parse(swapped) is None


@given(st.text(CHARACTERS))
def test_any_text_at_all_can_be_read(text: str) -> None:
    assert key_format.parse(text) is None


# ── the places ──

KEY = key_format.mint().whole


def basic(password: str) -> bytes:
    return b"Basic " + base64.b64encode(f"anybody:{password}".encode())


PLACES = {
    "bearer": ([(b"authorization", f"Bearer {KEY}".encode())], None),
    "small letters": ([(b"authorization", f"bearer   {KEY} ".encode())], None),
    "x-api-key": ([(b"x-api-key", f" {KEY} ".encode())], None),
    "api-key": ([(b"api-key", KEY.encode())], None),
    "basic": ([(b"authorization", basic(KEY))], None),
    "path": ([], KEY),
    "all": ([(b"authorization", f"Bearer {KEY}".encode()), (b"x-api-key", KEY.encode()), (b"api-key", KEY.encode())], KEY),
    "beside an empty one": ([(b"authorization", b"Bearer "), (b"x-api-key", KEY.encode())], None),
    "beside another scheme": ([(b"authorization", b"Digest x"), (b"authorization", basic(KEY))], None),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_places_of_a_key(place: str) -> None:
    assert key_format.find(*PLACES[place]) == KEY


@pytest.mark.parametrize(
    "value",
    [b"", b"Bearer", b"Bearer ", b"Basic", b"Basic !!", b"Basic bm9wYXNzd29yZA==", b"Basic /////w==", b"nz_without_a_scheme"],
)
def test_no_key_in_authorization(value: bytes) -> None:
    with pytest.raises(MissingKey):
        key_format.find([(b"authorization", value)], None)


def test_a_colon_belongs_to_the_password() -> None:
    assert key_format.find([(b"authorization", basic("a:b"))], None) == "a:b"


@pytest.mark.parametrize("place", [place for place in PLACES if place not in ("path", "all")])
def test_two_different_keys_of_ours_are_in_conflict(place: str) -> None:
    headers, _ = PLACES[place]
    with pytest.raises(ConflictingKeys):
        key_format.find(headers, key_format.mint().whole)
    with pytest.raises(ConflictingKeys):
        key_format.find([*headers, (b"x-api-key", key_format.mint().whole.encode())], None)


DUMMIES = {"ollama": "ollama", "sk": "sk-no-key-required", "our prefix": "nz_", "our README's": "nz_…", "cut short": KEY[:-1]}
DUMMIES |= {"capitals": KEY.upper(), "twice": f"{KEY} {KEY}"}


@pytest.mark.parametrize("dummy", DUMMIES.values(), ids=DUMMIES)
def test_what_is_not_shaped_like_a_key_of_ours_is_no_key(dummy: str) -> None:
    """Every client library insists on some key, whatever the address carries."""
    written = dummy.encode()
    places = [(b"authorization", b"Bearer " + written), (b"authorization", basic(dummy)), (b"x-api-key", written)]
    assert key_format.find(places, KEY) == KEY
    for place in places:
        assert key_format.find([place, (b"api-key", KEY.encode())], None) == KEY
        assert key_format.find([(b"api-key", KEY.encode()), place], "dummy in the path") == KEY


def test_alone_it_is_the_wrong_key_and_of_several_the_first_counts() -> None:
    assert key_format.find([(b"authorization", b"Bearer ollama")], None) == "ollama"
    assert key_format.find([(b"x-api-key", b"second"), (b"authorization", b"Bearer third")], "first") == "first"


def test_all_places_over_http(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    key, other = gateway.key(), gateway.key()
    with gateway.http() as client:
        for headers in ({"Authorization": f"Bearer {key}"}, {"X-Api-Key": key}, {"Api-Key": key}):
            assert client.get("/api/tags", headers=headers).status_code == 200
        assert client.get("/api/tags", auth=("anybody", key)).status_code == 200
        assert client.get(f"/k/{key}/api/tags").status_code == 200
        assert client.get(f"/k/{key}/api/tags", headers={"x-api-key": other}).status_code == 400
        assert client.get("/api/tags", headers={"Authorization": f"Bearer {key}", "api-key": other}).status_code == 400
        assert client.get("/api/tags", headers={"Authorization": "Bearer"}).status_code == 401
        assert client.get("/api/tags").status_code == 401
        twice = [("Authorization", f"Bearer {key}"), ("Authorization", f"Bearer {other}")]
        assert client.get("/api/tags", headers=twice).json() == {"error": "The request carries two different keys; send one."}


def test_a_dummy_beside_a_key_is_no_failure_and_alone_it_is_one(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha, AUTH_FAILURE_RATE_LIMIT_PER_IP_PER_MIN="3")
    key = gateway.key()
    with gateway.http("ollama") as client:
        assert [client.get(f"/k/{key}/v1/models").status_code for _ in range(6)] == [200] * 6
        alone = client.get("/v1/models")
        assert (alone.status_code, alone.json()["error"]["code"]) == (401, "invalid_api_key")
        assert client.get("/k/ollama/v1/models", headers={"x-api-key": "dummy"}).status_code == 401
        assert [client.get("/v1/models").status_code for _ in range(2)] == [401, 429]


# ── the life of a key ──


def test_rotation_with_overlap_keeps_both_for_its_time(start_gateway: StartGateway, alpha: FakeBackend) -> None:
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


def test_rotation_without_overlap_ends_the_old_one_everywhere(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    one, two = start_gateway(alpha), start_gateway(alpha)
    old = one.key(name="mine")
    assert (status(one, old), status(two, old)) == (200, 200)
    _, new = one.call(one.key_store().rotate("mine", timedelta()))
    until(lambda: (status(one, old), status(two, old)) == (401, 401), 1)
    assert (status(one, new), status(two, new)) == (200, 200)


def test_a_second_rotation_never_prolongs_the_first(start_gateway: StartGateway, alpha: FakeBackend) -> None:
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


def test_an_expired_key_stops_though_it_is_remembered(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    key = gateway.key(name="short", lifetime=timedelta(seconds=1))
    assert status(gateway, key) == 200
    until(lambda: status(gateway, key) == 401, 3)
    with pytest.raises(CommandFailed, match="'short' has expired: revoke it"):
        gateway.call(gateway.key_store().rotate("short", timedelta()))
    gateway.call(gateway.key_store().revoke("short"))


def test_no_time_at_all_is_not_forever(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    assert status(gateway, gateway.key(lifetime=timedelta())) == 401


def test_a_name_means_one_living_key(start_gateway: StartGateway, alpha: FakeBackend) -> None:
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
def test_names_nobody_can_read_are_refused(start_gateway: StartGateway, alpha: FakeBackend, name: str) -> None:
    gateway = start_gateway(alpha)
    with pytest.raises(CommandFailed, match="1 to 200 printable characters"):
        gateway.call(gateway.key_store().make(NewKey(name)))
    with pytest.raises(CommandFailed, match="no active key"):
        gateway.call(gateway.key_store().revoke(name))


def test_keys_that_are_not_there(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    gateway.key(name="mine")
    gateway.call(gateway.key_store().revoke("mine"))
    for name in ("mine", "never", "%", "mine' OR '1'='1"):
        with pytest.raises(CommandFailed, match="there is no active key"):
            gateway.call(gateway.key_store().revoke(name))
        with pytest.raises(CommandFailed, match="see `make keys`"):
            gateway.call(gateway.key_store().rotate(name, timedelta()))


def test_a_key_is_stored_as_a_hash_alone(start_gateway: StartGateway, stores: TestStores, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    old = gateway.key("llama*", name="mine", rpm=5, flags=("show_backend",))
    _, new = gateway.call(gateway.key_store().rotate("mine", timedelta(hours=1)))
    wrong = forged(old.split("_")[1])
    assert [status(gateway, key) for key in (old, new, wrong)] == [200, 200, 401]
    hashes = [row["hash"] for row in sql(stores.database_url, "SELECT hash FROM secrets")]
    assert len(hashes) == 2 and all(stored.startswith("$argon2id$v=19$m=64,t=1,p=1$") for stored in hashes)
    gateway.audit_rows()
    stored = dump_postgres(stores)
    assert "mine" in stored
    kept = dump_redis(stores)
    assert "mine" in kept
    for key in (old, new, wrong):
        for part in (key, key.split("_")[2], key.split("_")[2][: -key_format.CHECKSUM_CHARACTERS]):
            assert part not in stored and part not in kept


# ── wrong keys ──


@contextmanager
def counted(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The ids of secrets that the database was asked for."""
    asked: list[str] = []
    real = gateway.components.database.row

    async def row(query: str, *values: object) -> asyncpg.Record | None:
        asked.append(str(values[0]))
        return await real(query, *values)

    with monkeypatch.context() as patch:
        patch.setattr(gateway.components.database, "row", row)
        yield asked


def test_a_wrong_key_asks_the_database_once_and_garbage_never(
    start_gateway: StartGateway, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = start_gateway(alpha), start_gateway(alpha)
    unknown, wrong = forged("abcdefgh"), forged(one.key().split("_")[1])
    with counted(one, monkeypatch) as asked, counted(two, monkeypatch) as asked_by_two:
        for key in (unknown, wrong, "garbage", unknown[:-1] + "!", "nz_a_b", "sk-1234"):
            assert {status(one, key) for _ in range(5)} == {401}
        assert asked == [unknown.split("_")[1], wrong.split("_")[1]]
        assert {status(two, key) for key in (unknown, wrong)} == {401}
        assert asked_by_two == [], "what one gateway found out, the others know"


def test_a_right_key_asks_the_database_once(
    start_gateway: StartGateway, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = start_gateway(alpha), start_gateway(alpha)
    key = one.key()
    with counted(one, monkeypatch) as asked, counted(two, monkeypatch) as asked_by_two:
        assert {status(gateway, key) for gateway in (one, two) for _ in range(5)} == {200}
    assert (len(asked), asked_by_two) == (1, [])


@pytest.mark.parametrize("key_of", [lambda _: "garbage", forged], ids=["garbage", "of a right form"])
def test_failures_are_limited_before_any_work(
    start_gateway: StartGateway, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch, key_of: Callable[[str], str]
) -> None:
    gateway = start_gateway(alpha, AUTH_FAILURE_RATE_LIMIT_PER_IP_PER_MIN="3", GATEWAY_TRUSTED_PROXIES="127.0.0.1")
    good, new = gateway.key(), gateway.key()
    assert status(gateway, good) == 200
    assert [status(gateway, key_of("abcdefgh")) for _ in range(3)] == [401] * 3
    with counted(gateway, monkeypatch) as asked:
        refused = ask(gateway, key_of("abcdefgh"))
        assert refused.status_code == 429 and 1 <= int(refused.headers["Retry-After"]) <= 60
        assert status(gateway, new) == 429, "a key not seen before costs argon2"
    assert asked == []
    assert status(gateway, good) == 200, "a key already known goes on"
    elsewhere = {"Authorization": f"Bearer {new}", "X-Forwarded-For": "192.0.2.7"}
    assert httpx.get(f"{gateway.url}/api/tags", headers=elsewhere).status_code == 200


def test_failures_count_together_on_all_gateways(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    one, two = (start_gateway(alpha, AUTH_FAILURE_RATE_LIMIT_PER_IP_PER_MIN="3") for _ in range(2))
    assert [status(gateway, "garbage") for gateway in (one, two, one)] == [401] * 3
    assert [status(gateway, "garbage") for gateway in (two, two)] == [401, 429]


def test_requests_without_a_key_are_no_wrong_keys(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha, AUTH_FAILURE_RATE_LIMIT_PER_IP_PER_MIN="2")
    assert [status(gateway, "") for _ in range(6)] == [401] * 6


def test_an_unknown_id_takes_as_long_as_a_wrong_secret(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha, ARGON2_MEMORY_COST_KIB="16384", ARGON2_TIME_COST="2")
    known = gateway.key().split("_")[1]
    took: dict[str, list[float]] = {known: [], "unknown": []}
    with gateway.http() as client:
        for _ in range(15):
            for name, times in took.items():
                key = forged(known if name == known else key_format.mint().secret_id)
                began = time.perf_counter()
                assert client.get("/api/tags", headers={"x-api-key": key}).status_code == 401
                times.append(time.perf_counter() - began)
    # Other work on the machine only ever adds: the fastest of each are the ones to compare.
    wrong, unknown = (min(times) for times in took.values())
    assert min(wrong, unknown) > 0.008, "argon2 has not run"
    assert 0.6 < unknown / wrong < 1.7


def test_both_wrong_keys_get_the_same_answer(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    revoked, expired = gateway.key(name="gone"), gateway.key(lifetime=timedelta())
    gateway.call(gateway.key_store().revoke("gone"))
    keys = [forged(revoked.split("_")[1]), forged("abcdefgh"), "garbage", revoked, expired]
    answers = [ask(gateway, key) for key in keys]
    assert {answer.status_code for answer in answers} == {401} and len({answer.content for answer in answers}) == 1


# ── stores that are away ──


@contextmanager
def closed(stores: TestStores, servers: local_stores.Stores) -> Iterator[None]:
    """The test's database lets nobody in and throws out who is there."""
    name = stores.database_url.rpartition("/test_")[2].partition("?")[0]
    database = f"test_{name}"
    out = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"
    sql(servers.database_url, f"ALTER DATABASE {database} ALLOW_CONNECTIONS false", out)
    try:
        yield
    finally:
        sql(servers.database_url, f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")


def test_postgresql_away(
    start_gateway: StartGateway, stores: TestStores, servers: local_stores.Stores, alpha: FakeBackend
) -> None:
    gateway = start_gateway(alpha, REDIS_KEY_CACHE_TTL_S="1")
    known, unknown = gateway.key(), gateway.key()
    assert status(gateway, known) == 200
    assert httpx.get(f"{gateway.url}/readyz").json()["database"] == "ok"
    with closed(stores, servers):
        time.sleep(1.2)  # Longer than the cache (and than readyz remembers), so that the database is asked again.
        assert [status(gateway, known) for _ in range(3)] == [200] * 3
        for key in (unknown, forged("abcdefgh")):
            assert status(gateway, key) == 503
        assert status(gateway, "garbage") == 401
        with gateway.http() as client:
            assert client.get("/readyz").json()["database"] == "degraded"
    until(lambda: status(gateway, unknown) == 200, 5)
    assert status(gateway, known) == 200


def test_postgresql_away_and_when_to_come_back(
    start_gateway: StartGateway, stores: TestStores, servers: local_stores.Stores, alpha: FakeBackend
) -> None:
    gateway = start_gateway(alpha)
    with closed(stores, servers):
        assert int(ask(gateway, forged("abcdefgh")).headers.get("Retry-After", 0)) >= 1


@pytest.fixture
def without_redis(stores: TestStores, alpha: FakeBackend) -> Iterator[RunningGateway]:
    names = {"REDIS_URL": "unix:///nowhere/redis.sock", "REDIS_KEY_CACHE_TTL_S": "1"}
    with RunningGateway(settings_for(alpha, DATABASE_URL=stores.database_url, **names)) as gateway:
        yield gateway


def test_redis_away(without_redis: RunningGateway) -> None:
    key, other = without_redis.key(name="mine"), without_redis.key()
    assert [status(without_redis, each) for each in (key, other, key, "garbage")] == [200, 200, 200, 401]
    _, at_once = without_redis.call(without_redis.key_store().revoke("mine"))
    revoked = time.monotonic()
    assert not at_once
    until(lambda: status(without_redis, key) == 401, 2)
    assert time.monotonic() - revoked < 1.5
    assert status(without_redis, other) == 200


def test_redis_away_and_rotation(without_redis: RunningGateway) -> None:
    old = without_redis.key(name="mine")
    assert status(without_redis, old) == 200
    _, new = without_redis.call(without_redis.key_store().rotate("mine", timedelta()))
    assert status(without_redis, new) == 200
    until(lambda: status(without_redis, old) == 401, 2)


def test_failures_are_limited_without_redis(stores: TestStores, alpha: FakeBackend) -> None:
    names = {"REDIS_URL": "unix:///nowhere/redis.sock", "AUTH_FAILURE_RATE_LIMIT_PER_IP_PER_MIN": "2"}
    with RunningGateway(settings_for(alpha, DATABASE_URL=stores.database_url, **names)) as gateway:
        assert [status(gateway, "garbage") for _ in range(3)] == [401, 401, 429]


# ── wrong keys from everywhere ──


def authenticator_of(gateway: RunningGateway) -> Authenticator:
    owners = [getattr(kept._work, "__self__", None) for kept in gateway.components.background()]
    [found] = [owner for owner in owners if isinstance(owner, Authenticator)]
    return found


@pytest.mark.parametrize("forge", ["unknown ids", "one id that exists"])
def test_wrong_keys_from_many_addresses_keep_no_good_one_waiting(
    start_gateway: StartGateway, alpha: FakeBackend, forge: str
) -> None:
    """A good key that this process does not know yet has its turn among the next, however many wrong ones came before."""
    gateway = start_gateway(alpha)
    authenticator = authenticator_of(gateway)
    attacked = gateway.key().split("_")[1]
    good = [gateway.key() for _ in range(4)]
    hasher = gated(authenticator)

    async def run() -> tuple[list[int], Counter[str]]:
        wrong = [forged(key_format.mint().secret_id if forge == "unknown ids" else attacked) for _ in range(200)]
        flood = [asyncio.create_task(authenticator.key_for(key, f"192.0.2.{number}")) for number, key in enumerate(wrong)]
        under_way = authenticator._verifier._under_way
        await until_there(lambda: hasher.runs and sum(task.done() for task in flood) > 150)
        coming = [asyncio.create_task(authenticator.key_for(key, "127.0.0.1")) for key in good]
        await until_there(lambda: all(f"id {key.split('_')[1]}" in under_way for key in good))
        before = len(hasher.runs)
        hasher.gate.set()
        await asyncio.gather(*coming)
        ends = await asyncio.gather(*flood, return_exceptions=True)
        return [hasher.runs.index(key) - before for key in good], Counter(type(end).__name__ for end in ends)

    turns, ends = gateway.call(run())
    assert max(turns) < 2 * len(good)
    assert set(ends) == {"WrongKey", "Overloaded"}


class GatedHasher:
    """argon2 whose runs are counted, and end once the gate is open."""

    def __init__(self, hasher: PasswordHasher) -> None:
        self._hasher, self.gate = hasher, threading.Event()
        self.runs: list[str] = []

    def verify(self, stored: str, whole: str) -> bool:
        self.runs.append(whole)
        assert self.gate.wait(30)
        return self._hasher.verify(stored, whole)


def gated(authenticator: Authenticator) -> GatedHasher:
    verifier = authenticator._verifier
    hasher = verifier._hasher = GatedHasher(verifier._hasher)  # type: ignore[assignment]
    return hasher


async def until_there(done: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not done():  # noqa: ASYNC110 what is waited for sets no event
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("exists", [True, False], ids=["an id that exists", "an unknown id"])
def test_one_address_does_not_lock_out_the_holder_of_a_key(
    start_gateway: StartGateway, alpha: FakeBackend, exists: bool
) -> None:
    """Its attempts with one id are one at a time, whether there is the id or not; all of them count as wrong."""
    gateway = start_gateway(alpha)
    key, authenticator = gateway.key(), authenticator_of(gateway)
    attacked = key.split("_")[1] if exists else "abcdefgh"
    hasher = gated(authenticator)

    async def run() -> tuple[str, Counter[str]]:
        wrong = [authenticator.key_for(forged(attacked), f"2001:db8:0:{number:x}::1") for number in range(40)]
        flood = [asyncio.create_task(one) for one in wrong]
        await until_there(lambda: hasher.runs and sum(task.done() for task in flood) >= 24)
        holder = asyncio.create_task(authenticator.key_for(key, "192.0.2.1"))
        await until_there(lambda: holder.done() or authenticator._strangers == 2)
        hasher.gate.set()
        ends = await asyncio.gather(*flood, return_exceptions=True)
        return (await holder).id, Counter(type(end).__name__ for end in ends)

    key_id, ends = gateway.call(run())
    assert key_id and ends == {"WrongKey": 1, "Overloaded": 39}
    assert len(hasher.runs) == 2
    assert authenticator._failures._counts["2001:db8::"][0] == 40
    assert authenticator._attempts == set()


@pytest.mark.parametrize("flooded", [2, 12])
def test_floods_of_some_ids_keep_nobody_out_who_has_another(
    start_gateway: StartGateway, alpha: FakeBackend, flooded: int
) -> None:
    """Wrong keys with ids that exist, each from an address of its own: others wait for one of each of these ids at most."""
    gateway = start_gateway(alpha)
    attacked, holders = ([gateway.key() for _ in range(count)] for count in (flooded, 3))
    authenticator = authenticator_of(gateway)
    hasher = gated(authenticator)

    async def run() -> Counter[str]:
        ids = [key.split("_")[1] for key in attacked for _ in range(auth_verifier.MOST_OF_ONE_ID + 8)]
        wrong = [authenticator.key_for(forged(one), f"2001:db8:{number:x}::1") for number, one in enumerate(ids)]
        flood = [asyncio.create_task(one) for one in wrong]
        # All that are not turned away wait: two of them in the threads.
        left = min(flooded * auth_verifier.MOST_OF_ONE_ID, auth_verifier.MOST_BEHIND + flooded)
        await until_there(lambda: len(hasher.runs) == 2 and sum(task.done() for task in flood) == len(flood) - left)
        coming = [asyncio.create_task(authenticator.key_for(key, "192.0.2.1")) for key in holders]
        lanes = [f"id {key.split('_')[1]}" for key in holders]
        under_way = authenticator._verifier._under_way
        await until_there(lambda: all(lane in under_way for lane in lanes) or any(task.done() for task in coming))
        hasher.gate.set()
        assert len({found.id for found in await asyncio.gather(*coming)}) == len(holders)
        ends = await asyncio.gather(*flood, return_exceptions=True)
        return Counter(type(end).__name__ for end in ends)

    assert set(gateway.call(run())) == {"WrongKey", "Overloaded"}
    assert max(hasher.runs.index(key) for key in holders) < flooded + len(holders)


def test_a_right_key_on_many_connections_at_once_is_one_attempt(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    key, authenticator = gateway.key(), authenticator_of(gateway)
    hasher = gated(authenticator)

    async def run() -> set[str]:
        asked = [asyncio.create_task(authenticator.key_for(key, "192.0.2.1")) for _ in range(40)]
        await until_there(lambda: hasher.runs)
        asked += [asyncio.create_task(authenticator.key_for(key, "192.0.2.1")) for _ in range(40)]
        hasher.gate.set()
        return {found.id for found in await asyncio.gather(*asked)}

    assert len(gateway.call(run())) == 1
    assert (hasher.runs, authenticator._failures._counts) == ([key], {})


def test_a_changed_key_needs_no_argon2_and_without_the_database_it_is_good_no_longer(
    start_gateway: StartGateway, stores: TestStores, servers: local_stores.Stores, alpha: FakeBackend
) -> None:
    gateway = start_gateway(alpha)
    key, authenticator = gateway.key(name="mine"), authenticator_of(gateway)
    hasher = gated(authenticator)
    hasher.gate.set()
    assert status(gateway, key) == 200

    def change(rpm: int) -> None:
        before = authenticator._generation
        gateway.call(gateway.key_store().limit("mine", "", {"rpm": rpm}))
        until(lambda: authenticator._generation > before, 5)

    change(7)
    assert ask(gateway, key).headers["x-ratelimit-limit-requests"] == "7"
    change(8)
    with closed(stores, servers):
        assert status(gateway, key) == 503, "it may have been revoked"
    until(lambda: ask(gateway, key).headers.get("x-ratelimit-limit-requests") == "8", 5)
    assert hasher.runs == [key]


def test_an_answer_in_its_turn_frees_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers that leave, wait too long or find no room hold nothing afterwards."""
    monkeypatch.setattr(auth_verifier, "LONGEST_WAIT_S", 0.05)
    hasher = PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)
    key, other = key_format.mint(), key_format.mint()

    async def run() -> set[str]:
        verifier = auth_verifier.Verifier(hasher)
        stored = hasher.hash(key.whole)
        ends: set[str] = set()
        for seconds in (0.0, 0.001, 0.01):
            unknown = [asyncio.create_task(verifier.is_right(None, key_format.mint())) for _ in range(12)]
            wrong = [asyncio.create_task(verifier.is_right(stored, other)) for _ in range(12)]
            await asyncio.sleep(seconds)
            for task in (*unknown[::2], *wrong[::3]):
                task.cancel()
            found = await asyncio.gather(*unknown, *wrong, return_exceptions=True)
            ends |= {type(one).__name__ if isinstance(one, BaseException) else str(one) for one in found}
        await asyncio.sleep(0.2)
        assert (verifier._under_way, verifier._locks, verifier._lane.locked()) == (Counter(), {}, False)
        assert [await verifier.is_right(*asked) for asked in ((stored, key), (stored, other), (None, other))] == [
            True,
            False,
            False,
        ]
        verifier.close()
        return ends

    assert asyncio.run(run()) <= {"False", "Overloaded", "CancelledError"}


def test_a_wrong_key_is_wrong_also_while_the_queue_of_unknown_ids_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is counted and remembered, and argon2 does not run for it again."""
    monkeypatch.setattr(auth_verifier, "MOST_UNKNOWN", 0)
    hasher = PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)
    good, wrong = key_format.mint(), key_format.mint()

    async def run() -> list[bool]:
        verifier = auth_verifier.Verifier(hasher)
        try:
            with pytest.raises(Overloaded):
                await verifier.is_right(None, wrong)
            return [await verifier.is_right(hasher.hash(good.whole), each) for each in (good, wrong)]
        finally:
            verifier.close()

    assert asyncio.run(run()) == [True, False]
