"""The entries of lists of models: read from what a backend answers, completed with what clients need."""

import hashlib
import re
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from gateway.dialects.model_names import LONGEST_NAME, is_name

EMPTY_DETAILS = {"parent_model": "", "format": "", "family": "", "families": [], "parameter_size": "", "quantization_level": ""}
MOST_MODELS, DEEPEST_ENTRY = 10_000, 8
# Numbers by which clients size their context and answers, as vLLM, llama.cpp, LM Studio and services name them.
SIZES = (
    "max_model_len context_length context_window max_context_length loaded_context_length max_input_tokens max_output_tokens "
    "max_completion_tokens"
).split()
CONTEXT = ("max_model_len", "loaded_context_length", "context_length", "context_window", "max_context_length")
META = "n_ctx n_ctx_train n_vocab vocab_type n_embd n_params size".split()
# The model that a name refers to; a path on the backend is not shown.
ROOT = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?", re.ASCII)
LARGEST_SIZE = 2**53


def read_tags(answer: object) -> tuple[dict[str, Any], ...]:
    """The models of `/api/tags` or `/api/ps`, completed with fields that clients need. Raises ValueError on anything else."""
    models = answer.get("models") if isinstance(answer, dict) else None
    if not isinstance(models, list):
        raise ValueError("no list of models")
    return tuple(native_entry(entry) for entry in models[:MOST_MODELS] if has_name(entry, "name", "model"))


def read_openai_models(answer: object) -> tuple[dict[str, Any], ...]:
    """The models of `/v1/models` as entries of `/api/tags` with the OpenAI entry inside. Raises ValueError on anything else."""
    data = answer.get("data") if isinstance(answer, dict) and not answer.get("error") else None
    if not isinstance(data, list):
        raise ValueError("no list of models")
    return tuple(_from_openai(entry) for entry in data[:MOST_MODELS] if has_name(entry, "id"))


def has_name(entry: object, *names: str) -> bool:
    """Whether an entry has a usable name and can be passed on: entries without one, or nested deeply, are left out."""
    return isinstance(entry, dict) and is_name(_name_in(entry, names)) and _is_short(entry, names) and _is_flat(entry)


def _is_short(entry: Mapping[str, Any], fields: Iterable[str]) -> bool:
    return all(len(entry[field]) <= LONGEST_NAME for field in fields if isinstance(entry.get(field), str))


def _name_in(entry: Mapping[str, Any], fields: Iterable[str]) -> str:
    return next((entry[field] for field in fields if isinstance(entry.get(field), str) and entry[field]), "")


def _is_flat(value: object, levels: int = DEEPEST_ENTRY) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_flat(each, levels - 1) for each in inner if isinstance(each, dict | list))


def native_entry(entry: dict[str, Any]) -> dict[str, Any]:
    name = _name_in(entry, ("name", "model"))
    digest, details = entry.get("digest"), entry.get("details")
    known = {key: value for key, value in details.items() if value is not None} if isinstance(details, dict) else {}
    details = {**EMPTY_DETAILS, **known}
    return {
        **entry,
        "name": name,
        "model": entry["model"] if isinstance(entry.get("model"), str) and entry["model"] else name,
        "modified_at": entry["modified_at"] if isinstance(entry.get("modified_at"), str) else "1970-01-01T00:00:00Z",
        "size": entry["size"] if isinstance(entry.get("size"), int) else 0,
        "digest": digest if isinstance(digest, str) and len(digest) >= 12 else _digest(name),
        "details": details,
    }


def reported_digest(entry: Mapping[str, Any]) -> str:
    """The digest of a completed entry, as the backend reported it; empty if it reported none."""
    digest: str = entry["digest"]
    return "" if digest == _digest(entry["name"]) else digest.lower().removeprefix("sha256:")


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def openai_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    namespace = entry["name"].rpartition("/")[0].rpartition("/")[2]
    return {"id": entry["name"], "object": "model", "created": _unix(entry), "owned_by": namespace or "library"}


def _unix(entry: Mapping[str, Any]) -> int:
    try:
        return int(datetime.fromisoformat(entry["modified_at"]).timestamp())
    except (ValueError, OverflowError):
        return 0


def _from_openai(entry: dict[str, Any]) -> dict[str, Any]:
    created = entry.get("created")
    unix = int(created) if isinstance(created, int | float) and 0 <= created < 2**33 else 0
    shown: dict[str, Any] = {
        "id": entry["id"],
        "object": "model",
        "created": unix,
        "owned_by": str(entry.get("owned_by") or "library"),
    }
    shown |= {name: entry[name] for name in SIZES if whole_number(entry.get(name))}
    meta = entry.get("meta")
    if isinstance(meta, dict) and (kept := {name: meta[name] for name in META if whole_number(meta.get(name))}):
        shown["meta"] = kept
    root = entry.get("root")
    if isinstance(root, str) and ROOT.fullmatch(root):
        shown["root"] = root
    modified = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(unix))
    native = native_entry({"name": entry["id"], "modified_at": modified, "capabilities": ["completion"]})
    return {**native, "openai": shown}


def context_of(entry: Mapping[str, Any]) -> int:
    """The context length in a model's OpenAI entry, 0 if there is none."""
    found = [entry.get("meta", {}).get("n_ctx"), *(entry.get(name) for name in CONTEXT)]
    return next((length for value in found if (length := whole_number(value))), 0)


def whole_number(value: object) -> int:
    """A number of tokens, bytes or parameters as a backend reported it, 0 if it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST_SIZE else 0
