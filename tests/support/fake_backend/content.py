"""What the played answers are made of: the words, the tokens, the tool calls and the vectors. All of it predictable."""

from typing import Any

from tests.support.fake_backend.scripts import Pause, Step

Asked = dict[str, Any]

_SAMPLES: dict[str, object] = {"integer": 7, "number": 7.5, "boolean": True, "array": [], "object": {}}


class Refused(Exception):
    """The healthy server says no."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


def canonical(model: str) -> str:
    """A model's name as Ollama lists it."""
    name = model.strip().lower()
    for prefix in ("https://", "registry.ollama.ai/", "library/"):
        name = name.removeprefix(prefix)
    return name if ":" in name.rpartition("/")[2] else name + ":latest"


def plain(content: object) -> str:
    """The text of a message's content, or of a prompt, whichever form it has."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(plain(part.get("text", "") if isinstance(part, dict) else part) for part in content)
    return ""


def said(messages: list[Asked]) -> str:
    users = [message for message in messages if message.get("role") == "user"]
    return plain(users[-1].get("content")) if users else ""


def prompt_tokens(asked: Asked) -> int:
    """A word is a token here."""
    contents = [message.get("content") for message in asked.get("messages") or []]
    texts = map(plain, [*contents, asked.get("prompt"), asked.get("input")])
    return max(1, sum(len(text.split()) for text in texts))


def cut(text: str, pieces: int) -> list[str]:
    """Exactly so many pieces, the text first; each counts as a token."""
    whole = text + " …" * max(0, pieces - len(text))
    size = len(whole)
    return [whole[size * n // pieces : size * (n + 1) // pieces] for n in range(pieces)]


def tool_arguments(function: Asked) -> Asked:
    """An argument of the right type for everything the tool requires."""
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties") or {}
    return {
        name: _SAMPLES.get(properties.get(name, {}).get("type", ""), "Zürich")
        for name in parameters.get("required", properties)
    }


def vector(text: object) -> list[float]:
    """Exact in 32 bits, and different for texts of different length."""
    return [len(str(text)) / 64, 0.25, -0.5, 1.0]


def paused(steps: list[Step], seconds: float) -> list[Step]:
    return [Pause(seconds), *steps] if seconds else steps
