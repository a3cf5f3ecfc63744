"""What a backend sends is passed on without its token and address."""

import pytest

from gateway.dialects.ollama import Ollama
from gateway.fleet.backends.config import BackendConfig
from gateway.fleet.redaction import redact, redact_frames
from tests.support.fake_backend.scripts import ndjson

TOKEN, BASE_URL = "s3cret/tok+en", "http://gpu-1.lan:11434/Base"
SPELLINGS = (
    TOKEN,
    TOKEN.upper(),
    "s3cret%2Ftok%2Ben",
    "s3cret%2ftok%252Ben",
    "s3cret/tok\\u002ben",
    BASE_URL,
    f"{BASE_URL}/",
    "HTTP://GPU-1.LAN:11434",
    "http://gpu-1.lan",
    "gpu-1.lan:11434",
    "gpu-1.lan:40123",
    "gpu-1.lan",
    "http%3A%2F%2Fgpu-1.lan%3A11434%2FBase",
    "http:\\/\\/gpu-1.lan:11434\\/base",
)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_secret_is_redacted_in_every_spelling(spelling: str) -> None:
    redacted = redact(f"as {spelling}, of it", BackendConfig("alpha", BASE_URL, auth_token=TOKEN))
    assert redacted.replace("***/", "***") == "as ***, of it"


@pytest.mark.parametrize(
    ("base_url", "text", "expected"),
    [
        ("http://ollama:11434", "ollama says: dial tcp ollama:11434: refused", "ollama says: dial tcp ***: refused"),
        ("http://ollama:11434", "my-ollama:11434, ollama:114345", "my-ollama:11434, ollama:114345"),
        ("https://gpu", "gpu:443 of https://gpu/x, gpu:80", "*** of ***/x, gpu:80"),
        ("http://10.0.0.1:8000", "10.0.0.12, 110.0.0.1, 10.0.0.1.", "10.0.0.12, 110.0.0.1, ***."),
        ("http://[fd00::1]:8000", "dial [fd00::1]:8000: refused", "dial ***: refused"),
    ],
)
def test_an_address_is_not_replaced_within_another_word(base_url: str, text: str, expected: str) -> None:
    assert redact(text, BackendConfig("alpha", base_url)) == expected


def test_only_errors_in_frames_are_redacted() -> None:
    backend = BackendConfig("alpha", BASE_URL, auth_token=TOKEN)
    answers = ndjson([{"message": {"content": f'an "error" Bearer x {TOKEN}'}}, {"tool": {"error": f"Bearer {TOKEN}"}}])
    errors = [b'{"error":{"detail":["in \\"%b\\""]}}\n' % secret.encode() for secret in SPELLINGS if "\\" not in secret]
    unread = b'{"error": "\\x %b", \n' % TOKEN.encode()
    frames = b"".join([*answers, *errors, unread])
    passed_on = redact_frames(frames, Ollama().framing, backend).splitlines(keepends=True)
    assert passed_on[:2] == answers
    assert {line.replace(b"***/", b"***") for line in passed_on[2:-1]} == {b'{"error":{"detail":["in \\"***\\""]}}\n'}
    assert TOKEN.encode() not in passed_on[-1]


def test_in_very_long_lines_only_exact_secrets_are_replaced() -> None:
    backend = BackendConfig("alpha", BASE_URL, auth_token=TOKEN)
    long = b'{"error":[%b"%b"]}\n' % (b'"x",' * 500_000, TOKEN.encode())
    passed_on = redact_frames(long, Ollama().framing, backend)
    assert passed_on == long.replace(TOKEN.encode(), b"***")
