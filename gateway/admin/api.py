"""`/admin/v1`: what operators see and do, for scripts and for the pages, with keys that have the role `admin`.

A request carries its key in a header, never in a cookie, so that no other site can send requests in an operator's name.
Actions are in the audit, with the action in `detail`, and so are requests of keys without the role. Requests that only read
are not traffic: they are in no audit row, no figure and no metric.
"""

from typing import Any

from starlette.types import ASGIApp

from gateway.admin.backends import BackendHandlers
from gateway.admin.endpoint import AdminRoute, Handler
from gateway.admin.events import AdminEvents
from gateway.admin.keys import NEW_KEY, KeyHandlers
from gateway.admin.overview import Overview
from gateway.admin.reports import ReportHandlers
from gateway.core.cancel_scope import ScopeTimer
from gateway.core.in_flight import InFlight
from gateway.limits.quota import NAMES as LIMITS
from gateway.proxy.access import Access
from gateway.proxy.body import Bodies


class AdminApi:
    """The admin API's handlers, by method and path."""

    def __init__(
        self, keys: KeyHandlers, backends: BackendHandlers, reports: ReportHandlers, overview: Overview, in_flight: InFlight
    ) -> None:
        self._keys, self._backends, self._reports = keys, backends, reports
        self._overview, self._in_flight = overview, in_flight

    def routes(self, access: Access, watch: ScopeTimer, bodies: Bodies) -> dict[tuple[str, str], ASGIApp]:
        def route(handler: Handler, *takes: str, **options: Any) -> AdminRoute:
            return AdminRoute(access, watch, bodies, handler, takes=takes, **options)

        keys, backends, reports = self._keys, self._backends, self._reports
        return {
            ("GET", "/admin/v1/overview"): route(reports.overview),
            ("GET", "/admin/v1/events"): AdminEvents(access, watch, self._overview, self._in_flight),
            ("GET", "/admin/v1/series"): route(reports.series, "window"),
            ("GET", "/admin/v1/backends"): route(backends.list_all),
            ("POST", "/admin/v1/backends/{name}/drain"): route(backends.drain),
            ("POST", "/admin/v1/backends/{name}/undrain"): route(backends.undrain),
            ("POST", "/admin/v1/backends/{name}/probe"): route(backends.probe),
            ("POST", "/admin/v1/refresh"): route(backends.refresh),
            ("GET", "/admin/v1/keys"): route(keys.list_all),
            ("POST", "/admin/v1/keys"): route(keys.create, *NEW_KEY, has_body=True, status=201),
            ("PATCH", "/admin/v1/keys/{id}"): route(keys.limit, "model", *LIMITS, has_body=True),
            ("POST", "/admin/v1/keys/{id}/rotate"): route(keys.rotate, "overlap", has_body=True, status=201),
            ("DELETE", "/admin/v1/keys/{id}"): route(keys.revoke),
            ("GET", "/admin/v1/audit"): route(reports.audit, "key", "model", "since", "status", "outcome", "limit"),
            ("GET", "/admin/v1/requests/{id}"): route(reports.trace, "since"),
            ("GET", "/admin/v1/usage"): route(reports.usage, "by", "since"),
            ("GET", "/admin/v1/explain"): route(reports.explain, "key", "model", "client"),
        }
