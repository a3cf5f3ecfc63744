"""The context with which each model is loaded, as its backend reports it or as this process has asked for it since."""

import time
from collections.abc import Callable
from typing import NamedTuple

from gateway.dialects.dialect import Call
from gateway.dialects.model_entries import whole_number
from gateway.dialects.model_names import canonical
from gateway.dialects.translation.native_fields import unloads
from gateway.fleet.backends.backend import Backend
from gateway.fleet.catalog import Catalog
from gateway.fleet.load import Load
from gateway.fleet.residents import BackendLoad
from gateway.fleet.runner_options import UNCONFIGURED, Runner

# By the backend's name and its spelling of the model's.
Place = tuple[str, str]


class _Reported(NamedTuple):
    """A runner as its backend reported it."""

    catalog: Catalog
    load: BackendLoad | None
    runner: Runner


class _Requested(NamedTuple):
    context: int
    at: float


class LoadedModels:
    """`longest_s` is how long clients may keep a model loaded."""

    def __init__(self, catalog: Callable[[], Catalog], load: Load, longest_s: float) -> None:
        self._catalog, self._load, self._longest_s = catalog, load, longest_s
        self._reported: dict[Place, _Reported] = {}
        self._requested: dict[Place, _Requested] = {}

    def runner(self, call: Call, backend: Backend, spelling: str) -> Runner | None:
        """How an Ollama runs the call's model, None if the call has no options for that.

        Notes the context with which the model is loaded after this call.
        """
        place = (backend.name, spelling)
        if not call.operation.has_runner_options:
            if place in self._requested:
                # It is loaded as the backend likes, not as a client asked.
                self._requested[place] = _Requested(0, time.time())
            return None
        runner = self._reported_runner(place, backend)
        if call.may_unload:
            runner = runner._replace(may_unload=True)
        if "options" in call.body or call.may_unload or runner.config is not UNCONFIGURED:
            self._note(place, call, runner)
        return runner

    def answered(self, runner: Runner, backend: Backend, spelling: str) -> None:
        """Has the backend asked for the context if the call has loaded its model."""
        load = None if runner.context else self._load.known.get(backend.name)
        if load is not None and all(one.model != canonical(spelling).canonical for one in load.residents):
            self._load.look_soon(backend.name)

    def failed(self, backend: Backend, spelling: str) -> None:
        """The model may not be loaded as the call asked."""
        self._requested.pop((backend.name, spelling), None)

    def _reported_runner(self, place: Place, backend: Backend) -> Runner:
        catalog, load = self._catalog(), self._load.known.get(backend.name)
        known = self._reported.get(place)
        if known is None or known.catalog is not catalog or known.load is not load:
            known = self._reported[place] = _Reported(catalog, load, self._read(place, backend, catalog, load))
        requested = self._requested.get(place)
        if requested is not None and (load is None or requested.at >= load.at):
            return known.runner._replace(context=requested.context)
        return known.runner

    def _note(self, place: Place, call: Call, runner: Runner) -> None:
        context = 0 if runner.may_unload and unloads(call.body) else runner.context_for(call.body)
        if context is not None and context != runner.context:
            self._requested[place] = _Requested(context, time.time())

    def _read(self, place: Place, backend: Backend, catalog: Catalog, load: BackendLoad | None) -> Runner:
        name = canonical(place[1]).canonical
        config = backend.config.models.get(name, UNCONFIGURED)
        loaded = next((one.context for one in load.residents if one.model == name), 0) if load else 0
        return Runner(config, loaded, _trained_context(catalog, backend.name, name), self._longest_s)


def _trained_context(catalog: Catalog, backend: str, name: str) -> int:
    """That of the model's entry in the backend's list, 0 if it does not say."""
    snapshot = next((snapshot for snapshot in catalog.snapshots if snapshot.backend == backend), None)
    entries = snapshot.models if snapshot else ()
    entry = next((entry for entry in entries if canonical(entry["name"]).canonical == name), None)
    return whole_number(entry["details"].get("context_length")) if entry else 0
