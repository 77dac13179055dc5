"""The HTTP endpoint for Prometheus, on threads of its own: a scrape never makes the owner's thread wait.

Owns the listening socket, its threads and their end. Does not own what is exposed (`metrics.py`), which is imported
only when metrics are asked for. Nothing that goes wrong here ends the server: it is said, and serving goes on.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any

from flexkv_core.config.settings import MetricsSettings

logger = logging.getLogger("flexkv.metrics")

DEFAULT_HOST = "127.0.0.1"
MAX_SCRAPES = 8
"""At a time; whoever comes then is hung up on."""
SCRAPE_S = 5.0
"""How long the other side may take to send a request, or to take in its answer."""
FIGURES_S = 2.0
"""How long the owner's thread may take to give its figures: then the scrape fails."""
RETRY_S = 0.5
"""Before a connection is accepted again, where the machine had no descriptor for one."""

Expose = Callable[[str], tuple[bytes, str]]


class MetricsEndpoint:
    """Serves `GET /metrics` until `close`.

    Args:
        host, port: to listen at.
        expose: as `metrics.exposition` returns.

    Raises OSError where it cannot listen there.
    """

    def __init__(self, host: str, port: int, expose: Expose) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listening = socket.create_server((host, port), family=family)
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._scrapes: dict[threading.Thread, socket.socket] = {}
        self._handler = _handler_of(expose)
        self._thread = threading.Thread(target=self._accept, name="flexkv-metrics", daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, address = self._listening.accept()
            except OSError:  # it was shut down, or no descriptors are left
                self._closing.wait(RETRY_S)
                continue
            thread = threading.Thread(target=self._serve, args=(connection, address), name="flexkv-scrape", daemon=True)
            with self._lock:
                full = self._closing.is_set() or len(self._scrapes) >= MAX_SCRAPES
                if not full:
                    self._scrapes[thread] = connection
            if full:
                connection.close()
            else:
                thread.start()

    def _serve(self, connection: socket.socket, address: Any) -> None:
        try:
            connection.settimeout(SCRAPE_S)
            self._handler(connection, address, None)  # type: ignore[arg-type]  # it wants no server of us
        except OSError as error:
            logger.debug("a scrape was broken off: %s", error)
        finally:
            with self._lock:
                self._scrapes.pop(threading.current_thread(), None)
            connection.close()

    def close(self) -> None:
        """Hang up on everyone and wait for the threads."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listening.close()
        with self._lock:
            scrapes = dict(self._scrapes)
        for connection in scrapes.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in scrapes:
            thread.join(SCRAPE_S)


def _handler_of(expose: Expose) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def version_string(self) -> str:
            return "flexkv"

        def do_GET(self) -> None:
            if self.path.partition("?")[0] not in ("/", "/metrics"):
                self._answer(404, b"only /metrics is here\n")
                return
            try:
                text, content_type = expose(self.headers.get("Accept", ""))
            except TimeoutError:
                self._answer(503, b"the server is too busy to say\n")
            except Exception:
                logger.exception("a scrape failed")
                self._answer(500, b"the figures could not be shown: see the server's log\n")
            else:
                self._answer(200, text, content_type)

        def _answer(self, code: int, body: bytes, content_type: str = "text/plain; charset=utf-8") -> None:
            self.send_response(code)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            logger.debug(format, *args)

    return Handler


class Metrics:
    """The endpoint if it was asked for and can be had, and if not, why.

    Args:
        ask: the server's figures, by a deadline in seconds. Raises TimeoutError. Called on the endpoint's threads.
    """

    def __init__(self, settings: MetricsSettings, host: str, ask: Callable[[float], Mapping[str, Any]]) -> None:
        self._host, self._port = host, settings.py_port
        self._enabled = settings.enabled
        self._ask = ask
        self._endpoint: MetricsEndpoint | None = None
        self._error: str | None = None

    def open(self) -> None:
        """Begin to serve, if metrics are enabled. What is in the way is logged."""
        if not self._enabled:
            return
        try:
            from flexkv_core.server.metrics import exposition  # noqa: PLC0415 - its library is optional
        except ImportError as error:
            self._failed(f"{error}: pip install 'flexkv-core[metrics]'")
            return
        try:
            self._endpoint = MetricsEndpoint(self._host, self._port, exposition(lambda: self._ask(FIGURES_S)))
        except (OSError, UnicodeError) as error:  # the latter for what cannot be a host's name
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            self._failed(
                f"port {self._port} of {self._host} is taken: set py_metrics_port or FLEXKV_PY_METRICS_PORT"
                if taken
                else f"cannot listen on port {self._port} of {self._host!r}: {error}"
            )
            return
        logger.info("metrics at %s", self._url)

    def _failed(self, reason: str) -> None:
        self._error = reason
        logger.error("metrics cannot be served: %s", reason)

    @property
    def _url(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}/metrics"

    def figures(self) -> dict[str, Any] | None:
        """Where they are served, and `error`: why they are not; None where nobody asked for them."""
        return {"url": self._url, "error": self._error} if self._enabled else None

    def close(self) -> None:
        """Stop serving. Safe to call twice."""
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None
