"""`/admin/v1`: what operators see and do, for scripts and for the pages, with keys that have the role `admin`.

A request carries its key in a header, never in a cookie, so that no other site can send requests in an operator's name.
Actions are in the audit, with the action in `detail`, and so are requests of keys without the role. Requests that only read
are not traffic: they are in no audit row, no figure and no metric.
"""

from collections.abc import Callable

from gateway.admin.backends import BackendHandlers
from gateway.admin.endpoint import AdminRoute
from gateway.admin.events import AdminEvents
from gateway.admin.keys import NEW_KEY, KeyHandlers
from gateway.admin.reports import ReportHandlers
from gateway.auth.key import OPTIONS
from gateway.limits.quota import NAMES as LIMITS


class AdminApi:
    """The admin API's endpoints, with the names that the query or body of each may have; their paths are in endpoints.py."""

    def __init__(
        self,
        route: Callable[..., AdminRoute],
        keys: KeyHandlers,
        backends: BackendHandlers,
        reports: ReportHandlers,
        events: AdminEvents,
        jobs: Callable[[str], AdminRoute],
    ) -> None:
        self.overview, self.events = route(reports.overview), events
        self.series = route(reports.series, takes=("window",))
        self.backends = route(backends.list_all)
        self.drain, self.undrain = route(backends.drain), route(backends.undrain)
        self.probe, self.refresh = route(backends.probe), route(backends.refresh)
        self.warm, self.unload, self.pull = jobs("warm"), jobs("unload"), jobs("pull")
        self.keys = route(keys.list_all)
        self.create_key = route(keys.create, takes=NEW_KEY, has_body=True, status=201)
        self.limit_key = route(keys.limit, takes=("model", *LIMITS, *OPTIONS), has_body=True)
        self.rotate_key = route(keys.rotate, takes=("overlap",), has_body=True, status=201)
        self.revoke_key = route(keys.revoke)
        self.audit = route(reports.audit, takes=("key", "model", "since", "status", "outcome", "limit"))
        self.trace = route(reports.trace, takes=("since",))
        self.usage = route(reports.usage, takes=("by", "since"))
        self.explain = route(reports.explain, takes=("key", "model", "client", "prompt", "output"))
