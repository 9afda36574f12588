"""HTTP as the loopback Hub speaks it: requests, answers, and the faults that a test may put between the two."""

import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from tests.support.loopback.store import Account, Content

if TYPE_CHECKING:
    from tests.support.loopback_hub import LoopbackHub


class Answered(NamedTuple):
    """A request that was answered; status 0 where the connection was closed instead."""

    method: str
    path: str
    status: int
    headers: dict[str, str]


@dataclass
class Answer:
    """A status, and a body in memory or a part of a file."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    content: Content | None = None
    start: int = 0
    length: int = 0


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    named = {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
    return Answer(status, json.dumps(value).encode(), named)


class Interruption(Exception):
    """This answer ends the work on a request."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer


class Refusal(Interruption):
    """An answer that is an error, as the Hub words it."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra: Any) -> None:
        self.message = message
        headers = {"X-Error-Message": message.encode("ascii", "replace").decode()}
        if code:
            headers["X-Error-Code"] = code
        super().__init__(as_json({"error": message, **extra}, status, headers))


class Violation(Refusal):
    """A request that no client of the Hub may make; the fixture fails the test for it."""


class Dropped(Exception):
    """The connection ends here, without an answer."""


class Body:
    """A request's body; a fault may happen when a part of it has been read."""

    def __init__(self, file: BufferedIOBase, length: int) -> None:
        self._file = file
        self.length = length
        self._position = self._stop = 0
        self._act: Callable[[], None] | None = None
        self._data: bytes | None = None

    def stop_at(self, position: int, act: Callable[[], None]) -> None:
        """Call `act` when so many bytes have been read, or all of them."""
        self._stop, self._act = min(position, self.length), act
        self._meet()

    def _meet(self) -> None:
        if self._act and self._position >= self._stop:
            act, self._act = self._act, None
            act()

    def pieces(self) -> Iterator[bytes]:
        while self._position < self.length:
            limit = self._stop if self._act else self.length
            piece = self._file.read(min(1 << 20, limit - self._position))
            if not piece:
                raise ConnectionError("the client went away")
            self._position += len(piece)
            yield piece
            self._meet()

    def read(self) -> bytes:
        if self._data is None:
            self._data = b"".join(self.pieces())
        return self._data

    def drain(self) -> None:
        for _ in self.pieces():
            pass


@dataclass
class Request:
    """What a client asks for."""

    method: str
    target: str
    headers: dict[str, str]  # names in lower case
    body: Body
    account: Account | None = None
    names: dict[str, str] = field(default_factory=dict)  # the variable parts of the path
    at_end: "Callable[[Request], object] | None" = None  # what a fault does when the answer is ready

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        """The last value of every name."""
        query = parse_qs(urlsplit(self.target).query, keep_blank_values=True)
        return {name: values[-1] for name, values in query.items()}

    def flag(self, name: str) -> bool:
        value = self.query.get(name, "0")
        if value not in ("0", "1", "true", "false", "True", "False"):
            raise Violation(400, f"{name}={value} is no flag")
        return value in ("1", "true", "True")

    def json(self) -> Any:
        try:
            return json.loads(self.body.read())
        except ValueError as error:
            raise Violation(400, f"not JSON: {error}") from error


class Hold:
    """A request that waits in the Hub until the test lets it go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._go = threading.Event()
        self._dropped = False

    def release(self) -> None:
        self._go.set()

    def drop(self) -> None:
        """End it without doing what it asks for."""
        self._dropped = True
        self._go.set()

    def wait(self) -> None:
        self.reached.set()
        self._go.wait()
        if self._dropped:
            raise Dropped


@dataclass
class Fault:
    """What happens to the next requests that match, at the "start", at the "end", or "before" one of these."""

    pattern: re.Pattern[str]
    times: int
    act: Callable[[Request], object]
    when: str


class Connection(BaseHTTPRequestHandler):
    """One client's connection; a thread of its own reads its requests one after another."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: "Listener"

    def __getattr__(self, name: str) -> Callable[[], None]:
        """Every method, so that the Hub refuses those that it does not know."""
        if name.startswith("do_"):
            return self.serve
        raise AttributeError(name)

    def serve(self) -> None:
        hub = self.server.hub
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = headers.get("content-length", "0")
        body = Body(self.rfile, int(length) if length.isdecimal() else 0)
        request = Request(self.command, self.path, headers, body)
        try:
            answer = self.answer(request)
            body.drain()
            if request.at_end:
                request.at_end(request)
        except (Dropped, ConnectionError):
            hub.requests.append(Answered(request.method, request.target, 0, headers))
            self.close_connection = True
            _shut(self.connection)
            return
        hub.requests.append(Answered(request.method, request.target, answer.status, headers))
        try:
            self.send(answer)
        except ConnectionError:
            self.close_connection = True

    def answer(self, request: Request) -> Answer:
        hub = self.server.hub
        try:
            self.check(request)
            hub.meet_faults(request)
            return hub.handle(request)
        except Interruption as interruption:
            if isinstance(interruption, Violation):
                hub.violations.append(f"{request.method} {request.target}: {interruption.message}")
            return interruption.answer
        except (Dropped, ConnectionError):
            raise
        except Exception as error:  # noqa: BLE001  the test learns of it, and the client gets an answer
            hub.violations.append(f"{request.method} {request.target}: the Hub itself failed: {error!r}")
            return Refusal(500, f"Internal Error: {error!r}").answer

    def check(self, request: Request) -> None:
        if request.headers.get("host") != self.server.hub.host:
            raise Violation(400, f"meant for {request.headers.get('host')}")
        if "transfer-encoding" in request.headers:
            self.close_connection = True  # nothing reads the body
            raise Violation(411, "a body without Content-Length")

    def send(self, answer: Answer) -> None:
        length = answer.length if answer.content else len(answer.body)
        self.send_response_only(answer.status)
        for name, value in {"Content-Length": str(length), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if answer.content is None:
            self.wfile.write(answer.body)
        elif length:
            with answer.content.open() as file:
                self.connection.sendfile(file, answer.start, length)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the name that is overridden
        pass


class Listener(ThreadingHTTPServer):
    """On a port that all have in turn; `open` until its block ends, then no connection and no thread is left."""

    daemon_threads = False
    block_on_close = True
    request_queue_size = 128
    _last_port = 0

    def __init__(self, hub: "LoopbackHub") -> None:
        try:
            super().__init__(("127.0.0.1", Listener._last_port), Connection)
        except OSError:  # another program's by now
            super().__init__(("127.0.0.1", 0), Connection)
        Listener._last_port = self.server_address[1]
        self.hub = hub
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # the parent's looks this machine's name up

    @contextmanager
    def open(self) -> Iterator[None]:
        thread = threading.Thread(target=self.serve_forever, args=(0.01,), name="loopback-hub", daemon=True)
        thread.start()
        try:
            yield
        finally:
            for hold in self.hub.holds:
                hold.drop()
            self.shutdown()
            with self._lock:
                for connection in self._connections:
                    _shut(connection)
            self.server_close()
            thread.join()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, ConnectionError):  # a client that went away is no news
            self.hub.violations.append(f"a connection: failed: {error!r}")


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
