"""Forms of `multipart/form-data`, read piece by piece, and so strictly that no backend can read the same bytes differently."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.core.errors import BadRequest

LONGEST_HEAD, MOST_PARTS = 4096, 64
# Bytes of one field that is not a file, and of all of them.
LONGEST_FIELD, MOST_TEXT = 65_536, 262_144
BLANK = rb"[ \t]*"
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
TYPE = re.compile(BLANK + rb"multipart/form-data" + BLANK, re.IGNORECASE)
# The characters of a boundary (RFC 2046), quoted or not.
BOUNDARY = re.compile(rb"(?=.{1,70}\Z)[0-9A-Za-z'()+_,\-./:=? ]*[0-9A-Za-z'()+_,\-./:=?]")
PLAIN_BOUNDARY = re.compile(rb"[0-9A-Za-z'+_.-]+")
# In quotes a backslash may stand anywhere but before a quote: only some parsers would read that as an escape.
PARAMETER = re.compile(rb";%b(%b)=(?:\"((?:[^\"\\\x00-\x08\x0a-\x1f\x7f]|\\(?!\"))*)\"|(%b))%b" % (BLANK, TOKEN, TOKEN, BLANK))
# Some parsers split at semicolons in quotes, too, and would read what follows as a parameter.
LOOKS_LIKE_PARAMETER = re.compile(rb";.*=")
UPPER = re.compile(rb"[A-Z]")
LINE = re.compile(rb"(%b):%b([^\x00-\x08\x0a-\x1f\x7f]*)" % (TOKEN, BLANK))
DISPOSITION, OF_PART = b"content-disposition", re.compile(rb"form-data" + BLANK, re.IGNORECASE)
NAME = re.compile(rb"[A-Za-z0-9_.\[\]-]{1,64}")
# These change nothing.
ENCODINGS = frozenset({b"binary", b"8bit", b"7bit"})
UTF8 = frozenset({b"utf-8", b"us-ascii"})
# Parsers disagree on blanks before the equals sign, and on `charset*`.
CHARSETS = re.compile(rb"charset[^=;]*=([^;]*)")
# How the name of a list ends.
SEVERAL = "[]"
# A field of this name may set the charset of the others.
CHARSET = "_charset_"


@dataclass
class Form:
    """The fields of a form: texts with where their values stand in its bytes, and the names of files."""

    texts: dict[str, str] = field(default_factory=dict)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)


def boundary_of(content_type: bytes) -> bytes:
    """Raises BadRequest if the type is not that of a form, or its boundary is ambiguous."""
    kind = TYPE.match(content_type)
    if kind is None:
        raise BadRequest("the body must be a form: send it as multipart/form-data")
    parameters = _parameters(content_type[kind.end() :], "Content-Type")
    boundary = parameters.pop("boundary", b"")
    if BOUNDARY.fullmatch(boundary) is None:
        raise BadRequest("the Content-Type must have a boundary of 1 to 70 characters")
    if parameters.pop("charset", b"utf-8").lower() not in UTF8 or parameters:
        raise BadRequest("the Content-Type of a form may have no parameter but its boundary")
    return boundary


def content_type_of(boundary: bytes) -> str:
    text = boundary.decode()
    return (
        f"multipart/form-data; boundary={text}"
        if PLAIN_BOUNDARY.fullmatch(boundary)
        else f'multipart/form-data; boundary="{text}"'
    )


def _parameters(text: bytes, where: str) -> dict[str, bytes]:
    """`;name=value` any number of times, each name once."""
    found: dict[str, bytes] = {}
    at = 0
    while at < len(text):
        parameter = PARAMETER.match(text, at)
        if parameter is None:
            raise BadRequest(f"the parameters of a {where} of the form are ambiguous")
        name = parameter[1].decode().lower()
        if name in found:
            raise BadRequest(f"a {where} of the form has a parameter twice")
        value = parameter[2] if parameter[2] is not None else parameter[3]
        if LOOKS_LIKE_PARAMETER.search(value):
            raise BadRequest(f"a parameter of a {where} of the form has a semicolon before an equals sign; rename the file")
        found[name] = value
        at = parameter.end()
    return found


@dataclass(frozen=True)
class Part:
    name: str
    is_file: bool


def _part_of(head: bytes) -> Part:
    """A part as its headers describe it."""
    headers: dict[bytes, bytes] = {}
    for line in head.split(b"\r\n"):
        header = LINE.fullmatch(line)
        if header is None:
            raise BadRequest("a header in the form is ambiguous; headers must not be folded")
        name = header[1].lower()
        if name in headers:
            raise BadRequest("a part of the form has a header twice")
        headers[name] = header[2].rstrip()
    part = _disposed(headers.get(DISPOSITION, b""))
    _check_content(headers, part)
    return part


def _disposed(disposition: bytes) -> Part:
    kind = OF_PART.match(disposition)
    if kind is None:
        raise BadRequest("each part of the form must have a Content-Disposition: form-data with a name")
    text = disposition[kind.end() :]
    parameters = _parameters(text, "Content-Disposition")
    # Only some parsers know FILENAME.
    if any(UPPER.search(parameter[1]) for parameter in PARAMETER.finditer(text)):
        raise BadRequest("the parameters of a Content-Disposition of the form must be written in lower case")
    name = parameters.pop("name", b"")
    if NAME.fullmatch(name) is None or name.decode() == CHARSET:
        raise BadRequest("a field of the form has no name, or one that is not allowed")
    is_file = "filename" in parameters
    # Only some parsers take a part with this parameter alone for a file; none takes one without a file name for one.
    if "filename*" in parameters and not is_file:
        raise BadRequest("a part of the form has a filename* but no filename; send both, or filename alone")
    if parameters.keys() - {"filename", "filename*"} or parameters.get("filename") == b"":
        raise BadRequest("a file of the form has no name, or its Content-Disposition has an unknown parameter")
    return Part(name.decode(), is_file)


def _check_content(headers: dict[bytes, bytes], part: Part) -> None:
    encoding = headers.get(b"content-transfer-encoding", b"binary").lower()
    content_type = headers.get(b"content-type", b"").lower()
    if encoding not in ENCODINGS or content_type.startswith(b"multipart/"):
        raise BadRequest("the parts of the form must not be encoded or nested")
    charsets = () if part.is_file else CHARSETS.findall(content_type)
    if any(charset.strip(b'" \t') not in UTF8 for charset in charsets):
        raise BadRequest("the fields of the form must be UTF-8")


class FormReader:
    """`feed` it the body in pieces of any size; then `form` is what it has. Both raise BadRequest.

    The boundary may stand in the body only where it ends a part, because not all parsers agree on the other places.
    """

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"--" + boundary
        # What has not been examined yet, and where it stands in the body.
        self._rest = b""
        self._at = 0
        self._parts = self._text_size = 0
        self._part: Part | None = None
        self._value = bytearray()
        self._begins = 0
        self._next: Callable[[], bool] = self._first
        self._form = Form()

    def feed(self, data: bytes) -> None:
        self._rest += data
        while self._next():
            pass

    def form(self) -> Form:
        if self._next != self._after_end or self._rest not in (b"", b"\r\n"):
            raise BadRequest("the form does not end with its boundary")
        return self._form

    # Each of these is a state: it takes what it can from the rest, and returns whether another may take more.

    def _first(self) -> bool:
        if self._rest and not self._delimiter.startswith(self._rest[: len(self._delimiter)]):
            raise BadRequest("the form does not begin with the boundary that its Content-Type names")
        return self._begin_part(0)

    def _begin_part(self, end_of_value: int) -> bool:
        """Takes the delimiter, which stands at `end_of_value`, with what follows it."""
        end = end_of_value + len(self._delimiter) + 2
        after = self._rest[end - 2 : end]
        if len(after) < 2:
            return False
        if after not in (b"\r\n", b"--"):
            raise BadRequest("a boundary of the form is followed by something other than the end of its line")
        self._take(end)
        self._next = self._head if after == b"\r\n" else self._after_end
        return True

    def _head(self) -> bool:
        end = self._rest.find(b"\r\n\r\n", 0, LONGEST_HEAD + 4)
        if end < 0:
            if len(self._rest) > LONGEST_HEAD:
                raise BadRequest(f"the headers of a part of the form have more than {LONGEST_HEAD} bytes")
            return False
        head = self._rest[:end]
        if self._delimiter in head:
            raise BadRequest("a part of the form has no content")
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise BadRequest(f"the form has more than {MOST_PARTS} parts")
        self._part = _part_of(head)
        self._take(end + 4)
        self._begins = self._at
        self._next = self._content
        return True

    def _content(self) -> bool:
        found = self._rest.find(self._delimiter)
        if found < 0:
            # Of a delimiter and the line end before it, all but one byte may be here.
            self._keep(self._take(max(0, len(self._rest) - len(self._delimiter) - 1)))
            return False
        if found < 2 or self._rest[found - 2 : found] != b"\r\n":
            raise BadRequest("the boundary of the form occurs inside a part; choose another boundary")
        self._keep(self._take(found - 2))
        end = self._at
        if not self._begin_part(2):
            return False
        self._end_part(end)
        return True

    def _after_end(self) -> bool:
        if not b"\r\n".startswith(self._rest):
            raise BadRequest("something follows the end of the form")
        return False

    def _end_part(self, end: int) -> None:
        assert self._part is not None
        name, form = self._part.name, self._form
        if (name in form.texts or name in form.files) and not name.endswith(SEVERAL):
            raise BadRequest(f"the field {name!r} occurs twice in the form")
        if self._part.is_file:
            form.files.add(name)
            return
        try:
            form.texts[name], form.spans[name] = self._value.decode(), (self._begins, end)
        except UnicodeDecodeError:
            raise BadRequest(f"the field {name!r} of the form is not valid UTF-8") from None
        self._value.clear()

    def _take(self, size: int) -> bytes:
        taken, self._rest = self._rest[:size], self._rest[size:]
        self._at += size
        return taken

    def _keep(self, piece: bytes) -> None:
        """Keeps what belongs to a text."""
        assert self._part is not None
        if self._part.is_file:
            return
        self._value += piece
        self._text_size += len(piece)
        if len(self._value) > LONGEST_FIELD or self._text_size > MOST_TEXT:
            raise BadRequest("a field of the form is too long")
