"""The server programs of a local run, PostgreSQL and Redis: how they are set up, started, watched and stopped."""

import ctypes
import os
import pwd
import shutil
import signal
import socket
import subprocess  # nosec B404
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gateway.ops.local.stores import LocalStoresFailed, last_lines

READY_WAIT_S = 120.0
POLL_S = 0.01
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

# The accounts for servers that root starts: one made for them, else PostgreSQL's own, else one that others share.
ACCOUNTS = ("neuronetz", "postgres")
SHARED_ACCOUNT = "nobody"

Wait = Callable[[float], None]


@dataclass(frozen=True)
class Launcher:
    """Starts programs under the servers' account; they hold the lock, and end with this process."""

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
                preexec_fn=_dies_with(os.getpid(), if_orphaned),  # noqa: PLW1509 - the supervisor has one thread
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
    """The account that servers run under when root starts them, which they refuse to run as; None: our own."""
    if os.getuid() != 0:
        return None
    with suppress(FileNotFoundError, KeyError):
        return pwd.getpwuid((folder / "valkey").stat().st_uid)
    for name in ACCOUNTS:
        with suppress(KeyError):
            return pwd.getpwnam(name)
    return pwd.getpwnam(SHARED_ACCOUNT)


def warning_of(account: pwd.struct_passwd | None) -> str:
    """What the user should know about this account; empty where there is nothing."""
    if account is None or account.pw_name != SHARED_ACCOUNT:
        return ""
    return (
        f"the private PostgreSQL and Redis run as {SHARED_ACCOUNT!r}; other services on this machine that do too could read "
        f"key hashes and kept prompts. To give them an account of their own, run `useradd --system {ACCOUNTS[0]}` before the "
        "data folder is created, or start this as an ordinary user"
    )


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
    # An initdb that is killed leaves no incomplete cluster under the final name.
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
    # The lock shows that no server uses this folder: a pid left in it belongs to another process by now.
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
