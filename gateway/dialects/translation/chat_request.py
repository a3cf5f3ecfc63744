"""A prompt as the body of a chat/completions request, for every server that speaks it. No I/O.

Chat templates are stricter than the API: the system message must be the first, users and assistants must alternate, the
results of tools must follow the calls, and many templates fail on content that is a list of parts. `chat_answer` reads what
comes back.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby, takewhile
from typing import Any

from gateway.core.errors import BadRequest
from gateway.dialects.dialect import Kind
from gateway.dialects.translation.conversation import (
    Format,
    Image,
    Message,
    Part,
    Prompt,
    Text,
    Thinking,
    Tool,
    ToolCall,
    ToolResult,
)

BETWEEN_PARTS, BETWEEN_MESSAGES = "\n", "\n\n"
ERROR_PREFIX = "Error: "
ONLY_IMAGES = "(The result is in the images of the next message.)"
# Ollama reads `reasoning`, as vLLM does since 0.16. llama.cpp, SGLang and older vLLM read `reasoning_content`. Nothing says
# which of them an OpenAI server is, and none reads both.
REASONING_FIELDS: dict[Kind, tuple[str, ...]] = {"ollama": ("reasoning",), "openai": ("reasoning", "reasoning_content")}
# vLLM and SGLang have another name for the repeat penalty than llama.cpp and LM Studio.
SAMPLING: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("temperature", ("temperature",)),
    ("top_p", ("top_p",)),
    ("top_k", ("top_k",)),
    ("min_p", ("min_p",)),
    ("seed", ("seed",)),
    ("presence_penalty", ("presence_penalty",)),
    ("frequency_penalty", ("frequency_penalty",)),
    ("repeat_penalty", ("repeat_penalty", "repetition_penalty")),
)
WHOLE_NUMBERS = frozenset({"top_k", "seed"})
# gpt-oss, SGLang and vLLM before 0.20 answer 400 to any other effort; Ollama knows them all.
COMMON_EFFORTS = {"minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high", "max": "high"}
# vLLM, SGLang and llama.cpp hand these to the chat template. Qwen and GLM read the first, DeepSeek and Granite the second.
WITHOUT_THINKING = {"enable_thinking": False, "thinking": False}
# vLLM and SGLang start a new answer without the first two; llama.cpp refuses one of them alone, and gives the beginning again
# in a stream without them. It continues no answer of a model that may think.
CONTINUED = {
    "add_generation_prompt": False,
    "continue_final_message": True,
    "chat_template_kwargs": WITHOUT_THINKING,
}
IGNORED_BY_OLLAMA = ("top_k", "min_p", "repeat_penalty")
URL_SCHEMES = ("https://", "http://", "data:")


def body_of(prompt: Prompt, kind: Kind, *, thinks: bool = False) -> dict[str, Any]:
    """The body without the model. The output is not limited yet, and keys always come in the same order.

    `thinks` says that the model is known to think. Raises BadRequest for what no backend of this kind can carry.
    """
    body: dict[str, Any] = {"messages": list(_messages(prompt.messages, kind))}
    if beginning := beginning_of(prompt):
        body["messages"][-1]["content"] = beginning
    body |= _tool_fields(prompt, kind)
    if prompt.format is not None:
        body["response_format"] = _response_format(prompt.format)
    body |= CONTINUED if beginning and kind == "openai" else _effort_fields(prompt, kind, thinks=thinks)
    if prompt.most_output is not None:
        body["max_tokens"] = prompt.most_output
    if prompt.stop:
        body["stop"] = list(prompt.stop)
    body |= sampling_fields(prompt.sampling)
    if prompt.user:
        body["user"] = prompt.user
    body["stream"] = prompt.stream
    if prompt.stream:
        body["stream_options"] = {"include_usage": True}
    return body


def beginning_of(prompt: Prompt) -> str:
    """The beginning of the answer if the prompt has one. Templates cut blanks at its end, which vLLM would miss."""
    if not prompt.continues_last:
        return ""
    last = takewhile(_is_assistant, reversed(prompt.messages))
    return _assistant_text(list(last)[::-1]).rstrip()


def losses_of(prompt: Prompt, kind: Kind, *, thinks: bool = False) -> list[str]:
    """The client's names of what `body_of` sends and servers of this kind ignore, or what it does not send to them.

    A model on Ollama that is to call a tool is given that tool alone if it has a name, but may still answer with a text. The
    beginning of an answer leaves no place for thoughts: llama.cpp refuses both together, and so does Anthropic.
    """
    has_place = thinks if kind == "ollama" else not beginning_of(prompt)
    lost = [] if has_place or prompt.effort in (None, "none") else ["reasoning_effort"]
    if kind == "ollama":
        lost += [name for name in IGNORED_BY_OLLAMA if name in prompt.sampling]
        lost += ["tool_choice"] if prompt.tools and prompt.tool_choice not in ("", "auto", "none") else []
        lost += ["parallel_tool_calls"] if prompt.tools and prompt.parallel_tools is False else []
        lost += ["user"] if prompt.user else []
    return [prompt.client_names.get(name, name) for name in lost]


def _messages(messages: list[Message], kind: Kind) -> Iterator[dict[str, Any]]:
    """System messages at the beginning become one. A later one stays where it is, as part of a user's turn: moved to the
    beginning it would change the prompt from there on, and the backend would have to read all of it again."""
    leading = list(takewhile(_is_system, messages))
    if text := BETWEEN_MESSAGES.join(filter(None, map(_system_text, leading))):
        yield {"role": "system", "content": text}
    called: dict[str, int] = {}
    for is_assistant, turn in groupby(messages[len(leading) :], _is_assistant):
        if is_assistant:
            written = _assistant_message(list(turn), kind)
            called = {call["id"]: place for place, call in enumerate(written.get("tool_calls", ()))}
            yield written
        else:
            yield from _user_messages(list(turn), kind, called)
            called = {}


def _is_assistant(message: Message) -> bool:
    return message.role == "assistant"


def _is_system(message: Message) -> bool:
    return message.role == "system"


def _system_text(message: Message) -> str:
    return BETWEEN_PARTS.join(_texts(message, "a system message"))


def _texts(message: Message, where: str) -> Iterator[str]:
    for part in message.parts:
        if isinstance(part, Text):
            if part.text:
                yield part.text
        elif not isinstance(part, Thinking | ToolCall):
            raise BadRequest(f"{where} has {_name_of(part)}, which no backend takes there")


def _name_of(part: Part) -> str:
    return "an image" if isinstance(part, Image) else "the result of a tool"


def _assistant_message(turn: list[Message], kind: Kind) -> dict[str, Any]:
    """Content is "" rather than null: servers take the two for the same, and some refuse null."""
    parts = [part for message in turn for part in message.parts]
    written: dict[str, Any] = {"role": "assistant", "content": _assistant_text(turn)}
    if thoughts := BETWEEN_PARTS.join(part.text for part in parts if isinstance(part, Thinking) and part.text):
        written |= dict.fromkeys(REASONING_FIELDS[kind], thoughts)
    if calls := [_tool_call(part) for part in parts if isinstance(part, ToolCall)]:
        written["tool_calls"] = calls
    return written


def _assistant_text(turn: list[Message]) -> str:
    return BETWEEN_MESSAGES.join(filter(None, (BETWEEN_PARTS.join(_texts(one, "an assistant's message")) for one in turn)))


def _tool_call(call: ToolCall) -> dict[str, Any]:
    arguments = call.arguments if call.arguments.strip() else "{}"
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _user_messages(turn: list[Message], kind: Kind, called: dict[str, int]) -> Iterator[dict[str, Any]]:
    """The results of tools in the order of their calls, as templates that show no ids need it; then what the user wrote, with
    the images of those results."""
    results = [part for message in turn for part in message.parts if isinstance(part, ToolResult)]
    results.sort(key=lambda result: called.get(result.call_id, len(called)))
    yield from map(_tool_message, results)
    images: list[Text | Image] = [part for result in results for part in result.content if isinstance(part, Image)]
    content = _content([images, *map(_user_parts, turn)], kind)
    if content or not results:
        yield {"role": "user", "content": content}


def _tool_message(result: ToolResult) -> dict[str, Any]:
    text = BETWEEN_PARTS.join(part.text for part in result.content if isinstance(part, Text) and part.text)
    if not text and any(isinstance(part, Image) for part in result.content):
        text = ONLY_IMAGES
    return {"role": "tool", "tool_call_id": result.call_id, "content": ERROR_PREFIX + text if result.is_error else text}


def _user_parts(message: Message) -> list[Text | Image]:
    parts = [part for part in message.parts if isinstance(part, Image) or (isinstance(part, Text) and part.text)]
    if not _is_system(message) or not parts:
        return parts
    return [Text("<system-reminder>"), *parts, Text("</system-reminder>")]


def _content(messages: Iterable[list[Text | Image]], kind: Kind) -> str | list[dict[str, Any]]:
    """A string, or a list of parts if there are images; texts that follow each other are one part."""
    runs: list[list[str] | Image] = []
    for parts in messages:
        between = BETWEEN_MESSAGES
        for part in parts:
            if isinstance(part, Image):
                runs.append(part)
            elif runs and isinstance(runs[-1], list):
                runs[-1] += [between, part.text]
            else:
                runs.append([part.text])
            between = BETWEEN_PARTS
    if not any(isinstance(run, Image) for run in runs):
        return "".join(runs[0]) if runs else ""  # type: ignore[arg-type]
    return [_image_part(run, kind) if isinstance(run, Image) else {"type": "text", "text": "".join(run)} for run in runs]


def _image_part(image: Image, kind: Kind) -> dict[str, Any]:
    url = image.url or f"data:{image.media_type or 'image/png'};base64,{image.data}"
    if not url.startswith(URL_SCHEMES):
        raise BadRequest("an image must have a URL that begins with https://, http:// or data:")
    if kind == "ollama" and not url.startswith("data:"):
        raise BadRequest("the field 'url' of an image cannot be used: this model takes images only as base64 data")
    return {"type": "image_url", "image_url": {"url": url, "detail": image.detail} if image.detail else {"url": url}}


def _tool_fields(prompt: Prompt, kind: Kind) -> dict[str, Any]:
    """A choice without tools is left out, as vLLM refuses it."""
    tools, choice = _chosen_tools(prompt, kind)
    if not tools:
        return {}
    fields: dict[str, Any] = {"tools": [_tool(tool) for tool in tools]}
    if choice:
        fields["tool_choice"] = choice
    if prompt.parallel_tools is not None:
        fields["parallel_tool_calls"] = prompt.parallel_tools
    return fields


def _chosen_tools(prompt: Prompt, kind: Kind) -> tuple[list[Tool], str]:
    """A named tool is sent as the only one and required: LM Studio refuses a choice by name, and llama.cpp ignores it.

    Ollama ignores every choice, so that "none" is honoured by sending no tools.
    """
    if isinstance(prompt.tool_choice, tuple):
        (name,) = prompt.tool_choice
        chosen = [tool for tool in prompt.tools if tool.name == name]
        if not chosen:
            raise BadRequest("the field 'tool_choice' names a tool that is not among the tools")
        return chosen, "required"
    if prompt.tool_choice == "none" and kind == "ollama":
        return [], ""
    return prompt.tools, prompt.tool_choice


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "description": tool.description, "parameters": _parameters(tool.schema)}
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _parameters(schema: dict[str, Any]) -> dict[str, Any]:
    """Some chat templates fail on an object without properties."""
    if not schema:
        return {"type": "object", "properties": {}}
    return {**schema, "properties": {}} if schema.get("type") == "object" and schema.get("properties") is None else schema


def _response_format(form: Format) -> dict[str, Any]:
    """LM Studio refuses `json_object`; everywhere else a schema of any object means the same."""
    schema = {"name": form.name, "schema": {"type": "object"} if form.schema is None else form.schema}
    return {"type": "json_schema", "json_schema": schema if form.strict is None else {**schema, "strict": form.strict}}


def _effort_fields(prompt: Prompt, kind: Kind, *, thinks: bool) -> dict[str, Any]:
    """Ollama answers 400 to an effort for a model that does not think, which Claude Code sends to every model."""
    if prompt.effort is None:
        return {}
    if kind == "ollama":
        return {"reasoning_effort": prompt.effort} if thinks or prompt.effort == "none" else {}
    if prompt.effort == "none":
        return {"chat_template_kwargs": dict(WITHOUT_THINKING)}
    return {"reasoning_effort": COMMON_EFFORTS[prompt.effort]}


def sampling_fields(sampling: dict[str, float]) -> dict[str, Any]:
    """The numbers by every name that a server may have for them."""
    return {
        field: int(sampling[name]) if name in WHOLE_NUMBERS else sampling[name]
        for name, fields in SAMPLING
        if name in sampling
        for field in fields
    }
