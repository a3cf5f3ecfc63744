"""`/openapi.json`: an OpenAPI 3.1 document of the routes in use.

Made from the route table, the dialects, the error classes and two files: `openapi/routes.json` describes each route
(`METHOD /path`) where the code does not, `openapi/schemas.json` has the schemas.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from gateway.admin.endpoint import AdminRoute
from gateway.core import errors, strict_json
from gateway.core.errors import GatewayError
from gateway.dialects.dialect import Dialect
from gateway.edge.application import HEALTH
from gateway.fleet.scheduler import takes_slot
from gateway.pages import samples
from gateway.proxy.exchange import Exchange
from gateway.telemetry.metrics_endpoint import MetricsEndpoint

FOLDER = Path(__file__).parent / "openapi"
JSON, EVENTS, FORM = "application/json", "text/event-stream", "multipart/form-data"
DESCRIPTION = (
    "A gateway in front of your model servers, for clients of Ollama, OpenAI and Anthropic. When a model server refuses a "
    "request with a status from 400 to 499, the caller gets its message. Every answer has a request id, by which operators "
    "find the request."
)
SERVERS = [
    {"url": "/"},
    {
        "url": "/k/{key}",
        "description": "For clients that can set a URL but no key.",
        "variables": {"key": {"default": "nz_…", "description": "The key."}},
    },
]
SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "As OpenAI clients send the key."},
    "basic": {"type": "http", "scheme": "basic", "description": "The key is the password; any user name is accepted."},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    "api-key": {"type": "apiKey", "in": "header", "name": "api-key"},
}
RETRY = {"Retry-After": ("Seconds, rounded up.", "integer"), "Retry-After-Ms": ("Milliseconds.", "integer")}
RATES = {
    "X-RateLimit-Limit-Requests": ("Requests per minute.", "integer"),
    "X-RateLimit-Remaining-Requests": ("How many of them remain.", "integer"),
    "X-RateLimit-Reset-Requests": ("The time until all are available again, such as `1m30s`.", "string"),
    "X-RateLimit-Limit-Tokens": ("Tokens per minute.", "integer"),
    "X-RateLimit-Remaining-Tokens": ("How many of them remain.", "integer"),
    "X-RateLimit-Reset-Tokens": ("The time until all are available again.", "string"),
}
WHY_CHOSEN = (
    "Only for keys that see backends, why it was chosen: `order`, `loaded` (it had the model), `home` (it has the "
    "conversation), `load` (it loads the model), `join` (it was loading it), `tier` or `spill` (another tier)."
)
QUEUED = {
    "X-Queue-Position": ("The call's first place in the queue for a model server, 0 if it did not wait.", "integer"),
    "X-Queue-Wait-Ms": ("How long it waited, in milliseconds.", "integer"),
}
CHOSEN = {
    "X-Gateway-Backend": ("Only for keys that see backends: the model server that answered.", "string"),
    "X-Gateway-Chosen": (WHY_CHOSEN, "string"),
}
CAPPED = {"X-Gateway-Max-Tokens": ("The most tokens of each answer, if the request asked for more.", "integer")}
Failures = tuple[type[GatewayError], ...]
OF_A_KEY: Failures = (
    errors.ConflictingKeys,
    errors.MissingKey,
    errors.WrongKey,
    errors.TooManyFailures,
    errors.LimitReached,
    errors.Overloaded,
    errors.StoreUnavailable,
    errors.LimitsUnavailable,
)
OF_A_BODY: Failures = (
    errors.BadRequest,
    errors.BodyTooSlow,
    errors.BodyTooLarge,
    errors.BodiesUnfinished,
    errors.UnsupportedEncoding,
)
OF_BACKENDS: Failures = (errors.BackendFailed, errors.NoBackend, errors.BackendTimeout)
OF_THE_QUEUE: Failures = (errors.QueueFull, errors.QueueTimeout)
OF_A_CALL: Failures = (*OF_A_BODY, errors.ModelNotAvailable, errors.ModelNotFound, errors.BudgetSpent, *OF_BACKENDS)
# By the `for` of a route.
FAILURES: Mapping[str, Failures] = {
    "nobody": (),
    "metrics": (),
    "key": OF_A_KEY,
    "admin": (*OF_A_KEY, errors.BadRequest, errors.NotPermitted, errors.TooSlow, errors.ReadOnly),
    "models": (*OF_A_KEY, *OF_A_BODY, errors.NotPermitted, *OF_BACKENDS),
}
# The schemas of errors, by dialect.
ERRORS = {"ollama": "OllamaError", "openai": "OpenAIError", "responses": "OpenAIError", "anthropic": "AnthropicError"}
BY_CODE = {kind.code: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GatewayError)}


class ApiDocument:
    """`dialect_of` gives the dialect of a path's errors; `id_header` is the header of the request id."""

    def __init__(self, dialect_of: Callable[[str], Dialect], id_header: str) -> None:
        self._dialect_of, self._id_header = dialect_of, id_header
        self._facts: dict[str, dict[str, Any]] = strict_json.read_loosely((FOLDER / "routes.json").read_bytes())
        shapes: dict[str, Any] = strict_json.read_loosely((FOLDER / "schemas.json").read_bytes())
        self._schemas, self._parameters = shapes["schemas"], shapes["parameters"]
        # Many routes have the same errors: each response is described once.
        self._shared: dict[str, dict[str, Any]] = {}

    def of(self, table: Mapping[tuple[str, str], object]) -> dict[str, Any]:
        """`table` is (method, path) -> endpoint, as the router has it. Raises KeyError for a route that routes.json lacks."""
        paths: dict[str, dict[str, Any]] = {}
        calls = [path for (_, path), endpoint in table.items() if isinstance(endpoint, Exchange)]
        self._parameters["client"]["schema"]["enum"] = ["ollama", "openai", "anthropic", "responses", *sorted(calls)]
        for (method, route), endpoint in table.items():
            # Other methods of the metrics route only answer 404.
            if not isinstance(endpoint, MetricsEndpoint) or method == "GET":
                path = route.replace(":path}", "}")
                paths.setdefault(path, {})[method.lower()] = self._operation(method, path, endpoint)
        headers = {
            self._id_header: ("The request's id: the caller's, or one given by the gateway.", "string"),
            **CAPPED,
            **QUEUED,
            **CHOSEN,
            **RETRY,
            **RATES,
        }
        return {
            "openapi": "3.1.0",
            "info": {"title": "neuronetz-gateway", "version": "1", "description": DESCRIPTION},
            "servers": SERVERS,
            "tags": [{"name": tag} for tag in dict.fromkeys(facts["tag"] for facts in self._facts.values())],
            "paths": paths,
            "components": {
                "schemas": self._schemas,
                "responses": self._shared,
                "headers": {name: _header(*header) for name, header in headers.items()},
                "securitySchemes": SECURITY,
            },
        }

    def _operation(self, method: str, path: str, endpoint: object) -> dict[str, Any]:
        facts = self._facts[f"{method} {path}"]
        parameters = self._parameters_of(path, facts, endpoint)
        found: dict[str, Any] = {
            "operationId": "_".join([method.lower(), *re.findall(r"[\w-]+", path)]),
            "summary": facts["summary"],
            "tags": [facts["tag"]],
            "security": _security(facts["for"]),
        }
        if parameters:
            found["parameters"] = parameters
        if "body" in facts:
            content = {FORM if "file" in facts else JSON: {"schema": _ref(facts["body"]), "example": facts["example"]}}
            found["requestBody"] = {"required": True, "content": content}
        elif "raw" in facts:
            content = {"application/octet-stream": {"schema": {}, "example": facts["raw"]}}
            found["requestBody"] = {"required": True, "content": content}
        found["responses"] = self._responses(method, path, facts, endpoint)
        found["x-codeSamples"] = _sample(method, path, facts, parameters).in_all_languages()
        return found

    def _parameters_of(self, path: str, facts: dict[str, Any], endpoint: object) -> list[dict[str, Any]]:
        named = {name: facts.get("path", {}).get(name, name) for name in re.findall(r"{(\w+)}", path)}
        found = [{"name": name, "in": "path", "required": True, **self._parameters[kind]} for name, kind in named.items()]
        if isinstance(endpoint, AdminRoute) and not endpoint.has_body:
            required = facts.get("required", ())
            found += [
                {"name": name, "in": "query", "required": name in required, **self._parameters[name]} for name in endpoint.takes
            ]
        if facts["for"] == "models":
            found.append(self._parameters["backend"])
        if _takes_slot(endpoint):
            found.append(self._parameters["class"])
        return found

    def _responses(self, method: str, path: str, facts: dict[str, Any], endpoint: object) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if facts["for"] == "models":
            found["default"] = self._response("The model server's answer.", {"*/*": {}}, RATES)
        else:
            status = str(endpoint.status) if isinstance(endpoint, AdminRoute) else "200"
            headers = [] if facts["for"] in ("nobody", "metrics") else [*RATES]
            headers += CAPPED if isinstance(endpoint, Exchange) and endpoint.operation.clamp else ()
            headers += (*QUEUED, *CHOSEN) if _takes_slot(endpoint) else ()
            found[status] = self._response(_description_of(facts), _content(facts, endpoint), headers)
        error = _ref(ERRORS[self._dialect_of(path).name])
        if isinstance(endpoint, Exchange):
            found["4XX"] = self._response("The model server refused the request.", {JSON: {"schema": error}}, RATES)
        for failed, kinds in _by_status(_failures(path, facts, endpoint)).items():
            words = "\n".join(f"- `{kind.code}`: {kind.__doc__}" for kind in kinds)
            headers = [*(RETRY if failed in ("429", "503") else ()), *(RATES if failed == "429" else ())]
            found[failed] = self._response(words, {JSON: {"schema": error}}, headers)
        for also, schema in facts.get("also", {}).items():
            found[also] = self._response("Not ready.", {JSON: {"schema": _ref(schema)}}, ())
        if method == "HEAD":
            found = {status: {name: part for name, part in one.items() if name != "content"} for status, one in found.items()}
        return {status: self._share(status, found[status]) for status in sorted(found)}

    def _share(self, status: str, response: dict[str, Any]) -> dict[str, Any]:
        if status < "4":
            return response
        alike = [name for name, shared in self._shared.items() if shared == response]
        name = alike[0] if alike else f"{status}-{len(self._shared) + 1}"
        self._shared[name] = response
        return {"$ref": f"#/components/responses/{name}"}

    def _response(self, description: str, content: dict[str, Any], headers: Iterable[str]) -> dict[str, Any]:
        references = {name: {"$ref": f"#/components/headers/{name}"} for name in (self._id_header, *headers)}
        return {"description": description, "headers": references, "content": content}


def _takes_slot(endpoint: object) -> bool:
    return isinstance(endpoint, Exchange) and takes_slot(endpoint.operation)


def _content(facts: dict[str, Any], endpoint: object) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if isinstance(endpoint, Exchange) and endpoint.operation.streaming != "never":
        # A stream as a whole has no schema; its frames are described in text.
        found[endpoint.dialect.framing.content_type] = {}
    if "media" in facts:
        found[facts["media"]] = {} if facts["media"] == EVENTS else {"schema": {"type": "string"}}
    else:
        if isinstance(endpoint, Exchange):
            found |= {kind: {"schema": {"type": "string"}} for kind in endpoint.operation.media}
        found[JSON] = {"schema": _ref(facts["answer"])}
    return found


def _description_of(facts: dict[str, Any]) -> str:
    return f"Success. A stream has {facts['frames']}." if "frames" in facts else "Success."


def _failures(path: str, facts: dict[str, Any], endpoint: object) -> Iterable[type[GatewayError]]:
    found = [*FAILURES[facts["for"]], *(BY_CODE[code] for code in facts.get("fails", ()))]
    if isinstance(endpoint, Exchange):
        found += (*OF_A_CALL, *(OF_THE_QUEUE if _takes_slot(endpoint) else ()))
    if isinstance(endpoint, AdminRoute) and endpoint.has_body:
        found += OF_A_BODY
    if path not in HEALTH:
        found.append(errors.ShuttingDown)
    return dict.fromkeys(found)


def _by_status(kinds: Iterable[type[GatewayError]]) -> dict[str, list[type[GatewayError]]]:
    found: dict[str, list[type[GatewayError]]] = {}
    for kind in kinds:
        found.setdefault(str(kind.status), []).append(kind)
    return found


def _sample(method: str, path: str, facts: dict[str, Any], parameters: list[dict[str, Any]]) -> samples.Sample:
    in_path = {parameter["name"]: parameter["example"] for parameter in parameters if parameter["in"] == "path"}
    return samples.Sample(
        method,
        samples.address(path, in_path, facts.get("query", {})),
        {"nobody": "", "metrics": "METRICS_TOKEN"}.get(facts["for"], "GATEWAY_KEY"),
        facts.get("example"),
        facts.get("raw", ""),
        facts.get("media") == EVENTS or facts.get("frames", "").endswith("`done: true`"),
        facts.get("client", ""),
        saves=facts.get("saves", ""),
        file=facts.get("file", ""),
        package=facts.get("package", "openai" if "." in facts.get("client", "") else "ollama"),
    )


def _security(whom: str) -> list[dict[str, list[str]]]:
    if whom == "nobody":
        return []
    # Metrics may be open to some addresses, which need no key.
    found: list[dict[str, list[str]]] = [{name: []} for name in SECURITY]
    return [*found, {}] if whom == "metrics" else found


def _header(description: str, kind: str) -> dict[str, Any]:
    return {"description": description, "schema": {"type": kind}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
