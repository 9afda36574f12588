"""A search on a real PostgreSQL server: many workers, one of them killed, and errors that hold no password."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from crdiff_export.errors import CrdiffError, OptionError, SearchError
from tests.support.messages import raises
from tests.support.search_objective import NAME, PRINTS, Hill, opened, run_hill, scores_of, setup
from tests.support.search_workers import check_that_nothing_is_lost

PASSWORD = "s3cr@t{}/%"
HIDDEN = ("s3cr", quote(PASSWORD, safe=""))


def program(name: str) -> str | None:
    """One of the server's programs: Debian has them beside the path."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return shutil.which(name) or next((str(path / name) for path in folders if (path / name).exists()), None)


def account() -> dict[str, Any]:
    """Whom the server runs as, which root may not be."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return {}
    import pwd

    names = [one.pw_name for one in pwd.getpwall()]
    user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


@dataclass(frozen=True)
class Server:
    """A server on this machine."""

    port: int

    def url(self, database: str, password: str = PASSWORD) -> str:
        return f"postgresql://crdiff:{quote(password, safe='')}@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str) -> None:
        import psycopg

        parts = {"host": "127.0.0.1", "port": self.port, "user": "crdiff", "password": PASSWORD, "dbname": "postgres"}
        with psycopg.connect(**parts, autocommit=True) as connection:  # type: ignore[arg-type]
            connection.execute(statement.encode())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    pytest.importorskip("psycopg")
    initdb, postgres = program("initdb"), program("postgres")
    if not (initdb and postgres):
        pytest.skip("PostgreSQL is not installed")
    who = account()
    with tempfile.TemporaryDirectory(prefix="crdiff-pg-") as name:
        folder = Path(name)
        secret = folder / "password"
        secret.write_text(PASSWORD)
        if who:
            for path in (folder, secret):
                os.chown(path, who["user"], who["group"])
        data = folder / "data"
        options = ["--auth=scram-sha-256", "--username=crdiff", f"--pwfile={secret}", "--no-sync", "--locale=C"]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "cwd": folder, **who}
        subprocess.run([initdb, "-D", str(data), "--encoding=UTF8", *options], check=True, **quiet)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [postgres, "-D", str(data), "-F", "-p", str(port), "-k", name, "-h", "127.0.0.1"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, **quiet) as process:
            try:
                made = Server(port)
                wait(made, process)
                yield made
            finally:
                process.terminate()
                process.send_signal(2)  # a fast shutdown, which does not wait for those who are connected
                process.wait(30)


def wait(server: Server, process: "subprocess.Popen[bytes]") -> None:
    import psycopg

    until = time.monotonic() + 30
    while True:
        try:
            server.execute("SELECT 1")
        except psycopg.OperationalError:
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < until
            time.sleep(0.05)
        else:
            return


@pytest.fixture
def database(server: Server, request: pytest.FixtureRequest) -> str:
    """The address of an empty database."""
    name = f"db{abs(hash(request.node.nodeid))}"
    server.execute(f"CREATE DATABASE {name}")
    return server.url(name)


def test_three_workers_begin_at_once_and_one_is_killed(database: str) -> None:
    check_that_nothing_is_lost(database, "anneal", trials=8, workers=3)


def test_an_interrupted_search_goes_on_as_in_a_file(database: str, tmp_path: Path) -> None:
    search = setup("anneal")
    with pytest.raises(KeyboardInterrupt):
        run_hill(database, search, 5, Hill(stop=5))
    assert scores_of(run_hill(database, search, 5)) == scores_of(run_hill(tmp_path / "a.db", search, 5))
    with raises(SearchError, NAME, "steps was 20, now 30"), opened(database, search, {**PRINTS, "steps": "30"}):
        pass


def refused(url: str, kind: type[CrdiffError] = SearchError) -> CrdiffError:
    with pytest.raises(kind) as error, opened(url, setup()):
        pass
    for hidden in HIDDEN:
        assert hidden not in str(error.value)
    assert error.value.__cause__ is None  # whose words would be in a traceback
    return error.value


def test_a_password_is_never_shown(server: Server) -> None:
    wrong = refused(server.url("postgres", PASSWORD + "x"))
    assert wrong.message.startswith(f"postgresql://crdiff:***@127.0.0.1:{server.port}/postgres: ")
    assert "password authentication failed" in wrong.message
    assert 'database "nowhere" does not exist' in refused(server.url("nowhere")).message
    query = f"postgresql://crdiff@127.0.0.1:{server.port}/postgres?password={quote(PASSWORD + 'x', safe='')}"
    assert "password authentication failed" in refused(query).message


def test_a_server_that_is_not_there_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    error = refused(Server(port).url("a"))
    assert "refused" in error.message
    assert error.hint.startswith("Finished trials are kept")
    assert "cannot be read" in refused(f"postgresql://crdiff:{HIDDEN[0]}@127.0.0.1:port/a", OptionError).message


def test_a_driver_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with raises(SearchError, "psycopg"), opened("postgres://crdiff@127.0.0.1/a", setup()):
        pass
