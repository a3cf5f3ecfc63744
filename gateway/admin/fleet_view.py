"""The fleet as operators see it: memory, loaded models, slots and learned speeds of each backend, and what waits for them."""

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from gateway.fleet.board_state import BoardState
from gateway.fleet.catalog import Catalog
from gateway.fleet.costs import LEARNED, Costs
from gateway.fleet.residents import BackendLoad, Resident
from gateway.stores.redis_client import RedisUnavailable

# Of a backend: those that are loaded or have calls come first.
MOST_MODELS = 24
MOST_QUEUES = 50
# The numbers of Rates that are shown, with their places in its `origins`.
SHOWN_RATES = {"load_s": 0, "prefill_tps": 1, "decode_tps": 2}


class FleetView:
    """`state` may raise RedisUnavailable; then queues and slots in use are unknown."""

    def __init__(
        self,
        catalog: Callable[[], Catalog],
        loads: Callable[[], Mapping[str, BackendLoad]],
        costs: Costs,
        state: Callable[[], Awaitable[BoardState]],
    ) -> None:
        self._catalog, self._loads, self._costs, self._state = catalog, loads, costs, state

    async def now(self) -> "FleetNow":
        try:
            state: BoardState | None = await self._state()
        except RedisUnavailable:
            state = None
        return FleetNow(self._catalog(), self._loads(), self._costs, state)


class FleetNow:
    """What is known at one time; `state` is None while Redis is unreachable."""

    def __init__(self, catalog: Catalog, loads: Mapping[str, BackendLoad], costs: Costs, state: BoardState | None) -> None:
        self._catalog, self._loads, self._costs, self._state = catalog, loads, costs, state
        self._now = time.time()
        self._running: dict[str, dict[str, int]] = {}
        for place in state.places if state else ():
            self._running.setdefault(place.backend, {})[place.model] = place.running

    def queues(self) -> list[dict[str, Any]] | None:
        """The longest first."""
        return None if self._state is None else [queue._asdict() for queue in self._state.queues[:MOST_QUEUES]]

    @property
    def waiting(self) -> int | None:
        return None if self._state is None else sum(queue.calls for queue in self._state.queues)

    def of(self, backend: str) -> dict[str, Any]:
        """Memory is None of a backend that loads no models on demand."""
        load = self._loads.get(backend)
        swaps = load is not None and load.swaps
        return {
            "running": [resident.model for resident in load.residents] if load and swaps else [],
            "memory": _memory(load) if load and swaps else None,
            "loading": self._loading(load),
            "places": self._places(backend, load),
        }

    def _loading(self, load: BackendLoad | None) -> dict[str, Any] | None:
        if load is None or load.loading is None or any(one.model == load.loading.model for one in load.residents):
            return None
        began, until = load.loading.began, load.loading.until
        return {"model": load.loading.model, "for_s": max(0.0, self._now - began), "left_s": max(0.0, until - self._now)}

    def _places(self, backend: str, load: BackendLoad | None) -> list[dict[str, Any]]:
        """The models of a backend that are loaded or have calls, in that order."""
        running, residents = self._running.get(backend, {}), load.residents if load else ()
        found = {resident.model: self._place(backend, resident.model, resident) for resident in residents[:MOST_MODELS]}
        found |= {model: self._place(backend, model, None) for model in running if model not in found}
        busy_first = sorted(found.values(), key=lambda place: (not place["in_use"], not place["is_loaded"], place["model"]))
        return busy_first[:MOST_MODELS]

    def _place(self, backend: str, model: str, resident: Resident | None) -> dict[str, Any]:
        offer = self._catalog.offer(backend, model)
        rates = self._costs.rates(backend, model, offer.size if offer else 0)
        learned = {name: getattr(rates, name) if rates.origins[at] == LEARNED else None for name, at in SHOWN_RATES.items()}
        until = resident.until if resident else None
        return {
            "model": model,
            "is_loaded": resident is not None,
            "vram": resident.size_vram if resident else 0,
            "context": resident.context if resident else 0,
            "left_s": None if until is None else max(0.0, until - self._now),
            "slots": offer.slots if offer else None,
            "slots_from": offer.slots_source if offer else "",
            "in_use": None if self._state is None else self._running.get(backend, {}).get(model, 0),
            **learned,
        }


def _memory(load: BackendLoad) -> dict[str, Any]:
    """Bytes of VRAM, and counts since Redis began to be kept."""
    return {"used": load.used, "seen": load.seen, "loads": load.loads, "evictions": load.evictions, "error": load.error}
