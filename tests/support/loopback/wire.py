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
from typing import Any, NamedTuple, Protocol
from urllib.parse import parse_qs, urlsplit

from tests.support.loopback.store import Account, Content


class Asked(NamedTuple):
    """A request that was answered; status 0 where the connection was closed instead."""

    method: str
    path: str
    status: int
    headers: dict[str, str]


class Refusal(Exception):
    """An answer that is an error, as the Hub words it."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.extra = status, message, code, extra
        self.headers: dict[str, str] = {}


class Violation(Refusal):
    """A request that no client of the Hub may make; the fixture fails the test for it."""


class Dropped(Exception):
    """The connection ends here, without an answer."""


@dataclass
class Answer:
    """A status, and a body in memory or a part of a file."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    content: Content | None = None
    start: int = 0
    length: int = 0


def as_json(value: Any, status: int = 200, **headers: str) -> Answer:
    body = json.dumps(value).encode()
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Answer(status, body, {"Content-Type": "application/json; charset=utf-8", **named})


class Body:
    """A request's body; some places in it may be met with a fault."""

    def __init__(self, file: BufferedIOBase, length: int) -> None:
        self._file = file
        self.length = length
        self.position = 0
        self._stops: list[tuple[int, Callable[[], None]]] = []
        self._data: bytes | None = None

    def stop_at(self, position: int, act: Callable[[], None]) -> None:
        """Call `act` when so many bytes have been read, or all of them."""
        self._stops.append((min(position, self.length), act))
        self._stops.sort(key=lambda stop: stop[0])
        self._meet()

    def _meet(self) -> None:
        while self._stops and self._stops[0][0] <= self.position:
            self._stops.pop(0)[1]()

    def pieces(self) -> Iterator[bytes]:
        while self.position < self.length:
            limit = self._stops[0][0] if self._stops else self.length
            piece = self._file.read(min(1 << 20, limit - self.position))
            if not piece:
                raise ConnectionError("the client went away")
            self.position += len(piece)
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
    at_end: "Callable[[Request], None] | None" = None  # what a fault does when the answer is ready

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.target).query, keep_blank_values=True)

    def asks(self, name: str) -> str | None:
        """A query's last value."""
        values = self.query.get(name)
        return values[-1] if values else None

    def flag(self, name: str) -> bool:
        value = self.asks(name)
        if value not in (None, "0", "1", "true", "false", "True", "False"):
            raise Violation(400, f"{name}={value} is no flag")
        return value in ("1", "true", "True")

    def json(self, kind: str = "application/json") -> Any:
        self.expect(kind)
        try:
            return json.loads(self.body.read())
        except ValueError as error:
            raise Violation(400, f"not JSON: {error}") from error

    def fields(
        self, needed: Mapping[str, Any], optional: Mapping[str, Any] | None = None, kind: str = "application/json"
    ) -> dict[str, Any]:
        return check(self.json(kind), needed, optional)

    def expect(self, kind: str) -> None:
        sent = self.headers.get("content-type", "").partition(";")[0]
        if sent != kind:
            raise Violation(415, f"the content type is {sent}, not {kind}")


def check(value: Any, needed: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object that has every field it needs, no unknown one, and each of the right type."""
    known = {**needed, **(optional or {})}
    if not isinstance(value, dict) or not needed.keys() <= value.keys() <= known.keys():
        raise Violation(400, f"not an object of {sorted(needed)} and perhaps {sorted(optional or {})}: {value!r:.300}")
    for name, kind in known.items():
        if name in value and (not isinstance(value[name], kind) or (kind is int and isinstance(value[name], bool))):
            raise Violation(400, f"{name}: {value[name]!r:.100} is no {kind}")
    return value


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
    act: Callable[[Request], None]
    when: str


class Faults:
    """Those that a test has asked for; of several that match a request, it meets the first, and all of "before"."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._holds: list[Hold] = []

    def add(self, match: str, times: int, act: Callable[[Request], None], when: str = "start") -> None:
        with self._lock:
            self._faults.append(Fault(re.compile(match), times, act, when))

    def meet(self, request: Request) -> None:
        """Let happen what comes before the Hub looks at the request; `at_end` is for what comes after."""
        for fault in self._take(request):
            if fault.when == "end":
                request.at_end = fault.act
            else:
                fault.act(request)

    def _take(self, request: Request) -> list[Fault]:
        line = f"{request.method} {request.target}"
        with self._lock:
            found = [fault for fault in self._faults if fault.times > 0 and fault.pattern.search(line)]
            before = [fault for fault in found if fault.when == "before"]
            due = [*before, *[fault for fault in found if fault.when != "before"][:1]]
            for fault in due:
                fault.times -= 1
        return due

    def hold(self) -> Hold:
        hold = Hold()
        with self._lock:
            self._holds.append(hold)
        return hold

    def end(self) -> None:
        """Let go of every request that still waits."""
        for hold in self._holds:
            hold.drop()


class Server(Protocol):
    """What a connection needs of the Hub."""

    host: str
    faults: Faults

    def handle(self, request: Request) -> Answer: ...

    def record(self, request: Request, status: int) -> None: ...

    def violate(self, where: str, message: str) -> None: ...


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
        request = self.request_of()
        try:
            answer = self.answer(hub, request)
            request.body.drain()
            if request.at_end:
                request.at_end(request)
        except (Dropped, ConnectionError):
            hub.record(request, 0)
            self.hang_up()
            return
        hub.record(request, answer.status)
        try:
            self.send(answer)
        except ConnectionError:
            self.close_connection = True

    def request_of(self) -> Request:
        headers = {name.lower(): value for name, value in self.headers.items()}
        length = headers.get("content-length", "0")
        body = Body(self.rfile, int(length) if length.isdecimal() else 0)
        return Request(self.command, self.path, headers, body)

    def answer(self, hub: Server, request: Request) -> Answer:
        try:
            self.check(hub, request)
            hub.faults.meet(request)
            return hub.handle(request)
        except Refusal as refusal:
            if isinstance(refusal, Violation):
                hub.violate(f"{request.method} {request.target}", refusal.message)
            return refused(refusal)
        except Interruption as interruption:
            return interruption.answer
        except (Dropped, ConnectionError):
            raise
        except Exception as error:  # noqa: BLE001  the test is told, and the client gets an answer
            hub.violate(f"{request.method} {request.target}", f"the Hub itself failed: {error!r}")
            return refused(Refusal(500, f"Internal Error: {error!r}"))

    def check(self, hub: Server, request: Request) -> None:
        if request.headers.get("host") != hub.host:
            raise Violation(400, f"meant for {request.headers.get('host')}")
        if "transfer-encoding" in request.headers:
            self.close_connection = True  # nobody reads the body
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

    def hang_up(self) -> None:
        self.close_connection = True
        _shut(self.connection)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the name that is overridden
        pass


class Interruption(Exception):
    """A fault's own answer takes the place of the Hub's."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer


def refused(refusal: Refusal) -> Answer:
    shown = refusal.message.replace("\n", " ").encode("ascii", "replace").decode()
    headers = {"X-Error-Message": shown, **refusal.headers}
    if refusal.code:
        headers["X-Error-Code"] = refusal.code
    answer = as_json({"error": refusal.message, **refusal.extra}, refusal.status)
    answer.headers.update(headers)
    return answer


class Listener(ThreadingHTTPServer):
    """On a port of its own; `open` until its block ends, then no connection and no thread is left."""

    daemon_threads = False
    block_on_close = True
    request_queue_size = 128

    def __init__(self, hub: Server) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
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
            self.hub.faults.end()
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
            self.hub.violate("a connection", f"failed: {error!r}")


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
