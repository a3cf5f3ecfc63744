"""The content of the fake answers: text, tokens, tool calls and vectors, all predictable."""

from typing import Any

from tests.support.fake_backend.scripts import Pause, Step

Json = dict[str, Any]

_SAMPLES: dict[str, object] = {"integer": 7, "number": 7.5, "boolean": True, "array": [], "object": {}}


class ServerError(Exception):
    """The healthy server answers with an error."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


def canonical(model: str) -> str:
    """The name of a model as Ollama lists it."""
    name = model.strip().lower()
    for prefix in ("https://", "registry.ollama.ai/", "library/"):
        name = name.removeprefix(prefix)
    return name if ":" in name.rpartition("/")[2] else name + ":latest"


def text_of(content: object) -> str:
    """The text of a message's content or of a prompt, in any of their forms."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(text_of(part.get("text", "") if isinstance(part, dict) else part) for part in content)
    return ""


def last_user_text(messages: list[Json]) -> str:
    users = [message for message in messages if message.get("role") == "user"]
    return text_of(users[-1].get("content")) if users else ""


def prompt_tokens(fields: Json) -> int:
    """Counts each word as one token."""
    contents = [message.get("content") for message in fields.get("messages") or []]
    texts = map(text_of, [*contents, fields.get("prompt"), fields.get("input")])
    return max(1, sum(len(text.split()) for text in texts))


def split_evenly(text: str, pieces: int) -> list[str]:
    """Exactly `pieces` parts, padded if the text is shorter; each counts as one token."""
    whole = text + " …" * max(0, pieces - len(text))
    size = len(whole)
    return [whole[size * n // pieces : size * (n + 1) // pieces] for n in range(pieces)]


def tool_arguments(function: Json) -> Json:
    """An argument of the right type for each required parameter."""
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties") or {}
    return {
        name: _SAMPLES.get(properties.get(name, {}).get("type", ""), "Zürich")
        for name in parameters.get("required", properties)
    }


def vector(text: object) -> list[float]:
    """Exact in 32 bits; differs for texts of different length."""
    return [len(str(text)) / 64, 0.25, -0.5, 1.0]


def after_pause(steps: list[Step], seconds: float) -> list[Step]:
    return [Pause(seconds), *steps] if seconds else steps
