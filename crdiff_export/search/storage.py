"""Where a search is kept: a journal file, or PostgreSQL for workers on many machines."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from crdiff_export.errors import SearchError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

TIMEOUT: Final = 10  # seconds that a server has to answer
# Whoever makes the tables keeps the others waiting with this key: two who make them at once both fail.
KEY: Final = int.from_bytes(b"crdiff")


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage that is open, and its name as people may see it, without a password."""

    optuna: "BaseStorage"
    where: str

    def close(self) -> None:
        """Give connections back."""
        self.optuna.remove_session()
        if engine := getattr(self.optuna, "engine", None):
            engine.dispose()


def open_storage(spec: str | Path | None, name: str, *, create: bool = True) -> Storage:
    """Open what `--storage` names: None is a journal in the current folder, called like the study.

    SearchError for one that cannot be used; no message ever holds a password.
    """
    _silence()
    scheme, separator, _ = str(spec or "").partition("://")
    if not separator:
        from crdiff_export.search.journal import SUFFIX, open_journal

        path = Path(spec or re.sub(r"[^\w.-]+", "-", name) + SUFFIX)
        return Storage(open_journal(path, create=create), str(path))
    if scheme.partition("+")[0] not in ("postgresql", "postgres"):
        hint = "Leave --storage out or name a .journal file; for many machines name a postgresql:// server."
        if scheme.startswith("sqlite"):
            hint = f"SQLite fails with several workers and on network drives. {hint}"
        raise SearchError(f"a search cannot be kept in {scheme[:20]}", hint)
    return _postgres(str(spec))


def _silence() -> None:
    """Keep Optuna off stderr: what its log would say is in our events and errors."""
    import optuna

    optuna.logging.disable_default_handler()
    root = logging.getLogger("optuna")
    if not root.handlers:
        root.addHandler(logging.NullHandler())


def _postgres(spec: str) -> Storage:
    try:
        import psycopg  # noqa: F401
        import sqlalchemy
    except ImportError as error:
        hint = "Install it: pip install 'crdiff-export[search]'."
        raise SearchError("PostgreSQL's driver psycopg is not installed, or cannot be loaded", hint) from error
    from optuna.storages import RDBStorage

    try:
        url = sqlalchemy.make_url(spec).set(drivername="postgresql+psycopg")
    except (sqlalchemy.exc.ArgumentError, ValueError):
        hint = "Write postgresql://user:password@host:5432/database, with %40 for an @ in the password."
        raise SearchError("the address of the PostgreSQL server cannot be read", hint) from None
    where = url.set(drivername="postgresql", query={}).render_as_string(hide_password=True)
    hidden = [str(url.password or ""), *(str(value) for value in url.query.values())]
    options = {"connect_args": {"connect_timeout": TIMEOUT}, "pool_pre_ping": True}
    with speaking(where, hidden):
        # Optuna formats the address.
        address = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
        engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool, **options)
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(:key)"), {"key": KEY})
            try:
                return Storage(RDBStorage(address, engine_kwargs=options), where)
            except RuntimeError as error:
                hint = "Use the version of Optuna that the other workers have, or another database."
                raise SearchError(f"{where}: its tables are another version of Optuna's", hint) from error


@contextmanager
def speaking(where: str, hidden: Sequence[str] = ()) -> Iterator[None]:
    """Turn what a storage raises into a SearchError, without the words that are to stay hidden."""
    import sqlalchemy.exc
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError, OSError) as error:
        cause = getattr(error, "orig", None) or error.__cause__ or error
        words = next(iter(str(cause).splitlines()), "") or type(cause).__name__
        for secret in filter(None, hidden):
            words = words.replace(secret, "***")
        hint = "Finished trials are kept; when the storage answers again, run the same command once more."
        raise SearchError(f"{where}: {words}", hint) from (None if hidden else error)
