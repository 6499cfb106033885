"""A whole teacher server in this process, around an engine that the test controls."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future

import httpx

from teacher_server import app
from teacher_server.config import ServeConfig
from teacher_server.engines.base import TeacherEngine
from tests.support.servers import health, wait_until

CONFIG = ServeConfig(model="fake:layers=2", engine="fake", drain_seconds=0.2, max_queued_tokens=2000)


class ServerInThread:
    """A whole server on its own event loop, with an engine that the test can access."""

    def __init__(self, load: Callable[[ServeConfig], TeacherEngine], config: ServeConfig = CONFIG) -> None:
        self.server: app.TeacherServer
        self.ended: Future[bool] = Future()
        self._made = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._config = config
        self._load = load
        self._thread = threading.Thread(target=self._run, name="server")
        self._thread.start()
        self._made.wait()
        wait_until(lambda: bool(self.server.state.grpc_port) or self.ended.done())

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.server.state.grpc_port}"

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.server.state.http_port}{path}", timeout=10)

    def health(self) -> int:
        return health(self.endpoint)

    def wait_ready(self) -> None:
        wait_until(lambda: self.get("/readyz").status_code == 200)

    def request_stop(self) -> None:
        self._loop.call_soon_threadsafe(self.server.request_stop)

    def stop(self) -> None:
        if not self.ended.done():
            self.request_stop()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        async def serve() -> bool:
            self._loop = asyncio.get_running_loop()
            self.server = app.TeacherServer(self._config, self._load)
            self._made.set()
            return await self.server.serve()

        try:
            self.ended.set_result(asyncio.run(serve()))
        except Exception as error:  # noqa: BLE001  it is raised again when the result is read
            self.ended.set_exception(error)
