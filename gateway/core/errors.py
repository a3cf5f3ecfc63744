"""All errors: the docstring of a class is its message, `status` its HTTP status, `code` its stable name."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

# OpenAI's and Anthropic's clients retry after any 5xx unless this header forbids it, and Claude Code for minutes after a 401.
NO_RETRY = ((b"x-should-retry", b"false"),)


class GatewayError(Exception):
    """The gateway failed; its operator finds the reason in the log under this request's id."""

    status = 500
    code = "internal_error"
    # The error's type in the OpenAI API if it does not follow from the status.
    kind = ""
    # Fields that are added to an error of the OpenAI API, or replace others.
    fields: Mapping[str, object] = MappingProxyType({})
    headers: Sequence[tuple[bytes, bytes]] = ()
    # The prompt is too long for the model.
    is_of_context = False
    # The model takes no images, or not these.
    is_of_images = False
    # The rest of the request's body is not read; the connection ends with the answer.
    leaves_body = False

    def __init__(self, message: str = "", *, retry_after: float | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").partition("\n")[0])
        self.retry_after = retry_after

    @property
    def message(self) -> str:
        return str(self.args[0])


class BadRequest(GatewayError):
    """The request could not be understood."""

    status = 400
    code = "bad_request"


class ConflictingKeys(BadRequest):
    """The request carries two different keys; send one."""

    code = "conflicting_keys"


class RouteNotServed(BadRequest):
    """The servers with this model do not have this route."""

    code = "route_not_served"


class MissingKey(GatewayError):
    """No API key was sent; send it as 'Authorization: Bearer <key>'."""

    status = 401
    code = "missing_api_key"
    headers = NO_RETRY


class WrongKey(GatewayError):
    """The API key is wrong, expired or revoked."""

    status = 401
    code = "invalid_api_key"
    headers = NO_RETRY


class ModelNotAvailable(GatewayError):
    """The requested model does not exist or is not available to this key; /v1/models and /api/tags list those that are."""

    status = 403
    code = "model_not_available"


class ModelNotFound(GatewayError):
    """The requested model was not found; pull it first."""

    status = 404
    code = "model_not_found"


class NotPermitted(GatewayError):
    """This key may not use this route."""

    status = 403
    code = "insufficient_permissions"


class UnknownRoute(GatewayError):
    """There is no such route here."""

    status = 404
    code = "not_found"

    def __init__(self, message: str = "", meant: str = "") -> None:
        """`meant` is a path in the caller's dialect, or "" if the requested path itself has one."""
        super().__init__(message)
        self.meant = meant


class ResourceNotFound(GatewayError):
    """The resource in the path does not exist."""

    status = 404
    code = "no_such_thing"


class ResourceExists(GatewayError):
    """A resource with this name already exists."""

    status = 409
    code = "already_there"


class MethodNotAllowed(GatewayError):
    """This route does not support this method."""

    status = 405
    code = "method_not_allowed"

    def __init__(self, allowed: str = "") -> None:
        super().__init__()
        self.allowed = allowed


class BodyTooSlow(GatewayError):
    """The request's body did not arrive in time."""

    status = 408
    code = "request_timeout"
    leaves_body = True


class BodyTooLarge(GatewayError):
    """The request's body is too large."""

    status = 413
    code = "request_too_large"
    leaves_body = True


class BodiesUnfinished(GatewayError):
    """This key's unfinished request bodies exceed the memory limit; wait for them to finish."""

    status = 429
    code = "bodies_unfinished"
    leaves_body = True


class HeadTooLarge(GatewayError):
    """The request's head has more than 65536 bytes or more than 256 lines."""

    status = 431
    code = "head_too_large"


class UnsupportedTransferEncoding(GatewayError):
    """The body's Transfer-Encoding is not supported; send it chunked, or with a Content-Length."""

    status = 501
    code = "unsupported_transfer_encoding"
    headers = NO_RETRY


class UnsupportedEncoding(GatewayError):
    """The body's Content-Encoding is not supported; send it unencoded, or encoded once with gzip, deflate or zstd."""

    status = 415
    code = "unsupported_encoding"
    headers = ((b"accept-encoding", b"gzip, deflate, zstd"),)


class EncodedUpload(UnsupportedEncoding):
    """The Content-Encoding of an upload is not supported; send it unencoded."""

    headers = ((b"accept-encoding", b"identity"),)


class TooManyFailures(GatewayError):
    """Too many requests with a wrong key from this address; wait before the next."""

    status = 429
    code = "too_many_auth_failures"


class LimitReached(GatewayError):
    """A limit of this key is reached."""

    status = 429
    code = "rate_limit_exceeded"
    limit = ""
    may_wait = False
    # Decided by this process without Redis, which may decide differently.
    is_local = False
    waited_s = 0.0


class BudgetSpent(LimitReached):
    """A budget of this key is spent."""

    code = "insufficient_quota"


class BackendRefused(GatewayError):
    """The model server refused the request."""

    code = "upstream_refused"

    def __init__(self, message: str = "", status: int = 400, fields: Mapping[str, object] = MappingProxyType({})) -> None:
        super().__init__(message)
        self.status, self.fields = status, fields
        if status >= 500:
            self.headers = NO_RETRY


class PromptTooLong(BackendRefused):
    """The prompt is too long for the model's context."""

    is_of_context = True


class BackendCannot(BackendRefused):
    """The model server cannot do what the request needs."""

    code = "upstream_cannot"


class AnswerTooLarge(BackendRefused):
    """The model server's answer is too large for this gateway; ask for less in one request, or for a stream."""

    status = 502
    code = "answer_too_large"

    def __init__(self) -> None:
        super().__init__(status=self.status)


class AnswersUnread(BackendRefused):
    """This key's unread answers exceed the memory limit; read them first."""

    status = 502
    code = "answers_unread"

    def __init__(self) -> None:
        super().__init__(status=self.status)


class BackendFailed(GatewayError):
    """The model server failed to answer; try again."""

    status = 502
    code = "upstream_failed"


class AnswerCutShort(BackendFailed):
    """The model server's answer ended early; what came before is incomplete."""

    code = "upstream_ended_early"


class BackendTimeout(GatewayError):
    """The model server did not answer in time; try again or ask for less."""

    status = 504
    code = "upstream_timeout"


class NoBackend(GatewayError):
    """No model server with this model is reachable and free at the moment; try again shortly."""

    status = 503
    code = "upstream_unavailable"


class QueueFull(NoBackend):
    """As many requests wait for this model as may wait; try again later."""

    code = "queue_full"


class QueueTimeout(NoBackend):
    """No model server with this model became free in the time that a request may wait; try again later."""

    code = "queue_timeout"


class Overloaded(GatewayError):
    """The gateway is overloaded; try again shortly."""

    status = 503
    code = "overloaded"

    def __init__(self, message: str = "", *, retry_after: float | None = None, leaves_body: bool = False) -> None:
        super().__init__(message, retry_after=retry_after)
        self.leaves_body = leaves_body


class StoreUnavailable(GatewayError):
    """The gateway cannot check this key at the moment; try again shortly."""

    status = 503
    code = "store_unavailable"

    def __init__(self, message: str = "", *, retry_after: float | None = 2.0) -> None:
        super().__init__(message, retry_after=retry_after)


class ReadOnly(StoreUnavailable):
    """PostgreSQL is read-only at the moment, so nothing can be changed; try again shortly."""

    code = "read_only"


class StoreRefused(StoreUnavailable):
    """The gateway cannot check this key at the moment; try again shortly.

    PostgreSQL answers, but refuses this statement; `reason` is its message, for operators only.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__()
        self.reason = reason


class TooSlow(StoreUnavailable):
    """PostgreSQL takes too long for this; ask for a shorter period or for less."""

    code = "too_slow"


class LimitsUnavailable(GatewayError):
    """The gateway cannot check this key's limits at the moment; try again shortly."""

    status = 503
    code = "limits_unavailable"


class ShuttingDown(GatewayError):
    """The gateway is shutting down; try again shortly."""

    status = 503
    code = "shutting_down"


class ClientGone(Exception):
    """The client closed its connection before it had the whole answer."""


class ClientStalled(ClientGone):
    """The client stopped reading its answer."""


class SettingsError(Exception):
    """A setting is wrong; the message names the setting and its valid values."""


class CommandFailed(Exception):
    """An operator's command could not be carried out; the message says what to do next."""


class NotFound(CommandFailed):
    """The object that an operator's command names does not exist."""


class NameTaken(CommandFailed):
    """An object that an operator's command would create already exists."""
