"""The queue's SQLite file, which processes may share: its schema, transactions, and recovery from damage."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Generator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from ...errors import FileError
from ...files import file_errors, set_aside

logger = logging.getLogger(__name__)

_APPLICATION_ID = 0x49325642  # "I2VB", in the file's header
_VERSION = 1
_BUSY_SECONDS = 30.0
# Files of users have these names: `wish` is a stop request, a `pairing` a model on a device, a `shape` a plan's key.
_SCHEMA = """
CREATE TABLE jobs (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    spec TEXT NOT NULL,
    priority REAL NOT NULL,
    position INTEGER,
    state TEXT NOT NULL,
    wish TEXT,
    added_at REAL NOT NULL,
    started_at REAL,
    finished_at REAL,
    attempts INTEGER NOT NULL DEFAULT 0,
    crashes INTEGER NOT NULL DEFAULT 0,
    owner TEXT,
    lease_until REAL,
    device TEXT,
    stage TEXT,
    done INTEGER NOT NULL DEFAULT 0,
    total INTEGER NOT NULL DEFAULT 0,
    predicted_seconds REAL,
    predicted_bytes INTEGER,
    measured_bytes INTEGER,
    output TEXT,
    thumbnail TEXT,
    problem TEXT,
    report TEXT
);
CREATE INDEX jobs_by_state ON jobs (state);
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE timings (
    id INTEGER PRIMARY KEY, pairing TEXT NOT NULL, shape TEXT NOT NULL, stage TEXT NOT NULL,
    work REAL NOT NULL, seconds REAL NOT NULL
);
CREATE INDEX timings_by_pairing ON timings (pairing, stage);
"""


class Database:
    """One connection for all threads; other processes are locked out only while a transaction writes.

    Raises:
        FileError: the file cannot be created or opened, belongs to another program, or has a later version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        with file_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = _open(path)
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise _file_error(path, error) from error
            logger.warning("the queue in %s cannot be read and is set aside: %s", path, error)
            _set_all_aside(path)
            self._connection = _open(path)

    @contextmanager
    def transaction(self) -> Generator[sqlite3.Connection]:
        """Commit all of the body's writes or none; they are on the disk when the context has ended.

        Raises:
            FileError: the disk is full, or the file has been damaged.
        """
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise _file_error(self.path, error) from error

    @contextmanager
    def reading(self) -> Generator[sqlite3.Connection]:
        """Lend the connection for queries."""
        with self._lock:
            try:
                yield self._connection
            except sqlite3.Error as error:
                raise _file_error(self.path, error) from error

    def close(self) -> None:
        with self._lock:
            self._connection.close()


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        connection.row_factory = sqlite3.Row
        _prepare(path, connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(path: Path, connection: sqlite3.Connection) -> None:
    with closing(connection.execute("PRAGMA quick_check(1)")) as cursor:
        verdict = cursor.fetchone()[0]
    if verdict != "ok":
        raise sqlite3.DatabaseError(verdict)
    with suppress(sqlite3.OperationalError):  # another process is switching it now, or the file system cannot
        connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("BEGIN IMMEDIATE")
    try:
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {_VERSION}")
        _check_kind(path, connection)
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _check_kind(path: Path, connection: sqlite3.Connection) -> None:
    if connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
        raise FileError(f"{path} is a database of another program", "choose another file for the queue")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != _VERSION:
        raise FileError(
            f"the queue in {path} has format version {version}, but this release reads version {_VERSION}",
            "use the release that created it, or choose another file",
        )


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether the file's content is at fault; an `OperationalError` comes from locks, permissions or the disk."""
    return not isinstance(error, sqlite3.OperationalError)


def _set_all_aside(path: Path) -> None:
    """Rename the file and its journals, which would corrupt a new file of that name."""
    set_aside(path)
    for suffix in ("-wal", "-shm"):
        journal = path.with_name(path.name + suffix)
        if journal.exists():
            with file_errors(journal):
                journal.replace(path.with_suffix(f".broken{suffix}"))


def _file_error(path: Path, error: sqlite3.Error) -> FileError:
    return FileError(f"the queue in {path} cannot be used: {error}", "free the disk or choose another file")
