"""Forms: read in pieces of any size, with the exact place of each text, and refused where parsers could disagree."""

from email.message import Message
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.errors import BadRequest
from gateway.dialects import multipart
from gateway.dialects.multipart import LONGEST_FIELD, LONGEST_HEAD, MOST_PARTS, Form, FormReader

BOUNDARY = b"----WebKitFormBoundary7MA4"
MODEL = (b'Content-Disposition: form-data; name="model"', b"whisper-1")
FILE = (
    b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav',
    b"RIFF\r\n--\r\n\x00\xff" * 9,
)
Parts = list[tuple[bytes, bytes]]


def body_of(*parts: tuple[bytes, bytes], boundary: bytes = BOUNDARY) -> bytes:
    begun = b"".join(b"--%b\r\n%b\r\n\r\n%b\r\n" % (boundary, head, content) for head, content in parts)
    return begun + b"--%b--\r\n" % boundary


def read(body: bytes, *cuts: int, boundary: bytes = BOUNDARY) -> Form:
    reader, at = FormReader(boundary), 0
    for cut in (*sorted(cuts), len(body)):
        reader.feed(body[at:cut])
        at = cut
    return reader.form()


@pytest.mark.parametrize("parts", [[MODEL, FILE], [FILE, MODEL]])
def test_a_form_cut_at_every_byte(parts: Parts) -> None:
    body = body_of(*parts)
    whole = read(body)
    assert (whole.texts, whole.files) == ({"model": "whisper-1"}, {"file"})
    start, end = whole.spans["model"]
    assert body[start:end] == b"whisper-1"
    assert all(read(body, cut) == whole for cut in range(len(body)))
    assert read(body, *range(len(body))) == whole


def test_every_beginning_of_a_form_is_incomplete() -> None:
    body = body_of(FILE, MODEL)
    for end in range(len(body) - 2):
        with pytest.raises(BadRequest):
            read(body[:end])
    assert read(body[:-2]) == read(body)


names = st.from_regex(rb"\A[a-z_]{1,12}(\[\])?\Z")
contents = st.binary(max_size=300).filter(lambda content: b"--" + BOUNDARY not in content)
texts = st.text(max_size=100).map(str.encode).filter(lambda content: b"--" + BOUNDARY not in content)


@given(
    fields=st.dictionaries(names, texts, max_size=5),
    files=st.dictionaries(st.sampled_from([b"FILE", b"IMAGE"]), contents, max_size=2),
    cuts=st.lists(st.integers(0, 3000), max_size=9),
    order=st.randoms(use_true_random=False),
)
def test_any_form_is_read_as_another_parser_reads_it(
    fields: dict[bytes, bytes], files: dict[bytes, bytes], cuts: list[int], order: Any
) -> None:
    parts = [(b'Content-Disposition: form-data; name="%b"' % name, content) for name, content in fields.items()]
    parts += [
        (b'Content-Disposition: form-data; name="%b"; filename="x"\r\nContent-Type: application/octet-stream' % name, content)
        for name, content in files.items()
    ]
    order.shuffle(parts)
    if not parts:
        return
    body = body_of(*parts)
    found = read(body, *(cut for cut in cuts if cut < len(body)))
    assert found.texts == {name.decode(): content.decode() for name, content in fields.items()}
    assert found.files == {name.decode() for name in files}
    assert {name: body[slice(*span)] for name, span in found.spans.items()} == {
        name.decode(): content for name, content in fields.items()
    }
    head = f"Content-Type: {multipart.content_type_of(BOUNDARY)}\r\n\r\n".encode()
    other: Any = BytesParser(policy=HTTP).parsebytes(head + body)
    assert {_name(part) for part in other.iter_parts()} == found.texts.keys() | found.files


def _name(part: Message) -> str:
    return str(part.get_param("name", header="content-disposition"))


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=5))
def test_no_bytes_make_anything_but_a_form_or_a_clear_refusal(data: bytes, cuts: list[int]) -> None:
    for body in (data, b"--" + BOUNDARY + b"\r\n" + data, body_of(MODEL)[:-4] + data, body_of((MODEL[0], data))):
        try:
            read(body, *(cut for cut in cuts if cut < len(body)))
        except BadRequest as refused:
            assert refused.message


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "does not end"),
        (b"model=whisper-1", "does not begin"),
        (b"\r\n" + body_of(MODEL), "does not begin"),
        (b"preamble\r\n" + body_of(MODEL), "does not begin"),
        (body_of(MODEL) + b"x", "follows the end"),
        (body_of(MODEL) + body_of(MODEL), "follows the end"),
        (body_of(MODEL, boundary=BOUNDARY + b"x"), "followed by something other"),
        (body_of(MODEL).replace(b"4\r\n", b"4 \r\n"), "followed by something other"),
        (body_of(MODEL).replace(b"\r\n", b"\n"), "followed by something other"),
        (body_of(MODEL, MODEL), "'model' occurs twice"),
        (body_of(MODEL, (MODEL[0] + b'; filename="x"', b"llama")), "'model' occurs twice"),
        (body_of((FILE[0], b"a\n--" + BOUNDARY + b"--\r\n")), "inside a part"),
        (body_of((FILE[0], b"a--" + BOUNDARY)), "inside a part"),
        (body_of((FILE[0], b"a\r\n--" + BOUNDARY + b"x")), "followed by something other"),
        (b"--%b\r\n%b\r\n\r\n--%b--\r\n" % (BOUNDARY, MODEL[0], BOUNDARY), "inside a part"),
        (b"--%b\r\n%b\r\n--%b--\r\n\r\n\r\n" % (BOUNDARY, MODEL[0], BOUNDARY), "no content"),
        (body_of((b"", b"x")), "ambiguous"),
        (body_of((b"Content-Type: text/plain", b"x")), "must have a Content-Disposition"),
        (body_of((b'Content-Disposition: attachment; name="model"', b"x")), "must have a Content-Disposition"),
        (body_of((b"Content-Disposition: form-data", b"x")), "no name"),
        (body_of((b'Content-Disposition: form-data; name=""', b"x")), "no name"),
        (body_of((b'Content-Disposition: form-data; name="mo\\"del"', b"x")), "ambiguous"),
        (body_of((b'Content-Disposition: form-data; name="mo\\del"', b"x")), "no name"),
        (body_of((b'Content-Disposition: form-data; name="model', b"x")), "ambiguous"),
        (body_of((b'Content-Disposition: form-data; name="model"; name="x"', b"x")), "parameter twice"),
        (body_of((b'Content-Disposition: form-data; name="file"; filename="a"; FILENAME="b"', b"x")), "parameter twice"),
        (body_of((b"Content-Disposition: form-data; name*=utf-8''model", b"x")), "no name"),
        (body_of((b"Content-Disposition: form-data; name=\"file\"; filename*=utf-8''a", b"x")), "filename*"),
        (body_of((b'Content-Disposition: form-data; name="file"; filename=""', b"x")), "has no name"),
        (body_of((b'Content-Disposition: form-data; name="file"; size=3', b"x")), "unknown parameter"),
        # Only some parsers take this for a file, the others for a text.
        (body_of((b'Content-Disposition: form-data; name="file"; FILENAME="a"', b"x")), "lower case"),
        (body_of((b'Content-Disposition: form-data; name="_charset_"', b"utf-16")), "not allowed"),
        (body_of((b'Content-Disposition: form-data;\r\n name="model"', b"x")), "folded"),
        (body_of((b'Content-Disposition : form-data; name="model"', b"x")), "ambiguous"),
        (body_of((MODEL[0] + b"\r\n" + MODEL[0], b"x")), "header twice"),
        (body_of((MODEL[0] + b"\r\nContent-Transfer-Encoding: quoted-printable", b"x=79")), "must not be encoded"),
        (body_of((MODEL[0] + b"\r\nContent-Type: text/plain; charset=utf-16", b"x")), "must be UTF-8"),
        (body_of((MODEL[0] + b"\r\nContent-Type: text/plain; charset =utf-16", b"x")), "must be UTF-8"),
        (body_of((MODEL[0] + b"\r\nContent-Type: text/plain; charset*=utf-8''utf-16", b"x")), "must be UTF-8"),
        (body_of((MODEL[0] + b"\r\nContent-Type: text/plain; charset=utf-8; charset=utf-16", b"x")), "must be UTF-8"),
        # Python's email package reads the quote as escaped, and the name `model`.
        (
            body_of((b'Content-Disposition: form-data; name="f"; filename*="a\\\\"; filename="; name=model; x="', b"x")),
            "ambiguous",
        ),
        # aiohttp, like the library of llama.cpp, splits at semicolons in quotes and reads the name `model`.
        (body_of((b'Content-Disposition: form-data; filename=a; filename*="; name=model; x="; name="f"', b"x")), "semicolon"),
        (
            body_of((b'Content-Disposition: form-data; name="file"\r\nContent-Type: multipart/mixed; boundary=x', b"x")),
            "nested",
        ),
        (body_of((MODEL[0], b"\xff")), "not valid UTF-8"),
        (body_of((MODEL[0], b"x" * (LONGEST_FIELD + 1))), "too long"),
        (body_of(*((b'Content-Disposition: form-data; name="f%d"' % n, b"x" * 60_000) for n in range(5))), "too long"),
        (body_of((MODEL[0] + b"\r\nX: " + b"x" * LONGEST_HEAD, b"x")), f"more than {LONGEST_HEAD} bytes"),
        (body_of(*((b'Content-Disposition: form-data; name="f%d"' % n, b"") for n in range(MOST_PARTS + 1))), "parts"),
    ],
)
def test_what_parsers_could_read_differently_is_refused(body: bytes, words: str) -> None:
    for cuts in ((), range(0, len(body), 7)):
        with pytest.raises(BadRequest, match=words.replace("*", r"\*")):
            read(body, *cuts)


@pytest.mark.parametrize(
    "head",
    [
        b"content-disposition:form-data;name=model",
        b'Content-Type: text/plain; charset="UTF-8"\r\nContent-Disposition: Form-Data; name="model"',
        b'Content-Disposition: form-data; name="model"\r\nContent-Length: 9\r\nContent-Transfer-Encoding: 8bit',
    ],
)
def test_what_clients_really_send_is_read(head: bytes) -> None:
    assert read(body_of((head, b"whisper-1"))).texts == {"model": "whisper-1"}


@pytest.mark.parametrize(
    "parameters",
    [
        b'; filename="a \\b.wav"',
        b"; filename=a.wav; filename*=utf-8''a.wav",
        b'; filename="\xc3\xa4%22.wav"',
        b'; filename="a=b;c.wav"',
    ],
)
def test_names_of_files(parameters: bytes) -> None:
    assert read(body_of((b'Content-Disposition: form-data; name="file"' + parameters, b"x"))).files == {"file"}


def test_lists_may_have_several_values() -> None:
    head = b'Content-Disposition: form-data; name="timestamp_granularities[]"'
    assert read(body_of((head, b"word"), (head, b"segment"))).texts == {"timestamp_granularities[]": "segment"}


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        (b"multipart/form-data; boundary=abc", b"abc"),
        (b'Multipart/Form-Data;boundary="a b:c=d"', b"a b:c=d"),
        (b"multipart/form-data; charset=utf-8; Boundary=--abc", b"--abc"),
        (b"multipart/form-data; boundary=" + b"x" * 70, b"x" * 70),
    ],
)
def test_boundaries(content_type: bytes, boundary: bytes) -> None:
    assert multipart.boundary_of(content_type) == boundary
    assert multipart.boundary_of(multipart.content_type_of(boundary).encode()) == boundary
    assert read(body_of(MODEL, boundary=boundary), boundary=boundary).texts == {"model": "whisper-1"}


@pytest.mark.parametrize(
    "content_type",
    [
        b"",
        b"application/json",
        b"multipart/form-data",
        b"multipart/form-datax; boundary=abc",
        b"multipart/form-data; boundary=",
        b'multipart/form-data; boundary=""',
        b'multipart/form-data; boundary="abc "',
        b"multipart/form-data; boundary=" + b"x" * 71,
        b"multipart/form-data; boundary=abc; boundary=abd",
        b"multipart/form-data; boundary=a{c",
        b"multipart/form-data; boundary=a=c",
        b"multipart/form-data; boundary*=utf-8''abc",
        b"multipart/form-data; boundary*0=ab; boundary*1=c",
        b"multipart/form-data; boundary=abc; charset=utf-16",
        b"multipart/form-data, multipart/form-data; boundary=abc",
    ],
)
def test_unclear_content_types_are_refused(content_type: bytes) -> None:
    with pytest.raises(BadRequest):
        multipart.boundary_of(content_type)
