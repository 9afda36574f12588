"""The storage of a search: an SQLite file on one machine, or PostgreSQL for workers on many machines.

Both are Optuna's RDBStorage with its heartbeat: each worker records a sign of life for the trial that it is at, and a
trial without one for longer than the grace period is failed and queued again, by whichever worker looks first.
"""

import contextlib
import logging
import os
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import optuna
import sqlalchemy
import sqlalchemy.exc
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback

from crdiff_export.errors import OptionError, SearchError
from crdiff_export.formats import file_lock

SUFFIX: Final = ".db"
RETRIES: Final = 2  # a trial that failed three times stays failed
INTERVAL: Final = 10  # seconds between two signs of life
GRACE: Final = 60  # seconds without one after which a worker is thought dead
TIMEOUT: Final = 10  # seconds that a server has to answer
BUSY: Final = 60.0  # seconds that another worker may write to the file
# PostgreSQL's name for the lock that is held while tables and a search are made: two who make them at once both fail.
KEY: Final = int.from_bytes(b"crdiff")


class SearchStorage(RDBStorage):
    """Optuna's storage; a sign of life that cannot be recorded is left out, and the next one tried."""

    def record_heartbeat(self, trial_id: int) -> None:
        with suppress(StorageInternalError):
            super().record_heartbeat(trial_id)


def retry(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Queue a failed trial again, unless it has been tried often enough."""
    with quiet_optuna():
        RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)(study, trial)


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Ignore the warnings that say that heartbeats, retries and the pruner may change in later versions of Optuna."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


@contextmanager
def as_search_error(where: str, secrets: Sequence[str] = ()) -> Iterator[None]:
    """Turn what a storage raises into a SearchError, without the words that are to stay secret."""
    try:
        yield
    except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        cause = error.__cause__ or error
        cause = getattr(cause, "orig", None) or cause
        words = next(iter(str(cause).splitlines()), "") or type(cause).__name__
        for secret in filter(None, secrets):
            words = words.replace(secret, "***")
        hint = "Finished trials are kept; when the storage answers again, run the same command once more."
        raise SearchError(f"{where}: {words}", hint) from (None if secrets else error)


@dataclass(frozen=True, slots=True, repr=False)
class StorageAddress:
    """Where a storage is: SQLAlchemy's URL and engine, a name without a password, and what the name leaves out.

    `lock` locks it against others who make something in it.
    """

    url: str
    engine: dict[str, Any]
    lock: Callable[[], AbstractContextManager[None]]
    where: str
    secrets: Sequence[str] = ()


@contextmanager
def open_storage(
    storage: str | Path, *, interval: int = INTERVAL, grace: int = GRACE
) -> Iterator[tuple[SearchStorage, StorageAddress]]:
    """Open a storage until the block ends; its errors in the block become SearchErrors that show no password.

    Args:
        storage: A file that ends with .db, made where there is none; or the address of a PostgreSQL server.
        interval: Seconds between two signs of life of a worker.
        grace: Seconds without one after which others try its trial again; the same for all workers.

    Yields:
        The open storage, and where it is.

    Raises:
        OptionError: It is neither the name of a file that ends with .db nor the address of a server.
        SearchError: The storage cannot be used.
    """
    optuna.logging.disable_default_handler()
    if not logging.getLogger("optuna").handlers:
        logging.getLogger("optuna").addHandler(logging.NullHandler())  # else Python's last resort prints warnings
    address = _server_address(str(storage)) if is_address(storage) else _file_address(Path(storage))
    with as_search_error(address.where, address.secrets):
        with address.lock():
            opened = _open(address, interval, grace)
        try:
            yield opened, address
        finally:
            opened.remove_session()
            opened.engine.dispose()


def is_address(storage: str | Path) -> bool:
    """Return whether a storage is the address of a server rather than a file."""
    return "://" in str(storage)


def _open(address: StorageAddress, interval: int, grace: int) -> SearchStorage:
    """Open Optuna's storage, with its tables, which must be those of the installed version."""
    try:
        with quiet_optuna():
            return SearchStorage(
                address.url, address.engine, heartbeat_interval=interval, grace_period=grace,
                heartbeat_stale_trial_callback=retry,
            )  # fmt: skip
    except RuntimeError as error:
        hint = "Use the version of Optuna that the other workers have, or another storage."
        raise SearchError(f"{address.where}: its tables are another version of Optuna's", hint) from error


def _file_address(path: Path) -> StorageAddress:
    check_file(path)
    engine = {"creator": partial(_connect, path), "poolclass": sqlalchemy.QueuePool}
    return StorageAddress("sqlite://", engine, partial(_lock_folder, path.parent), str(path))


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY, check_same_thread=False)
    try:
        # A commit then waits for one write to the disk instead of several; where this cannot be, nothing changes.
        connection.execute("PRAGMA journal_mode=WAL")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def check_file(path: Path) -> None:
    """Refuse a file that is not a search's, before it is touched; OptionError where only its name is wrong."""
    if path.suffix != SUFFIX:
        hint = f"A search is kept in NAME{SUFFIX}, or on a server, as in postgresql://host/database."
        raise OptionError(f"{path}: not the name of a search's file", hint)
    if not path.parent.is_dir():
        raise SearchError(f"{path}: the folder {path.parent} does not exist", "Create it, or name a file elsewhere.")
    if not path.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.Error as error:
        hint = "It was left as it is; name another file, or restore this one from a copy."
        raise SearchError(f"{path}: no file of a search, or a damaged one", hint) from error
    if tables and "studies" not in tables:
        raise SearchError(f"{path}: a database, but none of a search", "It was left as it is; name another file.")


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Keep other workers of this machine from making tables or a search in the same folder, where the system can."""
    handle = None
    with suppress(OSError):  # a file system without locks
        handle = file_lock.lock(folder, wait=True)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _server_address(storage: str) -> StorageAddress:
    scheme = storage.partition("://")[0]
    if scheme.partition("+")[0] not in ("postgresql", "postgres"):
        hint = f"Leave --storage out or name a {SUFFIX} file; for many machines name a postgresql:// server."
        raise OptionError(f"a search cannot be kept in {scheme[:20]}", hint)
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        hint = '`python -m pip install "psycopg[binary]"`.'
        raise SearchError("PostgreSQL's driver psycopg is not installed, or cannot be loaded", hint) from error
    try:
        url = sqlalchemy.make_url(storage).set(drivername="postgresql+psycopg")
    except (sqlalchemy.exc.ArgumentError, ValueError):
        hint = "Write postgresql://user:password@host:5432/database, with %40 for an @ in the password."
        raise OptionError("the address of the PostgreSQL server cannot be read", hint) from None
    engine = {"connect_args": {"connect_timeout": TIMEOUT}, "pool_pre_ping": True}
    return StorageAddress(
        # Optuna formats the address.
        url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}"),
        engine,
        partial(_lock_server, sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, **engine)),
        where=url.set(drivername="postgresql", query={}).render_as_string(hide_password=True),
        secrets=[str(url.password or ""), *(str(value) for value in url.query.values())],
    )


@contextmanager
def _lock_server(engine: sqlalchemy.Engine) -> Iterator[None]:
    with engine.connect() as connection:  # the lock ends with the connection
        connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(:key)"), {"key": KEY})
        yield
