"""Turn an SQLite file into the log that processes share: each follows it, and publishes to it.

An event is a row of the table `event`, its id is `ms-n`. Ids are given inside the transaction that
adds the rows: who has read all rows up to an id has missed none. Any tool may read and add rows.
"""
from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Callable

from sse_core.broadcast import Unavailable
from sse_core.frames import Draft, Id, format_id
from sse_core.log import MAX_LOG
from sse_core.shared import MIN_KEPT, Row, SharedLog

if TYPE_CHECKING:       # who has no such file does without
    import sqlite3

APPLICATION, SCHEMA = 0x73736531, 1     # what the file says that it is, and in which version
POLL, IDLE_POLL = 0.01, 0.05    # seconds between two looks for what others write, when they just
SLOWER = 1.01                   # did and 4 s later; it grows by this factor. A look costs 120 us
READ_COUNT, READ_BYTES = 512, 1 << 20       # rows, and bytes of data, that are read at once
BUSY_TIME = 2.0         # seconds to wait for another process that writes; it may be stopped
BUSY_PAUSE = 0.002      # seconds between two tries meanwhile, at most, at random

_WHOLE = "integer check (typeof({0}) = 'integer' and {0} between 0 and 999999999999999)"
_CREATE = (f"create table event(ms {_WHOLE.format('ms')}, n {_WHOLE.format('n')}, channel text, "
           "event text, data text, primary key (ms, n)) without rowid")
_ROWS = ("select ms, n, cast(channel as text), cast(event as text), cast(data as text) "
         "from event ")         # a damaged file, or another's table, can hold numbers there
_FROM = _ROWS + "where (ms, n) >= (?, ?) order by ms, n limit ?"
_NEWEST = _ROWS + "order by ms desc, n desc limit ?"
_NEWEST_ID = "select ms, n from event order by ms desc, n desc limit 1 offset ?"
_OLDEST_ID = "select ms, n from event order by ms, n limit 1 offset ?"
_ADVICE = (             # what to do, by a part of what SQLite says
    ("not a database", "name another file, or move it away"),
    ("malformed", "restore a copy, or move it away"),
    ("readonly", "let this user write to it and to its folder"),
    ("unable to open", "it must be a file that this user may read and write, its folder, too"),
    ("full", "make room on the disk"), ("locked", "end the process that holds it"))

logger = logging.getLogger("sse_server")


class Unusable(Exception):
    """The file is not for us, or not there any more."""


class FileStream(SharedLog):
    """An SQLite file, followed by one thread; any thread may call `publish`.

    history: see SharedLog. sync: what is published outlives a power failure, too. Raises
    ValueError, one line that says what to do, for a file that is not ours or cannot be used; it is
    left as it was.
    """
    _away = "the history file cannot be used now (%s); trying until it can"
    _back, _skips = "the history file is back", "the history file has rows"

    def __init__(self, path: str | os.PathLike[str], history: int, sync: bool) -> None:
        super().__init__(history)
        import sqlite3
        self._faults = (sqlite3.Error, OSError, Unusable)
        self._changed = threading.Condition()   # guards the next three; a commit has ended
        self._orders: list[_Order] = []         # that nobody commits yet
        self._taken: list[_Order] = []          # that one thread commits now
        self._committing: int | None = None     # the thread that does now
        # What follows belongs to that thread
        self._writer = _File(path, sync)
        self._written: Id = (0, 0)              # the newest id that was given here
        self._uncounted = 0                     # rows since the last look for what to trim
        self._counted: sqlite3.Connection | None = None     # in which that was
        self._floor: Id | None = None           # rows below it are trimmed, some at each commit
        self._closed = False
        # And this belongs to the thread that follows, and to `load` before there is one
        self._reader = _File(path, sync)
        self._news = threading.Event()          # there may be something to read
        self._is_own = False                    # it may be from this process
        self._file: Id | None = None            # which it was, when the newest rows were read
        self._highest: Id = (0, 0)              # that was ever read
        self._seen: tuple[Any, ...] = ()        # connection, and its version that was read whole
        self._poll = IDLE_POLL
        try:
            connection = self._reader.connection()
            _insist(lambda: connection.execute("begin immediate"), BUSY_TIME)
            _fetch(connection, _NEWEST, (), self._history, MAX_LOG)
        except self._faults as fault:
            raise ValueError(f"cannot use the file {os.fspath(path)}: {_reason(fault)}") from None
        finally:
            self._reader.close()

    # For any thread

    def publish(self, drafts: Sequence[Draft]) -> list[str]:
        """Add events that have been checked, all or none, and return their ids.

        Who comes while another commits waits, then commits for all that wait. Raises Unavailable
        if the file does not take them, or was removed while it did.
        """
        if self._changed._is_owned() or (       # type: ignore[attr-defined]
                self._committing == threading.get_ident()):
            raise RuntimeError("a signal handler interrupted a publish of its thread by another")
        order = _Order(drafts)
        try:
            with self._changed:
                self._orders.append(order)
                while order.error is None and self._committing:
                    self._changed.wait()
                orders = self._take() if order.error is None else []
            if orders:
                self._commit(orders, BUSY_TIME)
        except BaseException:       # a signal handler's: if it came before the commit began
            self._end_commit("it was interrupted")
            raise
        if order.error:
            raise Unavailable(f"the history file does not take events now ({order.error})")
        return order.ids

    def _take(self) -> list[_Order]:
        """Return all orders, which this thread must commit now. Requires holding `_changed`."""
        self._committing = threading.get_ident()
        self._taken, self._orders = self._orders, []
        return self._taken

    def _end_commit(self, error: str) -> None:
        """Tell all orders what came of them, if this thread commits; let the next one commit."""
        with self._changed:
            if self._committing == threading.get_ident():
                for order in self._taken:
                    order.error = error
                self._committing = None
                self._changed.notify_all()

    # For the thread that commits

    def _commit(self, orders: Sequence[_Order], seconds: float) -> None:
        """Commit in one transaction, and tell all orders. Others may hold it up so long."""
        error = "it was interrupted"
        try:
            if self._closed:
                raise Unusable("the server is stopped")
            ids = iter(self._write([draft for order in orders for draft in order.drafts], seconds))
            for order in orders:
                order.ids = [str(format_id(next(ids))) for _ in order.drafts]
            error, self.trouble = "", None
            self._news.set()
        except self._faults as fault:
            error = self.trouble = _reason(fault)
        finally:
            if error:
                self._writer.close()
            self._end_commit(error)

    def _write(self, drafts: Sequence[Draft], seconds: float) -> list[Id]:
        """Commit drafts; without any, something all the same. Returns the ids they got."""
        connection, ids = self._writer.connection(), []
        _insist(lambda: connection.execute("begin immediate"), seconds)
        newest = map(_id, connection.execute(_NEWEST_ID, (0,)).fetchall())
        last, now = max(self._written, self._highest, *newest), int(time.time() * 1000)
        for _ in drafts:
            last = (now, 0) if now > last[0] else (last[0], last[1] + 1)
            ids.append(last)
        connection.executemany("insert into event values (?, ?, ?, ?, ?)", (
            (*new, draft.channel, draft.event or None, draft.data)
            for new, draft in zip(ids, drafts)))
        self._trim(connection, len(drafts))
        if not drafts:
            connection.execute(f"pragma user_version = {SCHEMA}")
        connection.execute("commit")
        self._written = last
        if not self._writer.is_in_place():      # SQLite would not mind
            raise Unusable("it was removed or replaced just now")
        return ids

    def _trim(self, connection: sqlite3.Connection, number: int) -> None:
        """Delete some of the oldest rows beyond those kept: twice as many as came, at most."""
        self._uncounted += number
        if self._uncounted > self._kept // 10 or self._counted is not connection:
            self._uncounted, self._counted = 0, connection
            self._floor = connection.execute(_NEWEST_ID, (self._kept - 1,)).fetchone()
        if self._floor:
            oldest = connection.execute(_OLDEST_ID, (2 * number,)).fetchone()
            below = min(self._floor, oldest or self._floor)
            connection.execute("delete from event where (ms, n) < (?, ?)", below)
            self._floor = self._floor if below < self._floor else None

    # For the thread that follows

    def _read(self) -> tuple[list[Row] | None, bool]:
        """Look for rows that follow the last one; see SharedLog.

        That is read again with them, in one statement, so that none can go in between.
        """
        seen = self._version()
        self._poll = min(SLOWER * self._poll, IDLE_POLL)
        if seen == self._seen:
            return [], True
        self._poll = self._poll if self._is_own else POLL       # somebody has committed
        connection, last = seen[0], self._last and self._last[:2]
        rows, is_all = _fetch(connection, _FROM, last or (0, 0), READ_COUNT, READ_BYTES)
        if last:    # another file may have it, too: a copy from before what was lost
            is_lost = not rows or rows.pop(0)[:2] != last or self._file != self._reader.identity
        else:       # nothing to stand on: it may not be another file, nor have been trimmed
            is_lost = self._seen[:1] != (connection,) or bool(rows) and bool(
                connection.execute(_OLDEST_ID, (MIN_KEPT - 1,)).fetchone())
        if is_lost:
            logger.warning("rows of the history file are gone, or it is another one: a gap is told")
            return None, True
        self._seen = seen if is_all else self._seen
        self._stand_on(rows[-1] if rows else self._last)
        return rows, is_all

    def _newest(self) -> list[Row]:
        seen = self._version()
        rows = _fetch(seen[0], _NEWEST, (), self._history, MAX_LOG)[0][::-1]
        new = [row for row in rows if row[:2] > self._highest]
        self._seen, self._file = seen, self._reader.identity
        self._stand_on(rows[-1] if rows else None)
        return new

    def _version(self) -> tuple[sqlite3.Connection, Any]:
        connection = self._reader.connection()
        return connection, connection.execute("pragma data_version").fetchone()

    def _stand_on(self, row: Row | None) -> None:
        self._last = row
        self._highest = max(self._highest, row[:2]) if row else self._highest

    def _failed(self, fault: Exception) -> str:
        self._reader.close()
        return _reason(fault)

    def _recover(self) -> None:
        self._try_to_write()

    def _try_to_write(self, wait: bool = False) -> None:
        """Commit what there is, or nothing, if no other thread does; or wait for that."""
        with self._changed:
            while wait and self._committing:
                self._changed.wait()
            is_free = not self._committing
            orders = self._take() if is_free else []
        if is_free:
            self._commit(orders, 0.0)

    def _rest(self, stopping: threading.Event, seconds: float) -> None:
        self._is_own = self._news.wait(seconds)
        self._news.clear()

    def _close(self) -> None:
        self._reader.close()
        self._closed = True
        self._try_to_write(wait=True)       # which closes


class _Order:
    """Drafts that are to be committed together, and what came of them."""

    def __init__(self, drafts: Sequence[Draft]) -> None:
        self.drafts = drafts
        self.ids: list[str] = []
        self.error: str | None = None       # None: not tried yet; empty: done


class _File:
    """A connection to the file that has this name now, for one thread at a time.

    SQLite keeps to the file it has opened, whatever becomes of the name, and would give a new file
    the -wal and -shm of the one before it. So here each use looks what the name means, and who
    opens a file first takes away what is of another, while a lock on the folder keeps others out.
    """

    def __init__(self, path: str | os.PathLike[str], sync: bool) -> None:
        self._path = os.path.realpath(path)
        self._names = [self._path + ending for ending in ("", "-wal", "-shm")]
        self._sync = sync
        self._connection: sqlite3.Connection | None = None
        self._opened: list[Id | None] = []      # what the names meant when that was made

    @property
    def identity(self) -> Id | None:
        """Which file is open, by device and inode."""
        return self._opened[0]

    def is_in_place(self) -> bool:
        """Say whether the names still mean what is open: a file can be moved away and back."""
        return [_identity(name) for name in self._names] == self._opened

    def connection(self) -> sqlite3.Connection:
        """Return the connection, made anew if there is none or the name means another file now.

        Raises sqlite3.Error, OSError or Unusable.
        """
        if not self._connection or not self.is_in_place():
            with _locked(os.path.dirname(self._path)):
                self._clear_away()
                self.close()
                self._connection = self._open()
        return self._connection

    def close(self) -> None:
        """Close the connection, if there is one; what was not committed is undone."""
        if self._connection:
            self._connection.close()
        self._connection = None

    def _clear_away(self) -> None:
        """Remove the -wal and -shm of a file that has not this name any more."""
        is_gone = _identity(self._path) is None
        if self._connection:        # to a file that may live on under another name
            self._connection.execute("pragma wal_checkpoint").fetchall()
        for name, opened in zip(self._names[1:], self._opened[1:] or (None, None)):
            if is_gone or self._connection and _identity(name) == opened:
                with suppress(FileNotFoundError):
                    os.unlink(name)

    def _open(self) -> sqlite3.Connection:
        import sqlite3
        connection = sqlite3.connect(self._path, timeout=0.0, isolation_level=None,
                                     check_same_thread=False)
        try:
            _insist(lambda: self._set_up(connection), BUSY_TIME)
        except BaseException:
            connection.close()
            raise
        self._opened = [_identity(name) for name in self._names]
        return connection

    def _set_up(self, connection: sqlite3.Connection) -> None:
        """Make sure that the file is ours and can be written; make a table in an empty one."""
        connection.text_factory = bytes
        application, version, tables = (connection.execute(query).fetchone()[0] for query in (
            "pragma application_id", "pragma user_version", "select count(*) from sqlite_master"))
        is_empty = (application, version, tables) == (0, 0, 0)
        if application != APPLICATION and not is_empty:
            raise Unusable("it is of another program: name another file, or move it away")
        if version > SCHEMA:
            raise Unusable("it is of a newer version of this server: use that, or another file")
        if not os.access(self._path, os.W_OK):      # SQLite would open it all the same
            raise Unusable("it is readonly")
        connection.execute("pragma journal_mode = wal")
        connection.execute(f"pragma synchronous = {'full' if self._sync else 'normal'}")
        if is_empty:
            connection.execute("begin immediate")
            connection.execute(_CREATE)
            connection.execute(f"pragma application_id = {APPLICATION}")
            connection.execute(f"pragma user_version = {SCHEMA}")
            connection.execute("commit")
        connection.execute("pragma data_version").fetchone()    # a copy has no -wal and -shm yet


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Hold a lock on a folder, as other processes do for the milliseconds they need it."""
    import fcntl
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _insist(lambda: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB), BUSY_TIME)
        yield
    finally:
        os.close(descriptor)


def _identity(name: str) -> Id | None:
    """Return the device and inode that a name means; None if it means nothing."""
    try:
        status = os.stat(name)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _insist(take: Callable[[], object], seconds: float) -> None:
    """Take a lock; while another process has it, try again for so many seconds."""
    until = time.monotonic() + seconds
    while True:
        try:
            take()
            return
        except Exception as error:
            is_busy = isinstance(error, BlockingIOError) or "locked" in str(error)
            if not is_busy or time.monotonic() >= until:
                raise
        time.sleep(random.uniform(0, BUSY_PAUSE))


def _id(ms_and_n: tuple[Any, ...]) -> Id:
    """Return the id of a row. Raises Unusable if it is none: the file is damaged."""
    ms, n = ms_and_n
    if not (isinstance(ms, int) and isinstance(n, int)):
        raise Unusable("it has an id that is no number: delete that row, or move the file away")
    return ms, n


def _fetch(connection: sqlite3.Connection, query: str, values: tuple[int, ...], count: int,
           size: int) -> tuple[list[Row], bool]:
    """Return `count` rows at most, of `size` bytes but for the last; and whether these are all."""
    rows: list[Row] = []
    with closing(connection.execute(query, (*values, count))) as cursor:
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
