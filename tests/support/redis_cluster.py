"""A Redis cluster of three primaries on the loopback interface."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import redis

from tests.support.processes import free_port, until
from tests.support.redis_server import server

SLOTS = 16384
NODES = 3


@contextmanager
def redis_cluster(folder: Path) -> Iterator[list[int]]:
    """Yields the ports of its nodes."""
    with ExitStack() as stack:
        ports = []
        for number in range(NODES):
            home = folder / f"node{number}"
            home.mkdir()
            own = ("cluster-enabled yes", f"cluster-port {free_port()}", "cluster-node-timeout 2000", "appendonly yes")
            ports.append(stack.enter_context(server(home, *own))[1])
        clients: list[Any] = [stack.enter_context(redis.Redis(port=port)) for port in ports]
        for number, client in enumerate(clients):
            first, last = number * SLOTS // NODES, (number + 1) * SLOTS // NODES - 1
            client.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
        for other in clients[1:]:
            bus = int(other.config_get("cluster-port")["cluster-port"])
            clients[0].execute_command("CLUSTER MEET", "127.0.0.1", other.connection_pool.connection_kwargs["port"], bus)
        until(lambda: all(is_whole(client) for client in clients), 20)
        yield ports


def is_whole(client: Any) -> bool:
    state = client.execute_command("CLUSTER INFO")
    return bool(state["cluster_state"] == "ok" and int(state["cluster_known_nodes"]) == NODES)


def url_of(ports: list[int]) -> str:
    return "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in ports)


def holds(client: Any, slot: int) -> bool:
    own = next(node for node in client.execute_command("CLUSTER NODES").values() if "myself" in node["flags"])
    return any(int(span[0]) <= slot <= int(span[-1]) for span in own["slots"])


def move_slot(clients: Sequence[Any], slot: int, target: int) -> None:
    """Like `redis-cli --cluster reshard`: prepares both nodes, moves the keys, then informs all nodes."""
    ids = [client.execute_command("CLUSTER MYID") for client in clients]
    source = next(n for n, client in enumerate(clients) if holds(client, slot))
    if source == target:
        return
    clients[target].execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[source])
    clients[source].execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[target])
    port = clients[target].connection_pool.connection_kwargs["port"]
    while names := clients[source].execute_command("CLUSTER GETKEYSINSLOT", slot, 100):
        clients[source].execute_command("MIGRATE", "127.0.0.1", port, "", 0, 5000, "KEYS", *names)
        time.sleep(0.01)
    for client in (clients[target], clients[source], *clients):
        client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[target])
