"""What a backend says when it does not answer: its words, the fields that clients act on, and whose fault it is."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from gateway.core import strict_json
from gateway.core.errors import BackendCannot, BackendRefused
from gateway.dialects.answers import error_text, try_read
from gateway.dialects.dialect import Framing
from gateway.fleet.backends.config import BackendConfig

# The caller's own mistakes: another backend would say the same. 401, 403 and 404 are between us and that backend.
CALLERS_FAULTS = frozenset({400, 405, 409, 411, 413, 414, 415, 416, 422, 431})
NOT_IMPLEMENTED = 501
# What proxies say of a backend that is away, in words of their own.
OF_PROXIES = frozenset({502, 503, 504})
DEEPEST_WRAPPING = 3
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
LARGEST_COUNT = 2**53
BEARER = re.compile(r"(?i)bearer\s+\S+")
# What each frame that tells an error has in it.
IN_ERRORS = b'"error"'
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"')
# In bytes: of a line of a frame; of a string of JSON with a secret in it.
LONGEST_ERROR, SHORTEST_SECRET = 32 * 1024, 3

# llama.cpp and LM Studio (exceed_context_size_error), Ollama (embed), vLLM, and what OpenAI calls it.
OVERFLOW = re.compile(
    r"exceed_context_size|context_length_exceeded|exceeds? the (?:\w+ )?context (?:size|length|window)|maximum context length"
    r"|context (?:size|length|window) (?:has been )?exceeded|longer than the context length",
    re.IGNORECASE,
)
# With 5xx: what a backend, or its model, will not do however often it is asked. As read: with single blanks, no line ends.
UNABLE = (
    # llama.cpp: a model without its mmproj; routes that a flag opens. Ollama: capabilities of a model.
    r"(?:image|audio|video|vision|file) inputs? (?:is|are) not supported",
    r"does not support (?:an? )?(?:image|audio|video|vision|multimodal|embed|rerank|completion|infill|insert|tool)",
    r"does not support (?:think|chat|generat|logprob|grammar)",
    # Ollama: pictures for a model of texts, or more than one. Both: pictures that cannot be read.
    r"missing data required for image input|only supports one image|messages? cannot contain images",
    r"failed to (?:load|decode|process|download) (?:the )?(?:image|audio)|decode webp image",
    # llama.cpp: texts to embed beyond its batch; messages that the model's template refuses: jinja now, minja before.
    r"input is too large to process",
    r"roles must alternate|jinja exception|while executing \w{1,40} at line \d{1,9}",
    r"error executing \w{1,40} at position \d{1,9}",
    r"at row \d{1,9}, column \d{1,9}:(?:\s|$)|unable to generate parser for this template",
    # The same from Ollama, and from its own templates in Go.
    r"llama-server template error|no user query found in messages",
    r"^template: \S{0,80}:\d{1,9}: |^undefined (?:template specified|action in template|branch)",
    # Ollama: options, formats and ways of thinking that are none.
    r"option \"\w{1,40}\" must be|invalid format: .{0,900}; expected \"json\"",
    r"invalid thinking value|unsupported \S{1,40} reasoning",
)
# Tool calls that the model broke or its bound on output cut short: Ollama; llama.cpp before and with its grammars.
BROKEN = (
    r"error parsing tool call|failed to parse (?:\w{1,20} )?(?:json )?tool call|tool call parsing failed|tool call arguments",
    r"incomplete \w{1,20} tool call|invalid (?:tool|function) call|empty (?:\w{1,20} )?function name|mismatched arg_key",
    r"undeclared \w{1,20} function|failed to parse input at pos|does not match the expected peg-|invalid diff: ",
)
CANNOT, BROKE = (re.compile("|".join(words), re.IGNORECASE) for words in (UNABLE, BROKEN))
# With 5xx from llama.cpp, though the request is wrong, at least for its build.
WRONG = re.compile(
    r"^(?:failed to parse (?:messages|tools|tool_choice)\b|unknown (?:reasoning|chat) format\b|unsupported param: "
    r"|only no echo is supported|cannot (?:specify grammar with tools|use both json_schema and grammar)"
    r"|(?:tools|tool_choice) param requires --jinja|invalid base64 value|failed to tokenize prompt|\"prompt\" "
    r"|invalid url (?:value|format)|url must be base64 encoded)",
    re.IGNORECASE,
)
# Not the backend's 5xx: the AI SDK, LangChain and others ask again after any, whatever x-should-retry says.
WRONG_STATUS = 400
# Whatever else stands there, this is a failure, and another time or another backend may do better.
FAILURE = re.compile(
    r"out[ -]of[ -](?:device )?memory|outofmemory|(?:not enough|insufficient) memory|failed to allocate|allocation failed"
    r"|malloc failed|(?:cuda|hip|rocm|metal|vulkan|sycl|ggml)[ _](?:error|assert)|connection (?:refused|reset)|timed out"
    r"|has terminated|unexpectedly stopped|no longer running|encountered while running the model|panic: |fatal error: ",
    re.IGNORECASE,
)
# What of a failure's words may stand in the log: fixed words alone, since the rest may repeat a prompt.
LOGGED = re.compile(
    r"model requires more (?:\w{3,6} )?memory|cudamalloc failed|unknown model architecture|newer version"
    r"|timed out waiting for (?:the )?(?:llama[ -]?)?(?:runner|server|model|slot)s?(?: to (?:start|load|respond|become ready))?"
    r"|(?:runner|server) process has terminated|exit status \d{1,3}|signal: (?:killed|aborted|segmentation fault)"
    r"|(?:failed|unable|error) (?:to )?load(?:ing)? (?:the )?model|maximum pending requests exceeded|no such file or directory"
    rf"|{FAILURE.pattern}",
    re.IGNORECASE,
)
LONGEST_LOGGED = 200


class Told(NamedTuple):
    """`words` for people; `fields` of an OpenAI error for programs: type, code and numbers of tokens."""

    words: str
    fields: Mapping[str, Any]


def read(value: dict[str, Any]) -> Told:
    """An error in any of the shapes of backends; Ollama and LM Studio put that of their runner, as JSON, into the words."""
    words, fields = error_text(value), _fields(value)
    for _ in range(DEEPEST_WRAPPING):
        start = words.find("{")
        inner = try_read(words[start:].encode()) if start >= 0 else {}
        if not inner.get("error"):
            break
        fields = {**fields, **_fields(inner)}
        if start > 0:
            break
        words = error_text(inner)
    return Told(words, fields)


def _fields(value: dict[str, Any]) -> dict[str, Any]:
    told = value.get("error")
    if not isinstance(told, dict):
        return {}
    names = {name: told[name] for name in ("type", "code") if isinstance(told.get(name), str) and NAME.fullmatch(told[name])}
    numbers = {name: told[name] for name in ("code", "n_prompt_tokens", "n_ctx") if _is_count(told.get(name))}
    return {**names, **numbers}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_COUNT


def meaning(status: int, told: Told, backend: BackendConfig) -> BackendRefused | None:
    """What to tell the caller; None where the backend has failed and another may do better.

    What no asking again will change is 400, though the backend calls it its own failure; 501 stays what it is, and a call of a
    tool that the model broke may come whole another time.

    `status` 200: the error stood in the body, which may have the true one.
    """
    if status == 200:
        code = told.fields.get("code")
        status = code if isinstance(code, int) and 400 <= code <= 599 else 500
    words = scrub(told.words, backend)
    if OVERFLOW.search(f"{told.words} {told.fields.get('type')} {told.fields.get('code')}"):
        return BackendRefused(
            words,
            WRONG_STATUS if status >= 500 else status,
            {name: _scrubbed(value, backend) for name, value in told.fields.items()},
        )
    if status in CALLERS_FAULTS:
        return BackendRefused(words, status)
    if status >= 500 and _says(WRONG, status, told.words):
        return BackendCannot(words, WRONG_STATUS)
    if status == NOT_IMPLEMENTED or (status >= 500 and _says(BROKE, status, told.words)):
        return BackendCannot(words, status)
    if status >= 500 and _says(CANNOT, status, told.words):
        return BackendCannot(words, WRONG_STATUS)
    return None


def _says(meant: re.Pattern[str], status: int, words: str) -> bool:
    return status not in OF_PROXIES and meant.search(words) is not None and FAILURE.search(words) is None


def why(told: Told) -> str:
    """What is known of a failure's words, each once, for the log; never what a prompt, token or address could stand in."""
    found = dict.fromkeys(known.group().strip(" :") for known in LOGGED.finditer(told.words))
    return ", ".join(found)[:LONGEST_LOGGED]


def _scrubbed(value: object, backend: BackendConfig) -> object:
    return scrub(value, backend) if isinstance(value, str) else value


def scrub(text: str, backend: BackendConfig) -> str:
    """A backend's words without its token or address, which it may have repeated, in whatever spelling."""
    for secret in _secrets(backend.auth_token, backend.base_url):
        text = secret.sub("***", text)
    return BEARER.sub("Bearer ***", text)


@lru_cache(maxsize=1024)
def _secrets(token: str, base_url: str) -> tuple[re.Pattern[str], ...]:
    address = re.compile(_address(base_url), re.IGNORECASE)
    return (re.compile(_spelt(token), re.IGNORECASE), address) if token else (address,)


def _address(base_url: str) -> str:
    """With its scheme or slashes before it, or without: then with its port, unless nothing else is called like this host."""
    parts = urlsplit(base_url)
    host = _spelt(parts.netloc.removesuffix(f":{parts.port}"))
    port = parts.port or (443 if parts.scheme == "https" else 80)
    any_port = rf"(?:{_spelt(':')}\d{{1,5}})?"
    its_port = any_port if "." in parts.netloc or "[" in parts.netloc else _spelt(f":{port}")
    path = f"(?:{_spelt(parts.path.rstrip('/'))})?"
    with_slashes = rf"(?:https?{_spelt(':')})?{_spelt('//')}{host}{any_port}"
    return rf"(?:{with_slashes}|(?<![\w.-]){host}{its_port})(?![\w-]|\.\w){path}"


def _spelt(text: str) -> str:
    """A pattern for a text as it is, percent-encoded or escaped as in JSON."""
    return "".join(
        re.escape(sign) if sign.isalnum() else rf"(?:\\?{re.escape(sign)}|%(?:25)?{ord(sign):02x}|\\u{ord(sign):04x})"
        for sign in text
    )


def scrub_frames(frames: bytes, framing: Framing, backend: BackendConfig) -> bytes:
    """Whole frames of which some may tell an error: those without the backend's secrets, else byte for byte as they came."""
    for payload in framing.payloads(frames):
        if IN_ERRORS in payload and _tells_error(try_read(payload)):
            # No string of JSON goes over the end of a line.
            for line in payload.split(b"\n"):
                if (scrubbed := _scrub_json(line, backend)) != line:
                    frames = frames.replace(line, scrubbed)
    return frames


def _tells_error(value: dict[str, Any]) -> bool:
    """Also what cannot be read."""
    choices = value.get("choices")
    parts = [value, *choices] if isinstance(choices, list) else [value]
    is_error = "error" in (value.get("object"), value.get("type"))
    return not value or is_error or any(isinstance(part, dict) and part.get("error") for part in parts)


def _scrub_json(line: bytes, backend: BackendConfig) -> bytes:
    """A line of JSON, that stays JSON. One too long for the words of an error loses the secrets as we know them only."""
    if len(line) > LONGEST_ERROR:
        for secret in (backend.auth_token, backend.base_url):
            line = line.replace(secret.encode(), b"***") if secret else line
        return line
    return STRING.sub(lambda found: _scrub_string(found[0], backend), line)


def _scrub_string(string: bytes, backend: BackendConfig) -> bytes:
    if len(string) < SHORTEST_SECRET:
        return string
    try:
        text = strict_json.read_loosely(string)
    except ValueError:
        text = string[1:-1].decode("utf-8", "replace")
    scrubbed = scrub(text, backend)
    return string if scrubbed == text else strict_json.write_anyhow(scrubbed)
