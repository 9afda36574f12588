"""A search on a real PostgreSQL server: many workers, one of them killed, and errors that hold no password."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from crdiff_export.errors import SearchError
from crdiff_export.search.board import Attempt
from crdiff_export.search.engine import (
    Budget,
    Finished,
    history,
    load_study,
    open_study,
    run,
    study_names,
)
from crdiff_export.search.lease import Worker
from crdiff_export.search.ledger import Claim
from tests.support.search_objective import (
    NAME,
    PRINTS,
    SPACE,
    START,
    Hill,
    setup,
    told,
)
from tests.support.search_workers import worker

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


def searched(url: str, method: str, trials: int) -> tuple[Finished, ...]:
    search = setup(method)
    with open_study(url, NAME, search, PRINTS) as study:
        run(study, Hill(), search.method, budget=Budget(trials))
        return history(study)


def test_three_workers_begin_at_once_and_one_is_killed(database: str) -> None:
    method, trials, lease = "tpe", 24, 4.0
    with (
        worker(database, method, trials, 0.15, lease) as one,
        worker(database, method, trials, 0.15, lease) as two,
        worker(database, method, trials, 0.15, lease) as three,
    ):
        begun = max(other.until("started")["place"] for other in (two, three))
        place = one.until("scored", after=begun, done=4)["place"]
        one.process.kill()
        one.process.wait()
        two.end()
        three.end()
    with load_study(database, NAME) as study:
        found = history(study)
        board = study.ledger.board()
    assert [one.place for one in found] == list(range(trials))
    assert {one.state for one in found} <= {"complete", "pruned"}
    assert found[place].attempts == 2
    assert [one.reason for one in board.places[place].attempts] == ["its worker died", None]
    assert sum(one.attempts for one in found) == trials + 1
    assert sorted(one.finished() + two.finished() + three.finished()) == list(range(trials))
    assert two.finished()
    assert three.finished()
    for one_found in found:
        exact = {pair: Hill().scores(one_found.candidate, [pair])[0] for pair in one_found.scores}
        assert one_found.scores == exact


def test_a_server_and_a_file_give_the_same_history(database: str, tmp_path: Path) -> None:
    found = told(searched(database, "tpe", 13))
    assert found == told(searched(str(tmp_path / "a.journal"), "tpe", 13))


def test_an_interrupted_search_goes_on(database: str, tmp_path: Path) -> None:
    search = setup("anneal")
    with open_study(database, NAME, search, PRINTS) as study, pytest.raises(KeyboardInterrupt):
        run(study, Hill(stop=5), search.method, budget=Budget(5))
    assert told(searched(database, "anneal", 5)) == told(searched(str(tmp_path / "a.journal"), "anneal", 5))
    with pytest.raises(SearchError, match="cannot go on with other settings: steps was 20, now 30"):
        open_study(database, NAME, search, {**PRINTS, "steps": "30"})
    assert study_names(database) == (NAME,)


def test_of_many_who_claim_a_place_one_gets_it(database: str) -> None:
    """Claims and results, raced by five connections at once."""
    studies = [open_study(database, NAME, setup(), PRINTS) for _ in range(5)]
    start = threading.Barrier(len(studies))
    got: list[Attempt] = []
    ended: list[str] = []

    def race(number: int) -> None:
        ledger = studies[number].ledger
        for place in range(4):
            start.wait()
            mine = ledger.claim(Claim(place, SPACE.point(START)), Worker.here(), -1)
            if mine:
                got.append(mine)
        start.wait()
        ended.extend(one.worker for one in ledger.reap(ledger.board(), Worker.here()))
        ledger.storage.optuna.remove_session()

    threads = [threading.Thread(target=race, args=(number,)) for number in range(len(studies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    board = studies[0].ledger.board()
    for study in studies:
        study.close()
    assert sorted(one.place for one in got) == [0, 1, 2, 3]
    assert sorted(ended) == sorted(one.worker for one in got)  # each was failed by one alone
    assert [place.open for place in board.places] == [True] * 4


def refused(url: str) -> SearchError:
    with pytest.raises(SearchError) as error:
        open_study(url, NAME, setup(), PRINTS)
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
    assert "cannot be read" in refused(f"postgresql://crdiff:{HIDDEN[0]}@127.0.0.1:port/a").message


def test_a_driver_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(SearchError, match=r"psycopg is not installed, or .*\nInstall it: pip install 'crdiff-export\["):
        open_study("postgres://crdiff@127.0.0.1/a", NAME, setup(), PRINTS)
