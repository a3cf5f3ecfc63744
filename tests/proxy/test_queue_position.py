"""Clients learn from headers whether their call has waited for a backend, and where in the queue it was."""

import threading
from concurrent.futures import ThreadPoolExecutor

from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import Hold
from tests.support.gateway_settings import entry_of
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

PATH = "/api/chat"
CHAT = {"model": "llama3.2", "messages": [{"role": "user", "content": "Say hi"}]}


def position_and_wait(gateway: RunningGateway, key: str) -> tuple[int, int]:
    with gateway.http(key) as client:
        answer = client.post(PATH, json=CHAT)
    assert answer.status_code == 200
    return int(answer.headers["X-Queue-Position"]), int(answer.headers["X-Queue-Wait-Ms"])


def test_the_first_place_and_the_wait(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gate = threading.Event()
    alpha.play(PATH, lambda request: [Hold(gate), *alpha.healthy(request)])
    gateway = start_gateway(entry_of(alpha, slots=1))
    key, other, patient = gateway.key(), gateway.key(), gateway.key(heartbeat_after_s=0.02)
    queue = gateway.components.placing.queue
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(position_and_wait, gateway, key)
        until(lambda: queue.running == 1)
        second = pool.submit(position_and_wait, gateway, other)
        until(lambda: queue.length == 1)
        # A heartbeat begins the answer while the call waits: how long it will have waited is not known yet.
        with gateway.http(patient) as client, client.stream("POST", PATH, json=CHAT) as answer:
            assert answer.headers["X-Queue-Position"] == "2" and "X-Queue-Wait-Ms" not in answer.headers
            gate.set()
            assert b'"done":true' in answer.read()
        assert first.result() == (0, 0)
        position, wait_ms = second.result()
        assert position == 1 and wait_ms > 0
    assert [row["outcome"] for row in gateway.audit_rows()] == ["answered"] * 3
