"""The fields of a request to Ollama's own API, as native_chat, native_generate and native_embed read them."""

import binascii
import re
from typing import Any

from gateway.core.errors import BadRequest
from gateway.dialects.fields import boolean, expect, expect_tools
from gateway.dialects.translation.conversation import EFFORTS, Effort, Format, Image, Tool

NUMBERS = ("temperature", "top_p", "min_p", "repeat_penalty", "presence_penalty", "frequency_penalty")
INTEGERS = ("top_k", "seed")
# They take effect when Ollama loads a model.
LOAD_OPTIONS = (
    "num_ctx num_batch num_gpu main_gpu num_thread numa low_vram f16_kv vocab_only logits_all use_mmap use_mlock "
    "embedding_only draft_num_predict"
).split()
# Ways to sample that no two servers share.
LOCAL_OPTIONS = "num_keep repeat_last_n typical_p tfs_z mirostat mirostat_tau mirostat_eta penalize_newline".split()
DROPPED_FIELDS = ("keep_alive", "truncate", "shift")
LARGEST_NUMBER = 2**53
# "0", "0s", "0h0m": what Go's time.ParseDuration reads as zero.
ZERO_DURATION = re.compile(r"[+-]?(0|((0++(\.0*+)?|\.0++)(ns|us|\u00b5s|\u03bcs|ms|s|m|h))++)")
MEDIA_TYPES = {
    b"\x89PNG": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
    b"II*\x00": "image/tiff",
    b"MM\x00*": "image/tiff",
}
LETTERS_OF_HEAD = 32
# Of a tool; Ollama does not read it.
FUNCTION = ("function", "", None)


def options_of(body: dict[str, Any]) -> dict[str, Any]:
    expect(body, "options", dict, "an object")
    return body.get("options") or {}


def most_output_of(options: dict[str, Any]) -> int | None:
    """Ollama takes zero and negative numbers as unlimited."""
    wished = _number(options, "num_predict")
    return int(wished) if wished is not None and 1 <= wished < LARGEST_NUMBER else None


def stop_of(options: dict[str, Any]) -> tuple[str, ...]:
    stop = options.get("stop")
    if stop is None:
        return ()
    if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
        raise BadRequest("the option 'stop' must be a list of strings")
    return tuple(text for text in stop if text)


def sampling_of(options: dict[str, Any]) -> dict[str, float]:
    """A negative seed means a random one, which every server takes if there is none."""
    found = {name: _number(options, name) for name in NUMBERS}
    whole = {name: _number(options, name) for name in INTEGERS}
    found |= {name: None if value is None else int(value) for name, value in whole.items()}
    if (seed := found["seed"]) is not None and seed < 0:
        found["seed"] = None
    return {name: value for name, value in found.items() if value is not None}


def _number(options: dict[str, Any], name: str) -> float | None:
    value = options.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRequest(f"the option {name!r} must be a number")
    if not -(2**63) <= value < 2**63:
        raise BadRequest(f"the option {name!r} is out of range")
    return value


def effort_of(body: dict[str, Any]) -> Effort | None:
    """True is the level that Ollama takes for it where a model has levels."""
    think = body.get("think")
    if think is None:
        return None
    if isinstance(think, bool):
        return "medium" if think else "none"
    if isinstance(think, str) and think in EFFORTS:
        return EFFORTS[think]
    raise BadRequest("the field 'think' must be true, false, 'low', 'medium', 'high' or 'max'")


def format_of(body: dict[str, Any]) -> Format | None:
    asked = body.get("format")
    if asked is None or asked == "":
        return None
    if asked == "json":
        return Format()
    if isinstance(asked, dict):
        return Format(asked)
    raise BadRequest("the field 'format' must be 'json' or a JSON schema")


def images_of(holder: dict[str, Any], where: str) -> tuple[Image, ...]:
    images = holder.get("images")
    if images is None:
        return ()
    if not isinstance(images, list):
        raise BadRequest(f"the 'images' of {where} must be a list")
    return tuple(_image(data, where) for data in images)


def _image(data: object, where: str) -> Image:
    if not isinstance(data, str):
        raise BadRequest(f"each of the 'images' of {where} must be a string in base64")
    # Go ignores line ends in base64, llama.cpp stops at them.
    if "\n" in data or "\r" in data:
        data = data.replace("\r", "").replace("\n", "")
    return Image(_media_type(data, where), data)


def _media_type(data: str, where: str) -> str:
    """Found by the first bytes alone; the server decodes the whole image anyway."""
    try:
        head = binascii.a2b_base64(data[:LETTERS_OF_HEAD], strict_mode=True)
    except ValueError:
        raise BadRequest(f"one of the 'images' of {where} is not valid base64") from None
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    for magic, media_type in MEDIA_TYPES.items():
        if head.startswith(magic):
            return media_type
    raise BadRequest(f"one of the 'images' of {where} is not a PNG, JPEG, GIF, WebP, BMP or TIFF image")


def tools_of(body: dict[str, Any]) -> list[Tool]:
    expect_tools(body)
    return [_tool(tool.get("function")) for tool in body.get("tools") or () if tool.get("type") in FUNCTION]


def _tool(function: object) -> Tool:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRequest("each of 'tools' must be an object with a 'function' that has a 'name'")
    description, schema, strict = (function.get(name) for name in ("description", "parameters", "strict"))
    if description is not None and not isinstance(description, str):
        raise BadRequest("the 'description' of each of 'tools' must be a string")
    if schema is not None and not isinstance(schema, dict):
        raise BadRequest("the 'parameters' of each of 'tools' must be a JSON schema")
    return Tool(function["name"], description or "", schema or {}, strict if isinstance(strict, bool) else None)


def dropped_of(body: dict[str, Any], *more: str) -> list[str]:
    """The names of the fields and options that are there and sent nowhere."""
    options = options_of(body)
    fields = [name for name in (*DROPPED_FIELDS, *more) if body.get(name) not in (None, "", [])]
    unsent = [f"options.{name}" for name in (*LOAD_OPTIONS, *LOCAL_OPTIONS) if options.get(name) is not None]
    return fields + unsent


def dropped_tools_of(body: dict[str, Any]) -> list[str]:
    """Tools that are not functions are run by a server that has them; the model does without."""
    return ["tools"] if any(tool.get("type") not in FUNCTION for tool in body.get("tools") or ()) else []


def refuse_lost_fields(body: dict[str, Any]) -> None:
    """Raises BadRequest on what a client waits for in the answer and would not get."""
    if boolean(body, "logprobs", default=False):
        raise BadRequest("the field 'logprobs' is not taken here for this model; /v1/chat/completions takes it")
    if boolean(body, "_debug_render_only", default=False):
        raise BadRequest("the field '_debug_render_only' is not taken for this model: its server does not show its prompts")


def unloads(body: dict[str, Any]) -> bool:
    """Whether a request without a prompt asks to unload its model rather than to load it."""
    keep_alive = body.get("keep_alive")
    if isinstance(keep_alive, str):
        return ZERO_DURATION.fullmatch(keep_alive) is not None
    return isinstance(keep_alive, int | float) and not isinstance(keep_alive, bool) and keep_alive == 0
