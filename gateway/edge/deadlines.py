"""Deadlines of a connection: for the head of a request, the rest of a refused body, and the reading of answers."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_DEADLINE_S = 10.0
STALL_DEADLINE_S = 60.0


class Deadlines(HttpToolsProtocol):
    """Closes connections that make no progress with a head, the rest of a refused body, or the reading of an answer."""

    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _unsent = 0

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_watching_for_stall()
        super().connection_lost(exc)

    def _await_rest(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_DEADLINE_S, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    @property
    def _waits_since(self) -> float:
        """Since when the connection has been idle or has been sending a head."""
        if self.timeout_keep_alive_task is not None:
            return float(self.timeout_keep_alive_task.when()) - self.timeout_keep_alive
        return self._head_timer.when() - HEAD_DEADLINE_S if self._head_timer is not None else 0.0

    @property
    def is_leaving(self) -> bool:
        return self.transport.is_closing() and not self.has_unsent

    @property
    def has_unsent(self) -> bool:
        return self.transport.get_write_buffer_size() > 0

    def give_way(self) -> None:
        self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_for_stall()

    def resume_writing(self) -> None:
        self._stop_watching_for_stall()
        super().resume_writing()

    def _watch_for_stall(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._stall_timer = self.loop.call_later(STALL_DEADLINE_S, self._check_for_stall)

    def _stop_watching_for_stall(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _check_for_stall(self) -> None:
        """A client may read slowly; one that has read nothing since the last check counts as gone."""
        if self.transport.get_write_buffer_size() >= self._unsent:
            self.transport.abort()
        else:
            self._watch_for_stall()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(STALL_DEADLINE_S, self.transport.abort)
