"""Items of an answer of the Responses API, with the events by which each comes into being."""

from typing import Any, Literal

from gateway.core import strict_json
from gateway.dialects.translation.responses_custom_input import CustomInput
from gateway.dialects.translation.responses_names import ClientTool
from gateway.dialects.translation.responses_tools import NATIVE
from gateway.dialects.translation.tool_arguments import ArgumentPieces

Status = Literal["in_progress", "completed", "incomplete"]
Fields = dict[str, Any]
# The type of an event, and its fields besides those that name its item.
Step = tuple[str, Fields]
NO_ARGUMENTS = "{}"


class Item:
    """A part of an answer; `item` is what of it is complete. `index` is its place in the answer once it has one."""

    index = -1

    def __init__(self, item_id: str) -> None:
        self.id = item_id
        self.item: Fields = {}
        self._pieces: list[str] = []

    def begin(self) -> list[Step]:
        raise NotImplementedError

    def add(self, text: str) -> list[Step]:
        raise NotImplementedError

    def end(self, status: Status) -> list[Step]:
        raise NotImplementedError

    def _text(self) -> str:
        return "".join(self._pieces)


class MessageItem(Item):
    def begin(self) -> list[Step]:
        return [
            ("response.output_item.added", {"item": self._item("in_progress", [])}),
            ("response.content_part.added", {"content_index": 0, "part": _output_text("")}),
        ]

    def add(self, text: str) -> list[Step]:
        self._pieces.append(text)
        return [("response.output_text.delta", {"content_index": 0, "delta": text, "logprobs": []})]

    def end(self, status: Status) -> list[Step]:
        text = self._text()
        self.item = self._item(status, [_output_text(text)])
        return [
            ("response.output_text.done", {"content_index": 0, "text": text, "logprobs": []}),
            ("response.content_part.done", {"content_index": 0, "part": _output_text(text)}),
            ("response.output_item.done", {"item": self.item}),
        ]

    def _item(self, status: Status, content: list[Fields]) -> Fields:
        return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": content}


def _output_text(text: str) -> Fields:
    return {"type": "output_text", "annotations": [], "logprobs": [], "text": text}


class ReasoningItem(Item):
    """What a model thought is the summary of an item: Codex shows no other part of it, and sends no other back."""

    def begin(self) -> list[Step]:
        return [
            ("response.output_item.added", {"item": self._item([])}),
            ("response.reasoning_summary_part.added", {"summary_index": 0, "part": _summary_text("")}),
        ]

    def add(self, text: str) -> list[Step]:
        self._pieces.append(text)
        return [("response.reasoning_summary_text.delta", {"summary_index": 0, "delta": text})]

    def end(self, status: Status) -> list[Step]:
        text = self._text()
        self.item = self._item([_summary_text(text)])
        return [
            ("response.reasoning_summary_text.done", {"summary_index": 0, "text": text}),
            ("response.reasoning_summary_part.done", {"summary_index": 0, "part": _summary_text(text)}),
            ("response.output_item.done", {"item": self.item}),
        ]

    def _item(self, summary: list[Fields]) -> Fields:
        return {"id": self.id, "type": "reasoning", "summary": summary}


def _summary_text(text: str) -> Fields:
    return {"type": "summary_text", "text": text}


class CallItem(Item):
    """A call of a tool. `add` takes its arguments as the model wrote them."""

    def __init__(self, item_id: str, call_id: str, tool: ClientTool) -> None:
        super().__init__(item_id)
        self.call_id, self.tool = call_id, tool
        self._arguments = ArgumentPieces()

    def has_all_arguments(self) -> bool:
        """Whether nothing can follow. No arguments at all may be the beginning of some."""
        return self._arguments.is_filled

    def _text(self) -> str:
        return self._arguments.text

    def is_readable(self) -> bool:
        return _arguments(self._text()) is not None

    def _item(self, kind: str, status: Status, fields: Fields) -> Fields:
        return {"id": self.id, "type": kind, "status": status, "call_id": self.call_id, **fields}

    def _named(self, fields: Fields) -> Fields:
        """Codex finds a tool by both names; it does not know them joined."""
        namespace = {"namespace": self.tool.namespace} if self.tool.namespace else {}
        return {**namespace, "name": self.tool.name, **fields}


def _arguments(text: str) -> Fields | None:
    try:
        found = strict_json.read_loosely(text.encode("utf-8", "replace"))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


class FunctionCall(CallItem):
    def begin(self) -> list[Step]:
        return [("response.output_item.added", {"item": self._call("in_progress", "")})]

    def add(self, text: str) -> list[Step]:
        self._arguments.add(text)
        return [("response.function_call_arguments.delta", {"delta": text})]

    def end(self, status: Status) -> list[Step]:
        filled = [] if self._text().strip() or status != "completed" else self.add(NO_ARGUMENTS)
        arguments = self._text()
        self.item = self._call(status, arguments)
        return [
            *filled,
            ("response.function_call_arguments.done", {"name": self.tool.name, "arguments": arguments}),
            ("response.output_item.done", {"item": self.item}),
        ]

    def _call(self, status: Status, arguments: str) -> Fields:
        return self._item("function_call", status, self._named({"arguments": arguments}))


class CustomCall(CallItem):
    def __init__(self, item_id: str, call_id: str, tool: ClientTool) -> None:
        super().__init__(item_id, call_id, tool)
        self._input = CustomInput()

    def begin(self) -> list[Step]:
        return [("response.output_item.added", {"item": self._call("in_progress", "")})]

    def add(self, text: str) -> list[Step]:
        self._arguments.add(text)
        return self._delta(self._input.add(text))

    def _delta(self, text: str) -> list[Step]:
        return [("response.custom_tool_call_input.delta", {"delta": text})] if text else []

    def end(self, status: Status) -> list[Step]:
        last = self._delta(self._input.finish())
        self.item = self._call(status, self._input.text)
        return [
            *last,
            ("response.custom_tool_call_input.done", {"input": self._input.text}),
            ("response.output_item.done", {"item": self.item}),
        ]

    def _call(self, status: Status, text: str) -> Fields:
        return self._item("custom_tool_call", status, self._named({"input": text}))


class NativeCall(CallItem):
    """A call whose type has no deltas. If the client could not run it, it becomes the call of a function of that name: clients
    report that there is none, and the model can do better."""

    def begin(self) -> list[Step]:
        return []

    def add(self, text: str) -> list[Step]:
        self._arguments.add(text)
        return []

    def end(self, status: Status) -> list[Step]:
        native = NATIVE[self.tool.kind]
        arguments = _arguments(self._text() or NO_ARGUMENTS)
        own = native.arguments(arguments) if arguments is not None and status == "completed" else None
        if own is None:
            return self._end_as_function(status)
        self.item = self._item(native.item, status, {**dict(native.fixed), native.field: own})
        return [
            ("response.output_item.added", {"item": {**self.item, "status": "in_progress"}}),
            ("response.output_item.done", {"item": self.item}),
        ]

    def _end_as_function(self, status: Status) -> list[Step]:
        call = FunctionCall(self.id, self.call_id, self.tool)
        text = self._text()
        steps = [*call.begin(), *(call.add(text) if text else []), *call.end(status)]
        self.item = call.item
        return steps


def call_item(item_id: str, call_id: str, tool: ClientTool) -> CallItem:
    if tool.kind in NATIVE:
        return NativeCall(item_id, call_id, tool)
    return CustomCall(item_id, call_id, tool) if tool.kind == "custom" else FunctionCall(item_id, call_id, tool)
