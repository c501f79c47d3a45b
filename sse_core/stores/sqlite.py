"""Use an SQLite file as the log that processes share: each follows it, and publishes to it.

An event is a row of the table `event`; its id is `ms-n`. Ids are given inside the transaction that
adds the rows, so a process that has read all rows up to an id has missed none. Other programs may
read rows, and add rows with ids that grow.

The table `meta` has one row. It holds the id of the newest row that was removed; a trigger keeps it
up to date, whoever removes rows. So a process that knows its place in the file also knows whether a
row after that place is gone.

Each process opens its connections once and keeps them. SQLite stays with the file that it has
opened, whatever the name means later. But it finds a -wal by its name alone, and would apply that
of one file to another that has taken its name. So a file that is removed or replaced under a
running server is not followed. For the start, `meta` also holds the inode of the file: if that is
another one, a -wal that lies there was made for another file.
"""
from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Callable
from urllib.parse import quote

from sse_core.engine.frames import MAX_EVENT, MAX_NAME, Event, Id
from sse_core.engine.log import NOTHING
from sse_core.stores.store import MIN_KEPT, READING, EventStore, Row

# A server without such a file does not import it.
if TYPE_CHECKING:
    import sqlite3

# The application id that marks a file as ours, and the version of its tables. Version 1 had no
# `meta`.
APPLICATION, SCHEMA = 0x73736531, 2

# Seconds between two looks for what others have written: when they just did, and 4 s later. The
# pause grows by the factor SLOWER. A look costs 120 us.
POLL, IDLE_POLL = 0.01, 0.05
SLOWER = 1.01

# Rows, and bytes of data, that are read at once.
READ_COUNT, READ_BYTES = 512, 1 << 20

# Seconds to wait for another process that writes, which may have been stopped in the middle; the
# same when no event waits for it; and the longest pause between two tries, which is random.
BUSY_TIME = 2.0
TIDY_TIME = 0.5
BUSY_PAUSE = 0.002

# The rows are counted every COUNT_EVERY seconds, which takes 40 ns for each row that is kept. While
# there are too many, TRIM_ROWS and twice as many as were added are deleted every TRIM_PAUSE
# seconds. So rows that other programs add are deleted, too. With rows of 1 MiB, a deletion holds
# the lock for up to 60 ms.
COUNT_EVERY = 1.0
TRIM_ROWS, TRIM_PAUSE = 100, 0.01

# Bytes to which the -wal shrinks again after a reader that kept SQLite from reusing it.
WAL_LIMIT = 16 << 20

_WHOLE = "integer check (typeof({0}) = 'integer' and {0} between 0 and 999999999999999)"
_EVENT = (f"create table event(ms {_WHOLE.format('ms')}, n {_WHOLE.format('n')}, channel text, "
          "event text, data text, primary key (ms, n)) without rowid")
_LENGTH = "ifnull(length(cast(new.{} as blob)), 0)"
_META = (
    "create table meta(removed_ms, removed_n, inode, probe)",
    "insert into meta values ({0}, {1}, null, null)",
    "create trigger removed after delete on event when max(old.ms, old.n) < 1000000000000000 and "
    "(old.ms, old.n) > (select removed_ms, removed_n from meta) "
    "begin update meta set removed_ms = old.ms, removed_n = old.n; end",
    # Reading a row takes as much memory as the row has bytes. So of one that is too long for an
    # event only the id is kept.
    "create trigger too_long before insert on event "
    f"when {_LENGTH.format('data')} > {MAX_EVENT} "
    f"or max({_LENGTH.format('channel')}, {_LENGTH.format('event')}) > {MAX_NAME} begin "
    "insert into event values (new.ms, new.n, null, null, null); "
    "select raise(ignore); end",
    f"pragma user_version = {SCHEMA}")
_ROWS = ("select ms, n, cast(channel as text), cast(event as text), cast(data as text) "
         "from event where (ms, n) {} (?, ?) order by ms {}, n {} limit ?")
_AFTER, _BEFORE = _ROWS.format(">", "", ""), _ROWS.format("<", "desc", "desc")
_NEWEST_ID = "select ms, n from event order by ms desc, n desc limit 1 offset ?"
_OLDEST_ID = "select ms, n from event order by ms, n limit 1 offset ?"
_REMOVED = "select removed_ms, removed_n from meta"
# Newer than every row.
_END: Id = 1 << 62, 0

_MOVED = ("it was removed or replaced: stop all servers that use it, put a file in its place "
          "without a -wal beside it, and start them")
# What to do, by a part of what SQLite or the system says.
_ADVICE = (
    ("not a database", "name another file, or move it away"),
    ("malformed", "restore a copy, or move it away"),
    ("readonly", "let this user write to it and to its folder"),
    ("ermission denied", "let this user write to it and to its folder"),
    ("unable to open", "it must be a file that this user may read and write, its folder, too"),
    ("full", "make room on the disk"), ("locked", "end the process that holds it"))


class Unusable(Exception):
    """The file is not ours, or is no longer in its place."""


class WrongWal(Unusable):
    """The -wal was made for another file, or another process is about to say that it was not."""


class SQLiteStore(EventStore):
    """An SQLite file. See EventStore for who may call what.

    history: see EventStore. sync: what is published survives a power failure, too. Raises
    ValueError for a file that is not ours or cannot be used; the text is one line that says what to
    do, and the file is left as it was.
    """
    _away = "the history file cannot be used now: %s"
    _back, _skips = "the history file is back", "rows of the history file"
    _refuses = "the history file"

    def __init__(self, path: str | os.PathLike[str], history: int, sync: bool) -> None:
        super().__init__(history)
        import sqlite3
        self._faults = (sqlite3.Error, OSError, Unusable)
        self._path = os.path.realpath(path)
        self._sync = sync

        # The thread that follows opens both, once. `_files` says which files the names of the
        # database, its -wal and its -shm meant then.
        self._reader: sqlite3.Connection | None = None
        self._writer: sqlite3.Connection | None = None
        self._files: list[Id | None] = []

        # These two belong to the thread that writes. Rows below the floor are to be deleted; None:
        # there are none, as far as is known.
        self._floor: Id | None = None

        # Rows that were added since some were deleted.
        self._fresh = 0

        # Set when this process has committed something.
        self._news = threading.Event()

        # The others belong to the thread that follows. Whether `_news` was set.
        self._is_own = False

        # The version of the file (`data_version`) of which all rows were read.
        self._seen: Any = None

        # What `_last` becomes when the newest rows have been read.
        self._place: Id | None = None
        self._poll = IDLE_POLL
        try:
            with closing(_opened(self._path, sync)) as connection:
                _insist(lambda: connection.execute("begin immediate"), BUSY_TIME)
                connection.execute("rollback")
                _fetch(connection, _BEFORE, _END, READ_COUNT)
        except self._faults as fault:
            raise ValueError(f"cannot use the file {os.fspath(path)}: {_reason(fault)}") from None

    # For the thread that follows

    def _open(self) -> sqlite3.Connection:
        """Return the connection that reads; open both connections if that was not done yet.

        Raises Unusable if the file was removed or replaced meanwhile.
        """
        if not self._reader:
            self._reader = _opened(self._path, self._sync)
            self._files = self._names()
        self._check_in_place()
        if not self._writer:
            writer = _opened(self._path, self._sync)
            try:
                self._check_in_place()
            except Unusable:
                writer.close()
                raise
            self._writer = writer
        return self._reader

    def _read(self) -> tuple[list[Row] | None, bool]:
        """Read the rows that follow the last one, if there may be any; see EventStore."""
        connection, last = self._open(), self._last or NOTHING
        self._poll = min(SLOWER * self._poll, IDLE_POLL)
        seen = connection.execute("pragma data_version").fetchone()
        if seen == self._seen:
            return [], True
        self._poll = self._poll if self._is_own else POLL
        # In one transaction, so that no row is removed between the two queries.
        with _transaction(connection, "begin", BUSY_TIME):
            rows, is_all = _fetch(connection, _AFTER, last, READ_COUNT)
            removed = _newest_removed(connection)
        if removed > last:
            return None, True
        self._seen = seen if is_all else None
        self._last = rows[-1][:2] if rows else self._last
        return rows, is_all

    def _page(self, before: Row | None) -> list[Row]:
        connection = self._open()
        if before:
            return _fetch(connection, _BEFORE, before[:2], READ_COUNT)[0]
        removed = _newest_removed(connection)
        rows, _ = _fetch(connection, _BEFORE, _END, READ_COUNT)
        # If a person has deleted the newest rows, the newest removed id is beyond them.
        place = max(removed, rows[0][:2] if rows else NOTHING)
        self._place = None if place == NOTHING else place
        return rows

    def _removed(self) -> Id:
        return _newest_removed(self._open())

    def _unread(self, rows: list[Row]) -> list[Row]:
        last, self._last = self._last or NOTHING, self._place
        return [row for row in rows if row[:2] > last]

    def _rest(self, stopping: threading.Event, seconds: float) -> None:
        self._is_own = self._news.wait(seconds)
        self._news.clear()

    # For the thread that writes

    def _writing(self) -> sqlite3.Connection:
        """Return the connection that writes. Raises Unusable if the file cannot be used."""
        # What is written to a file that cannot be read reaches no client, and may be lost.
        if not self._writer or self._troubles[READING]:
            raise Unusable(self._troubles[READING] or "it is being opened")
        self._check_in_place()
        return self._writer

    def _commit(self, events: Sequence[Event]) -> list[str]:
        connection = self._writing()
        with _transaction(connection, "begin immediate", BUSY_TIME):
            ids = self._next_ids(connection, len(events))
            connection.executemany("insert into event values (?, ?, ?, ?, ?)", (
                (*new, event.channel, event.name, event.data)
                for new, event in zip(ids, events)))
        self._fresh += len(events)
        # SQLite has committed to the file that it opened, wherever that is now.
        self._check_in_place()
        self._news.set()
        return ["%d-%d" % new for new in ids]

    def _next_ids(self, connection: sqlite3.Connection, number: int) -> list[Id]:
        """Return ids above all that were ever given, and above the last that this server has read.
        """
        newest = connection.execute(_NEWEST_ID, (0,)).fetchone()
        last = max(_id(newest or NOTHING), _newest_removed(connection), self._last or NOTHING)
        now, ids = int(time.time() * 1000), []
        for _ in range(number):
            last = (now, 0) if now > last[0] else (last[0], last[1] + 1)
            ids.append(last)
        return ids

    def _tidy(self) -> float:
        """Delete some of the oldest rows if there are more than are kept; see EventStore."""
        if not self._writer:
            return COUNT_EVERY
        connection, number = self._writing(), TRIM_ROWS + 2 * self._fresh
        floor = self._floor or connection.execute(_NEWEST_ID, (self._kept - 1,)).fetchone()
        if floor:
            with _transaction(connection, "begin immediate", TIDY_TIME):
                oldest = connection.execute(_OLDEST_ID, (number,)).fetchone()
                below = min(floor, oldest or floor)
                connection.execute("delete from event where (ms, n) < (?, ?)", below)
                self._floor = floor if below < floor else None
        self._fresh = 0
        return TRIM_PAUSE if self._floor else max(COUNT_EVERY, self._kept * 1e-4)

    def _probe(self, size: int) -> None:
        connection = self._writing()
        for value in (bytes(size), None):
            with _transaction(connection, "begin immediate", TIDY_TIME):
                connection.execute("update meta set probe = ?", (value,))

    # For both

    def _failed(self, fault: Exception) -> str:
        return _reason(fault)

    def close(self) -> None:
        """Close both connections. The last one of all processes removes the -wal."""
        for connection in (self._reader, self._writer):
            if connection:
                connection.close()

    def _check_in_place(self) -> None:
        """Raise Unusable if a name means another file now. One that is moved back is ours again."""
        if self._files != self._names():
            raise Unusable(_MOVED)

    def _names(self) -> list[Id | None]:
        """Return which files the names mean, by device and inode."""
        found = (_stat(self._path + ending) for ending in ("", "-wal", "-shm"))
        return [each and (each.st_dev, each.st_ino) for each in found]


def _opened(path: str, sync: bool) -> sqlite3.Connection:
    """Return a connection to the file; create the file if there is none."""
    import sqlite3
    _insist(lambda: _check_wal(path), BUSY_TIME)
    # Only its owner may read it: it holds the events of every private channel.
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
    connection = sqlite3.connect(path, timeout=0.0, isolation_level=None, check_same_thread=False)
    try:
        _insist(lambda: _set_up(connection, path, sync), BUSY_TIME)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_wal(path: str) -> None:
    """Raise WrongWal if the -wal was made for another file: SQLite would apply it to this one."""
    file, wal = _stat(path), _stat(path + "-wal")
    is_ours = file and file.st_size and _inode_in(path) in (None, b"%d" % file.st_ino)
    if wal and wal.st_size and not is_ours:
        raise WrongWal("the -wal beside it is of another file: remove that; if it is not, as in a "
                       f"copy of both, run sqlite3 '{path}' 'pragma wal_checkpoint(truncate)'")


def _inode_in(path: str) -> bytes | None:
    """Return the inode that `meta` holds, read from the file alone, without its -wal.

    None if there is none: the file is missing, empty, of version 1, or not ours.
    """
    import sqlite3
    url = f"file:{quote(path)}?mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(url, uri=True)) as connection:
            connection.text_factory = bytes
            inode: bytes | None = connection.execute("select inode from meta").fetchone()[0]
            return inode
    except (sqlite3.Error, TypeError):
        return None


def _set_up(connection: sqlite3.Connection, path: str, sync: bool) -> None:
    """Make sure that the file is ours and can be written; create the tables that it lacks."""
    connection.text_factory = bytes
    version = _version(connection)
    # SQLite would open it all the same, to read it.
    if not os.access(path, os.W_OK):
        raise Unusable("it is readonly")
    if version < SCHEMA:
        with _transaction(connection, "begin immediate", BUSY_TIME):
            _make_tables(connection)
    connection.execute("pragma journal_mode = wal")
    connection.execute(f"pragma synchronous = {'full' if sync else 'normal'}")
    connection.execute(f"pragma journal_size_limit = {WAL_LIMIT}")
    inode = str(os.stat(path).st_ino)
    if connection.execute("select inode from meta").fetchone() != (inode.encode(),):
        with _transaction(connection, "begin immediate", BUSY_TIME):
            connection.execute("update meta set inode = ?", (inode,))
        _insist(lambda: _checkpoint(connection), BUSY_TIME)
    # This creates the -wal and the -shm, which a copy does not have yet.
    connection.execute("pragma data_version").fetchone()


def _version(connection: sqlite3.Connection) -> int:
    """Return the version of the tables, 0 if there are none. Raises Unusable."""
    application, version, tables = (connection.execute(query).fetchone()[0] for query in (
        "pragma application_id", "pragma user_version", "select count(*) from sqlite_master"))
    if application != APPLICATION and (application, version, tables) != (0, 0, 0):
        raise Unusable("it is of another program: name another file, or move it away")
    if version > SCHEMA:
        raise Unusable("it is of a newer version of this server: use that, or another file")
    return int(version)


def _make_tables(connection: sqlite3.Connection) -> None:
    """Create the tables that the file lacks. Another process may have done it just now.

    Version 1 did not record what it removed; it kept at least 10,000 rows. So in a file with as
    many rows, everything before the oldest one counts as removed. A client may then be told a gap
    that was none, but no loss is hidden.
    """
    version, removed = _version(connection), NOTHING
    if version == 0:
        connection.execute(_EVENT)
        connection.execute(f"pragma application_id = {APPLICATION}")
    elif connection.execute(_NEWEST_ID, (MIN_KEPT - 1,)).fetchone():
        ms, n = _id(connection.execute(_OLDEST_ID, (0,)).fetchone())
        removed = ms, n - 1
    for statement in _META if version < SCHEMA else ():
        connection.execute(statement.format(*removed))


def _checkpoint(connection: sqlite3.Connection) -> None:
    """Copy the -wal into the file. Raises BlockingIOError while another connection is at work."""
    if connection.execute("pragma wal_checkpoint(full)").fetchone()[0]:
        raise BlockingIOError("database is locked")


@contextmanager
def _transaction(connection: sqlite3.Connection, begin: str, seconds: float) -> Iterator[None]:
    """Commit what the block does, or undo it. Wait so long for another process that writes."""
    _insist(lambda: connection.execute(begin), seconds)
    try:
        yield
        connection.execute("commit")
    finally:
        if connection.in_transaction:
            connection.execute("rollback")


def _newest_removed(connection: sqlite3.Connection) -> Id:
    return _id(connection.execute(_REMOVED).fetchone())


def _stat(name: str) -> os.stat_result | None:
    """Return what there is by this name, or None."""
    try:
        return os.stat(name)
    except FileNotFoundError:
        return None


def _insist(take: Callable[[], object], seconds: float) -> None:
    """Call `take`, again and again for so many seconds while another process holds a lock."""
    until = time.monotonic() + seconds
    while True:
        try:
            take()
            return
        except Exception as error:
            is_busy = isinstance(error, WrongWal) or "locked" in str(error)
            if not is_busy or time.monotonic() >= until:
                raise
        time.sleep(random.uniform(0, BUSY_PAUSE))


def _id(ms_and_n: tuple[Any, ...]) -> Id:
    """Return the id of a row. Raises Unusable if it is none: the file is damaged."""
    ms, n = ms_and_n
    if not (isinstance(ms, int) and isinstance(n, int)):
        raise Unusable("it has an id that is no number: delete that row, or move the file away")
    return ms, n


def _fetch(connection: sqlite3.Connection, query: str, place: Id, count: int
           ) -> tuple[list[Row], bool]:
    """Return the rows of a query, at most `count`, and whether these are all.

    They end with the row that exceeds READ_BYTES.
    """
    rows: list[Row] = []
    size = READ_BYTES
    with closing(connection.execute(query, (*place, count))) as cursor:
        for row in cursor:
            _id(row[:2])
            rows.append(row)
            size -= len(row[4] or b"")
            if size < 0 and len(rows) > 1:
                return rows, False
    return rows, len(rows) < count


def _reason(fault: Exception) -> str:
    """Return what is wrong and what to do about it, in a line."""
    if isinstance(fault, FileNotFoundError):
        return "its folder does not exist: make it"
    text = fault.strerror if isinstance(fault, OSError) and fault.strerror else str(fault)
    return text + next((f": {advice}" for part, advice in _ADVICE if part in text), "")
