"""The output of an answer of the Responses API, built item by item from the events of a conversation."""

from collections.abc import Iterator

from gateway.dialects.translation.conversation import (
    Event,
    Finish,
    Finished,
    Reply,
    Text,
    TextPiece,
    Thinking,
    ThinkingPiece,
    ToolPiece,
)
from gateway.dialects.translation.responses_items import (
    CallItem,
    Fields,
    Item,
    MessageItem,
    ReasoningItem,
    Status,
    Step,
    call_item,
)
from gateway.dialects.translation.responses_names import ToolNames

CUT_SHORT = frozenset({"length", "content_filter"})
PREFIXES = {"function": "fc", "custom": "ctc"}


class Output:
    """Items come one after the other, as clients expect them. Calls whose arguments arrive by turns are the exception: they
    stay open beside each other, each with its own place in the answer."""

    def __init__(self, names: ToolNames, stem: str) -> None:
        """`stem` makes the ids of the items, which must be different in each answer."""
        self._names, self._stem = names, stem
        self._text: Item | None = None
        self._calls: dict[int, CallItem] = {}
        self._closed: set[int] = set()
        # Calls with new pieces since it was last examined which of them have ended.
        self._grown: set[int] = set()
        self._call_ids: set[str] = set()
        self._placed: list[Item] = []
        self._number = 0

    @property
    def items(self) -> list[Fields]:
        """The items that are complete; or all of them, once the output is finished."""
        return [item.item for item in self._placed if item.item]

    def take(self, event: Event) -> Iterator[Step]:
        match event:
            case TextPiece(text) if text:
                yield from self._add_text(text, MessageItem, "msg")
            case ThinkingPiece(text) if text:
                yield from self._add_text(text, ReasoningItem, "rs")
            case ToolPiece():
                yield from self._add_call(event)
            case Finished(finish):
                yield from self._finish(finish)
            case _:
                return

    def _add_text(self, text: str, kind: type[MessageItem | ReasoningItem], prefix: str) -> Iterator[Step]:
        if not isinstance(self._text, kind):
            yield from self._close_text()
            yield from self._close_calls()
            self._text = kind(self._new_id(prefix))
            yield from self._placed_steps(self._text, self._text.begin())
        yield from self._placed_steps(self._text, self._text.add(text))

    def _add_call(self, piece: ToolPiece) -> Iterator[Step]:
        if piece.index in self._closed:
            return
        call = self._calls.get(piece.index)
        if call is None:
            yield from self._close_text()
            yield from self._close_calls()
            call = self._calls[piece.index] = self._new_call(piece)
            yield from self._placed_steps(call, call.begin())
        self._grown.add(piece.index)
        if piece.arguments:
            yield from self._placed_steps(call, call.add(piece.arguments))

    def _new_call(self, piece: ToolPiece) -> CallItem:
        """Clients distinguish calls by their ids, which some servers leave out or repeat."""
        tool = self._names.tool_of(piece.name)
        item_id = self._new_id(PREFIXES.get(tool.kind, "call"))
        call_id = piece.id if piece.id and piece.id not in self._call_ids else self._new_id("call")
        self._call_ids.add(call_id)
        return call_item(item_id, call_id, tool)

    def _new_id(self, prefix: str) -> str:
        self._number += 1
        return f"{prefix}_{self._stem}{self._number:02d}"

    def _placed_steps(self, item: Item, steps: list[Step]) -> Iterator[Step]:
        """The steps with the place of their item, which gets one when the client first learns of it."""
        if steps and item.index < 0:
            item.index = len(self._placed)
            self._placed.append(item)
        for kind, fields in steps:
            yield kind, {**({} if "item" in fields else {"item_id": item.id}), "output_index": item.index, **fields}

    def _close_text(self, status: Status = "completed") -> Iterator[Step]:
        if self._text is not None:
            item, self._text = self._text, None
            yield from self._placed_steps(item, item.end(status))

    def _close_calls(self) -> Iterator[Step]:
        """Ends the calls to which nothing can be added any more."""
        grown, self._grown = sorted(self._grown & self._calls.keys()), set()
        for index in [index for index in grown if self._calls[index].has_all_arguments()]:
            yield from self._close_call(index, "completed")

    def _close_call(self, index: int, status: Status) -> Iterator[Step]:
        call = self._calls.pop(index)
        self._closed.add(index)
        yield from self._placed_steps(call, call.end(status))

    def _finish(self, finish: Finish) -> Iterator[Step]:
        cut: Status = "incomplete" if finish in CUT_SHORT else "completed"
        yield from self._close_text(cut)
        for index, call in list(self._calls.items()):
            yield from self._close_call(index, "completed" if call.is_readable() else cut)


def output_of(reply: Reply, names: ToolNames, stem: str) -> list[Fields]:
    output = Output(names, stem)
    for event in _events(reply):
        for _ in output.take(event):
            pass
    return output.items


def _events(reply: Reply) -> Iterator[Event]:
    for index, part in enumerate(reply.parts):
        match part:
            case Text(text):
                yield TextPiece(text)
            case Thinking(text):
                yield ThinkingPiece(text)
            case _:
                yield ToolPiece(index, part.id, part.name, part.arguments)
    yield Finished(reply.finish)
