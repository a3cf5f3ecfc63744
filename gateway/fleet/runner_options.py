"""Bounds the fields with which one client would have Ollama load a model again, keep it or unload it for everybody. No I/O.

Ollama loads a model with the options of the request that needs it first. A request with other options makes it load the model
again (`needsReload` in its server/sched.go): one with a smaller context as well as one with a larger, and one without any if
the request before had one. The model stays loaded for as long as the last `keep_alive` of any request.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from gateway.dialects.keep_alive import keep_alive_s
from gateway.fleet.backends.config import ModelConfig

NUM_CTX, KEEP_ALIVE = "num_ctx", "keep_alive"
# Options of a runner besides its context; the last line has those of earlier versions.
OF_RUNNERS = frozenset(
    "num_batch num_gpu main_gpu use_mmap num_thread draft_num_predict "
    "numa low_vram f16_kv logits_all vocab_only use_mlock embedding_only".split()
)
FIXED = OF_RUNNERS | {NUM_CTX}
NOTHING: Mapping[str, Any] = {}
# Whether a runner forgets the beginning of a conversation that is too long is decided when it is loaded, too.
SHIFT = "shift"
# Ollama's own default. A client that asks for less would unload the model for everybody.
SHORTEST_KEEP_ALIVE_S = 300.0
FOREVER = -1
UNCONFIGURED = ModelConfig()


class Runner(NamedTuple):
    """How one model is run at one backend.

    `context` is that of the loaded model in tokens, 0 if it is not loaded or not known; `most_context` is what the model was
    trained with, 0 if unknown. Clients may keep it for `longest_s`. A caller that `may_unload` it manages the models.
    """

    config: ModelConfig = UNCONFIGURED
    context: int = 0
    most_context: int = 0
    longest_s: float = math.inf
    may_unload: bool = False

    def apply(self, body: dict[str, Any]) -> list[str]:
        """Changes the fields of a request to Ollama's own API; returns the names of those that the client had otherwise."""
        changed: list[str] = []
        if self.config.num_ctx == "raise" and "options" not in body and SHIFT not in body:
            if self.context:
                body["options"] = {NUM_CTX: self.context}
        elif self.config.num_ctx != "pass":
            self._fix_options(body, changed)
        if KEEP_ALIVE in body or self.config.keep_alive_s is not None:
            self._bound_keep_alive(body, changed)
        return changed

    def context_for(self, body: Mapping[str, Any]) -> int | None:
        """The context that the backend is asked for; None leaves it to the backend."""
        asked = (body.get("options") or NOTHING).get(NUM_CTX)
        configured = self.config.num_ctx
        if configured == "pass":
            return None if asked is None else self._possible(asked)
        if configured != "raise":
            return self._possible(configured)
        wanted = 0 if asked is None else self._possible(asked)
        return max(wanted, self.context) or None

    def needs_reload(self, body: Mapping[str, Any]) -> bool:
        """Whether the backend would have to load its model again for a request to Ollama's own API, also after `apply`."""
        if not self.context:
            return False
        if self.context_for(body) not in (None, self.context):
            return True
        if self.config.num_ctx != "pass":
            return False
        return body.get(SHIFT) is False or not OF_RUNNERS.isdisjoint(body.get("options") or NOTHING)

    def _fix_options(self, body: dict[str, Any], changed: list[str]) -> None:
        given, context = body.get("options") or NOTHING, self.context_for(body)
        options = {name: value for name, value in given.items() if name not in FIXED}
        if context is not None:
            options[NUM_CTX] = context
        if options or given:
            body["options"] = options
        changed += [f"options.{name}" for name, value in given.items() if name in FIXED and value != options.get(name)]
        if SHIFT in body and body.pop(SHIFT) is not None:
            changed.append(SHIFT)

    def _possible(self, context: float) -> int:
        """Ollama cuts off decimals, and bounds the context to that of the training."""
        whole = max(0, int(context))
        return min(whole, self.most_context) if self.most_context else whole

    def _bound_keep_alive(self, body: dict[str, Any], changed: list[str]) -> None:
        asked = body.get(KEEP_ALIVE)
        seconds = None if asked is None else keep_alive_s(asked)
        if asked is not None and (seconds is None or (seconds == 0 and self.may_unload)):
            # Ollama refuses the one, and unloads the model for the other.
            return
        kept = self.config.keep_alive_s
        if kept is None and seconds is not None:
            kept = min(max(seconds, SHORTEST_KEEP_ALIVE_S), self.longest_s)
        if kept is not None and kept != seconds:
            body[KEEP_ALIVE] = _written(kept)
            if asked is not None:
                changed.append(KEEP_ALIVE)


def _written(seconds: float) -> float:
    if seconds == math.inf:
        return FOREVER
    return int(seconds) if seconds == int(seconds) else seconds
