"""A PostgreSQL and a Redis for one test, which may stop, freeze and restart them."""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gateway.components import database_of
from gateway.ops.local import stores as local_stores
from gateway.ops.local.servers import (
    Launcher,
    PostgresFiles,
    Server,
    create_cluster,
    postgres_server,
    redis_server,
    server_account,
)
from gateway.stores import migrations
from tests.support import memory_folder
from tests.support.gateway_settings import settings_for


class DurableStores:
    """Durable as in a deployment: PostgreSQL with fsync, Redis with an append-only file."""

    __test__ = False

    def __init__(self, folder: Path) -> None:
        launcher = Launcher(os.open(os.devnull, os.O_RDONLY), server_account(folder))
        search = local_stores.ProgramSearch(launcher.identity(), folder / "copies", print)
        initdb, version = search.first(local_stores.postgres_programs(), "no PostgreSQL")
        valkey, _ = search.first(local_stores.redis_programs(), "no Redis")
        sockets = launcher.make_folder(folder / "sockets")
        files = PostgresFiles(initdb.parent, int(version.split()[2].split(".")[0]), folder)
        create_cluster(files, launcher, time.sleep)
        self.postgres: Server = postgres_server(files, launcher, sockets, durable=True)
        self.redis: Server = redis_server(valkey, launcher, folder, sockets, durable=True)
        self.database_url = f"postgresql://gateway@/gateway?host={sockets}&port=5432"
        self.redis_url = f"unix://{sockets}/redis.sock"

    def start(self, server: Server) -> None:
        server.start()
        server.wait_ready(time.sleep)

    def restart(self, server: Server, away_s: float = 0.0) -> None:
        server.stop()
        time.sleep(away_s)
        self.start(server)

    @contextmanager
    def frozen(self, server: Server) -> Iterator[None]:
        assert server.process is not None
        server.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            server.process.send_signal(signal.SIGCONT)

    def is_answering(self, server: Server) -> bool:
        return server.is_ready()


@contextmanager
def durable_stores() -> Iterator[DurableStores]:
    folder = memory_folder.new_folder()
    stores: DurableStores | None = None
    try:
        stores = DurableStores(folder)
        for server in (stores.redis, stores.postgres):
            stores.start(server)
        migrate(stores.database_url)
        yield stores
    finally:
        for server in (stores.redis, stores.postgres) if stores else ():
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def migrate(url: str) -> None:
    import asyncio

    async def run() -> None:
        async with database_of(settings_for(DATABASE_URL=url)) as database:
            await migrations.migrate(database, lambda _: None)

    asyncio.run(run())
