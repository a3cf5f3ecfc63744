"""Calls whose process is gone are settled from what Redis keeps of them."""

from gateway.audit import abandoned
from gateway.stores import redis_keys
from tests.conftest import StartGateway, TestStores
from tests.support.fake_backend.backend import FakeBackend
from tests.support.processes import until


def test_an_entry_that_is_not_a_call_is_removed(start_gateway: StartGateway, alpha: FakeBackend, stores: TestStores) -> None:
    gateway = start_gateway(alpha)
    shared = redis_keys.BY_SHARD[4]
    with stores.client() as redis:
        redis.hset(shared.calls, "x", b'0 {"scopes":[[1,2,3,4,5,6,7]],"model":"m","prompt":1,"row":{}}')
        redis.zadd(shared.leases, {"x": 1})
        assert gateway.call(abandoned.settle_expired(gateway.components.limits, 0, 10)) == 0
        until(lambda: not redis.exists(shared.calls), 10)
