"""dsmq, the dead simple message queue: one file that moves strings between processes.

A server holds topics in memory; clients put strings into a topic and read them back.

    python dsmq.py serve                      # in one terminal

    from dsmq import connect                  # in as many programs as you like
    mq = connect()                            # 127.0.0.1, port 30008
    mq.put("greetings", "hello")
    mq.get("greetings")                       # "" if there is nothing (yet)

Semantics
    One-to-many: every client reads every message of a topic, first in first out, at
    its own pace. A client sees what was put after it connected. When put returns, the
    message is stored, once, and every other client's next get sees it. A message older
    than the time to live (600 s) is neither handed out nor kept. A lost connection is
    made again by the next call, which carries on where the last one stopped. After a
    restart of the server its messages are gone; clients carry on with the new ones.

Wire protocol, version 1
    A frame is a 4-byte unsigned big-endian length and that many bytes of UTF-8 JSON,
    always an object. One reply a request, in order, on each connection. Unknown fields
    are ignored. A reply with `error` (text) and `code` refuses the request and changes
    nothing. README has the details.

    hello         protocol, nonce            -> protocol, max_frame_bytes, head (or with
                                                a secret challenge, proof and no head)
    authenticate  proof                      -> head
    put           topic, messages, client, sequence, settled      -> head
    get           topic, after, limit, wait  -> messages, ids, expires
    get_latest    topic, after               -> messages, ids, expires
    stats                                    -> what the client's `stats` gives
    shutdown

Threads and locks
    Server: a thread accepts, one thread serves each connection, a timer thread purges,
    and one answers readers of whom several waited for the same message. What a waiting
    reader does not take in at once, one more thread sends.
    `MessageStore._lock` guards all stored state, and is never held while sending,
    receiving, encoding or decoding. `_Server._gate` guards the set of connections.
    `Waiter.woken` is held until a get that waits is answered.
    Client: each call borrows a connection of its own for as long as it lasts, so calls
    in several threads do not wait for each other; `DSMQClientSideConnection._lock`
    guards cursors and idle connections, for moments only. `_fork_lock` lets one thread
    of a forked process tidy what it inherited.
"""

from __future__ import annotations

import _thread
import argparse
import binascii
import bisect
import contextlib
import errno
import hmac
import importlib
import ipaddress
import json
import logging
import math
import multiprocessing
import operator
import os
import queue
import re
import secrets
import select
import signal
import socket
import socketserver
import sqlite3
import ssl
import struct
import sys
import threading
import time
import urllib.parse
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import repeat
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

__all__ = [
    "AuthenticationError",
    "DSMQClientSideConnection",
    "DSMQError",
    "QueueFull",
    "connect",
    "serve",
]
__version__ = "2.0.0"

# Programs written for the original say `from dsmq.server import serve` and
# `from dsmq.client import connect`; both names are this module.
if __name__ in sys.modules:  # not when some tool runs the file without importing it
    server = client = sys.modules[__name__]
    sys.modules[f"{__name__}.server"] = sys.modules[f"{__name__}.client"] = server

_T = TypeVar("_T")
_Messages = tuple[list[int], list[str], float]  # ids, texts, when the first expires
_Bytes = bytes | memoryview
_Row = tuple[int, int, float, bytes]  # id, topic's key, when it was put, body

_log = logging.getLogger("dsmq")
_log.addHandler(logging.NullHandler())  # a library prints nothing unless asked to

# ---------------------------------------------------------------------------- limits

DEFAULT_HOST = "127.0.0.1"  # loopback: nobody else on the network gets in unasked
DEFAULT_PORT = 30008
PROTOCOL = 1

TIME_TO_LIVE_SECONDS = 600.0
MAX_TIME_TO_LIVE_SECONDS = 1e9  # as good as for ever, and JSON can say it
MAX_BYTES = 1 << 30  # memory of stored messages: what a small machine can spare
MAX_FRAME_BYTES = 16 << 20  # a request or reply: an image fits, a film does not
MAX_VALUE_BYTES = 1_000_000_000  # SQLite's limit; the header could say more
MIN_FRAME_BYTES = 1000  # below it the server's own replies and errors do not fit
MAX_PUT_MESSAGES = 100_000  # stored in one go, in which others wait: 0.2 s
MAX_CLIENTS = 10_000  # connections, a thread each
MAX_TOPIC_CHARACTERS = 1000
MAX_INTEGER = (1 << 63) - 1  # SQLite's, and most other languages' widest
MIN_INTEGER = -MAX_INTEGER - 1
MAX_NAME_CHARACTERS = 256  # of a `client` or `nonce` field, which the server keeps
ENVELOPE_BYTES = 128  # of a reply around its messages and ids
PUT_ENVELOPE_BYTES = 180  # of a client's put around its topic and messages
STATS_TOPIC_BYTES = 31  # of a topic in the stats beside its name, at least
ID_BYTES = 20  # of an id in a reply, at most
# What a stored message takes in memory beside its text (row, index; measured 65 to 75
# bytes), and what a topic takes beside its name: both count towards max_bytes, so that
# a flood of empty messages is bounded too.
MESSAGE_OVERHEAD_BYTES = 72
TOPIC_OVERHEAD_BYTES = 400

UNTRUSTED_FRAME_BYTES = 4096  # a peer that has yet to prove the secret needs no more
STALL_SECONDS = 30.0  # a peer silent inside a frame, or not reading, is dropped
LONGEST_SECONDS = 1e6  # a timeout every system takes; longer ones begin again
LINGER_SECONDS = 1.0  # a refused peer gets this long to read why
MAX_WAIT_SECONDS = 30.0  # one request's wait; clients ask again, so the dead are found
VANISHED_CHECK_SECONDS = 2.0  # between looks whether a waiting client is still there
KEEPALIVE_SECONDS = 60  # of silence, then TCP asks whether the peer still lives
CLOSE_SECONDS = 0.3  # for connections to end by themselves when the server stops
POLL_SECONDS = 0.1  # between looks whether the server should stop
RETRY_PAUSE_SECONDS = 0.01  # before the first retry; doubles
MAX_RETRY_PAUSE_SECONDS = 0.25  # so a server started at the same moment is found soon
CROWD_PAUSE_SECONDS = 0.002  # between replies to readers of whom several wait

PEER_LOG_LINES = 10  # a second, of what peers do wrong
PURGE_SECONDS = 0.5  # between looks for expired messages
PURGE_PAUSE_SECONDS = 0.001  # between steps, in which other threads get the lock
STEP_MESSAGES = 500  # handled in one hold of the store's lock: about a millisecond
STEP_BYTES = 1 << 20  # likewise
YOUNG_MESSAGES = 32  # not in the database yet, so that it takes many at a time ...
YOUNG_PUT_BYTES = 4096  # ... unless a put is longer
COMPACT_BYTES = 16 << 20  # free memory in the database worth giving back
REMEMBERED_CLIENTS = 10_000  # whose last puts are remembered, and ...
REMEMBERED_PUTS = 64  # ... how many of each, so that a repeated put is stored once
REMEMBERED_SECONDS = 60.0  # at least, however short the messages live

READ_AHEAD_MESSAGES = 1000  # one request's worth of messages at most, ...
READ_AHEAD_FIRST = 10  # ... while their size is unknown, ...
READ_AHEAD_BYTES = 1 << 20  # ... and once it is known
IDLE_RECEIVE_BYTES = 4096  # a thread's buffer while it waits for a peer to speak
SEND_BYTES = 1 << 18  # given to the system at a time
RECEIVE_BYTES = 1 << 18  # and while a long frame arrives
LONG_TEXT_BYTES = 4096  # above it the quick way to encode pays
KEPT_BYTES = 2 << 20  # of freed memory is worth keeping for the next long message

# ---------------------------------------------------------------------------- errors


class DSMQError(Exception):
    """The root of dsmq's own errors: the server refused, for the reason it names."""

    code = "stale"  # in the reply to the client


class QueueFull(DSMQError):
    """The server's memory limit, `max_bytes`, is reached; nothing of the request that
    met it was stored."""

    code = "full"


class AuthenticationError(DSMQError):
    """A peer did not prove that it knows the shared secret."""


class FrameError(DSMQError, ConnectionError):
    """The peer's bytes are no frame of this protocol; the connection is given up."""


class _Refusal(Exception):
    """A request the server refuses: what the error reply says."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


def _shown(value: object) -> str:
    """A value as an error message shows it: one line of bounded length, in ASCII."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value[:60] if isinstance(value, (str, bytes)) else value)
    text = text if len(text) <= 80 else text[:77] + "..."
    return text.encode("ascii", "backslashreplace").decode()


# What an argument must be. Each raises TypeError or ValueError, naming the value.


def _check_address(host: object, port: object) -> None:
    if not isinstance(host, str):
        raise TypeError(f"host must be a str, not {_shown(host)}")
    _check_number("port", port, 0, 65535, whole=True)


def _check_number(
    name: str, value: object, least: float, most: float, whole: bool = False
) -> None:
    kinds = (int,) if whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool):
        kind = "an int" if whole else "a number"
        raise TypeError(f"{name} must be {kind}, not {_shown(value)}")
    # Not a number fails this, as does an integer too large for a float.
    if not least <= value <= most or (
        not whole and math.inf > value > sys.float_info.max
    ):
        raise ValueError(f"{name} must be {least} to {most}, not {_shown(value)}")


def _check_secret(secret: object) -> None:
    if secret is not None and not isinstance(secret, str):
        raise TypeError(f"secret must be a str, not a {type(secret).__name__}")
    if secret == "":
        raise ValueError("secret must not be empty: it would keep nobody out")
    if secret is not None:
        try:
            secret.encode()
        except UnicodeEncodeError:
            raise ValueError("secret must be text that UTF-8 can carry") from None


# ---------------------------------------------------------------------------- frames

_HEADER = struct.Struct(">I")
_ESCAPED = b'\n"\\' + bytes(range(32))  # what JSON cannot carry as it is
_encode = json.JSONEncoder(separators=(",", ":")).encode


def encode_text(text: str) -> bytes:
    """`text` as UTF-8 JSON. Raises UnicodeEncodeError for a lone surrogate."""
    if len(text) > LONG_TEXT_BYTES:
        raw = text.encode()
        # json looks at each character twice; to look for each byte that needs an escape
        # takes a seventh of that (0.16 ms instead of 1.1 ms for 500 kB).
        if not any(map(raw.__contains__, _ESCAPED)):
            return b'"%b"' % raw
    return json.encoder.encode_basestring(text).encode()


def encode_frame(*body: bytes) -> bytes:
    """A frame around a body, which may come in parts: header and body together, for one
    send and one packet. A long part is copied once."""
    return b"".join((_HEADER.pack(sum(map(len, body))), *body))


def encode_object(fields: dict[str, Any]) -> bytes:
    """The frame of a JSON object, in ASCII so that any text survives in an error."""
    return encode_frame(_encode(fields).encode())


def _bounded_int(digits: str) -> int:
    # Python's own parsing of an integer takes quadratic time, or fails, for thousands
    # of digits; beyond 64 bits one value too large is as wrong as any other.
    return int(digits) if len(digits) <= 20 else MAX_INTEGER + 1


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _decoder(**options: Any) -> Callable[[str], Any]:
    decoder = json.JSONDecoder(**options)

    def decode(text: str) -> Any:
        # To look for white space around it takes a short text a quarter of its time.
        try:
            value, end = decoder.raw_decode(text)
        except ValueError:
            end = -1
        return value if end == len(text) else decoder.decode(text)

    return decode


_decode = _decoder(parse_int=_bounded_int, parse_constant=_no_constant)
_decode_reply = _decoder()  # quicker, with a thousand ids in a reply


def decode_object(
    body: bytes | bytearray, decode: Callable[[str], Any] = _decode
) -> dict[str, Any]:
    """The JSON object in a frame's body. Raises FrameError if it is not one."""
    try:
        value = decode(str(body, "utf-8"))
    except (ValueError, RecursionError) as error:
        raise FrameError(f"a frame must be UTF-8 JSON: {_shown(str(error))}") from None
    if not isinstance(value, dict):
        raise FrameError(f"a frame must be a JSON object, not {type(value).__name__}")
    return value


def _keep_freed_memory() -> None:
    """Halves the time of long messages where malloc is glibc's: it gives blocks as long
    as they are back to the system at once, and getting them again costs a page fault
    for each 4 kB, until it has seen a longer one come and go. No page of this one is
    ever touched. Elsewhere it does nothing."""
    bytearray(KEPT_BYTES)


def _give_memory_back() -> None:
    """Returns freed memory to the system where malloc is glibc's, which unasked keeps
    what threads other than the first had."""
    if sys.platform == "linux":
        with contextlib.suppress(ImportError, OSError, AttributeError):  # not glibc's
            importlib.import_module("ctypes").CDLL(None).malloc_trim(0)


class FrameSocket:
    """A connected socket that sends and receives whole frames, at either end.

    `end` is a monotonic time by which the call must be done, or TimeoutError is raised.
    Without it every single send and receive may take STALL_SECONDS, except that a frame
    may be waited for as long as it takes to begin.
    """

    def __init__(self, sock: socket.socket, max_frame_bytes: int) -> None:
        # A small frame must not wait for the acknowledgement of the one before it.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A peer whose machine vanished never says so; keepalive finds out.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE"):  # Linux, Windows; macOS
            if hasattr(socket, name):  # elsewhere the system's two hours hold
                option = getattr(socket, name)
                sock.setsockopt(socket.IPPROTO_TCP, option, KEEPALIVE_SECONDS)
                break
        sock.settimeout(STALL_SECONDS)
        self._timeout = STALL_SECONDS  # in force
        self.sock = sock
        self.max_frame_bytes = max_frame_bytes
        self._unread = b""

    def limit_to(self, end: float | None) -> None:
        if end is not None:
            remaining = end - time.monotonic()
            if remaining <= 0:
                raise TimeoutError("timed out")
            # To set it is a system call; one a little longer than need be will do.
            if not remaining <= self._timeout <= 1.02 * remaining:
                self._timeout = min(1.01 * remaining, LONGEST_SECONDS)
                self.sock.settimeout(self._timeout)

    def relax(self) -> None:
        """From here on there is no `end` any more."""
        self._timeout = STALL_SECONDS
        self.sock.settimeout(STALL_SECONDS)

    def send(self, frame: _Bytes, end: float | None = None) -> None:
        """Sends it all. socket.sendall would allow STALL_SECONDS for the whole frame,
        which a long one over a slow line may need, as long as it moves."""
        sent = 0
        while sent < len(frame):
            self.limit_to(end)
            # TLS counts the time until all it is given has gone, so it gets parts.
            sent += self.sock.send(memoryview(frame)[sent : sent + SEND_BYTES])

    def receive(self, end: float | None = None) -> bytes | bytearray | None:
        """The body of the next frame; None if the peer closed after the last one.
        Raises FrameError for one longer than `max_frame_bytes`, ConnectionError if the
        peer closed in its middle."""
        data = self._unread
        while len(data) < _HEADER.size:
            self.limit_to(end)
            try:
                chunk = self.sock.recv(IDLE_RECEIVE_BYTES)
            except TimeoutError:
                if data or end is not None:
                    raise
                continue
            if not chunk and not data:
                return None
            data += self._not_cut(chunk)
        (size,) = _HEADER.unpack_from(data)
        if size > self.max_frame_bytes:
            raise FrameError(
                f"a frame of {size} bytes, but the limit is {self.max_frame_bytes}"
            )
        total = _HEADER.size + size
        if len(data) < total:
            return self._receive_rest(bytearray(data), total, end)
        self._unread = data[total:]
        return data[_HEADER.size : total]

    def _receive_rest(
        self, data: bytearray, total: int, end: float | None
    ) -> bytearray:
        # Memory grows with what came: a length announced and never sent costs nothing.
        self._unread = b""
        while len(data) < total:
            self.limit_to(end)
            data += self._not_cut(self.sock.recv(min(total - len(data), RECEIVE_BYTES)))
        del data[: _HEADER.size]
        return data

    @staticmethod
    def _not_cut(chunk: bytes) -> bytes:
        if not chunk:
            raise ConnectionResetError("the peer closed in the middle of a frame")
        return chunk

    def shut(self, how: int = socket.SHUT_RDWR) -> None:
        """Ends the conversation from any thread; the one using the socket finds out."""
        # Not SSLSocket's own, after which its user would go on in plain text.
        with contextlib.suppress(OSError):  # the peer may have been faster
            socket.socket.shutdown(self.sock, how)

    def close(self) -> None:
        """Frees the descriptor and no more: after a fork the other side has it too."""
        self.sock.close()


# --------------------------------------------------------------------- message store


class Batch(NamedTuple):
    """Messages of a topic in order, as the store keeps them."""

    ids: list[int]
    bodies: list[bytes]
    expires_seconds: float  # until the oldest of them expires


EMPTY = Batch([], [], 0.0)


class Waiter:
    """A reader that waits for a topic's next message.

    `woken` is held from the start; whoever took the waiter out of its topic (put, or
    close) releases it, once.
    """

    def __init__(self, topic: str, after: int, limit: int, room_bytes: int) -> None:
        self.topic = topic
        self.after = after
        self.limit = limit
        self.room_bytes = room_bytes
        self.woken = threading.Lock()
        self.woken.acquire()


class _Topic:
    __slots__ = ("bytes", "key", "messages", "name", "newest", "waiters")

    def __init__(self, name: str, key: int) -> None:
        self.name = name
        self.key = key  # stands for the name in every row and index entry
        self.newest = 0  # id; answers a reader that has everything without SQL
        self.messages = 0
        self.bytes = TOPIC_OVERHEAD_BYTES + len(name.encode())
        self.waiters: dict[Waiter, None] = {}  # a set that keeps order


class Origin(NamedTuple):
    """Where a put comes from, so that it is stored once, and not after later ones."""

    client: str
    sequence: int
    settled: int  # the client expects no more of its puts up to this sequence


class _RecentPuts:
    __slots__ = ("at", "heads", "settled")

    def __init__(self) -> None:
        self.at = 0.0  # of the last one
        self.settled = MIN_INTEGER
        self.heads: dict[int, int] = {}  # by sequence, newest last


def _gather(
    rows: Iterable[tuple[int, bytes, float]], limit: int, room_bytes: int
) -> tuple[list[int], list[bytes], float]:
    """Ids and bodies of the first rows that fit, at least one if there is one, and when
    the first of them was put."""
    ids: list[int] = []
    bodies: list[bytes] = []
    first_put_at = 0.0
    for id_, body, put_at in rows:
        room_bytes -= len(body) + ID_BYTES
        if not ids:
            first_put_at = put_at
        elif room_bytes < 0:
            break
        ids.append(id_)
        bodies.append(body)
        if len(ids) >= limit:
            break
    return ids, bodies, first_put_at


class MessageStore:
    """Topics of messages, which are opaque bytes here; all semantics but the cursors.

    Ids are contiguous over all topics: the rows are exactly those with ids from
    `_purged + 1` to `_head`, in the order of their age. So the oldest go first, and the
    boundary between expired and live is found by bisection.
    """

    def __init__(
        self,
        time_to_live: float,
        max_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.time_to_live = time_to_live
        self.max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.Lock()  # guards everything below
        self._db = self._open()
        # The one look at the wall clock. Microseconds, because ids then grow more
        # slowly than the clock does, so a restarted server starts above them, and stay
        # below 2**53, where JavaScript's integers end, for two centuries.
        self._head = self._purged = time.time_ns() // 1000
        # The newest rows, which are still to be inserted: together they cost less (2
        # instead of 5 us each), most reads are of these alone, and SQLite gives up the
        # interpreter lock at every step, so that busy threads trip over each other.
        self._young: list[_Row] = []
        self._bytes = 0
        self._topics: dict[str, _Topic] = {}
        self._topics_by_key: dict[int, _Topic] = {}
        self._last_key = 0
        self._name_bytes = 0  # of all topics
        self._recent: OrderedDict[str, _RecentPuts] = OrderedDict()  # by client
        self._closed = False

    @staticmethod
    def _open() -> sqlite3.Connection:
        # Any thread may use it, under the lock. Autocommit: put begins its own
        # transactions. The journal stays on, in memory (0.7 us a put): without it a
        # statement that runs out of memory half-way leaves a broken database.
        db = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        # Bodies are last in the row and the index holds none of them, so long messages
        # do not slow their neighbours. The index ends with the id, as all do.
        db.execute(
            "CREATE TABLE messages (id INTEGER PRIMARY KEY, topic INTEGER NOT NULL,"
            " put_at REAL NOT NULL, body BLOB NOT NULL)"
        )
        db.execute("CREATE INDEX by_topic ON messages (topic)")
        return db

    @property
    def head(self) -> int:
        """The newest id."""
        return self._head

    def put(
        self, topic: str, bodies: list[bytes], origin: Origin | None = None
    ) -> tuple[int, Batch, list[Waiter]]:
        """Stores all bodies or none; gives the id of the last, what was stored, and the
        waiters that are now to be answered by the caller. A put whose client and
        sequence were stored before gives that id and nothing else. Raises QueueFull,
        and DSMQError for a put that comes too late: its client has settled it."""
        with self._lock:
            self._check_open()
            known = self._known_head(origin)
            if known is not None:
                return known, EMPTY, []
            entry = self._topics.get(topic) or _Topic(topic, self._last_key + 1)
            cost = sum(map(len, bodies)) + MESSAGE_OVERHEAD_BYTES * len(bodies)
            self._check_room(cost + (0 if entry.messages else entry.bytes))
            ids = list(range(self._head + 1, self._head + 1 + len(bodies)))
            now = self._clock()
            rows = [(id_, entry.key, now, body) for id_, body in zip(ids, bodies)]
            young = len(self._young) + len(rows) <= YOUNG_MESSAGES
            if young and cost <= YOUNG_PUT_BYTES:
                self._young += rows
            else:
                self._insert(rows)
            self._count(entry, len(bodies), cost)
            self._head = entry.newest = ids[-1]
            self._remember(origin, now)
            # A reader whose `after` is above the head waits for later messages.
            woken = [w for w in entry.waiters if w.after < self._head]
            for waiter in woken:
                del entry.waiters[waiter]
            return self._head, Batch(ids, bodies, self.time_to_live), woken

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionAbortedError("the server has stopped")

    def _check_room(self, cost_bytes: int) -> None:
        if self._bytes + cost_bytes > self.max_bytes:
            raise QueueFull(
                f"no room for {cost_bytes} bytes: {self._bytes} of max_bytes"
                f" {self.max_bytes} are in use"
            )

    def _insert(self, rows: list[_Row]) -> None:
        """Writes the young rows and these to the database, all or none."""
        if not rows and not self._young:
            return
        self._db.execute("BEGIN")
        try:
            sql = "INSERT INTO messages VALUES (?, ?, ?, ?)"
            self._db.executemany(sql, self._young + rows)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # out of memory, SQLite may have ended it
                self._db.execute("ROLLBACK")
            raise
        self._young = []

    def _count(self, entry: _Topic, messages: int, cost_bytes: int) -> None:
        """Adds to the accounts (or takes from them) of a topic and of the whole."""
        if entry.messages == 0:
            self._bytes += entry.bytes
            self._enter(entry)
        entry.messages += messages
        entry.bytes += cost_bytes
        self._bytes += cost_bytes
        if entry.messages == 0:
            self._bytes -= entry.bytes
            self._forget_if_unused(entry)

    def _enter(self, entry: _Topic) -> None:
        if entry.key > self._last_key:
            self._last_key = entry.key
            self._name_bytes += len(entry.name)
        self._topics[entry.name] = self._topics_by_key[entry.key] = entry

    def _forget_if_unused(self, entry: _Topic) -> None:
        if not entry.messages and not entry.waiters:
            self._name_bytes -= len(entry.name)
            del self._topics[entry.name], self._topics_by_key[entry.key]

    def _known_head(self, origin: Origin | None) -> int | None:
        recent = self._recent.get(origin.client) if origin else None
        if recent is None or origin is None:
            return None
        head = recent.heads.get(origin.sequence)
        if head is None and origin.sequence <= recent.settled:
            # Left on its way by an interrupt or a timeout, on a connection lost since.
            raise DSMQError(f"sequence {origin.sequence} was settled before")
        return head

    def _remember(self, origin: Origin | None, now: float) -> None:
        if origin is None:
            return
        recent = self._recent.get(origin.client)
        if recent is None:
            recent = self._recent[origin.client] = _RecentPuts()
        self._recent.move_to_end(origin.client)
        recent.at = now
        recent.settled = max(recent.settled, origin.settled)
        recent.heads[origin.sequence] = self._head
        if len(recent.heads) > REMEMBERED_PUTS:
            del recent.heads[next(iter(recent.heads))]
        if len(self._recent) > REMEMBERED_CLIENTS:
            self._recent.popitem(last=False)

    def get(
        self,
        topic: str,
        after: int,
        limit: int,
        room_bytes: int,
        waiter: Waiter | None = None,
    ) -> Batch:
        """The oldest live messages with ids above `after`, as many as fit `limit` and
        `room_bytes` (each with ID_BYTES), at least one if there is one. If there is
        none, `waiter` begins to wait for one."""
        batch = Batch([], [], 0.0)
        while len(batch.ids) < limit:
            # In steps, for a long read must not keep everyone else from the lock.
            step = min(limit - len(batch.ids), STEP_MESSAGES)
            with self._lock:
                self._check_open()
                more = self._read(topic, after, step, min(room_bytes, STEP_BYTES))
                if waiter and not more.ids and not batch.ids:
                    self._begin_wait(waiter)
            if not more.ids:
                break
            room_bytes -= sum(map(len, more.bodies)) + ID_BYTES * len(more.ids)
            if batch.ids and room_bytes < 0:
                break
            batch.ids.extend(more.ids)
            batch.bodies.extend(more.bodies)
            after = more.ids[-1]
            if len(batch.ids) == len(more.ids):
                batch = batch._replace(expires_seconds=more.expires_seconds)
        return batch

    def _read(self, topic: str, after: int, limit: int, room_bytes: int) -> Batch:
        entry = self._topics.get(topic)
        if entry is None or entry.newest <= after:
            return EMPTY
        cutoff = self._clock() - self.time_to_live
        ids, bodies, put_at = self._select(entry, after, limit, room_bytes)
        # Rows are in the order of their age, so only the first needs a look.
        if ids and put_at <= cutoff:
            after = max(after, self._newest_expired(cutoff))
            ids, bodies, put_at = self._select(entry, after, limit, room_bytes)
        return Batch(ids, bodies, put_at - cutoff) if ids else EMPTY

    def _select(
        self, entry: _Topic, after: int, limit: int, room_bytes: int
    ) -> tuple[list[int], list[bytes], float]:
        newer = self._head - after
        if newer <= len(self._young):
            key = entry.key
            rows = [(i, b, at) for i, k, at, b in self._young[-newer:] if k == key]
            return _gather(rows, limit, room_bytes)
        self._insert([])
        cursor = self._db.execute(
            "SELECT id, body, put_at FROM messages WHERE topic = :topic AND id > :after"
            " ORDER BY id LIMIT :limit",
            {"topic": entry.key, "after": after, "limit": limit},
        )
        try:
            return _gather(cursor, limit, room_bytes)
        finally:
            cursor.close()  # a statement left half-way would get in the way of a DELETE

    def get_latest(self, topic: str, after: int) -> Batch:
        """The newest live message with an id above `after`, or none."""
        with self._lock:
            self._check_open()
            entry = self._topics.get(topic)
            if entry is None or entry.newest <= after:
                return EMPTY
            return self._read(topic, entry.newest - 1, 1, 0)

    def _newest_expired(self, cutoff: float) -> int:
        self._insert([])
        ids = range(self._purged + 1, self._head + 1)
        return self._purged + bisect.bisect_right(ids, cutoff, key=self._put_at)

    def _put_at(self, id_: int) -> float:
        sql = "SELECT put_at FROM messages WHERE id = :id"
        return float(self._db.execute(sql, {"id": id_}).fetchone()[0])

    def _begin_wait(self, waiter: Waiter) -> None:
        entry = self._topics.get(waiter.topic)
        if entry is None:
            entry = _Topic(waiter.topic, self._last_key + 1)
            self._enter(entry)
        entry.waiters[waiter] = None

    def end_wait(self, waiter: Waiter) -> bool:
        """Whether the waiter was still waiting; if not, a put has it in hand."""
        with self._lock:
            entry = self._topics.get(waiter.topic)
            if entry is None or waiter not in entry.waiters:
                return False
            del entry.waiters[waiter]
            self._forget_if_unused(entry)
            return True

    def purge(self) -> bool:
        """Frees the oldest expired messages, a step's worth; whether there were any."""
        with self._lock:
            self._insert([])
            newest, costs = self._expired_step(self._clock() - self.time_to_live)
            if not costs:
                return False
            self._db.execute("DELETE FROM messages WHERE id <= :id", {"id": newest})
            self._purged = newest
            for key, (messages, cost_bytes) in costs.items():
                self._count(self._topics_by_key[key], -messages, -cost_bytes)
            return True

    def _expired_step(self, cutoff: float) -> tuple[int, dict[int, tuple[int, int]]]:
        """The newest id of the step, and its messages and bytes by topic key."""
        newest = self._purged
        costs: dict[int, tuple[int, int]] = {}
        room_bytes = STEP_BYTES
        cursor = self._db.execute(
            "SELECT id, topic, put_at, length(body) FROM messages"
            " ORDER BY id LIMIT :limit",
            {"limit": STEP_MESSAGES},
        )
        for id_, key, put_at, size in cursor:
            if put_at > cutoff or room_bytes <= 0:
                break
            newest = id_
            room_bytes -= size
            messages, cost_bytes = costs.get(key, (0, 0))
            costs[key] = messages + 1, cost_bytes + size + MESSAGE_OVERHEAD_BYTES
        cursor.close()  # a statement left half-way would get in the way of the DELETE
        return newest, costs

    def forget_puts(self) -> None:
        """Frees the memory of puts too long ago to be repeated."""
        with self._lock:
            kept = max(self.time_to_live, REMEMBERED_SECONDS)
            oldest = self._clock() - kept
            while self._recent and next(iter(self._recent.values())).at < oldest:
                self._recent.popitem(last=False)

    def compact(self) -> None:
        """Gives memory back to the system once little is left of much: SQLite keeps the
        pages of deleted rows for new ones, so the few live rows move to a new
        database."""
        with self._lock:
            if self._head - self._purged > STEP_MESSAGES or self._bytes > STEP_BYTES:
                return
            self._insert([])
            (pages,) = self._db.execute("PRAGMA freelist_count").fetchone()
            (page_bytes,) = self._db.execute("PRAGMA page_size").fetchone()
            if pages * page_bytes < COMPACT_BYTES:
                return
            old, new = self._db, self._open()
            rows = old.execute("SELECT id, topic, put_at, body FROM messages")
            new.executemany("INSERT INTO messages VALUES (?, ?, ?, ?)", rows)
            self._db = new
        old.close()  # takes a while, without the lock
        _give_memory_back()

    def stats(self, room_bytes: int = 1 << 30) -> dict[str, Any]:
        """Counts of messages and bytes, in all and, if their names fit, by topic."""
        with self._lock:
            stats: dict[str, Any] = {
                "messages": self._head - self._purged,
                "bytes": self._bytes,
                "time_to_live": self.time_to_live,
                "max_bytes": self.max_bytes,
            }
            least_bytes = self._name_bytes + STATS_TOPIC_BYTES * len(self._topics)
            if least_bytes > room_bytes:
                return {**stats, "topics": {}, "topics_left_out": len(self._topics)}
            topics = [(t.name, t.messages, t.bytes) for t in self._topics.values()]
        sizes = {n: {"messages": m, "bytes": b} for n, m, b in topics if m}
        return {**stats, "topics": sizes}

    def close(self) -> None:
        """Wakes every waiter and frees the messages; may be called again."""
        with self._lock:
            self._closed = True
            self._db.close()
            waiters = [w for t in self._topics.values() for w in t.waiters]
            self._topics.clear()
        for waiter in waiters:
            waiter.woken.release()


# ---------------------------------------------------------------------------- server


class _Connection(FrameSocket):
    """The server's end of a client's connection.

    Its own thread serves it; besides, the thread of a client that puts may `push` the
    reply to a waiting reader, while the connection's own thread waits.
    """

    def __init__(self, sock: socket.socket, max_frame_bytes: int) -> None:
        super().__init__(sock, max_frame_bytes)
        self.peer = _address(sock.getpeername())
        self._at_once: socket.socket | None = None
        self._arrivals: Any = None  # a select.poll, where `hear` can be had

    def start(self, context: ssl.SSLContext | None) -> None:
        """The TLS handshake, if any: in the connection's own thread: it may stall."""
        if context:
            self.sock = context.wrap_socket(
                self.sock, server_side=True, do_handshake_on_connect=False
            )  # known before the handshake, so that `close` can end it
            self.sock.do_handshake()
            return  # two threads must not use a TLS socket, so nothing is pushed
        # A second view of the same descriptor, which never waits. (The first has a
        # timeout, and Python then waits for the socket before each send.)
        family, kind, proto = self.sock.family, self.sock.type, self.sock.proto
        self._at_once = socket.socket(family, kind, proto, self.sock.fileno())
        self._at_once.setblocking(False)
        if hasattr(select, "poll"):  # not so on Windows
            self._arrivals = select.poll()
            self._arrivals.register(self._at_once, select.POLLIN)

    @property
    def hears(self) -> bool:
        """Whether a thread that waits does so for the peer, and not to be woken."""
        return self._arrivals is not None

    def hear(self, seconds: float) -> bool:
        """Waits for the peer's next request, where that can be done; False if there
        will be none."""
        if self._at_once is None or self._arrivals is None or self._unread:
            return True
        if not self._arrivals.poll(1000 * seconds):
            return True
        try:
            self._unread = self._at_once.recv(IDLE_RECEIVE_BYTES)
        except BlockingIOError:
            return True  # the system took back what it had said
        except OSError:
            return False
        return bool(self._unread)

    def push(self, frame: _Bytes) -> _Bytes:
        """Sends as much as the peer takes without waiting; gives the rest."""
        try:
            sent = self._at_once.send(frame) if self._at_once else 0
            # No copy: of a long reply each of many readers may have a rest.
            return memoryview(frame)[sent:] if sent < len(frame) else b""
        except OSError:  # full, or broken: the connection's own thread will see to it
            return frame

    def vanished(self) -> bool:
        """Whether the peer has closed, as far as can be told without waiting."""
        try:
            return self._at_once is not None and not self._at_once.recv(
                1, socket.MSG_PEEK
            )
        except BlockingIOError:
            return False
        except OSError:
            return True

    def linger(self) -> None:
        """Reads until the peer closes: bytes left unread would reset the connection,
        and the peer might lose the reply that says why it is being closed."""
        self.shut(socket.SHUT_WR)
        end = time.monotonic() + LINGER_SECONDS
        try:
            self.limit_to(end)
            while self.sock.recv(RECEIVE_BYTES):
                self.limit_to(end)
        except OSError:
            pass  # the time is up, or the peer is gone

    def close(self) -> None:
        if self._at_once:
            self._at_once.detach()
        super().close()


def _start_thread(job: Callable[..., object], *arguments: Any) -> None:
    """Raises RuntimeError or MemoryError. Thread.start would wait until the thread has
    begun: for ever, if memory runs out just then."""
    _thread.start_new_thread(job, arguments)


class _WaitingGet(Waiter):
    """A `get` that waits. The thread that answers it sends what the peer takes at once,
    unless that is much: many would hold up the readers of other topics.

    The connection's own thread had better not be woken for that: it waits for the next
    request instead, which tells it that the peer has its reply. (With eight readers
    this is a third faster.) A rest is then left to a thread for it alone; where the
    own thread cannot wait like that, it is woken and sends the rest.
    """

    def __init__(
        self,
        connection: _Connection,
        topic: str,
        after: int,
        limit: int,
        room_bytes: int,
    ) -> None:
        super().__init__(topic, after, limit, room_bytes)
        self._connection = connection
        self.rest: _Bytes = b""
        self.finishing = False  # a thread has begun to send the rest

    def answer(self, reply: bytes) -> None:
        much = len(reply) > SEND_BYTES
        self.rest = reply if much else self._connection.push(reply)
        if self.rest and self._connection.hears:
            try:
                _start_thread(self._finish)
                return
            except (RuntimeError, MemoryError):  # no thread to be had
                self._connection.shut()  # the client asks again on a new one
        self.woken.release()

    def _finish(self) -> None:
        self.finishing = True
        try:
            self._connection.send(self.rest)
        except (OSError, MemoryError):
            self._connection.shut()  # its own thread closes it
        finally:
            self.rest = b""
            self.woken.release()


class _Server(socketserver.ThreadingTCPServer):
    """Accepts connections, a thread each, and stops when a client or Ctrl-C says so."""

    request_queue_size = 1024  # clients may all come at the same moment
    # On Windows this option would let a second server take over the port.
    allow_reuse_address = os.name != "nt"

    def __init__(
        self,
        host: str,
        port: int,
        store: MessageStore,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        max_clients: int = MAX_CLIENTS,
        secret: str | None = None,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.store = store
        self.max_frame_bytes = max_frame_bytes
        self.max_clients = max_clients
        self.secret = secret
        self.context = context
        self.started = time.monotonic()
        self.stopping = threading.Event()  # set once, by whoever stops the server
        # Guards `connections`; notified when one has gone.
        self._gate = threading.Condition()
        self.connections: set[_Connection] = set()
        # Readers that waited for the same put, for the thread that answers them.
        self._crowds: queue.SimpleQueue[list[Waiter]] = queue.SimpleQueue()
        # The log of what peers do is thinned out. Without a lock: a line more or less.
        self._refusing = False  # so that a flood is logged once
        self._noted = 0, 0  # a second, and the lines logged in it
        # Given up for a moment to accept, and turn away, a client when no more
        # descriptors can be had.
        self._spare: socket.socket | None = None
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        # Of the addresses of a name the IPv4 one, as it is clients' default.
        family, *_, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        self.address_family = family
        super().__init__(cast(Any, address), _Handler)
        # A client may be gone between select and accept, which then must not wait.
        self.socket.settimeout(POLL_SECONDS)
        self._spare = socket.socket()

    def run(self) -> None:
        """Serves until stopped, then closes."""
        jobs = {"dsmq purge": self._purge, "dsmq crowds": self._deliver_to_crowds}
        threads: list[threading.Thread] = []
        try:
            for name, job in jobs.items():
                thread = threading.Thread(target=job, name=name, daemon=True)
                thread.start()
                threads.append(thread)
            self.serve_forever(POLL_SECONDS)
        except KeyboardInterrupt:
            pass  # the usual way to stop a server by hand
        finally:
            self.stopping.set()
            self._crowds.put([])  # wakes its thread, which then ends
            for thread in threads:
                thread.join()  # a step of their work at most
            self.close()

    def stop(self) -> None:
        """Ends `run` from another thread; returns when the port is free."""
        self._deafen()  # wakes the thread that accepts, where the system can do that
        self.shutdown()
        self.server_close()
        self.stopping.set()

    def close(self) -> None:
        """Frees the port and ends every conversation, after the reply under way."""
        self.server_close()
        self.stopping.set()
        self.store.close()
        with self._gate:
            for how in (socket.SHUT_RD, socket.SHUT_RDWR):
                for connection in self.connections:
                    connection.shut(how)
                self._gate.wait_for(lambda: not self.connections, CLOSE_SECONDS / 2)

    def _deafen(self) -> None:
        # Not all systems can do this, nor can it be done twice.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def server_close(self) -> None:
        self._deafen()  # closing leaves the port taken while a forked child has it too
        super().server_close()
        if self._spare:
            self._spare.close()

    def _purge(self) -> None:
        """The timer thread: frees expired messages, also in topics nobody touches."""
        while not self.stopping.wait(PURGE_SECONDS):
            try:
                while self.store.purge():
                    if self.stopping.wait(PURGE_PAUSE_SECONDS):
                        return
                self.store.forget_puts()
                self.store.compact()
            except Exception:  # try again: without this thread nothing ever expires
                _log.exception("purging failed")

    # A connection's way: get_request accepts it, process_request starts its thread,
    # in which _Handler serves it, and shutdown_request closes it, whatever happened.

    def get_request(self) -> tuple[Any, Any]:
        try:
            return self._accepted()
        except MemoryError as error:  # socketserver lets only an OSError pass
            raise OSError(errno.ENOMEM, str(error)) from None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._refuse_without_descriptor()
            raise  # socketserver goes on with the next

    def _accepted(self) -> tuple[_Connection, Any]:
        sock, address = self.socket.accept()
        try:
            return _Connection(sock, self.max_frame_bytes), address
        except BaseException:
            sock.close()  # the client has gone again
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._gate:
            full = len(self.connections) >= self.max_clients
            if not full:
                self.connections.add(request)
        if full:
            self._refuse(request, f"max_clients {self.max_clients} is reached")
            return
        try:
            _start_thread(self.process_request_thread, request, client_address)
            self._refusing = False
        except (RuntimeError, MemoryError) as error:  # no thread to be had
            self._gone(request)
            self._refuse(request, f"the server has no thread left: {error}")

    def _refuse(self, connection: _Connection, why: str) -> None:
        if not self._refusing:
            _log.warning("refusing clients from %s on: %s", connection.peer, why)
        self._refusing = True
        try:
            connection.sock.setblocking(False)  # the thread that accepts must not wait
            if (
                not self.context
            ):  # over TLS a handshake would come first; it tries again
                connection.sock.send(encode_object({"error": why, "code": "busy"}))
                connection.shut(socket.SHUT_WR)
                connection.sock.recv(IDLE_RECEIVE_BYTES)  # unread, it would be a reset
        except OSError:
            pass  # the client has gone, or will find the connection closed
        connection.close()

    def _refuse_without_descriptor(self) -> None:
        if self._spare:
            self._spare.close()
            self._spare = None
            # Another thread may take the descriptor first, or the client be gone.
            with contextlib.suppress(OSError):
                self._refuse(self._accepted()[0], "the server has no descriptor left")
        try:
            self._spare = socket.socket()
        except OSError:
            self.stopping.wait(POLL_SECONDS)  # or accepting would fail without a pause

    def _gone(self, connection: _Connection) -> None:
        with self._gate:
            self.connections.discard(connection)
            self._gate.notify_all()

    def shutdown_request(self, request: Any) -> None:
        request.close()
        self._gone(request)

    def note(
        self, level: int, text: str, *values: object, exc_info: bool = False
    ) -> None:
        """Logs what a peer did, ten times a second at most: a hostile one must not fill
        the disk."""
        second = int(time.monotonic())
        if second != self._noted[0]:
            self._noted = second, 0
        self._noted = second, self._noted[1] + 1
        if self._noted[1] <= PEER_LOG_LINES:
            _log.log(level, text, *values, exc_info=exc_info)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A fault of ours, or no memory left: it ends one connection, and is told.
        self.note(logging.ERROR, "a fault serving %s", request.peer, exc_info=True)

    def deliver(self, batch: Batch, waiters: list[Waiter]) -> None:
        """Answers the readers that waited for what was put. A single one at once, in
        the putter's thread, and without another look into the store, which would cost
        it a fifth of its time; a crowd would hold up the putter, 30 us for each."""
        if len(waiters) > 1 and not self.stopping.is_set():
            self._crowds.put(waiters)
            return
        for waiter in waiters:
            self._answer(waiter, partial(_part, batch, waiter))

    def _answer(self, waiter: Waiter, read: Callable[[], Batch]) -> bytes:
        assert isinstance(waiter, _WaitingGet)
        try:
            reply = _messages_reply(read())
        except Exception:  # out of memory, or the store is closed
            reply = _NO_MESSAGES  # what was put is stored; the reader asks again
        waiter.answer(reply)
        return reply

    def _deliver_to_crowds(self) -> None:
        """The thread that answers crowds, until the server stops."""
        while not self.stopping.is_set():
            waiters = self._crowds.get()
            while not self._crowds.empty():
                waiters += self._crowds.get()
            self._answer_all(waiters)
            # The first message after a silence goes out at once. Of a stream of them
            # each reader then gets a few at a time, which costs all much less.
            time.sleep(CROWD_PAUSE_SECONDS)

    def _answer_all(self, waiters: list[Waiter]) -> None:
        """Readers at the same place get the same reply, found and encoded once; with it
        come the messages put since they were woken."""
        place, reply = None, b""
        for waiter in waiters:
            assert isinstance(waiter, _WaitingGet)
            if self.stopping.is_set():
                waiter.woken.release()
                continue
            wanted = waiter.topic, waiter.after, waiter.limit, waiter.room_bytes
            if wanted == place:
                waiter.answer(reply)
            else:
                reply = self._answer(waiter, partial(self.store.get, *wanted))
                place = wanted


def _part(batch: Batch, waiter: Waiter) -> Batch:
    """What of a put its waiter gets."""
    if len(batch.ids) == 1:
        return batch
    start = bisect.bisect_right(batch.ids, waiter.after)
    rows = zip(batch.ids[start:], batch.bodies[start:], repeat(0.0))
    ids, bodies, _ = _gather(rows, waiter.limit, waiter.room_bytes)
    return Batch(ids, bodies, batch.expires_seconds)


def _address(address: Any) -> str:
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else str(address)


def _messages_reply(batch: Batch) -> bytes:
    """The reply to a get: put together from bodies encoded when they were put."""
    if not batch.ids:
        return _NO_MESSAGES
    ids = ",".join(map(str, batch.ids)).encode()
    return encode_frame(
        b'{"messages":[',
        b",".join(batch.bodies),
        b'],"ids":[%b],"expires":%.6f}' % (ids, batch.expires_seconds),
    )


_NO_MESSAGES = encode_object({"messages": [], "ids": []})


def _proof(secret: str, role: str, nonce: str, challenge: str) -> str:
    """What only someone who knows the secret can say to this nonce and challenge; the
    role keeps one side's proof from being sent back as the other's."""
    text = f"dsmq {role}:{nonce}:{challenge}"
    return hmac.new(secret.encode(), text.encode(), "sha256").hexdigest()


class _Handler(socketserver.BaseRequestHandler):
    """Serves one connection: a request, its reply, the next request."""

    server: _Server
    request: _Connection

    def handle(self) -> None:
        self._trusted = self.server.secret is None
        self._expected_proof = ""  # the client's, once it said hello
        # Without it someone who knows no secret could keep a thread for ever.
        self._end = None if self._trusted else time.monotonic() + STALL_SECONDS
        try:
            self.request.start(self.server.context)
            if not self._trusted:
                self.request.max_frame_bytes = UNTRUSTED_FRAME_BYTES
            self._converse()
        except FrameError as error:
            self.server.note(logging.INFO, "closing %s: %s", self.request.peer, error)
            self._say_goodbye("bad_frame", str(error))
        except OSError as error:  # vanished, stalled, does not read, or speaks no TLS
            self.server.note(logging.INFO, "closing %s: %s", self.request.peer, error)

    def _say_goodbye(self, code: str, text: str) -> None:
        try:
            self.request.send(encode_object({"error": text, "code": code}))
            self.request.linger()
        except OSError:
            pass  # where possible: the peer has gone already

    def _converse(self) -> None:
        while not self.server.stopping.is_set():
            body = self.request.receive(self._end)
            if body is None:
                return
            self._plain = b"\\" not in body
            reply = self._answer(decode_object(body))
            del body  # a long one must not stay while the thread waits for the next
            # A short reply needs no wait for room, nor, before it, a look for some.
            if reply and (reply := self.request.push(reply)):
                self.request.send(reply)
            del reply  # nor must this

    def _answer(self, request: dict[str, Any]) -> _Bytes:
        """The reply's frame, or what is left of it to send."""
        try:
            action = request.get("action")
            if not isinstance(action, str) or action not in self.ACTIONS:
                raise _Refusal("unknown_action", f"no action {_shown(action)}")
            if not self._trusted and action not in ("hello", "authenticate"):
                raise _Refusal("authentication", "this server requires its secret")
            return self.ACTIONS[action](self, request)
        except (_Refusal, DSMQError) as error:
            return encode_object({"error": str(error), "code": error.code})
        except MemoryError:
            return encode_object({"error": "out of memory", "code": "full"})

    def _hello(self, request: dict[str, Any]) -> bytes:
        protocol = _integer(request, "protocol", PROTOCOL)
        if protocol != PROTOCOL:
            raise _Refusal("bad_request", f"protocol is {PROTOCOL}, not {protocol}")
        reply: dict[str, Any] = {"protocol": PROTOCOL}
        reply["max_frame_bytes"] = self.server.max_frame_bytes
        secret = self.server.secret
        if secret is None:
            reply["head"] = self.server.store.head
            return encode_object(reply)
        if request.get("nonce") is None:
            raise _Refusal("authentication", "this server requires its secret")
        nonce = _text(request, "nonce", MAX_NAME_CHARACTERS)
        challenge = secrets.token_hex(32)
        self._expected_proof = _proof(secret, "client", nonce, challenge)
        reply["challenge"] = challenge
        reply["proof"] = _proof(secret, "server", nonce, challenge)
        return encode_object(reply)

    def _authenticate(self, request: dict[str, Any]) -> bytes:
        proof = request.get("proof")
        expected, self._expected_proof = self._expected_proof, ""  # good for one try
        if self.server.secret is not None and not (
            isinstance(proof, str)
            and expected
            and hmac.compare_digest(proof.encode(errors="replace"), expected.encode())
        ):
            text = "%s does not know the secret"
            self.server.note(logging.WARNING, text, self.request.peer)
            raise _Refusal("authentication", "that proof is wrong")
        self._trusted, self._end = True, None
        self.request.max_frame_bytes = self.server.max_frame_bytes
        self.request.relax()
        return encode_object({"head": self.server.store.head})

    def _put(self, request: dict[str, Any]) -> _Bytes:
        topic, messages = _topic(request), request.get("messages")
        if not isinstance(messages, list) or not messages:
            raise _Refusal(
                "bad_request", "messages must be a list of texts, one or more"
            )
        if len(messages) > MAX_PUT_MESSAGES:
            text = f"{len(messages)} messages; the limit is {MAX_PUT_MESSAGES}"
            raise _Refusal("too_large", text)
        limit = self.server.max_frame_bytes - ENVELOPE_BYTES
        # A frame without escapes carries its texts as they are stored.
        encode = _quoted if self._plain else encode_text
        bodies = [_body(message, limit, encode) for message in messages]
        origin = None
        if request.get("client") is not None:
            client = _text(request, "client", MAX_NAME_CHARACTERS)
            sequence = _integer(request, "sequence")
            settled = _integer(request, "settled", MIN_INTEGER)
            origin = Origin(client, sequence, settled)
        head, batch, waiters = self.server.store.put(topic, bodies, origin)
        reply: _Bytes = encode_frame(b'{"head":%d}' % head)
        if waiters:
            # A reader that wakes may take this thread's core; the putter goes first.
            reply = self.request.push(reply)
            try:
                self.server.deliver(batch, waiters)
            except MemoryError as error:  # `_answer` would reply again
                raise ConnectionAbortedError("out of memory") from error
        return reply

    def _get(self, request: dict[str, Any]) -> _Bytes:
        topic, after = _topic(request), _integer(request, "after")
        limit = _integer(request, "limit", 1)
        if limit < 1:
            raise _Refusal("bad_request", f"limit must be at least 1, not {limit}")
        seconds = _wait_seconds(request)
        room_bytes = self.server.max_frame_bytes - ENVELOPE_BYTES
        if not seconds:
            batch = self.server.store.get(topic, after, limit, room_bytes)
            return _messages_reply(batch)
        waiter = _WaitingGet(self.request, topic, after, limit, room_bytes)
        batch = self.server.store.get(topic, after, limit, room_bytes, waiter)
        if batch.ids:
            return _messages_reply(batch)
        try:
            return self._wait(waiter, seconds)
        except MemoryError as error:  # no reply: a put may be sending one
            self.server.store.end_wait(waiter)
            raise ConnectionAbortedError("out of memory") from error

    def _wait(self, waiter: _WaitingGet, seconds: float) -> _Bytes:
        end = time.monotonic() + seconds
        there = self.request.hear(seconds)
        # Still unanswered: the peer asks ahead, or this thread cannot hear it.
        while there and (remaining := end - time.monotonic()) > 0:
            if waiter.woken.acquire(timeout=min(remaining, VANISHED_CHECK_SECONDS)):
                return waiter.rest
            there = not self.request.vanished()
        if self.server.store.end_wait(waiter):
            return _NO_MESSAGES
        # A put has just taken it in hand, which needs no time to speak of, but for a
        # rest that is on its way.
        seconds = CLOSE_SECONDS if self.server.stopping.is_set() else STALL_SECONDS
        while not waiter.woken.acquire(timeout=seconds):
            if not waiter.finishing:
                raise ConnectionAbortedError("a reply was begun and never finished")
        return waiter.rest

    def _get_latest(self, request: dict[str, Any]) -> bytes:
        topic, after = _topic(request), _integer(request, "after")
        return _messages_reply(self.server.store.get_latest(topic, after))

    def _stats(self, request: dict[str, Any]) -> bytes:
        stats = {
            "version": __version__,
            "uptime": time.monotonic() - self.server.started,
            "clients": len(self.server.connections),
            **self.server.store.stats(self.server.max_frame_bytes),
        }
        reply = encode_object(stats)
        if len(reply) > self.server.max_frame_bytes:
            left_out = len(stats["topics"])
            reply = encode_object({**stats, "topics": {}, "topics_left_out": left_out})
        return reply

    def _shutdown(self, request: dict[str, Any]) -> bytes:
        _log.info("%s asked the server to stop", self.request.peer)
        self.server.stop()
        return encode_object({})

    # README's table tells the fields and replies.
    ACTIONS: ClassVar[dict[str, Callable[[_Handler, dict[str, Any]], _Bytes]]] = {
        "hello": _hello,
        "authenticate": _authenticate,
        "put": _put,
        "get": _get,
        "get_latest": _get_latest,
        "stats": _stats,
        "shutdown": _shutdown,
    }


# What a field of a request must be. Each refuses what is not, naming field and value.


def _text(request: dict[str, Any], field: str, most: int) -> str:
    value = request.get(field)
    if isinstance(value, str) and 1 <= len(value) <= most:
        if value.isascii():
            return value
        with contextlib.suppress(UnicodeEncodeError):  # of a lone surrogate
            value.encode()
            return value
    raise _Refusal(
        "bad_request",
        f"{field} must be a text of 1 to {most} characters that UTF-8 can carry,"
        f" not {_shown(value)}",
    )


def _topic(request: dict[str, Any]) -> str:
    return _text(request, "topic", MAX_TOPIC_CHARACTERS)


def _integer(request: dict[str, Any], field: str, absent: int | None = None) -> int:
    value = request.get(field, absent)
    if type(value) is not int or not MIN_INTEGER <= value <= MAX_INTEGER:
        raise _Refusal(
            "bad_request", f"{field} must be a 64-bit integer, not {_shown(value)}"
        )
    return value


def _wait_seconds(request: dict[str, Any]) -> float:
    value = request.get("wait", 0)
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise _Refusal(
            "bad_request", f"wait must be seconds, 0 or more, not {_shown(value)}"
        )
    return float(min(value, MAX_WAIT_SECONDS))


def _quoted(text: str) -> bytes:
    return b'"%b"' % text.encode()


def _body(
    message: object, limit_bytes: int, encode: Callable[[str], bytes] = encode_text
) -> bytes:
    if not isinstance(message, str):
        raise _Refusal("bad_request", f"a message must be text, not {_shown(message)}")
    try:
        body = encode(message)
    except UnicodeEncodeError:
        raise _Refusal(
            "bad_request", f"UTF-8 has no lone surrogates, as in {_shown(message)}"
        ) from None
    if len(body) > limit_bytes:
        raise _Refusal(
            "too_large", f"a message of {len(body)} bytes; the limit is {limit_bytes}"
        )
    return body


def _listening(host: str, port: int, *arguments: Any) -> _Server:
    try:
        return _Server(host, port, *arguments)
    except OSError as error:
        text = f"cannot listen on {host}:{port}: {error.strerror or error}"
        raise OSError(error.errno, text) from None


def serve(
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    verbose: bool = False,
    *,
    time_to_live: float = TIME_TO_LIVE_SECONDS,
    max_bytes: int = MAX_BYTES,
    max_frame_bytes: int = MAX_FRAME_BYTES,
    max_clients: int = MAX_CLIENTS,
    secret: str | None = None,
    certfile: str | None = None,
    keyfile: str | None = None,
) -> None:
    """Runs a server; blocks until a client or Ctrl-C stops it, then returns.

    `host` and `port` say where to listen: the default can be reached from this machine
    only, "0.0.0.0" from everywhere; port 0 is any free one (which the log tells).
    `verbose` shows the log, of the logger "dsmq", on stderr. A message lives
    `time_to_live` seconds. Stored messages take `max_bytes` of memory at most; a put
    beyond that raises QueueFull in the client. A request or reply takes
    `max_frame_bytes` at most, so that is what the longest message needs. A connection
    beyond `max_clients` is refused. With a `secret` only clients that know it get in.
    `certfile` and `keyfile`, of a certificate and its key in PEM format, turn on TLS.

    Raises OSError if it cannot listen there, TypeError or ValueError for an argument
    that is wrong. Can be the target of a multiprocessing.Process.
    """
    _check_address(host, port)
    _check_number("time_to_live", time_to_live, 0.001, MAX_TIME_TO_LIVE_SECONDS)
    _check_number("max_bytes", max_bytes, 1, MAX_INTEGER, whole=True)
    _check_number(
        "max_frame_bytes", max_frame_bytes, MIN_FRAME_BYTES, MAX_VALUE_BYTES, whole=True
    )
    _check_number("max_clients", max_clients, 1, MAX_INTEGER, whole=True)
    _check_secret(secret)
    if verbose:
        _show_log()
    context = _tls_server_context(certfile, keyfile)
    _keep_freed_memory()
    with (
        contextlib.closing(MessageStore(float(time_to_live), max_bytes)) as store,
        _listening(
            host, port, store, max_frame_bytes, max_clients, secret, context
        ) as server,
    ):
        _log.info("dsmq %s%s", __version__, ", with TLS" if context else "")
        _log.info("listening on %s", _address(server.server_address))
        _log.info("stop it with Ctrl-C, or shutdown_server() from a client")
        if secret is None and not _is_loopback(server.server_address[0]):
            _log.warning(
                "no secret: anyone on the network can read and put messages,"
                " and stop this server"
            )
        server.run()
    _log.info("stopped; goodbye")


def _tls_server_context(
    certfile: str | None, keyfile: str | None
) -> ssl.SSLContext | None:
    if certfile is None:
        if keyfile is not None:
            raise ValueError("a keyfile needs a certfile")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certfile, keyfile)
    return context


def _is_loopback(address: object) -> bool:
    return ipaddress.ip_address(str(address).partition("%")[0]).is_loopback


def _show_log() -> None:
    """Shows the log on stderr, once however often it is asked for."""
    if not any(type(h) is logging.StreamHandler for h in _log.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        _log.addHandler(handler)
    _log.setLevel(logging.INFO)


# ---------------------------------------------------------------------------- client

_forks = 0  # how many forks lie between this process and the one that imported dsmq
_fork_lock = threading.RLock()  # lets one thread of a forked process tidy a client


def _count_fork() -> None:
    global _forks, _fork_lock
    _forks += 1
    _fork_lock = threading.RLock()  # the old one may be held by a thread left behind


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_count_fork)


_UNREACHABLE = [
    getattr(errno, name, None)  # not every system has them all
    for name in ("EHOSTUNREACH", "ENETUNREACH", "EHOSTDOWN", "ENETDOWN")
]


class _Busy(ConnectionRefusedError):
    """The server is there, but has no room for one more client."""


# What a refusal by the server becomes in the client; DSMQError if not listed. A busy
# server is tried again, like one that is not there yet.
_EXCEPTIONS: dict[str, type[Exception]] = {
    "full": QueueFull,
    "authentication": AuthenticationError,
    "too_large": ValueError,
    "busy": _Busy,
}


def _reply(body: bytes | bytearray | None) -> dict[str, Any]:
    if body is None:
        raise ConnectionResetError("the server closed the connection")
    reply = decode_object(body, _decode_reply)
    if "error" in reply:
        kind = _EXCEPTIONS.get(str(reply.get("code")), DSMQError)
        raise kind(str(reply["error"]))
    return reply


class _Lane:
    """One of a client's connections, used by one call at a time.

    It keeps its name and the number of its last put when the connection is made anew,
    so the server can tell a put sent again from a new one.
    """

    def __init__(self, dial: Callable[[_Lane, float], Any]) -> None:
        self.name = secrets.token_hex(16)
        self.sequence = 0
        # Weak, or client and lanes would keep each other alive, and the collector may
        # come to a socket before it comes to the lane that would close it.
        self._dial = weakref.WeakMethod(dial)
        self._connection: Any = None  # a FrameSocket, or what another engine dials
        # Not so from before a request until its reply is in: wherever an interrupt
        # strikes, no later request can meet an earlier one's reply.
        self.ready = False

    def connect(self, end: float) -> Any:
        if not self.ready:
            self.drop()
            dial = self._dial()
            assert dial is not None  # it is a method of the client that is calling
            self._connection = dial(self, end)
            self.ready = True
        return self._connection

    def talk(self, work: Callable[[Any], _T], end: float) -> _T:
        """`work` done with the connection: what sends a request and takes in its whole
        reply."""
        connection = self.connect(end)
        self.ready = False
        result = work(connection)
        self.ready = True
        return result

    def exchange(self, request: bytes, end: float) -> dict[str, Any]:
        frames = self.connect(end)
        self.ready = False  # as `talk` does it, whose call of a function takes longer
        frames.send(request, end)
        body = frames.receive(end)
        self.ready = True
        return _reply(body)

    def hold(self, connection: Any) -> None:
        """One that is not ready yet, so that `shut` ends what makes it so."""
        self._connection = connection

    def shut(self) -> None:
        """Ends the call under way, from another thread."""
        if self._connection:
            self._connection.shut()

    def drop(self) -> None:
        """Closes the connection: lost, or with a reply still to come on it."""
        self.ready = False
        connection, self._connection = self._connection, None
        if connection:
            connection.close()

    __del__ = drop  # a client that was never closed gives no ResourceWarning


def _put_frame(name: bytes, load: list[bytes], client: str, sequence: int) -> bytes:
    head = (
        b'{"action":"put","client":"%b","sequence":%d,"settled":%d,"topic":%b,"messages":['
        % (client.encode(), sequence, sequence - 1, name)
    )
    return encode_frame(head, b",".join(load), b"]}")


def _stored(lane: _Lane, request: bytes, end: float) -> int:
    return _reply_integer(lane.exchange(request, end), "head")


def _numbered_put(
    make: Callable[[str, int], _T], send: Callable[[_Lane, _T, float], object]
) -> Callable[[_Lane, float], None]:
    """Sends what `make` gives for a lane's name and the number of its next put: with
    the same number however often it is called, on whichever lane."""
    requests: list[_T] = []

    def exchange(lane: _Lane, end: float) -> None:
        if not requests:
            lane.sequence += 1
            requests.append(make(lane.name, lane.sequence))
        send(lane, requests[0], end)

    return exchange


class _ReadAhead:
    """A topic's cursor, and the messages after it that have been read already.

    `next` counts those handed out. To hand some out is to move `next`, in one store of
    one attribute: an interrupt comes before or after it.
    """

    __slots__ = ("_after", "expires", "ids", "limit", "messages", "next")

    def __init__(
        self,
        after: int,
        ids: list[int],
        messages: list[str],
        expires: float,
        limit: int,
    ) -> None:
        self._after = after
        self.ids = ids
        self.messages = messages
        self.expires = expires  # monotonic time at which the oldest unread expires
        self.limit = limit  # how many messages of their size are worth reading ahead
        self.next = 0

    @property
    def cursor(self) -> int:
        """The id of the last message handed out, or where the reader began."""
        return self.ids[self.next - 1] if self.next else self._after

    @property
    def last(self) -> int:
        """The id to read on from."""
        return self.ids[-1] if self.ids else self._after

    def dropped(self) -> _ReadAhead:
        return _ReadAhead(self.cursor, [], [], math.inf, self.limit)

    def extended(
        self, ids: list[int], messages: list[str], expires: float
    ) -> _ReadAhead:
        """With the messages not in it yet, of a read that began at or before `last`."""
        new = bisect.bisect_right(ids, self.last)
        if self.next < len(self.ids):
            expires = min(expires, self.expires)
        mean = sum(map(len, messages)) // len(messages) or 1
        return _ReadAhead(
            self.cursor,
            self.ids[self.next :] + ids[new:],
            self.messages[self.next :] + messages[new:],
            expires,
            max(1, min(READ_AHEAD_MESSAGES, READ_AHEAD_BYTES // mean)),
        )


class DSMQClientSideConnection:
    """A client of a dsmq server: what `connect` gives.

    It may be used by many threads at once; each message goes to one of them. After a
    fork both processes may use it, each reading on from where it stood; the same holds
    for one passed to another process. Every method goes on for `timeout` seconds trying
    to reach a server that refuses, drops the connection or does not answer, and then
    raises ConnectionRefusedError, ConnectionError or TimeoutError; after `close` it
    raises ConnectionError. A wrong type is a TypeError; a topic that is empty or longer
    than 1,000 characters, text that UTF-8 cannot carry, and a message too long for the
    server's frames are a ValueError, before anything is sent.
    """

    # How long get_wait persists without a timeout: the sum of so many pauses, each
    # twice as long as the one before, in seconds. The original's names.
    _n_tries = 10
    _initial_retry = 0.01
    _engine = "dsmq server"  # as error messages name it

    def __init__(
        self,
        host: str = DEFAULT_HOST,
        port: int = DEFAULT_PORT,
        verbose: bool = False,
        *,
        timeout: float = 10.0,
        secret: str | None = None,
        tls: bool | str | os.PathLike[str] = False,
    ) -> None:
        _check_address(host, port)
        _check_number("timeout", timeout, 0.001, math.inf)
        _check_secret(secret)
        if not isinstance(tls, (bool, str, os.PathLike)):
            raise TypeError(f"tls must be a bool or a path, not {_shown(tls)}")
        if tls == "":
            raise ValueError("tls must not be an empty path: it would say nothing")
        self._host, self._port = host, port
        self._timeout = float(timeout)
        self._secret = secret
        self._tls = tls
        self._closed = False
        self._start: int | None = None  # where reading a topic begins: head at connect
        self._max_frame_bytes = MAX_FRAME_BYTES
        self._cursors: dict[str, _ReadAhead] = {}
        self._begin()
        _keep_freed_memory()
        if verbose:
            _show_log()
            _log.info("connecting to %s:%s", host, port)
        self._call(_Lane.connect)

    def _begin(self) -> None:
        """What belongs to one process, and is made anew in another."""
        # Guards the attributes below, `_start` and `_cursors`; never held while talking
        # to the server. Reentrant, because a signal handler may use the client, too.
        self._lock = threading.RLock()
        self._lanes: set[_Lane] = set()  # all
        self._idle: list[_Lane] = []  # those no call is using
        self._born = _forks

    def _check_usable(self) -> None:
        if self._born != _forks:
            self._after_fork()
        if self._closed:
            raise ConnectionError("this client is closed")

    def _after_fork(self) -> None:
        with _fork_lock:
            if self._born == _forks:
                return  # another thread was faster
            # The connections are the parent's: they are closed, but not shut down. What
            # was read ahead, it hands out.
            for lane in self._lanes:
                lane.drop()
            cursors = self._cursors.items()
            self._cursors = {topic: ahead.dropped() for topic, ahead in cursors}
            self._begin()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for name in ("_lock", "_lanes", "_idle", "_born"):
            del state[name]
        cursors = self._cursors.items()
        state["_cursors"] = {topic: ahead.cursor for topic, ahead in cursors}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        cursors = state["_cursors"].items()
        self._cursors = {
            topic: _ReadAhead(cursor, [], [], math.inf, READ_AHEAD_FIRST)
            for topic, cursor in cursors
        }
        self._begin()

    # Reaching the server

    def _call(self, work: Callable[[_Lane, float], _T]) -> _T:
        """`work` done with a lane, and done again on a new connection if that is lost,
        until `timeout` has passed."""
        self._check_usable()
        end = time.monotonic() + self._timeout
        pause = RETRY_PAUSE_SECONDS
        lane = self._borrow()
        try:
            while True:
                try:
                    return work(lane, end)
                except OSError as error:
                    lane.drop()
                    self._check_usable()
                    if _is_final(error) or time.monotonic() + pause >= end:
                        raise self._named(error) from error
                time.sleep(pause)
                self._check_usable()
                pause = min(2 * pause, MAX_RETRY_PAUSE_SECONDS)
        finally:
            with self._lock:
                if self._closed or not lane.ready:
                    lane.drop()
                self._idle.append(lane)

    def _borrow(self) -> _Lane:
        with self._lock:
            if self._idle:
                return self._idle.pop()  # the one used last: the others may have aged
            lane = _Lane(self._dial)
            self._lanes.add(lane)
            return lane

    def _named(self, error: OSError) -> OSError:
        where = f"{self._engine} at {self._host}:{self._port}"
        if isinstance(error, FrameError):
            return FrameError(f"the {where} speaks another protocol, or TLS: {error}")
        if isinstance(error, ConnectionRefusedError):
            text = f"no {where} takes the connection: {error}"
            return ConnectionRefusedError(text)
        if isinstance(error, TimeoutError):
            return TimeoutError(f"the {where} did not answer in {self._timeout:g} s")
        if isinstance(error, ConnectionError):
            return ConnectionError(f"the connection to the {where} was lost: {error}")
        if isinstance(error, socket.gaierror):
            text = f"no address for {_shown(self._host)}: {error.strerror}"
            return socket.gaierror(error.errno, text)
        if isinstance(error, ssl.SSLError) and not isinstance(
            error, ssl.SSLCertVerificationError
        ):
            return ConnectionError(f"the {where} speaks no TLS, or another: {error}")
        if error.errno in _UNREACHABLE:
            return ConnectionError(f"the {where} cannot be reached: {error}")
        return error

    def _dial(self, lane: _Lane, end: float) -> Any:
        newest = self._newest()
        frames = self._reach(self._host, self._port, end, lane.hold)
        try:
            head = self._greet(frames, end)
            self._check_usable()  # another thread may have closed it meanwhile
        except BaseException:
            frames.close()
            raise
        self._note_head(head, newest)
        return frames

    def _reach(
        self, host: str, port: int, end: float, hold: Callable[[FrameSocket], object]
    ) -> FrameSocket:
        sock = _connected(host, port, end)
        try:
            frames = FrameSocket(sock, MAX_FRAME_BYTES)
        except BaseException:
            sock.close()
            raise
        try:
            if self._tls is not False:
                frames.sock = _tls_context(self._tls).wrap_socket(
                    sock, server_hostname=host, do_handshake_on_connect=False
                )
            hold(frames)
            self._check_usable()
            if isinstance(frames.sock, ssl.SSLSocket):
                frames.limit_to(end)
                frames.sock.do_handshake()
            return frames
        except BaseException:
            frames.close()
            raise

    def _newest(self) -> int:
        """The newest id read so far."""
        with self._lock:
            return max((a.last for a in self._cursors.values()), default=0)

    def _note_head(self, head: int, newest: int) -> None:
        """Takes in the server's newest id; `newest` was read before dialling."""
        with self._lock:
            if self._start is None:
                self._start = head
            elif head < max(newest, self._start):
                # Another server, whose clock is behind the last one's. All it has is
                # new to this client.
                self._start = 0
                self._cursors.clear()

    def _greet(self, frames: FrameSocket, end: float) -> int:
        """The opening dialogue; gives the server's newest id.

        1. client: hello, with a nonce if it has a secret.
        2. server: the limits; without a secret the newest id, and that is all. With it
           a challenge, and the proof that it knows the secret.
        3. client: its own proof, once the server's is seen to be right.
        4. server: the newest id.
        """
        nonce = secrets.token_hex(32)
        hello: dict[str, Any] = {"action": "hello", "protocol": PROTOCOL}
        if self._secret is not None:
            hello["nonce"] = nonce
        frames.send(encode_object(hello), end)
        reply = _reply(frames.receive(end))
        limit = max(_reply_integer(reply, "max_frame_bytes"), MIN_FRAME_BYTES)
        if self._secret is not None:
            # In ASCII whatever they are, as those of an honest server are.
            challenge, proof = (
                ascii(reply.get(field)).strip("'") for field in ("challenge", "proof")
            )
            expected = _proof(self._secret, "server", nonce, challenge)
            if not hmac.compare_digest(proof, expected):
                raise AuthenticationError("the server does not know the secret")
            answer = _proof(self._secret, "client", nonce, challenge)
            request = {"action": "authenticate", "proof": answer}
            frames.send(encode_object(request), end)
            reply = _reply(frames.receive(end))
        self._max_frame_bytes = frames.max_frame_bytes = limit
        return _reply_integer(reply, "head")

    # Putting

    def put(self, topic: str, msg: str) -> None:
        """Puts `msg` into `topic`; it is stored, and can be read, when this returns.
        Raises QueueFull if the server's memory is used up. After any other error than
        that, a TypeError or ValueError it may have been stored or not, once at most."""
        self._put(topic, [msg])

    def put_many(self, topic: str, msgs: Iterable[str]) -> None:
        """Puts them all, in order, or none: they share one request, and nobody else's
        messages come between. Only where they are too long for one frame, or more than
        100,000, they go in several, each all or none and with its own timeout."""
        if isinstance(msgs, str):
            raise TypeError("msgs must be several messages, not one str")
        self._put(topic, msgs)

    def _put(self, topic: str, msgs: Iterable[str]) -> None:
        name = self._topic_name(topic)
        self._check_usable()
        room_bytes = self._max_frame_bytes - PUT_ENVELOPE_BYTES - len(name)
        for load in list(_loads(msgs, room_bytes)):  # all are checked before one goes
            self._call(_numbered_put(partial(_put_frame, name, load), _stored))

    def _topic_name(self, topic: str) -> bytes:
        """The topic as a request carries it."""
        name = encode_text(_checked_topic(topic))
        room_bytes = self._max_frame_bytes - PUT_ENVELOPE_BYTES - len('""')
        if len(name) > room_bytes:
            raise ValueError(
                f"the topic {_shown(topic)} takes {len(name)} bytes, but {room_bytes}"
                " fit into a frame of the server"
            )
        return name

    # Reading

    def get(self, topic: str) -> str:
        """The oldest unread message of `topic`, or at once "" if there is none."""
        return self._next(topic, 0.0) or ""

    def get_wait(self, topic: str, timeout: float | None = None) -> str:
        """The oldest unread message of `topic`; waits for one up to `timeout` seconds
        (math.inf: for ever), then gives "". Without a timeout it persists for the sum
        of `_n_tries` doubling pauses from `_initial_retry`: 10.23 s."""
        if timeout is None:
            timeout = self._initial_retry * (2**self._n_tries - 1)
        _check_number("timeout", timeout, 0, math.inf)
        return self._next(topic, timeout) or ""

    def get_latest(self, topic: str) -> str:
        """The newest unread message of `topic`, or at once "" if there is none. The
        older ones stay unread for ever."""
        _checked_topic(topic)
        self._check_usable()
        with self._lock:
            after = self._ahead(topic).cursor
        ids, messages, _ = self._read_latest(topic, after)
        old = new = None
        try:
            with self._lock:
                old = self._ahead(topic)
                if not ids or ids[0] <= old.cursor:
                    return ""  # another thread has it, or a newer one
                new = _ReadAhead(ids[0], [], [], math.inf, old.limit)
                self._cursors[topic] = new
                return messages[0]
        except BaseException:
            # Interrupted: the caller never gets it, so nothing was handed out.
            if old and new and self._cursors.get(topic) is new:
                self._cursors[topic] = old
            raise

    def get_many(self, topic: str, limit: int = 100) -> list[str]:
        """All unread messages of `topic` there are, at once, up to `limit`."""
        _check_number("limit", limit, 1, MAX_INTEGER, whole=True)
        _checked_topic(topic)
        self._check_usable()
        fetched = False
        while True:
            with self._lock:
                ahead = self._ahead(topic, fetched)
                missing = limit - (len(ahead.ids) - ahead.next)
            if missing <= 0 or not self._fetch(topic, 0.0, missing):
                return self._take(topic, limit, fetched)
            fetched = True

    def listen(self, topic: str, timeout: float = math.inf) -> Iterator[str]:
        """Iterates over the messages of `topic` as they come; ends when for `timeout`
        seconds there was none."""
        _checked_topic(topic)
        _check_number("timeout", timeout, 0, math.inf)
        return iter(partial(self._next, topic, timeout), None)

    def _next(self, topic: str, seconds: float) -> str | None:
        """The next message; waits for it up to so many seconds."""
        _checked_topic(topic)
        end = time.monotonic() + seconds
        fetched = False
        while True:
            messages = self._take(topic, 1, fetched)
            if messages:
                return messages[0]
            wait = max(end - time.monotonic(), 0.0)
            fetched = self._fetch(topic, wait)
            if not fetched and time.monotonic() >= end:
                return None

    def _ahead(self, topic: str, fetched: bool = True) -> _ReadAhead:
        """Where the topic's reader stands. What was read ahead, and not only just now,
        is dropped when it expires."""
        ahead = self._cursors.get(topic)
        if ahead is None:
            return _ReadAhead(self._start or 0, [], [], math.inf, READ_AHEAD_FIRST)
        if not fetched and ahead.expires <= time.monotonic():
            ahead = self._cursors[topic] = ahead.dropped()
        return ahead

    def _take(self, topic: str, limit: int, fetched: bool) -> list[str]:
        """Hands out messages read ahead, up to `limit`."""
        self._check_usable()
        ahead, begin, end = None, 0, 0
        try:
            with self._lock:
                ahead = self._ahead(topic, fetched)
                while ahead.next < len(ahead.ids):
                    begin = ahead.next
                    end = min(begin + limit, len(ahead.ids))
                    messages = ahead.messages[begin:end]
                    if ahead.next == begin:  # no signal handler has read meanwhile
                        ahead.next = end
                        return messages
                return []
        except BaseException:
            # Interrupted after the cursor moved: the caller never gets them, so they
            # are still to be handed out.
            if ahead and begin < end == ahead.next:
                ahead.next = begin
            raise

    def _fetch(self, topic: str, wait: float, wanted: int = 1) -> bool:
        """Reads messages ahead, waiting for the first; whether there were any."""
        with self._lock:
            ahead = self._ahead(topic)
            after, limit = ahead.last, max(wanted, ahead.limit)
        ids, messages, expires = self._read(topic, after, limit, wait)
        if not ids:
            return False
        with self._lock:
            while True:
                ahead = self._ahead(topic)
                begin = ahead.next
                if ahead.last < after:  # it is another server's since
                    return True
                new = ahead.extended(ids, messages, expires)
                # No call from here on, in which a signal handler could read.
                if ahead.next == begin:
                    self._cursors[topic] = new
                    return True

    def _read(self, topic: str, after: int, limit: int, wait: float) -> _Messages:
        """The oldest messages after an id; waits for one, at most so many seconds."""
        name = self._topic_name(topic)
        begun = 0.0

        def exchange(lane: _Lane, end: float) -> _Messages:
            # Half of the time that is left, so that an answer that does not come is
            # told from one that comes late.
            nonlocal begun, limit
            if begun:  # a line that breaks now and then may never carry a long reply
                limit = max(limit // 2, 1)
            lane.connect(end)
            begun = time.monotonic()
            seconds = min(wait, (end - begun) / 2, MAX_WAIT_SECONDS)
            request = (
                b'{"action":"get","topic":%b,"after":%d,"limit":%d,"wait":%.6f}'
                % (name, after, limit, seconds)
            )
            reply = lane.exchange(encode_frame(request), end)
            # The messages' age is known as of some moment since the request was sent.
            return _reply_messages(reply, after, time.monotonic() if wait else begun)

        return self._call(exchange)

    def _read_latest(self, topic: str, after: int) -> _Messages:
        """The newest message after an id."""
        request = encode_frame(
            b'{"action":"get_latest","topic":%b,"after":%d}'
            % (self._topic_name(topic), after)
        )

        def exchange(lane: _Lane, end: float) -> _Messages:
            return _reply_messages(lane.exchange(request, end), after, time.monotonic())

        return self._call(exchange)

    # The server itself

    def stats(self) -> dict[str, Any]:
        """What the server holds: `version`, `uptime` in seconds, `clients`, `messages`,
        `bytes` of memory they take, `time_to_live`, `max_bytes`, and of `topics` each
        one's `messages` and `bytes`."""
        request = encode_object({"action": "stats"})

        def exchange(lane: _Lane, end: float) -> dict[str, Any]:
            reply = lane.exchange(request, end)
            _reply_integer(reply, "messages")
            return reply

        return self._call(exchange)

    def shutdown_server(self) -> None:
        """Stops the server. When this returns it takes no more connections."""
        asked = False

        def exchange(lane: _Lane, end: float) -> None:
            nonlocal asked
            try:
                lane.connect(end)
            except _Busy:
                raise
            except ConnectionRefusedError:
                if asked:
                    return  # the answer was lost, but now nobody listens there
                raise
            asked = True
            lane.exchange(encode_object({"action": "shutdown"}), end)

        self._call(exchange)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self) -> None:
        """Ends the connection, and the calls of other threads. May be called again."""
        if self._born != _forks:
            self._after_fork()
        self._closed = True
        with self._lock:
            for lane in self._lanes.difference(self._idle):
                lane.shut()
            for lane in self._idle:
                lane.shut()
                lane.drop()

    def __enter__(self) -> DSMQClientSideConnection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _connected(host: str, port: int, end: float) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:  # of the encoding of names
        raise ValueError(f"host {_shown(host)} cannot be a name: {error}") from None
    failure: OSError = TimeoutError("timed out")
    for *_, address in found:
        remaining = end - time.monotonic()
        if remaining <= 0:
            break
        try:
            return _connected_to(address, min(remaining, LONGEST_SECONDS))
        except OSError as error:
            failure = error
    raise failure


def _connected_to(address: Any, seconds: float) -> socket.socket:
    sock = socket.create_connection(address[:2], seconds)
    # Asking again and again for a port of this machine that nobody listens on may end
    # in a socket connected to itself, when the system picks that port for our end.
    if sock.getsockname() == sock.getpeername():
        sock.close()
        raise ConnectionRefusedError("nobody listens there")
    return sock


def _tls_context(tls: bool | str | os.PathLike[str]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=None if isinstance(tls, bool) else tls)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _is_final(error: OSError) -> bool:
    """Whether trying again would give the same."""
    if isinstance(error, ssl.SSLError):
        lost = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
        return not isinstance(error, lost)
    if isinstance(error, socket.gaierror):
        return error.errno != socket.EAI_AGAIN  # of a name server, and may pass
    return isinstance(error, (FrameError, FileNotFoundError))


def _reply_integer(reply: dict[str, Any], field: str) -> int:
    value = reply.get(field)
    if type(value) is not int:
        raise FrameError(f"a reply without the integer {field}: {_shown(str(reply))}")
    return value


def _reply_messages(reply: dict[str, Any], after: int, now: float) -> _Messages:
    ids, texts = reply.get("ids"), reply.get("messages")
    expires = reply.get("expires", 0)
    if ids == [] == texts:  # the commonest of all
        return [], [], now
    if (
        isinstance(ids, list)
        and isinstance(texts, list)
        and len(ids) == len(texts)
        and {*map(type, ids)} <= {int}
        and {*map(type, texts)} <= {str}
        and all(map(operator.lt, [after, *ids], ids))  # each above the one before
        and type(expires) in (int, float)
    ):
        return ids, texts, now + expires
    raise FrameError(
        f"a reply without messages as they should be: {_shown(str(reply))}"
    )


def _checked_topic(topic: object) -> str:
    if not isinstance(topic, str):
        raise TypeError(f"a topic must be a str, not {_shown(topic)}")
    if not 1 <= len(topic) <= MAX_TOPIC_CHARACTERS:
        raise ValueError(
            f"a topic has 1 to {MAX_TOPIC_CHARACTERS} characters, but {_shown(topic)}"
            f" has {len(topic)}"
        )
    if not topic.isascii():
        _checked_text(topic)
    return topic


def _checked_text(text: str, encode: Callable[[str], bytes] = encode_text) -> bytes:
    try:
        return encode(text)
    except UnicodeEncodeError:
        raise ValueError(
            f"UTF-8 has no lone surrogates, as in {_shown(text)}"
        ) from None


def _loads(
    msgs: Iterable[str],
    room_bytes: int,
    encode: Callable[[str], bytes] = encode_text,
    each_bytes: int = 1,  # that a message takes beside its text: here, a comma
) -> Iterator[list[bytes]]:
    """The messages, encoded, in loads that take up to `room_bytes` in a request."""
    load: list[bytes] = []
    load_bytes = 0
    for msg in msgs:
        if not isinstance(msg, str):
            raise TypeError(f"a message must be a str, not {_shown(msg)}")
        body = _checked_text(msg, encode)
        if len(body) > room_bytes:
            raise ValueError(
                f"the message {_shown(msg)} takes {len(body)} bytes, but"
                f" {room_bytes} fit into a frame of the server"
            )
        full = load_bytes + len(body) + each_bytes > room_bytes
        if load and (full or len(load) >= MAX_PUT_MESSAGES):
            yield load
            load, load_bytes = [], 0
        load.append(body)
        load_bytes += len(body) + each_bytes
    if load:
        yield load


def connect(
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    verbose: bool = False,
    *,
    timeout: float = 10.0,
    secret: str | None = None,
    tls: bool | str | os.PathLike[str] = False,
) -> DSMQClientSideConnection:
    """A client connected to the server at `host` and `port`.

    Goes on trying for `timeout` seconds, as every later call does, then raises
    ConnectionRefusedError, ConnectionError or TimeoutError. With a `secret` client and
    server prove to each other that they know it, or AuthenticationError is raised.
    `tls` is True to trust the certificate authorities of the system, or the path of a
    PEM file with the certificate to trust. `verbose` shows the log on stderr.

    A host redis://[user:password@]host[:port][/database], or rediss:// for TLS, gives
    the same on a Redis or a Redis Cluster; see `_RedisConnection`.
    """
    engine: Callable[..., DSMQClientSideConnection] = DSMQClientSideConnection
    if isinstance(host, str) and host.startswith(("redis://", "rediss://")):
        engine = _RedisConnection
    return engine(host, port, verbose, timeout=timeout, secret=secret, tls=tls)


# ------------------------------------------------------------ past one machine (Redis)

# What is where in Redis: the messages of a topic in a stream, {dsmq:topic}, with ids of
# milliseconds and a number; the number of a client's last put, for a while, in
# {dsmq:topic}client, which the braces keep on the same node of a cluster; and on a
# single server the newest id over all topics in dsmq:head.
_REDIS_HEAD = b"dsmq:head"
_REDIS_STREAM = b"{dsmq:%b}"
_REDIS_READ_MESSAGES = 100  # in one reply, which Redis cannot bound in bytes
_REDIS_MESSAGE_BYTES = 72  # that a message takes in a request beside its text, at most
_REDIS_LATE_SECONDS = 0.1  # it looks for waits that are over ten times a second
_REDIS_REDIRECTIONS = 8  # followed at once; one more is tried again after a pause
_REDIS_ID_BITS = 64  # here an id is milliseconds << 64 | number: in order like Redis's

# Stores messages, all or none. KEYS: the stream, the client's last put and, unless in a
# cluster, dsmq:head. ARGV: the put's number, milliseconds to keep its messages and its
# number, and the messages.
#
# A put sent again, for its answer was lost, is known by its number. Lower numbers are
# refused too: they come late, on a connection given up. As a replica takes in stream
# and number together, after a failover it has both or neither, and stores a put once.
#
# Redis would make an id on a topic without messages from its clock alone. But two
# topics may share a millisecond, and a clock may step back. Ids made from dsmq:head
# grow over all topics, as in a dsmq server: they tell what was put before a connect.
_REDIS_PUT = b"""
local last = redis.call('GET', KEYS[2])
if last and tonumber(last) >= tonumber(ARGV[1]) then return end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local id = KEYS[3] and redis.call('GET', KEYS[3]) or '0-0'
local ms, number = string.match(id, '(%d+)-(%d+)')
ms, number = tonumber(ms), tonumber(number)
for i = 4, #ARGV do
    if ms < now then ms, number = now, 0 else number = number + 1 end
    id = KEYS[3] and string.format('%.0f-%.0f', ms, number) or '*'
    redis.call('XADD', KEYS[1], id, 'message', ARGV[i])
end
if KEYS[3] then redis.call('SET', KEYS[3], id) end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[3])
redis.call('XTRIM', KEYS[1], 'MINID', string.format('%.0f', now - ARGV[2] + 1))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

# What an error becomes by the code in its text; DSMQError if not listed. What passes (a
# restart, a failover, a slot on the move) is a connection error, so it is retried.
_REDIS_EXCEPTIONS: dict[str, type[Exception]] = {
    "OOM": QueueFull,
    "WRONGPASS": AuthenticationError,
    "NOAUTH": AuthenticationError,
    "ERR AUTH": AuthenticationError,
    "ERR max number of clients": ConnectionRefusedError,
    "BUSY": ConnectionError,
    "CLUSTERDOWN": ConnectionError,
    "LOADING": ConnectionError,
    "MASTERDOWN": ConnectionError,
    "READONLY": ConnectionError,
    "TRYAGAIN": ConnectionError,
    "UNBLOCKED": ConnectionError,
}

_Node = tuple[str, int]  # host and port
_Command = tuple[Any, ...]


def _redis_package() -> Any:
    """Imported only by those who use it, as only they need to have it."""
    try:
        return importlib.import_module("redis")
    except ImportError as error:
        raise DSMQError(
            f"a Redis needs the package redis: pip install dsmq[redis] ({error})"
        ) from error


class _Redirection(Exception):
    """Another node of a cluster has the key: for this once (ASK), or MOVED."""

    def __init__(self, text: str, asked: _Node) -> None:
        super().__init__(text)
        code, _, address = text.split(" ")[:3]
        host, _, port = address.rpartition(":")
        self.moved = code == "MOVED"
        self.node: _Node = (host or asked[0], int(port))


def _redis_exception(error: Exception, node: _Node) -> Exception:
    """What every dsmq client raises for an error of the package."""
    redis, text = _redis_package(), str(error)
    if text.startswith(("MOVED ", "ASK ")):
        return _Redirection(text, node)
    kind: type[Exception] = ConnectionError
    if isinstance(error, redis.TimeoutError):
        kind = TimeoutError
    elif isinstance(error, redis.exceptions.InvalidResponse):
        kind = FrameError
    elif isinstance(error, redis.ResponseError):
        code = next((code for code in _REDIS_EXCEPTIONS if code in text), None)
        kind = _REDIS_EXCEPTIONS[code] if code else DSMQError
    return kind(f"{node[0]}:{node[1]}: {text[:500]}")


class _RedisNode:
    """A connection to one server. The package speaks the protocol, over a socket made
    here, so that TLS and time limits are those of every dsmq client."""

    def __init__(self, node: _Node, frames: FrameSocket, login: dict[str, Any]) -> None:
        self._node = node
        self.frames = frames
        connection = _redis_package().connection
        # Its versions differ in which errors have classes of their own; without any,
        # the server's text stays whole.
        parser = type("Parser", (connection.DefaultParser,), {"EXCEPTION_CLASSES": {}})
        self._connection = connection.Connection(
            host=node[0], port=node[1], protocol=2, parser_class=parser, **login
        )
        self._connection._connect = lambda: frames.sock

    def ask(self, end: float, *commands: _Command) -> list[Any]:
        """The replies, once all have come. Raises the first that is an error."""
        redis = _redis_package()
        replies: list[Any] = []
        try:
            self.frames.limit_to(end)
            packed = self._connection.pack_commands(commands)
            self._connection.send_packed_command(packed)  # logs in, the first time
            for _ in commands:
                self.frames.limit_to(end)
                try:
                    replies.append(self._connection.read_response())
                except redis.ResponseError as error:
                    replies.append(error)
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
        except redis.RedisError as error:
            raise _redis_exception(error, self._node) from error
        return replies

    def close(self) -> None:
        self._connection.disconnect()
        self.frames.close()


class _RedisLink:
    """A lane's connections: in a cluster, one to each node it had to do with.

    The package's RedisCluster would repeat commands in its own time, ask a node before
    each XREAD which words of it are keys, and after an interrupt use connections with a
    reply still to come.
    """

    def __init__(self, open_node: Callable[[_Node, float], _RedisNode]) -> None:
        self._open = open_node
        self._nodes: dict[_Node, _RedisNode] = {}

    def ask(self, node: _Node, end: float, *commands: _Command) -> list[Any]:
        if node not in self._nodes:
            self._nodes[node] = self._open(node, end)
        return self._nodes[node].ask(end, *commands)

    def shut(self) -> None:
        for node in list(self._nodes.values()):
            node.frames.shut()

    def close(self) -> None:
        for node in self._nodes.values():
            node.close()


class _RedisConnection(DSMQClientSideConnection):
    """A client like any other, whose messages are in Redis 6.2 or later.

    On a single server all is as with a dsmq server. In a Redis Cluster each node makes
    ids from its own clock, so where reading begins is exact only up to the difference
    between the clocks, and while one that stepped back catches up, what is put to its
    node may be missed. In a failover Redis may lose messages it had acknowledged.
    """

    _engine = "Redis"
    _time_to_live = TIME_TO_LIVE_SECONDS  # to be the same for all clients

    def __init__(
        self,
        url: str,
        port: int = DEFAULT_PORT,
        verbose: bool = False,
        *,
        timeout: float = 10.0,
        secret: str | None = None,
        tls: bool | str | os.PathLike[str] = False,
    ) -> None:
        if port != DEFAULT_PORT or secret is not None:
            raise ValueError("port and password of a Redis belong in its URL")
        scheme, node, self._login = _parsed_redis_url(url)
        if tls and scheme != "rediss":
            raise ValueError("TLS to a Redis is asked for with rediss://")
        _redis_package()
        self._clustered: bool | None = None
        # The nodes known, best first, and where the keys of a slot were. Both are
        # hints, and put right by redirections.
        self._nodes = [node]
        self._homes: dict[int, _Node] = {}
        tls = tls or scheme == "rediss"
        super().__init__(*node, verbose, timeout=timeout, tls=tls)

    # Reaching the servers

    def _dial(self, lane: _Lane, end: float) -> Any:
        link = _RedisLink(self._open)
        lane.hold(link)
        if self._start is None:  # connecting; later ones are opened as they are needed
            self._ask(link, self._nodes[0], end)
        return link

    def _open(self, node: _Node, end: float) -> _RedisNode:
        newest = self._newest()
        opened = _RedisNode(node, self._reach(*node, end, lambda _: None), self._login)
        try:
            if self._clustered is None:
                (info,) = opened.ask(end, ("INFO", "cluster"))
                self._clustered = b"cluster_enabled:1" in info
            if not self._clustered:
                self._note_redis_head(opened, end, newest)
            elif self._start is None:
                self._note_cluster(opened, end, node)
        except BaseException:
            opened.close()
            raise
        return opened

    def _note_redis_head(self, opened: _RedisNode, end: float, newest: int) -> None:
        (head,) = opened.ask(end, ("GET", _REDIS_HEAD))
        # A head that is lower than before was restored from a disk; later ids are still
        # higher, by the clock. Without any, nothing was put yet: all will be new.
        known = max(newest, self._start or 0)
        self._note_head(max(_redis_id(head), known) if head else 0, newest)

    def _note_cluster(self, opened: _RedisNode, end: float, node: _Node) -> None:
        slots, time_ = opened.ask(end, ("CLUSTER", "SLOTS"), ("TIME",))
        nodes = [n for part in slots for n in _redis_nodes(part, node)]
        self._nodes = list(dict.fromkeys([*self._nodes, *nodes]))
        self._note_head(((_redis_milliseconds(time_) + 1) << _REDIS_ID_BITS) - 1, 0)
        # Puts of this millisecond may have gone before or not. Once it has passed, all
        # that are still to come get higher ids.
        time.sleep(0.002)

    def _ask(
        self, link: _RedisLink, node: _Node, end: float, *commands: _Command
    ) -> list[Any]:
        try:
            return link.ask(node, end, *commands)
        except OSError:
            with self._lock:  # the next attempt begins with another node, if there is
                self._homes = {s: n for s, n in self._homes.items() if n != node}
                self._nodes = [*(n for n in self._nodes if n != node), node]
            raise

    def _exchange(
        self, key: bytes, lane: _Lane, commands: list[_Command], end: float
    ) -> list[Any]:
        return lane.talk(partial(self._ask_home, key, commands, end), end)

    def _ask_home(
        self, key: bytes, commands: list[_Command], end: float, link: _RedisLink
    ) -> list[Any]:
        """The replies of the node that has the key."""
        slot = binascii.crc_hqx(key[1 : key.index(b"}")], 0) % 16384
        node = self._homes.get(slot, self._nodes[0])
        asking: list[_Command] = []
        for _ in range(_REDIS_REDIRECTIONS):
            try:
                return self._ask(link, node, end, *asking, *commands)[len(asking) :]
            except _Redirection as to:
                node, asking = to.node, [] if to.moved else [("ASKING",)]
                if to.moved:
                    self._homes[slot] = node
        raise ConnectionError("the nodes of the cluster point at each other")

    # Putting and reading

    def _put(self, topic: str, msgs: Iterable[str]) -> None:
        key = _redis_key(topic)
        self._check_usable()
        room_bytes = self._max_frame_bytes
        for load in list(_loads(msgs, room_bytes, str.encode, _REDIS_MESSAGE_BYTES)):
            make, send = partial(self._put_command, key, load), self._exchange
            self._call(_numbered_put(make, partial(send, key)))

    def _put_command(
        self, key: bytes, load: list[bytes], client: str, sequence: int
    ) -> list[_Command]:
        keys = [key, key + client.encode(), *([] if self._clustered else [_REDIS_HEAD])]
        # As long as this call may send it again.
        remembered = max(REMEMBERED_SECONDS, min(self._timeout, LONGEST_SECONDS))
        times = [int(s * 1000) for s in (self._time_to_live, remembered)]
        return [("EVAL", _REDIS_PUT, len(keys), *keys, sequence, *times, *load)]

    def _read(self, topic: str, after: int, limit: int, wait: float) -> _Messages:
        key = _redis_key(topic)
        count = min(limit, _REDIS_READ_MESSAGES)
        begun = 0.0

        def exchange(lane: _Lane, end: float) -> list[Any]:
            nonlocal begun, count
            if begun:  # a line that breaks now and then may never carry a long reply
                count = max(count // 2, 1)
            begun = time.monotonic()
            block: tuple[Any, ...] = ()
            if wait:
                seconds = min(wait, (end - begun) / 2, MAX_WAIT_SECONDS)
                block = ("BLOCK", max(int(seconds * 1000), 1))  # 0 would be for ever
                end += _REDIS_LATE_SECONDS
            last = ("STREAMS", key, _redis_id_text(after))
            read = ("XREAD", "COUNT", count, *block, *last)
            return self._exchange(key, lane, [read, ("TIME",)], end)

        while True:
            streams, time_ = self._call(exchange)
            rows = streams[0][1] if streams else []
            now = time.monotonic() if wait else begun
            messages, oldest = self._live(rows, time_, now)
            if messages[0] or not rows:
                return messages
            after = oldest - 1  # all of these have expired; there may be others behind

    def _read_latest(self, topic: str, after: int) -> _Messages:
        key = _redis_key(topic)
        begin = b"(" + _redis_id_text(after)
        commands = [("XREVRANGE", key, "+", begin, "COUNT", 1), ("TIME",)]
        rows, time_ = self._call(lambda n, end: self._exchange(key, n, commands, end))
        return self._live(rows, time_, time.monotonic())[0]

    def _live(
        self, rows: list[Any], time_: list[bytes], now: float
    ) -> tuple[_Messages, int]:
        """The messages that have not expired, and the least id of such, by the clock of
        the server that gave the ids."""
        oldest = _redis_milliseconds(time_) - int(self._time_to_live * 1000) + 1
        ids = [_redis_id(id_) for id_, _ in rows]
        expired = bisect.bisect_left(ids, oldest << _REDIS_ID_BITS)
        texts = [fields[1].decode(errors="replace") for _, fields in rows[expired:]]
        ids = ids[expired:]
        left = ((ids[0] >> _REDIS_ID_BITS) - oldest) / 1000 if ids else 0.0
        return (ids, texts, now + left), oldest << _REDIS_ID_BITS

    # The servers themselves

    def stats(self) -> dict[str, Any]:
        """As of a dsmq server, over all nodes. `version` and `clients` are those of
        Redis, `max_bytes` is its maxmemory, 0 for none. Looks at each of its keys."""

        def ask_all(end: float, link: _RedisLink) -> list[dict[str, Any]]:
            seed = self._nodes[0]
            nodes = {seed}
            if self._clustered:
                (slots,) = self._ask(link, seed, end, ("CLUSTER", "SLOTS"))
                nodes = {_redis_nodes(part, seed)[0] for part in slots}
            asks = [partial(self._ask, link, node, end) for node in nodes]
            return [_redis_stats(ask, self._time_to_live) for ask in asks]

        parts = self._call(lambda lane, end: lane.talk(partial(ask_all, end), end))
        topics = {name: size for part in parts for name, size in part["topics"].items()}
        return {
            "version": parts[0]["version"],
            "uptime": parts[0]["uptime"],
            "clients": sum(part["clients"] for part in parts),
            "messages": sum(topic["messages"] for topic in topics.values()),
            "bytes": sum(topic["bytes"] for topic in topics.values()),
            "time_to_live": self._time_to_live,
            "max_bytes": sum(part["max_bytes"] for part in parts),
            "topics": topics,
        }

    def shutdown_server(self) -> None:
        """Raises DSMQError: others may be using the Redis."""
        self._check_usable()
        raise DSMQError("a Redis is not stopped by its clients")


def _parsed_redis_url(url: str) -> tuple[str, _Node, dict[str, Any]]:
    """Scheme, host and port, and what is needed to log in."""
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.query or parts.fragment:
            raise ValueError
        node = parts.hostname or DEFAULT_HOST, parts.port or 6379
        database = int(parts.path.strip("/") or 0)
    except ValueError:  # whose text may show a part of the password
        text = "a Redis URL is redis://[user:password@]host[:port][/database]"
        raise ValueError(
            f"{text}, with any /?#@ in a password as %2F and so on"
        ) from None
    user, password = (
        urllib.parse.unquote(text or "") or None
        for text in (parts.username, parts.password)
    )
    return parts.scheme, node, {"db": database, "username": user, "password": password}


def _redis_key(topic: str) -> bytes:
    return _REDIS_STREAM % _checked_topic(topic).encode()


def _redis_id(text: bytes) -> int:
    milliseconds, number = text.split(b"-")
    return int(milliseconds) << _REDIS_ID_BITS | int(number)


def _redis_id_text(id_: int) -> bytes:
    return b"%d-%d" % (id_ >> _REDIS_ID_BITS, id_ & ((1 << _REDIS_ID_BITS) - 1))


def _redis_milliseconds(time_: list[bytes]) -> int:
    return int(time_[0]) * 1000 + int(time_[1]) // 1000


def _redis_nodes(part: list[Any], asked: _Node) -> list[_Node]:
    """The nodes that have a part of the slots, the one that takes puts first."""
    return [((host or b"").decode() or asked[0], port) for host, port, *_ in part[2:]]


def _redis_stats(ask: Callable[..., list[Any]], time_to_live: float) -> dict[str, Any]:
    """What one node holds."""
    text, time_ = ask(("INFO",), ("TIME",))
    info = dict(re.findall(r"^(\w+):(.*)\r$", text.decode(), re.MULTILINE))
    oldest = _redis_milliseconds(time_) - int(time_to_live * 1000) + 1
    topics, cursor = {}, b""
    while cursor != b"0":
        only = ("MATCH", _REDIS_STREAM % b"*", "COUNT", 1000, "TYPE", "stream")
        ((cursor, keys),) = ask(("SCAN", cursor or b"0", *only))
        for key in keys:
            # As at a put: what has expired is not counted, nor kept.
            trim = ("XTRIM", key, "MINID", oldest)
            _, messages, size = ask(trim, ("XLEN", key), ("MEMORY", "USAGE", key))
            if messages:
                topic = key[len(b"{dsmq:") : -1].decode(errors="replace")
                topics[topic] = {"messages": messages, "bytes": size}
    return {
        "version": info["redis_version"],
        "uptime": float(info["uptime_in_seconds"]),
        "clients": int(info["connected_clients"]),
        "max_bytes": int(info["maxmemory"]),
        "topics": topics,
    }


# ---------------------------------------------------------------------- command line


def demo() -> None:
    """A server, a putter and two getters that each receive everything."""
    context = multiprocessing.get_context("spawn")  # the same on every system
    port = _free_port()
    # Daemons, so that they end with the demo, however it ends.
    arguments = DEFAULT_HOST, port
    processes = [context.Process(target=serve, args=arguments, daemon=True)]
    processes[0].start()
    with connect(port=port) as mq:
        _say(f"server:   listening on {DEFAULT_HOST}:{port}")
        for name in "AB":
            getter = partial(_demo_getter, port, name)
            processes.append(context.Process(target=getter, daemon=True))
            processes[-1].start()
            _say(f"getter {mq.get_wait('ready')}: connected")
        for text in ("Hello, world", "Part mail room,", "part bulletin board.", "Bye"):
            _say(f"putter:   puts {text!r}")
            mq.put("greetings", text)
            time.sleep(0.3)
        _say("putter:   asks the server to stop")
        mq.shutdown_server()
    for process in processes:
        process.join()
    _say("server:   stopped")


def _demo_getter(port: int, name: str) -> None:
    with contextlib.suppress(BrokenPipeError), connect(port=port) as mq:
        mq.put("ready", name)
        for text in mq.listen("greetings", timeout=5):
            _say(f"getter {name}: got {text!r}")
            if text == "Bye":
                break


def _say(line: str) -> None:
    # Line and line end together, for others print to the same terminal.
    print(line + "\n", end="", flush=True)


def _free_port() -> int:
    with socket.create_server((DEFAULT_HOST, 0)) as probe:
        return int(probe.getsockname()[1])


def _run_serve(options: argparse.Namespace) -> None:
    # As Ctrl-C: what service managers and kill send.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):  # one that comes before serve's loop
        serve(
            options.host,
            options.port,
            verbose=True,
            time_to_live=options.time_to_live,
            max_bytes=options.max_bytes,
            max_frame_bytes=options.max_frame_bytes,
            max_clients=options.max_clients,
            secret=_secret(options),
            certfile=options.certfile,
            keyfile=options.keyfile,
        )


def _run_put(options: argparse.Namespace) -> None:
    with _connected_client(options) as mq:
        if options.messages:
            mq.put_many(_argument(options.topic), map(_argument, options.messages))
            return
        stored = 0
        try:
            for lines in _stdin_lines():
                mq.put_many(_argument(options.topic), lines)
                stored += len(lines)
        except (OSError, DSMQError, ValueError) as error:
            raise DSMQError(f"stopped after {stored} lines: {error}") from error


def _argument(text: str) -> str:
    """An argument as the UTF-8 it was typed in, whatever the locale made of it."""
    return os.fsencode(text).decode()


def _stdin_lines() -> Iterator[list[str]]:
    """The lines of standard input, as many at a time as have come."""
    if sys.stdin is None:
        raise ValueError("standard input is closed")
    rest = b""
    while chunk := os.read(sys.stdin.fileno(), RECEIVE_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > MAX_FRAME_BYTES:
            raise ValueError(f"a line longer than {MAX_FRAME_BYTES} bytes")
        if lines:
            yield [_line(line) for line in lines]
    if rest:
        yield [_line(rest)]


def _line(line: bytes) -> str:
    return (line.removesuffix(b"\r") if os.name == "nt" else line).decode()


def _run_watch(options: argparse.Namespace) -> None:
    _show_log()  # a lost server is told of
    _check_number("timeout", options.timeout, 0, math.inf)
    if sys.stdout is None:
        raise ValueError("standard output is closed")
    messages: queue.Queue[str | Exception] = queue.Queue(STEP_MESSAGES)
    with _connected_client(options) as mq:
        for topic in options.topics:
            arguments = mq, _checked_topic(_argument(topic)), messages
            threading.Thread(target=_follow, args=arguments, daemon=True).start()
        for _ in range(options.count):
            message = _next_watched(messages, options.timeout)
            if isinstance(message, Exception):
                raise message
            if message is None:
                return
            sys.stdout.buffer.write(message.encode() + b"\n")
            sys.stdout.buffer.flush()


def _next_watched(
    messages: queue.Queue[str | Exception], timeout: float
) -> str | Exception | None:
    end = time.monotonic() + timeout
    while (remaining := end - time.monotonic()) > 0:
        # Not longer at once, for on Windows Ctrl-C does not end the wait for a lock.
        with contextlib.suppress(queue.Empty):
            return messages.get(timeout=min(remaining, 1.0))
    return None


def _follow(
    mq: DSMQClientSideConnection, topic: str, messages: queue.Queue[str | Exception]
) -> None:
    """Passes on a topic's messages, through restarts of the server, to the end."""
    while True:
        try:
            for message in mq.listen(topic):
                messages.put(message)
        except OSError as error:
            if mq.closed:
                return
            _log.warning("%s; trying again", error)
        except Exception as error:
            messages.put(error)  # the main thread tells it
            return


def _run_stats(options: argparse.Namespace) -> None:
    with _connected_client(options) as mq:
        stats = mq.stats()
    if options.json:
        print(json.dumps(stats))
        return
    topics = stats.pop("topics")
    width = max(len(name) for name in stats)
    for name, value in stats.items():
        print(f"{name:{width}}  {value}")
    rows = [("topic", "messages", "bytes")]
    rows += [
        (_shown(t), str(n["messages"]), str(n["bytes"])) for t, n in topics.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    print()
    for topic, count, size in rows:
        print(f"{topic:{widths[0]}}  {count:>{widths[1]}}  {size:>{widths[2]}}")


def _run_shutdown(options: argparse.Namespace) -> None:
    with _connected_client(options) as mq:
        mq.shutdown_server()


def _run_bench(options: argparse.Namespace) -> None:
    context = multiprocessing.get_context("spawn")
    private = options.host is None and options.port is None
    options.host = options.host or DEFAULT_HOST
    options.port = options.port or (_free_port() if private else DEFAULT_PORT)
    if private:
        options.secret_file, options.tls = None, None
        os.environ.pop("DSMQ_SECRET", None)
        address = options.host, options.port
        context.Process(target=serve, args=address, daemon=True).start()
    figures: dict[str, float] = {}
    with _connected_client(options) as mq:
        try:
            for name, figure in _bench(mq, context, options.count):
                print(f"{name} ...", file=sys.stderr)
                figures[name] = figure()
        finally:
            if private:
                mq.shutdown_server()
    if options.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:<40} {value:10,.1f}")


def _bench(
    mq: DSMQClientSideConnection, context: Any, count: int
) -> Iterator[tuple[str, Callable[[], float]]]:
    """What to measure, in microseconds unless the name says otherwise."""
    topic = f"bench {secrets.token_hex(4)} "
    long, few, batch = "x" * 500_000, max(count // 20, 1), ["x"] * 100

    def each(times: int, call: Callable[[], object], share: int = 1) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - begin) / times / share * 1e6

    yield "put", lambda: each(count, lambda: mq.put(topic + "a", "x"))
    yield "get, something there", lambda: each(count, lambda: mq.get(topic + "a"))
    yield "get, nothing there", lambda: each(count, lambda: mq.get(topic + "a"))
    put_many = partial(mq.put_many, topic + "b", batch)
    yield "put_many of 100, a message", lambda: each(few, put_many, 100)
    get_many = partial(mq.get_many, topic + "b", 100)
    yield "get_many of 100, a message", lambda: each(few, get_many, 100)
    yield "put, 500 kB", lambda: each(few, lambda: mq.put(topic + "c", long))
    yield "get, 500 kB", lambda: each(few, lambda: mq.get(topic + "c"))
    trips = partial(_bench_trips, mq, context, topic, max(count // 4, 1))
    yield "one way to another process, median", trips
    fan_out = partial(_bench_fan_out, mq, context, topic, count)
    yield "1 writer, 4 readers, deliveries/s", fan_out


def _bench_trips(
    mq: DSMQClientSideConnection, context: Any, topic: str, trips: int
) -> float:
    echo = context.Process(target=_bench_echo, args=(mq, topic, trips), daemon=True)
    echo.start()
    mq.get_wait(topic + "pong")  # it is there
    times = []
    for _ in range(trips):
        begin = time.perf_counter()
        mq.put(topic + "ping", "x")
        mq.get_wait(topic + "pong")
        times.append((time.perf_counter() - begin) / 2 * 1e6)
    echo.join()
    return sorted(times)[trips // 2]


def _bench_echo(mq: DSMQClientSideConnection, topic: str, trips: int) -> None:
    mq.put(topic + "pong", "ready")
    for _ in range(trips):
        mq.get_wait(topic + "ping")
        mq.put(topic + "pong", "x")


def _bench_fan_out(
    mq: DSMQClientSideConnection, context: Any, topic: str, count: int
) -> float:
    readers = [
        context.Process(target=_bench_read, args=(mq, topic, count), daemon=True)
        for _ in range(4)
    ]
    for reader in readers:
        reader.start()
    for _ in readers:
        mq.get_wait(topic + "ready")
    begin = time.perf_counter()
    for _ in range(count):
        mq.put(topic + "fan", "x")
    for reader in readers:
        reader.join()
    return len(readers) * count / (time.perf_counter() - begin)


def _bench_read(mq: DSMQClientSideConnection, topic: str, count: int) -> None:
    mq.put(topic + "ready", "x")
    for _ in range(count):
        mq.get_wait(topic + "fan")


def _connected_client(options: argparse.Namespace) -> DSMQClientSideConnection:
    tls = False if options.tls is None else options.tls
    return connect(options.host, options.port, secret=_secret(options), tls=tls)


def _secret(options: argparse.Namespace) -> str | None:
    """From a file or the environment: every user of the machine can see arguments."""
    if options.secret_file is None:
        return os.environ.get("DSMQ_SECRET")
    with open(options.secret_file, encoding="utf-8") as file:
        return file.read().rstrip("\r\n")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return int(text)


def _common_options() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--host", default=DEFAULT_HOST, help=f"default: {DEFAULT_HOST}; or redis://...")
    add("--port", type=int, default=DEFAULT_PORT, help=f"default: {DEFAULT_PORT}")
    text = "holds the shared secret; or else the environment variable DSMQ_SECRET"
    add("--secret-file", metavar="FILE", help=text)
    return common


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "dsmq",
        description="The dead simple message queue. Without a command: a demo.",
        epilog="example: dsmq serve & dsmq watch greetings & dsmq put greetings hello",
    )
    parser.add_argument("--version", action="version", version=f"dsmq {__version__}")
    parser.set_defaults(run=lambda options: demo())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (run, text, example, add_options) in _COMMANDS.items():
        example = f"example: dsmq {name} {example}".rstrip()
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=example,
            parents=[_common_options()],  # each its own, for bench changes the defaults
        )
        command.set_defaults(run=run)
        if run is not _run_serve:
            text = "use TLS, trusting this certificate, or without one the system's"
            command.add_argument(
                "--tls", nargs="?", const=True, metavar="PEM", help=text
            )
        add_options(command)
    return parser


def _serve_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--time-to-live", type=float, default=TIME_TO_LIVE_SECONDS, metavar="SECONDS")
    add("--max-bytes", type=int, default=MAX_BYTES, metavar="N", help="of messages")
    add("--max-frame-bytes", type=int, default=MAX_FRAME_BYTES, metavar="N")
    add("--max-clients", type=int, default=MAX_CLIENTS, metavar="N")
    add("--certfile", metavar="PEM", help="turns on TLS")
    add("--keyfile", metavar="PEM", help="the key, if it is not in the certfile")


def _put_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("topic", metavar="TOPIC")
    text = "without any: the lines of standard input"
    command.add_argument("messages", metavar="MSG", nargs="*", help=text)


def _watch_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("topics", metavar="TOPIC", nargs="+")
    text = "end after so many messages"
    add("--count", type=_positive, default=sys.maxsize, metavar="N", help=text)
    text = "end when none came for so many seconds"
    add("--timeout", type=float, default=math.inf, metavar="S", help=text)


def _stats_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="for programs to read")


def _bench_options(command: argparse.ArgumentParser) -> None:
    command.set_defaults(host=None, port=None)
    _stats_options(command)
    text = "how many of the short operations"
    command.add_argument(
        "--count", type=_positive, default=2000, metavar="N", help=text
    )


# What runs, what it does, an example's arguments, and what adds its options.
_COMMANDS: dict[
    str,
    tuple[
        Callable[[argparse.Namespace], None],
        str,
        str,
        Callable[[argparse.ArgumentParser], None],
    ],
] = {
    "serve": (_run_serve, "run a server", "--port 30008", _serve_options),
    "put": (_run_put, "put messages into a topic", "greetings hello", _put_options),
    "watch": (
        _run_watch,
        "print the messages of topics as they come",
        "greetings --count 1",
        _watch_options,
    ),
    "stats": (_run_stats, "show what a server holds", "--json", _stats_options),
    "bench": (
        _run_bench,
        "measure a private server, or the one at --host and --port",
        "--count 1000",
        _bench_options,
    ),
    "shutdown": (_run_shutdown, "stop a server", "--port 30008", lambda command: None),
}


def main(arguments: list[str] | None = None) -> int:
    """The command line; gives the exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        if sys.stdout is not None:  # as it is when it was closed from the start
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT  # as a shell tells it
    except BrokenPipeError:
        # Whoever read our output has enough. Python would complain once more, when it
        # flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, DSMQError, ValueError) as error:
        print(f"dsmq: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
