"""Turn an SQLite file into the log that processes share: each follows it, and publishes to it.

An event is a row of the table `event`, its id is `ms-n`. Ids are given inside the transaction that
adds the rows: who has read all rows up to an id has missed none. Any program may read rows, and add
some with ids that grow.

The file says of itself, in the one row of the table `meta`, which is the newest row that was
removed: a trigger sees to that, whoever removes it. So whoever has a place in the file knows
whether a row after that place is gone.

A connection is opened once and kept. SQLite keeps to the file that it has opened, whatever becomes
of its name, and would take the -wal of one file for that of another that has its name now. So a
file that is removed or replaced while a server runs is told and not followed; and in `meta` stands
for which file, by its inode, the -wal was made, so that nobody opens one beside a wrong one.
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

from sse_core.engine.frames import MAX_EVENT, Draft, Id
from sse_core.engine.log import NOTHING
from sse_core.stores.store import MIN_KEPT, READING, Row, SharedLog

if TYPE_CHECKING:       # who has no such file does without
    import sqlite3

# What the file says that it is, and in which version. In version 1 there was no `meta`.
APPLICATION, SCHEMA = 0x73736531, 2

# Seconds between two looks for what others write, when they just did and 4 s later; it grows by
# this factor. A look costs 120 us.
POLL, IDLE_POLL = 0.01, 0.05
SLOWER = 1.01

READ_COUNT, READ_BYTES = 512, 1 << 20       # rows, and bytes of data, that are read at once
BUSY_TIME = 2.0         # seconds to wait for another process that writes; it may be stopped
BUSY_PAUSE = 0.002      # seconds between two tries meanwhile, at most, at random
TIDY_TIME = 0.5         # seconds to wait for it where no event waits

# Once in COUNT_EVERY seconds rows are counted, which takes 40 ns for each that is kept. While there
# are too many, TRIM_ROWS of them, and twice as many as were added, are deleted every TRIM_PAUSE
# seconds. So rows that other programs add go, too; they can be of 1 MiB, so this takes up to 60 ms.
COUNT_EVERY = 1.0
TRIM_ROWS, TRIM_PAUSE = 100, 0.01

# Bytes to which the -wal shrinks again after a reader that has kept it from being reused.
WAL_LIMIT = 16 << 20

_WHOLE = "integer check (typeof({0}) = 'integer' and {0} between 0 and 999999999999999)"
_EVENT = (f"create table event(ms {_WHOLE.format('ms')}, n {_WHOLE.format('n')}, channel text, "
          "event text, data text, primary key (ms, n)) without rowid")
_META = (
    "create table meta(removed_ms, removed_n, inode, probe)",
    "insert into meta values ({0}, {1}, null, null)",
    "create trigger removed after delete on event when max(old.ms, old.n) < 1000000000000000 and "
    "(old.ms, old.n) > (select removed_ms, removed_n from meta) "
    "begin update meta set removed_ms = old.ms, removed_n = old.n; end",
    # Whoever reads a row holds it in memory whole. A row that no event can be is kept without data.
    "create trigger too_long before insert on event "
    f"when length(cast(new.data as blob)) > {MAX_EVENT} begin "
    "insert into event values (new.ms, new.n, new.channel, new.event, null); "
    "select raise(ignore); end",
    f"pragma user_version = {SCHEMA}")
_ROWS = ("select ms, n, cast(channel as text), cast(event as text), cast(data as text) "
         "from event where (ms, n) {} (?, ?) order by ms {}, n {} limit ?")
_AFTER, _BEFORE = _ROWS.format(">", "", ""), _ROWS.format("<", "desc", "desc")
_NEWEST_ID = "select ms, n from event order by ms desc, n desc limit 1 offset ?"
_OLDEST_ID = "select ms, n from event order by ms, n limit 1 offset ?"
_REMOVED = "select removed_ms, removed_n from meta"
_END: Id = 1 << 62, 0       # newer than every row

_MOVED = ("it was removed or replaced: stop all servers that use it, put a file in its place "
          "without a -wal beside it, and start them")
_ADVICE = (             # what to do, by a part of what SQLite or the system says
    ("not a database", "name another file, or move it away"),
    ("malformed", "restore a copy, or move it away"),
    ("readonly", "let this user write to it and to its folder"),
    ("ermission denied", "let this user write to it and to its folder"),
    ("unable to open", "it must be a file that this user may read and write, its folder, too"),
    ("full", "make room on the disk"), ("locked", "end the process that holds it"))


class Unusable(Exception):
    """The file is not for us, or not there any more."""


class WrongWal(Unusable):
    """A -wal lies beside a file for which it was not made, or for which it is just being made."""


class FileStream(SharedLog):
    """An SQLite file. See SharedLog for who may call what.

    history: see SharedLog. sync: what is published outlives a power failure, too. Raises
    ValueError, one line that says what to do, for a file that is not ours or cannot be used; it is
    left as it was.
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

        # Both are opened by the thread that follows, together, and once. `_files` is what the
        # names of the file, its -wal and its -shm meant then.
        self._reader: sqlite3.Connection | None = None
        self._writer: sqlite3.Connection | None = None
        self._files: list[Id | None] = []

        # The writing thread's. Rows below the floor are too many; None: they are to be counted.
        self._floor: Id | None = None
        self._fresh = 0                 # rows that were added since some were deleted

        # The following thread's
        self._news = threading.Event()  # there may be something to read
        self._is_own = False            # it may be from this process
        self._seen: Any = None          # the version of the file of which all was read
        self._place: Id | None = None   # what will be `_last` when the newest rows were read
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
        """Open the file if that was not done yet, and return the connection that reads.

        Raises Unusable if the file was removed or replaced since.
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
        """Look for rows that follow the last one; see SharedLog."""
        connection, last = self._open(), self._last or NOTHING
        self._poll = min(SLOWER * self._poll, IDLE_POLL)
        seen = connection.execute("pragma data_version").fetchone()
        if seen == self._seen:
            return [], True
        self._poll = self._poll if self._is_own else POLL       # somebody has committed
        with _transaction(connection, "begin"):     # so that none can go between the two
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
        # Behind what was removed before, too: that can be newer if a person did it.
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
        if not self._writer:
            raise Unusable(self._troubles[READING] or "it is being opened")
        self._check_in_place()
        return self._writer

    def _commit(self, drafts: Sequence[Draft]) -> list[str]:
        connection = self._writing()
        with _transaction(connection, "begin immediate"):
            ids = self._next_ids(connection, len(drafts))
            connection.executemany("insert into event values (?, ?, ?, ?, ?)", (
                (*new, draft.channel, draft.event, draft.data)
                for new, draft in zip(ids, drafts)))
        self._fresh += len(drafts)
        self._check_in_place()      # SQLite would not mind
        self._news.set()
        return ["%d-%d" % new for new in ids]

    def _next_ids(self, connection: sqlite3.Connection, number: int) -> list[Id]:
        """Return ids above all that ever were, and above the last that this server has read."""
        newest = connection.execute(_NEWEST_ID, (0,)).fetchone()
        last = max(_id(newest or NOTHING), _newest_removed(connection), self._last or NOTHING)
        now, ids = int(time.time() * 1000), []
        for _ in range(number):
            last = (now, 0) if now > last[0] else (last[0], last[1] + 1)
            ids.append(last)
        return ids

    def _tidy(self) -> float:
        """Delete some of the oldest rows, as far as there are more than are kept."""
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
        """Close the connections; the last one that is closed removes the -wal."""
        for connection in (self._reader, self._writer):
            if connection:
                connection.close()

    def _check_in_place(self) -> None:
        """Raise Unusable if a name means another file: it can be moved away, and back."""
        if self._files != self._names():
            raise Unusable(_MOVED)

    def _names(self) -> list[Id | None]:
        """Return which files the names mean, by device and inode."""
        found = (_stat(self._path + ending) for ending in ("", "-wal", "-shm"))
        return [each and (each.st_dev, each.st_ino) for each in found]


def _opened(path: str, sync: bool) -> sqlite3.Connection:
    """Return a connection to the file, which is made if there is none."""
    import sqlite3
    _insist(lambda: _check_wal(path), BUSY_TIME)
    with suppress(FileExistsError):     # what every private channel was sent is in it
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
    connection = sqlite3.connect(path, timeout=0.0, isolation_level=None, check_same_thread=False)
    try:
        _insist(lambda: _set_up(connection, path, sync), BUSY_TIME)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_wal(path: str) -> None:
    """Raise WrongWal if the -wal there is of another file: SQLite would add it to this one."""
    file, wal = _stat(path), _stat(path + "-wal")
    is_ours = file and file.st_size and _inode_in(path) in (None, b"%d" % file.st_ino)
    if wal and wal.st_size and not is_ours:
        raise WrongWal("the -wal beside it is of another file: remove that; if it is not, as in a "
                       f"copy of both, run sqlite3 '{path}' 'pragma wal_checkpoint(truncate)'")


def _inode_in(path: str) -> bytes | None:
    """Return for which file the file says that its -wal is made, without a look at the -wal."""
    import sqlite3
    url = f"file:{quote(path)}?mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(url, uri=True)) as connection:
            connection.text_factory = bytes
            inode: bytes | None = connection.execute("select inode from meta").fetchone()[0]
            return inode
    except (sqlite3.Error, TypeError):      # it is empty, of version 1 or not ours
        return None


def _set_up(connection: sqlite3.Connection, path: str, sync: bool) -> None:
    """Make sure that the file is ours and can be written; make the tables that it lacks."""
    connection.text_factory = bytes
    version = _version(connection)
    if not os.access(path, os.W_OK):        # SQLite would open it all the same
        raise Unusable("it is readonly")
    if version < SCHEMA:
        with _transaction(connection, "begin immediate"):
            _make_tables(connection)
    connection.execute("pragma journal_mode = wal")
    connection.execute(f"pragma synchronous = {'full' if sync else 'normal'}")
    connection.execute(f"pragma journal_size_limit = {WAL_LIMIT}")
    inode = str(os.stat(path).st_ino)
    if connection.execute("select inode from meta").fetchone() != (inode.encode(),):
        with _transaction(connection, "begin immediate"):
            connection.execute("update meta set inode = ?", (inode,))
        _insist(lambda: _checkpoint(connection), BUSY_TIME)
    connection.execute("pragma data_version").fetchone()    # a copy has no -wal and -shm yet


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
    """Make what the file lacks; another process may have done it just now.

    Version 1 kept 10,000 rows at least and did not say what it had removed. Of a file with so
    many, all before the oldest row counts as removed: somebody may be told a gap that was none.
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
def _transaction(connection: sqlite3.Connection, begin: str, seconds: float = BUSY_TIME
                 ) -> Iterator[None]:
    """Commit what is done in the block, or undo it. Another process may hold it up so long."""
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
    """Do what another process holds up; while it does, try again for so many seconds."""
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
    """Return rows from a place on, READ_BYTES but for the last; and whether these are all."""
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
