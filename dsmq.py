"""dsmq, the dead simple message queue: one file that moves strings between processes.

A server holds topics in memory; clients put strings into a topic and read them back.

    python dsmq.py serve                      # in one terminal

    from dsmq import connect                  # in as many programs as you like
    mq = connect()                            # 127.0.0.1, port 30008
    mq.put("greetings", "hello")
    mq.get("greetings")                       # "" if there is nothing (yet)

Semantics
    One-to-many: every client reads every message of a topic, first in first out, at
    its own pace. A client sees what was put after it connected, or up to `since`
    seconds before. When put returns, the message is stored, once, and every other
    client's next get sees it. A message older than the time to live (600 s) is neither
    handed out nor kept. A lost connection is made again by the next call, which carries
    on where the last one stopped. After a restart of the server its messages are gone;
    clients carry on with all that is put to the new one.

Wire protocol, version 1
    A frame is a 4-byte unsigned big-endian length and that many bytes of UTF-8 JSON,
    always an object. One reply a request, in order, on each connection. Unknown fields
    are ignored. A reply with `error` (text) and `code` refuses the request and changes
    nothing. README has the details.

    hello         protocol, nonce, since     -> protocol, server, max_frame_bytes,
                                                time_to_live, head (or with a secret
                                                challenge, proof and no head)
    authenticate  proof                      -> head
    put           topic, messages, client, sequence, settled      -> head
    get           topic, after, limit, limit_bytes, wait  -> messages, ids, expires
    get_latest    topic, after               -> messages, ids, expires
    stats                                    -> what the client's `stats` gives
    shutdown

Threads and locks
    Server: one thread accepts, one serves each connection, one purges, and one answers
    the readers that wait for a topic's next round. `MessageStore._lock` guards all
    stored state, and is never held while sending, receiving, encoding or decoding.
    `FrameSocket.sending` is held while a reply is under way: of a get that waits from
    the moment it is in the store, until whoever took it out has sent its reply.
    Client: each call borrows a connection of its own, so calls in several threads do
    not wait for each other; `DSMQClientSideConnection._lock` guards the cursors.
"""

from __future__ import annotations

import _thread
import bisect
import contextlib
import errno
import importlib
import json
import logging
import math
import operator
import os
import queue
import re
import select
import socket
import socketserver
import struct
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count, repeat
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

if TYPE_CHECKING:
    import ssl

__all__ = ["AuthenticationError", "DSMQClientSideConnection", "DSMQError"]
__all__ += ["FrameError", "QueueFull", "connect", "serve"]
__version__ = "2.1.0"

# Programs written for the original say `from dsmq.server import serve` and
# `from dsmq.client import connect`; both names are this module.
if __name__ in sys.modules:  # not when some tool runs the file without importing it
    server = client = sys.modules[__name__]
    sys.modules[f"{__name__}.server"] = sys.modules[f"{__name__}.client"] = server

_T = TypeVar("_T")
_Fields = dict[str, Any]  # of a frame's object
_Messages = tuple[list[int], list[str], float]  # ids, texts, when the first expires
_Bytes = bytes | memoryview
_TLS = bool | str | os.PathLike[str]

_log = logging.getLogger("dsmq")
_log.addHandler(logging.NullHandler())  # a library prints nothing unless asked to

# ---------------------------------------------------------------------------- limits

DEFAULT_HOST = "127.0.0.1"  # loopback: nobody else on the network gets in unasked
DEFAULT_PORT = 30008
PROTOCOL = 1

TIME_TO_LIVE_SECONDS = 600.0
MAX_BYTES = 1 << 30  # memory of stored messages: what a small machine can spare
MAX_FRAME_BYTES = 16 << 20  # a request or reply: an image fits, a film does not
MIN_FRAME_BYTES = 1000  # below it the server's own replies and errors do not fit
ENVELOPE_BYTES = 200  # of a frame around its topic, messages and ids
ID_BYTES = 20  # of an id in a reply, at most
MAX_PUT_MESSAGES = 100_000  # stored in one go, in which others wait: 0.2 s
MAX_CLIENTS = 10_000  # connections, a thread each
MAX_TOPIC_CHARACTERS = 1000
MAX_INTEGER = (1 << 63) - 1  # SQLite's, and most other languages' widest
# What a stored message takes in memory beside its text (row, index; measured 65 to 75
# bytes), and what a topic takes beside its name: both count towards max_bytes, so that
# a flood of empty messages is bounded too.
MESSAGE_OVERHEAD_BYTES = 72
TOPIC_OVERHEAD_BYTES = 400

STALL_SECONDS = 30.0  # a peer silent inside a frame, or not reading, is dropped
LINGER_SECONDS = 1.0  # a refused peer gets this long to read why
LONGEST_SECONDS = 1e6  # that any system can wait at a time
MAX_WAIT_SECONDS = 30.0  # one request's wait; clients ask again, so the dead are found
POLL_SECONDS = 0.1  # between looks whether the server should stop
PURGE_SECONDS = 0.5  # between looks for expired messages
STEP_MESSAGES = 500  # handled in one hold of the store's lock: about a millisecond
STEP_BYTES = 1 << 20  # likewise
REMEMBERED_SECONDS = 60.0  # a put can be repeated, however short the messages live
RETRY_PAUSE_SECONDS = 0.01  # before the first retry; doubles up to a quarter second
SEND_BYTES = 1 << 18  # sent or received at a time
READ_AHEAD_BYTES = 1 << 20  # of one reply at most, ...
FIRST_READ_AHEAD_BYTES = 1 << 16  # ... while it is unknown what the line carries, ...
LEAST_READ_AHEAD_BYTES = 8192  # ... and over the slowest that is of use

# ---------------------------------------------------------------------------- errors


class DSMQError(Exception):
    """The root of dsmq's own errors: the server refused, for the reason it names."""

    code = "stale"  # in the reply to the client: a put that comes after later ones


class QueueFull(DSMQError):
    """The server's memory limit, `max_bytes`, is reached; nothing was stored."""

    code = "full"


class AuthenticationError(DSMQError):
    """A peer did not prove that it knows the shared secret."""


class FrameError(DSMQError, ConnectionError):
    """The peer's bytes are no frame of this protocol; the connection is given up."""


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
    if host.count(":") == 1:  # an IPv6 address has more
        raise ValueError(f"host is {_shown(host)}: the port is an argument of its own")
    _check_number("port", port, 0, 65535, whole=True)


def _check_number(
    name: str, value: object, least: float, most: float, whole: bool = False
) -> None:
    kinds = (int,) if whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool):
        kind = "an int" if whole else "a number"
        raise TypeError(f"{name} must be {kind}, not {_shown(value)}")
    # Not a number fails this, as does an integer too large for a float.
    too_large = not whole and math.inf > value > sys.float_info.max
    if too_large or not least <= value <= most:
        raise ValueError(f"{name} must be {least} to {most}, not {_shown(value)}")


def _check_secret(secret: object) -> None:
    if secret is not None and not isinstance(secret, str):
        raise TypeError(f"secret must be a str, not a {type(secret).__name__}")
    if secret == "":
        raise ValueError("secret must not be empty: it would keep nobody out")
    if secret and secret.encode(errors="replace").decode() != secret:
        raise ValueError("secret must be text that UTF-8 can carry")


# ---------------------------------------------------------------------------- frames

_HEADER = struct.Struct(">I")
_ESCAPED = b'\n"\\' + bytes(range(32))  # what JSON cannot carry as it is
# By the first bytes of a reply: who else may be listening there.
_STRANGERS = {b"\x15\x03": "(it wants TLS)", b"HTTP": "(it speaks HTTP)"}
_STRANGERS |= {b"-ERR": "(it may be a Redis)", b"-NOA": "(it may be a Redis)"}
_encode = json.JSONEncoder(separators=(",", ":")).encode
_decode = json.JSONDecoder(parse_constant=int).raw_decode  # int refuses NaN and such
# glibc's malloc gives blocks as long as this one back to the system at once, and to get
# them again costs a page fault for each 4 kB, until it has seen a longer one come and
# go: that halves the time of long messages. No page of it is ever touched.
bytearray(2 << 20)


def encode_text(text: str) -> bytes:
    """`text` as UTF-8 JSON. Raises ValueError for a lone surrogate."""
    try:
        if len(text) > 4096:
            raw = text.encode()
            # json looks at each character twice; to look for each byte that needs an
            # escape takes a seventh of that (0.16 ms instead of 1.1 ms for 500 kB).
            if not any(map(raw.__contains__, _ESCAPED)):
                return b'"%b"' % raw
        return json.encoder.encode_basestring(text).encode()
    except UnicodeEncodeError:
        shown = _shown(text)
        raise ValueError(f"UTF-8 has no lone surrogates, as in {shown}") from None


def encode_frame(*body: bytes) -> bytes:
    """A frame around a body, which may come in parts: header and body together, for one
    send and one packet. A long part is copied once."""
    return b"".join((_HEADER.pack(sum(map(len, body))), *body))


def encode_object(fields: dict[str, Any]) -> bytes:
    """The frame of a JSON object, in ASCII so that any text survives in an error."""
    return encode_frame(_encode(fields).encode())


def decode_object(body: bytes | bytearray) -> dict[str, Any]:
    """The JSON object in a frame's body. Raises FrameError if it is not one."""
    try:
        text = str(body, "utf-8")
        if text[:1] != "{" or text[-1:] != "}":
            text = text.strip(" \t\r\n")
        value, end = _decode(text)
        if end != len(text):
            raise ValueError(f"there is more, at character {end}")
    except (ValueError, RecursionError) as error:
        raise FrameError(f"a frame must be UTF-8 JSON: {_shown(str(error))}") from None
    if not isinstance(value, dict):
        raise FrameError(f"a frame must be a JSON object, not {type(value).__name__}")
    return value


def _address(address: Any) -> str:
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else str(address)


def _would_wait(error: OSError) -> bool:
    # By its name, for ssl is imported only where TLS is used.
    return isinstance(error, BlockingIOError) or "SSLWant" in type(error).__name__


class FrameSocket:
    """A connected socket that carries frames, at either end. One thread receives, any
    may send.

    `end` is a monotonic time by which the call must be done, or TimeoutError is raised.
    Without it a frame may take as long as it likes to begin, and STALL_SECONDS for each
    part from then on.
    """

    def __init__(self, sock: socket.socket, max_frame_bytes: int) -> None:
        self.max_frame_bytes = max_frame_bytes
        self.bytes_per_second = 0.0  # at which the last frame came; 0 if it was short
        self.unread = b""  # came already, for `receive`
        self.sending = threading.Lock()  # a frame's bytes stay together
        # In the TLS layer there may be but one thread, so there both are the same.
        self._reading, self._writing = threading.Lock(), threading.Lock()
        # Where single calls can be told not to wait (not on Windows), the others may: a
        # server's thread needs no second system call to wait for the next request.
        self._flag = getattr(socket, "MSG_DONTWAIT", 0)
        self._raw = sock
        self._sock: Any = sock  # or the TLS around it
        try:
            self.peer = _address(sock.getpeername())
            # Asking again and again for a port of this machine that nobody listens on
            # may end in a socket connected to itself, as the system picks its port.
            if self.peer == _address(sock.getsockname()):
                raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody listens there")
            # A small frame must not wait for the acknowledgement of the one before it.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A peer whose machine vanished never says so. Keepalive asks after 60 s of
            # silence, where that can be set (on macOS by another name), else after two
            # hours.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            macos = getattr(socket, "TCP_KEEPALIVE", None)
            if option := getattr(socket, "TCP_KEEPIDLE", macos):
                sock.setsockopt(socket.IPPROTO_TCP, option, 60)
            sock.setblocking(bool(self._flag))
        except BaseException:
            sock.close()  # the peer has gone again
            raise

    def start_tls(
        self, context: ssl.SSLContext, end: float, host: str | None = None
    ) -> None:
        """The handshake: a client's, if it says which host's certificate to expect."""
        import ssl

        self._raw = self._sock = context.wrap_socket(
            self._raw,
            server_side=host is None,
            server_hostname=host,
            do_handshake_on_connect=False,  # but when `shut` can end it
        )
        self._raw.settimeout(min(max(end - time.monotonic(), 0.001), LONGEST_SECONDS))
        try:
            self._sock.do_handshake()
        except ssl.SSLError as error:
            if host is not None:
                raise
            self._sock = super(ssl.SSLSocket, self._sock)  # to say why in plain text
            raise FrameError(f"this port speaks TLS only: {error}") from None
        self._raw.setblocking(False)
        self._flag, self._writing = 0, self._reading

    def send(self, frame: _Bytes, end: float | None = None) -> None:
        """Sends it all, after what another thread is sending."""
        with self.sending:
            while frame := self._push(frame):
                self._wait(end or time.monotonic() + STALL_SECONDS, write=True)

    def _push(self, frame: _Bytes) -> _Bytes:
        """Sends what the peer takes without waiting; gives the rest."""
        try:
            with self._writing:
                sent = self._sock.send(frame, self._flag)
            return memoryview(frame)[sent:] if sent < len(frame) else b""
        except OSError as error:
            if _would_wait(error):
                return frame
            raise

    def answer(self, frame: bytes) -> None:
        """Sends the reply for which `sending` is held, from any thread, without waiting
        for the peer: what it does not take at once has a thread of its own."""
        try:
            rest = frame if len(frame) > SEND_BYTES else self._push(frame)
            if rest:
                _thread.start_new_thread(self._finish_answer, (rest,))
                return
        except (OSError, RuntimeError, MemoryError):  # the peer has gone; or no thread
            self.shut()  # a client asks again on a new one
        self.sending.release()

    def _finish_answer(self, rest: _Bytes) -> None:
        try:
            while rest := self._push(rest):
                self._wait(time.monotonic() + STALL_SECONDS, write=True)
        except (OSError, ValueError, MemoryError):  # to poll a closed one is the second
            self.shut()  # its own thread closes it
        finally:
            self.sending.release()

    def receive(self, end: float | None = None) -> bytes | bytearray | None:
        """The body of the next frame; None if the peer closed after the last one.
        Raises FrameError for one longer than `max_frame_bytes`, ConnectionError if the
        peer closed in its middle."""
        data = self.unread
        while len(data) < _HEADER.size:
            stalled = time.monotonic() + STALL_SECONDS if data else None
            chunk = self.some(4096, end or stalled)
            if not chunk:
                if data:
                    raise ConnectionResetError("the peer closed inside a frame")
                return None
            data += chunk
        total = _HEADER.size + _HEADER.unpack_from(data)[0]
        if total > _HEADER.size + self.max_frame_bytes:
            hints = [h for begin, h in _STRANGERS.items() if data.startswith(begin)]
            text = f"a frame of {total - _HEADER.size} bytes, but the limit is"
            raise FrameError(" ".join([text, str(self.max_frame_bytes), *hints]))
        self.bytes_per_second = 0.0
        if len(data) < total:
            return self._receive_rest(bytearray(data), total, end)
        self.unread = data[total:]
        return data[_HEADER.size : total]

    def _receive_rest(
        self, data: bytearray, total: int, end: float | None
    ) -> bytearray:
        # Memory grows with what came: a length announced and never sent costs nothing.
        self.unread, missing, begun = b"", total - len(data), time.monotonic()
        while len(data) < total:
            limit = end or time.monotonic() + STALL_SECONDS
            chunk = self.some(min(total - len(data), SEND_BYTES), limit)
            if not chunk:
                raise ConnectionResetError("the peer closed inside a frame")
            data += chunk
            # A slow line may take longer than `end`, as long as it moves: every 4 kB
            # buy a second. A peer that only trickles gains next to nothing.
            end = end and end + len(chunk) / 4000
        if missing > 2000:  # less says little of the line
            self.bytes_per_second = missing / max(time.monotonic() - begun, 1e-6)
        del data[: _HEADER.size]  # a long body is not copied once more
        return data

    def some(self, size: int, end: float | None) -> bytes:
        """What has come, once there is something; b"" when the peer has closed."""
        if self._flag and end is not None:
            self._wait(end)
        while True:
            try:
                with self._reading:
                    return self._sock.recv(size)  # type: ignore[no-any-return]
            except OSError as error:
                if not _would_wait(error):
                    raise
            self._wait(end)

    def _wait(self, end: float | None, write: bool = False) -> None:
        """Waits, outside of the TLS layer, until it can be read or written."""
        seconds = LONGEST_SECONDS if end is None else end - time.monotonic()
        if seconds > 0 and hasattr(select, "poll"):
            poll = select.poll()
            poll.register(self._raw, select.POLLOUT if write else select.POLLIN)
            if poll.poll(math.ceil(1000 * min(seconds, LONGEST_SECONDS))):
                return
        elif seconds > 0:  # on Windows
            ways = ([], [self._raw]) if write else ([self._raw], [])
            if any(select.select(*ways, [], min(seconds, LONGEST_SECONDS))):
                return
        if end is not None:
            raise TimeoutError("timed out")

    def shut(self, how: int = socket.SHUT_RDWR) -> None:
        """Ends the conversation from any thread; the one using the socket finds out."""
        # Not SSLSocket's own, after which its user would go on in plain text.
        with contextlib.suppress(OSError):  # the peer may have been faster
            socket.socket.shutdown(self._raw, how)

    def close(self) -> None:
        """Frees the descriptor and no more: after a fork the other side has it too."""
        self._raw.close()


# --------------------------------------------------------------------- message store


class Batch(NamedTuple):
    """Messages of a topic in order, as the store keeps them."""

    ids: list[int]
    bodies: list[bytes]
    expires_seconds: float  # until the oldest of them expires


class Waiter(NamedTuple):
    """A reader that waits for a topic's next message. Whoever takes it out of the store
    (a put, a round, the end of its wait, stopping) owes it the answer."""

    topic: str
    after: int
    limit: int
    room_bytes: int
    end: float = math.inf  # of its wait, a monotonic time
    connection: Any = None  # the server's, to answer it on


class _Topic:
    def __init__(self, name: str, key: int) -> None:
        self.name = name
        self.key = key  # stands for the name in every row and index entry
        self.newest = 0  # id; answers a reader that has everything without SQL
        self.gap = 0, 0  # from the first of these ids to the second the topic has none
        self.messages = 0
        self.bytes = TOPIC_OVERHEAD_BYTES + len(name.encode())
        self.waiters: dict[Waiter, None] = {}  # a set that keeps order
        self.next_round = 0.0  # its waiters are not answered again before this time
        self.round_due = False  # it is in `rounds`


EMPTY = Batch([], [], 0.0)
_Row = tuple[int, int, float, bytes]  # id, topic's key, when it was put, body
# Where a put comes from, so that it is stored once, and not after later ones: the
# client's name, its number for this put, and up to which number it expects no more.
Origin = tuple[str, int, int]


class MessageStore:
    """Topics of messages, which are opaque bytes here; all semantics but the cursors.

    Ids are contiguous over all topics: the rows are exactly those with ids from
    `_purged + 1` to `_head`, in the order of their age. So the oldest go first, and the
    boundary between expired and live is found by bisection.

    Readers that wait are answered by the putter, if they are few. Then their topic
    rests for four times as long as that took, 2 ms at most: who asks again meanwhile
    waits for the next round, though something is there, so that a fast writer does not
    wake every reader for every message. (From one writer to eight readers 51,000 a
    second, without it 20,000; at 500 a second each message goes out at once.)
    """

    def __init__(
        self,
        time_to_live: float,
        max_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.time_to_live = time_to_live
        self.max_bytes = max_bytes
        # Topics whose readers are to be answered at the time of their next round.
        self.rounds: queue.SimpleQueue[_Topic | None] = queue.SimpleQueue()
        self._clock = clock
        self._lock = threading.Lock()  # guards everything below
        import sqlite3  # which only a server needs

        # Any thread may use it, under the lock. Autocommit: put begins its own
        # transactions. The journal stays on, in memory (0.7 us a put): without it a
        # statement that runs out of memory half-way leaves a broken database.
        options: dict[str, Any] = {"check_same_thread": False, "isolation_level": None}
        self._db = sqlite3.connect(":memory:", **options)
        # Bodies are last in the row and the index holds none of them, so long messages
        # do not slow their neighbours. The index ends with the id, as all do.
        self._db.execute(
            "CREATE TABLE messages (id INTEGER PRIMARY KEY, topic INTEGER NOT NULL,"
            " put_at REAL NOT NULL, body BLOB NOT NULL)"
        )
        self._db.execute("CREATE INDEX by_topic ON messages (topic)")
        # The one look at the wall clock. Microseconds, because ids then grow more
        # slowly than the clock does, so a restarted server starts above them, and stay
        # below 2**53, where JavaScript's integers end, for two centuries.
        self.head = self._purged = time.time_ns() // 1000  # the newest id
        # The newest rows, which are still to be inserted: together they cost less (2
        # instead of 5 us each), most reads are of these alone, and SQLite gives up the
        # interpreter lock at every step, so that busy threads trip over each other.
        self._young: list[_Row] = []
        self._bytes = 0
        self._topics: dict[str, _Topic] = {}
        self._topics_by_key: dict[int, _Topic] = {}
        self._last_key = 0
        # By client, the latest to put last: when, what it settled, heads by sequence.
        self._recent: dict[str, tuple[float, int, dict[int, int]]] = {}
        self._closed = False

    # Putting

    def put(
        self, topic: str, bodies: list[bytes], origin: Origin | None = None
    ) -> tuple[int, _Topic | None]:
        """Stores all bodies or none; gives the id of the last, and the topic, if the
        caller is to answer its readers. A put whose client and sequence were stored
        before gives that id and nothing else. Raises QueueFull, and DSMQError for a put
        that comes too late: its client has settled it."""
        with self._lock:
            if self._closed:
                raise ConnectionAbortedError("the server has stopped")
            now, first = self._clock(), self.head + 1
            heads = self._heads(origin, now) if origin else {}
            if origin and origin[1] in heads:
                return heads[origin[1]], None
            entry = self._topics.get(topic) or _Topic(topic, self._last_key + 1)
            cost = sum(map(len, bodies)) + MESSAGE_OVERHEAD_BYTES * len(bodies)
            used = self._bytes + (0 if entry.messages else entry.bytes)
            if used + cost > self.max_bytes:
                text = f"{self._bytes} of max_bytes {self.max_bytes} are in use"
                raise QueueFull(f"no room for {cost} bytes: {text}")
            rows = list(zip(count(first), repeat(entry.key), repeat(now), bodies))
            if len(rows) + len(self._young) > 32 or cost > 4096:
                self._insert(rows)
            else:
                self._young += rows
            self._count(entry, len(bodies), cost)
            if not entry.round_due:  # else most wait at the first gap of the round
                entry.gap = entry.newest, first - 1
            self.head = entry.newest = first + len(bodies) - 1
            if origin:
                heads[origin[1]] = self.head
            # Each takes the putter 20 us; a crowd would keep it from its next request.
            few = now >= entry.next_round and len(entry.waiters) <= 8
            if entry.waiters and not few:
                self._call_round(entry)
            return self.head, entry if entry.waiters and few else None

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
        self._young.clear()

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
        self._last_key = max(self._last_key, entry.key)
        self._topics[entry.name] = self._topics_by_key[entry.key] = entry

    def _forget_if_unused(self, entry: _Topic) -> None:
        if not entry.messages and not entry.waiters:
            del self._topics[entry.name], self._topics_by_key[entry.key]

    def _heads(self, origin: Origin, now: float) -> dict[int, int]:
        """The heads of a client's latest puts by sequence, to look for this one's and
        to note it there."""
        client, sequence, settled = origin
        _, before, heads = self._recent.pop(client, (0.0, settled, {}))
        self._recent[client] = now, max(settled, before), heads
        if sequence <= before and sequence not in heads:
            # Left on its way by an interrupt or a timeout, on a connection lost since.
            raise DSMQError(f"sequence {sequence} was settled before")
        # Bounded, whatever clients do: 64 puts of each, 10,000 clients.
        if len(heads) >= 64 and sequence not in heads:
            del heads[next(iter(heads))]
        if len(self._recent) > 10_000:
            del self._recent[next(iter(self._recent))]
        return heads

    # Reading

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
        none, or a round to come, `waiter` waits for that, and nothing is given."""
        batch = EMPTY
        while len(batch.ids) < limit:
            # In steps, for a long read must not keep everyone else from the lock.
            with self._lock:
                self._check_open()
                entry, more = self._topics.get(topic), EMPTY
                if entry and entry.newest > after:
                    more = self._read(entry, after, limit - len(batch.ids), room_bytes)
                if waiter and not batch.ids and self._begins_to_wait(waiter, more):
                    return EMPTY
            room_bytes -= sum(map(len, more.bodies)) + ID_BYTES * len(more.ids)
            if not more.ids or (batch.ids and room_bytes < 0):
                break
            if batch.ids:
                batch.ids.extend(more.ids)
                batch.bodies.extend(more.bodies)
            else:
                batch = more
            after = more.ids[-1]
        return batch

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionAbortedError("the server has stopped")

    def get_latest(self, topic: str, after: int) -> Batch:
        """The newest live message with an id above `after`, or none."""
        with self._lock:
            self._check_open()
            entry = self._topics.get(topic)
            if entry is None or entry.newest <= after:
                return EMPTY
            return self._read(entry, entry.newest - 1, 1, 0)

    def _read(self, entry: _Topic, after: int, limit: int, room_bytes: int) -> Batch:
        """One step's worth of a topic's live messages."""
        cutoff = self._clock() - self.time_to_live
        limit, room_bytes = min(limit, STEP_MESSAGES), min(room_bytes, STEP_BYTES)
        rows = self._select(entry, after, limit, room_bytes)
        # Rows are in the order of their age, so only the first needs a look.
        if rows and rows[0][2] <= cutoff:
            after = max(after, self._newest_by(cutoff, bisect.bisect_right))
            rows = self._select(entry, after, limit, room_bytes)
        if not rows:
            return EMPTY
        ids, bodies, times = zip(*rows)
        return Batch(list(ids), list(bodies), times[0] - cutoff)

    def _select(
        self, entry: _Topic, after: int, limit: int, room_bytes: int
    ) -> list[tuple[int, bytes, float]]:
        """The rows that fit, at least one if there is one."""
        newer, key = self.head - after, entry.key
        if newer <= len(self._young):
            rows = [(i, b, at) for i, k, at, b in self._young[-newer:] if k == key]
            return _fitting(rows[:limit], room_bytes)
        self._insert([])
        cursor = self._db.execute(
            "SELECT id, body, put_at FROM messages WHERE topic = :topic AND id > :after"
            " ORDER BY id LIMIT :limit",
            {"topic": key, "after": after, "limit": limit},
        )
        with contextlib.closing(cursor):  # left half-way it would be in a DELETE's way
            return _fitting(cursor, room_bytes)

    def head_before(self, seconds: float) -> int:
        """The newest id of those put longer ago than that; with 0 of all."""
        with self._lock:
            self._check_open()
            if not seconds:
                return self.head
            return self._newest_by(self._clock() - seconds, bisect.bisect_left)

    def _newest_by(self, time_: float, side: Callable[..., int]) -> int:
        """The newest id put before a time; with bisect_right also at that time."""
        self._insert([])
        ids = range(self._purged + 1, self.head + 1)
        ask, sql = self._db.execute, "SELECT put_at FROM messages WHERE id = ?"
        place = side(ids, time_, key=lambda id_: ask(sql, (id_,)).fetchone()[0])
        return self._purged + place

    # Readers that wait

    def _begins_to_wait(self, waiter: Waiter, found: Batch) -> bool:
        entry = self._topics.get(waiter.topic)
        if entry is None:
            entry = _Topic(waiter.topic, self._last_key + 1)
            self._enter(entry)
        if found.ids:
            if self._clock() >= entry.next_round:
                return False
            self._call_round(entry)
        entry.waiters[waiter] = None
        return True

    def _call_round(self, entry: _Topic) -> None:
        if not entry.round_due:
            self.rounds.put(entry)
            entry.round_due = True  # not if memory ran out

    def take_readers(self, entry: _Topic) -> list[tuple[Waiter, Batch]]:
        """Readers that are to be answered, no longer waiting, and what with."""
        ready = []
        found: dict[tuple[int, int, int], Batch] = {}  # most ask for the same
        with self._lock:
            entry.round_due, entry.next_round = False, self._clock() + 0.002
            for waiter in entry.waiters:
                # One whose `after` is above the newest id waits for later messages.
                if waiter.after < entry.newest:
                    # Wherever it began to wait in the gap, it reads the same.
                    low, high = entry.gap
                    after = high if low <= waiter.after <= high else waiter.after
                    place = after, waiter.limit, waiter.room_bytes
                    if place not in found:
                        found[place] = self._read(entry, *place)
                    if found[place].ids:  # or all have expired
                        ready.append((waiter, found[place]))
            # Not before all is read: one taken out, as memory ran out, had no answer.
            for waiter, _ in ready:
                del entry.waiters[waiter]
        return ready

    def end_wait(self, waiter: Waiter) -> bool:
        """Whether the waiter was still waiting; if not, it is being answered."""
        with self._lock:
            entry = self._topics.get(waiter.topic)
            if entry is None or waiter not in entry.waiters:
                return False
            del entry.waiters[waiter]
            self._forget_if_unused(entry)
            return True

    # Expiry and accounts

    def purge(self) -> bool:
        """Frees the oldest expired messages, a step's worth; whether there were any."""
        with self._lock:
            self._insert([])
            cutoff, room_bytes = self._clock() - self.time_to_live, STEP_BYTES
            sql = "SELECT id, topic, put_at, length(body) FROM messages ORDER BY id"
            gone: list[tuple[int, int, int]] = []
            with contextlib.closing(self._db.execute(sql)) as rows:
                for id_, key, put_at, size in rows:
                    if put_at > cutoff or room_bytes <= 0 or len(gone) >= STEP_MESSAGES:
                        break
                    gone.append((id_, key, size + MESSAGE_OVERHEAD_BYTES))
                    room_bytes -= size
            if gone:
                sql = "DELETE FROM messages WHERE id <= ?"
                self._db.execute(sql, gone[-1][:1])
                self._purged = gone[-1][0]
                for _, key, cost in gone:
                    self._count(self._topics_by_key[key], -1, -cost)
            return bool(gone)

    def tidy(self) -> None:
        """Frees the memory of puts too long ago to be repeated, and, once little is
        left of much, that of SQLite, which keeps the pages of deleted rows."""
        with self._lock:
            oldest = self._clock() - max(self.time_to_live, REMEMBERED_SECONDS)
            while self._recent and next(iter(self._recent.values()))[0] < oldest:
                del self._recent[next(iter(self._recent))]
            free_pages = self._db.execute("PRAGMA freelist_count").fetchone()[0]
            if free_pages > 4096 and self._bytes <= STEP_BYTES:
                self._insert([])
                self._db.execute("VACUUM")  # milliseconds
                # glibc unasked keeps what threads other than the first have freed.
                with contextlib.suppress(ImportError, OSError, AttributeError):
                    import ctypes

                    ctypes.CDLL(None).malloc_trim(0)

    def stats(self) -> dict[str, Any]:
        """Counts of messages and bytes, in all and by topic."""
        with self._lock:
            topics = [(t.name, t.messages, t.bytes) for t in self._topics.values()]
            messages, size = self.head - self._purged, self._bytes
        return {
            "messages": messages,
            "bytes": size,
            "time_to_live": self.time_to_live,
            "max_bytes": self.max_bytes,
            "topics": {n: {"messages": m, "bytes": b} for n, m, b in topics if m},
        }

    def close(self) -> list[Waiter]:
        """Frees the messages; gives the readers that still waited. May be called
        again."""
        with self._lock:
            self._closed = True
            self._db.close()
            waiters = [w for t in self._topics.values() for w in t.waiters]
            for entry in self._topics.values():
                entry.waiters.clear()
            self._topics.clear()
            return waiters


def _fitting(
    rows: Iterable[tuple[int, bytes, float]], room_bytes: int
) -> list[tuple[int, bytes, float]]:
    """The first rows that fit; at least one if there is one."""
    fitting: list[tuple[int, bytes, float]] = []
    for row in rows:
        room_bytes -= len(row[1]) + ID_BYTES
        if room_bytes < 0 and fitting:
            break
        fitting.append(row)
    return fitting


# ---------------------------------------------------------------------------- server


class _Server(socketserver.ThreadingTCPServer):
    """Accepts connections, a thread each, and stops when a client or Ctrl-C says so."""

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
        self.name = os.urandom(16).hex()  # no other start has the same
        self.started = time.monotonic()
        self.stopping = threading.Event()  # set once, by whoever stops the server
        # Guards `connections`; notified when one has gone.
        self._gate = threading.Condition()
        self.connections: set[FrameSocket] = set()
        self._noted = 0, 0  # a second, and what was logged of peers in it
        super().__init__((host, port), _Handler, bind_and_activate=False)
        self.socket.close()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            # Clients may all come at the same moment.
            listener = socket.create_server((host, port), family=family, backlog=1024)
        except OSError as error:
            text = f"cannot listen on {host}:{port}: {error.strerror or error}"
            raise OSError(error.errno, text) from None
        # A client may be gone between select and accept, which then must not wait.
        listener.settimeout(POLL_SECONDS)
        self.socket, self.server_address = listener, listener.getsockname()
        _forked.add(self)

    def run(self) -> None:
        """Serves until stopped, then closes."""
        place = _address(self.server_address)
        _log.info("dsmq %s%s", __version__, ", with TLS" if self.context else "")
        _log.info("listening on %s", place)
        _log.info("stop it with Ctrl-C, or shutdown_server() from a client")
        if self.secret is None and not place.startswith(("127.", "::1")):
            can = "read and put messages, and stop this server"
            _log.warning("no secret: anyone on the network can %s", can)
        jobs = self._purge, self._hold_rounds
        threads = [threading.Thread(target=job, daemon=True) for job in jobs]
        try:
            for thread in threads:
                thread.start()
            self.serve_forever(POLL_SECONDS)
        except KeyboardInterrupt:
            pass  # the usual way to stop a server by hand
        finally:
            self.close()
            for thread in threads:
                if thread.ident:  # it was started
                    thread.join()  # a step of its work at most
            _log.info("stopped; goodbye")

    def stop(self) -> None:
        """Ends `run` from another thread; returns when the port is free."""
        with contextlib.suppress(OSError):
            # Wakes the thread that accepts, where the system can do that.
            self.socket.shutdown(socket.SHUT_RDWR)
        self.shutdown()
        self.server_close()
        self.stopping.set()

    def close(self) -> None:
        """Frees the port and ends every conversation, after the reply under way."""
        self.server_close()
        self.stopping.set()
        self.store.rounds.put(None)
        for waiter in self.store.close():
            waiter.connection.answer(_NO_MESSAGES)
        with self._gate:
            for how in (socket.SHUT_RD, socket.SHUT_RDWR):
                for connection in self.connections:
                    connection.shut(how)
                # Time to end by themselves.
                self._gate.wait_for(lambda: not self.connections, 0.15)

    def _purge(self) -> None:
        """The timer thread: frees expired messages, also in topics nobody touches, and
        looks whether the process that started this one is still there."""
        started_by = sys.modules.get("multiprocessing")
        parent = started_by and started_by.parent_process()
        number = os.getppid()  # tells more while the parent's other children live
        while not self.stopping.wait(PURGE_SECONDS):
            if parent and (os.getppid() != number or not parent.is_alive()):
                _log.warning("stopping: the process that started this one has ended")
                self.stop()
            try:
                while self.store.purge():
                    if self.stopping.wait(0.001):  # in which others get the lock
                        return
                self.store.tidy()
            except Exception:  # try again: without this thread nothing ever expires
                with contextlib.suppress(MemoryError):
                    if not self.stopping.is_set():
                        _log.exception("purging failed")

    def _hold_rounds(self) -> None:
        """The thread that answers the readers who wait for their topic's round."""
        while entry := self.store.rounds.get():
            time.sleep(max(entry.next_round - time.monotonic(), 0))
            try:
                self.answer_readers(entry)
            except Exception:  # out of memory; but others wait for their rounds
                with contextlib.suppress(MemoryError):
                    _log.exception("a round failed")

    def answer_readers(self, entry: _Topic) -> None:
        """Those at the same place get the same reply, made once."""
        begun, last, reply = time.monotonic(), EMPTY, _NO_MESSAGES
        for waiter, batch in self.store.take_readers(entry):
            if batch is not last:
                try:
                    last, reply = batch, _messages_reply(batch)
                except MemoryError:  # what was put is stored; the reader asks again
                    last, reply = EMPTY, _NO_MESSAGES
            waiter.connection.answer(reply)
        now = time.monotonic()
        entry.next_round = now + min(4 * (now - begun), 0.002)

    # A connection's way: get_request accepts it, process_request starts its thread,
    # in which _Handler serves it, and shutdown_request closes it, whatever happened.

    def get_request(self) -> tuple[Any, Any]:
        try:
            sock, address = self.socket.accept()
            return FrameSocket(sock, self.max_frame_bytes), address
        except (OSError, MemoryError) as error:
            # The client is gone again; or descriptors or memory ran out, and to accept
            # again at once would fail again, without end.
            soon = errno.EAGAIN, errno.ENOTCONN, errno.EINVAL  # the last: it stops
            if getattr(error, "errno", 0) not in soon:
                self.stopping.wait(POLL_SECONDS)
            raise OSError(str(error)) from None  # socketserver goes on with the next

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._gate:
            self.connections.add(request)
        try:
            # Thread.start would wait until the thread has begun: for ever, if memory
            # runs out just then.
            job = self.process_request_thread
            _thread.start_new_thread(job, (request, client_address))
        except (RuntimeError, MemoryError) as error:  # no thread to be had
            self.note(logging.WARNING, "closing %s: %s", request.peer, error)
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        request.shut()  # a forked child may have it too, and then closing ends nothing
        request.sending.acquire(timeout=1.0)  # or who sends might meet another's socket
        request.close()
        with self._gate:
            self.connections.discard(request)
            self._gate.notify_all()

    def _leave_to_parent(self) -> None:
        """Or ports and peers would have to wait for the child's end, too."""
        self.socket.close()
        for connection in list(self.connections):
            connection.close()

    def note(self, level: int, text: str, *values: object) -> None:
        """Logs what a peer did, ten times a second at most: a hostile one must not fill
        the disk."""
        second = int(time.monotonic())
        self._noted = second, self._noted[1] + 1 if second == self._noted[0] else 1
        if self._noted[1] <= 10:
            _log.log(level, text, *values, exc_info=level == logging.ERROR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A fault of ours, or no memory left: it ends one connection.
        self.note(logging.ERROR, "a fault serving %s", request.peer)


# Servers and clients: what a forked child closes of its parent's.
_forked: weakref.WeakSet[Any] = weakref.WeakSet()

if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(
        after_in_child=lambda: [each._leave_to_parent() for each in list(_forked)]
    )


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
    import hmac

    text = f"dsmq {role}:{nonce}:{challenge}"
    data = text.encode(errors="replace")
    return hmac.new(secret.encode(), data, "sha256").hexdigest()


def _same(proof: object, expected: str) -> bool:
    """Compares proofs, in constant time."""
    import hmac

    return isinstance(proof, str) and hmac.compare_digest(
        proof.encode(errors="replace"), expected.encode()
    )


class _Handler(socketserver.BaseRequestHandler):
    """Serves one connection: a request, its reply, the next request."""

    server: _Server
    request: FrameSocket
    _trusted = False
    _end: float | None = None  # of the time to become so
    _expected_proof = ""  # the client's, once it said hello
    _since = 0.0  # as it said there
    _waiter: Waiter | None = None  # of the get that waits, if one does
    _readers: _Topic | None = None  # whose readers a put has to answer

    def handle(self) -> None:
        self._trusted, limit = self.server.secret is None, self.server.max_clients
        soon = time.monotonic() + STALL_SECONDS
        try:
            if self.server.context:  # not before, as the peer may stall in it
                self.request.start_tls(self.server.context, soon)
            if len(self.server.connections) > limit:
                self._say_goodbye("busy", f"max_clients {limit} is reached")
                return
            if not self._trusted:
                # Who knows no secret must not keep a thread, or much memory.
                self._end, self.request.max_frame_bytes = soon, 4096
            self._converse()
        except FrameError as error:
            self._say_goodbye("bad_frame", str(error))
        except OSError as error:  # vanished, stalled, or does not read
            self.server.note(logging.INFO, "closing %s: %s", self.request.peer, error)
        finally:
            if self._waiter and self.server.store.end_wait(self._waiter):
                self.request.sending.release()

    def _say_goodbye(self, code: str, text: str) -> None:
        """Then reads until the peer closes: bytes left unread would reset the
        connection, and the peer might lose the reply that says why it is closed."""
        level = logging.WARNING if code == "busy" else logging.INFO
        self.server.note(level, "closing %s: %s", self.request.peer, text)
        with contextlib.suppress(OSError):  # where possible: the peer may have gone
            end = time.monotonic() + LINGER_SECONDS
            self.request.send(encode_object({"error": text, "code": code}), end)
            self.request.shut(socket.SHUT_WR)
            while self.request.some(SEND_BYTES, end):
                pass

    def _converse(self) -> None:
        while True:
            if self._waiter and not self._heard(self._waiter):
                return
            body = self.request.receive(self._end)
            if body is None:
                return
            self._plain = b"\\" not in body
            reply = self._answer(decode_object(body))
            del body  # a long one must not stay while the thread waits for the next
            readers, self._readers = self._readers, None
            if readers:
                # A reader that wakes may take this core, so the putter goes first; but
                # it must not keep them waiting if it does not read.
                self.request.sending.acquire()
                self.request.answer(reply)
                self.server.answer_readers(readers)
            elif reply:
                self.request.send(reply)
            del reply  # nor must this

    def _heard(self, waiter: Waiter) -> bool:
        """Waits until the get that waits is answered; False if the peer has gone.

        The thread waits for the peer's next request, which tells that it has its reply,
        and need not be woken for the reply itself: with eight readers that is a third
        faster.
        """
        frames = self.request
        with contextlib.suppress(TimeoutError):
            frames.unread = frames.unread or frames.some(4096, waiter.end)
            if not frames.unread:
                return False
            # A peer that asks ahead has to be patient. Whoever answers its get releases
            # what `_get` has acquired.
            left = max(waiter.end - time.monotonic(), 0)
            if frames.sending.acquire(timeout=left):
                frames.sending.release()
                self._waiter = None
                return True
        self._waiter = None
        store = self.server.store
        if store.end_wait(waiter):
            # There is something, if the wait ends before its topic's next round.
            frames.answer(_messages_reply(store.get(*waiter[:4])))
        return True

    def _answer(self, request: _Fields) -> bytes:
        """The reply's frame, or nothing if it was sent or is to come."""
        try:
            action = request.get("action")
            if not isinstance(action, str) or action not in self.ACTIONS:
                raise _refusal("unknown_action", f"no action {_shown(action)}")
            if not self._trusted and action not in ("hello", "authenticate"):
                raise _refusal("authentication", "this server requires its secret")
            return self.ACTIONS[action](self, request)
        except DSMQError as error:
            return encode_object({"error": str(error), "code": error.code})
        except MemoryError as error:
            if self._waiter:  # somebody may be sending its reply
                raise ConnectionAbortedError("out of memory") from error
            return encode_object({"error": "out of memory", "code": "full"})

    def _hello(self, request: _Fields) -> bytes:
        protocol = _integer(request, "protocol", PROTOCOL)
        if protocol != PROTOCOL:
            raise _refusal("bad_request", f"protocol is {PROTOCOL}, not {protocol}")
        self._since = _seconds(request, "since")
        reply = {
            "protocol": PROTOCOL,
            "server": self.server.name,
            "max_frame_bytes": self.server.max_frame_bytes,
            "time_to_live": self.server.store.time_to_live,
        }
        if self._trusted:
            head = self.server.store.head_before(self._since)
            return encode_object({**reply, "head": head})
        if request.get("nonce") is None:
            raise _refusal("authentication", "this server requires its secret")
        nonce, challenge = _text(request, "nonce", 256), os.urandom(32).hex()
        secret = self.server.secret or ""
        self._expected_proof = _proof(secret, "client", nonce, challenge)
        proof = _proof(secret, "server", nonce, challenge)
        return encode_object({**reply, "challenge": challenge, "proof": proof})

    def _authenticate(self, request: _Fields) -> bytes:
        expected, self._expected_proof = self._expected_proof, ""  # good for one try
        if not self._trusted:
            if not expected or not _same(request.get("proof"), expected):
                text = "%s does not know the secret"
                self.server.note(logging.WARNING, text, self.request.peer)
                raise _refusal("authentication", "that proof is wrong")
            self._trusted, self._end = True, None
            self.request.max_frame_bytes = self.server.max_frame_bytes
        return encode_object({"head": self.server.store.head_before(self._since)})

    def _put(self, request: _Fields) -> bytes:
        topic = _text(request, "topic", MAX_TOPIC_CHARACTERS)
        bodies = self._bodies(request.get("messages"))
        origin = None
        if request.get("client") is not None:
            client = _text(request, "client", 256)
            sequence = _integer(request, "sequence")
            origin = client, sequence, _integer(request, "settled", -MAX_INTEGER - 1)
        head, self._readers = self.server.store.put(topic, bodies, origin)
        return encode_frame(b'{"head":%d}' % head)

    def _bodies(self, messages: object) -> list[bytes]:
        if not isinstance(messages, list) or not messages:
            raise _refusal("bad_request", "messages must be a list of texts, 1 or more")
        if len(messages) > MAX_PUT_MESSAGES:
            text = f"{len(messages)} messages; the limit is {MAX_PUT_MESSAGES}"
            raise _refusal("too_large", text)
        limit = self.server.max_frame_bytes - ENVELOPE_BYTES
        bodies, plain = [], self._plain
        for message in messages:
            if not isinstance(message, str):
                text = f"a message must be text, not {_shown(message)}"
                raise _refusal("bad_request", text)
            try:
                # A frame without escapes carries texts as they are stored.
                body = b'"%b"' % message.encode() if plain else encode_text(message)
            except ValueError as error:
                raise _refusal("bad_request", str(error)) from None
            if len(body) > limit:
                text = f"a message of {len(body)} bytes; the limit is {limit}"
                raise _refusal("too_large", text)
            bodies.append(body)
        return bodies

    def _get(self, request: _Fields) -> bytes:
        topic = _text(request, "topic", MAX_TOPIC_CHARACTERS)
        after, limit = _integer(request, "after"), _integer(request, "limit", 1)
        store = self.server.store
        if request["action"] == "get_latest":
            return _messages_reply(store.get_latest(topic, after))
        if limit < 1:
            raise _refusal("bad_request", f"limit must be at least 1, not {limit}")
        room = self.server.max_frame_bytes - ENVELOPE_BYTES
        room = min(_integer(request, "limit_bytes", room), room)
        seconds = _seconds(request, "wait")
        if not seconds:
            return _messages_reply(store.get(topic, after, limit, room))
        end = time.monotonic() + min(seconds, MAX_WAIT_SECONDS)
        self._waiter = Waiter(topic, after, limit, room, end, self.request)
        self.request.sending.acquire()  # until whoever takes it from the store answers
        batch = store.get(topic, after, limit, room, self._waiter)
        if not batch.ids:
            return b""
        self._waiter = None
        self.request.sending.release()
        return _messages_reply(batch)

    def _stats(self, request: _Fields) -> bytes:
        stats = {
            "version": __version__,
            "uptime": time.monotonic() - self.server.started,
            "clients": len(self.server.connections),
            **self.server.store.stats(),
        }
        reply = encode_object(stats)
        if len(reply) > self.server.max_frame_bytes:
            left_out = len(stats["topics"])
            reply = encode_object({**stats, "topics": {}, "topics_left_out": left_out})
        return reply

    def _shutdown(self, request: _Fields) -> bytes:
        _log.info("%s asked the server to stop", self.request.peer)
        self.server.stop()
        return encode_object({})

    # README's table tells the fields and replies.
    ACTIONS: ClassVar[dict[str, Callable[[_Handler, _Fields], bytes]]] = {
        "hello": _hello,
        "authenticate": _authenticate,
        "put": _put,
        "get": _get,
        "get_latest": _get,
        "stats": _stats,
        "shutdown": _shutdown,
    }


# What a field of a request must be. Each refuses what is not, naming field and value.


def _refusal(code: str, text: str) -> DSMQError:
    error = DSMQError(text)
    error.code = code
    return error


def _text(request: _Fields, field: str, most: int) -> str:
    value = request.get(field)
    if isinstance(value, str) and 1 <= len(value) <= most:
        if value.isascii():
            return value
        with contextlib.suppress(UnicodeEncodeError):  # of a lone surrogate
            value.encode()
            return value
    text = f"{field} must be a text of 1 to {most} characters that UTF-8 can carry"
    raise _refusal("bad_request", f"{text}, not {_shown(value)}")


def _integer(request: _Fields, field: str, absent: int | None = None) -> int:
    value = request.get(field, absent)
    if type(value) is not int or not -MAX_INTEGER - 1 <= value <= MAX_INTEGER:
        text = f"{field} must be a 64-bit integer, not {_shown(value)}"
        raise _refusal("bad_request", text)
    return value


def _seconds(request: _Fields, field: str) -> float:
    value = request.get(field, 0)
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        text = f"{field} must be seconds, 0 or more, not {_shown(value)}"
        raise _refusal("bad_request", text)
    return float(min(value, 1e9))


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
    """Runs a server; blocks until a client, Ctrl-C or (in a main thread) SIGTERM stops
    it, or the parent of its multiprocessing.Process has ended; then returns.

    It listens at `host`, which is this machine only unless said otherwise ("0.0.0.0":
    the network), and `port` (0: any free one, which the log tells); `verbose` shows the
    log, of the logger "dsmq", on stderr. Messages live `time_to_live` seconds and take
    `max_bytes` of memory in all; a request or reply takes `max_frame_bytes`, so about
    the longest message; one connection more than `max_clients` is refused. With a
    `secret` only clients that know it get in; `certfile` and `keyfile`, PEM files, turn
    on TLS. Raises OSError if it cannot listen there, TypeError or ValueError for an
    argument that is wrong.
    """
    _check_address(host, port)
    # Longer is as good as for ever, and JSON can say it; SQLite takes no longer value.
    _check_number("time_to_live", time_to_live, 0.001, 1e9)
    _check_number("max_frame_bytes", max_frame_bytes, MIN_FRAME_BYTES, 10**9, True)
    for name, value in (("max_bytes", max_bytes), ("max_clients", max_clients)):
        _check_number(name, value, 1, MAX_INTEGER, True)
    _check_secret(secret)
    if verbose:
        _show_log()
    limits = max_frame_bytes, min(max_clients, _descriptors())
    context = _server_context(certfile, keyfile)
    with (
        contextlib.suppress(KeyboardInterrupt),
        _ended_by_sigterm(),
        contextlib.closing(MessageStore(float(time_to_live), max_bytes)) as store,
        _Server(host, port, store, *limits, secret, context) as server,
    ):
        server.run()


def _descriptors() -> int:
    """How many connections can be had; beyond them nobody could be told so."""
    try:
        import resource
    except ImportError:  # on Windows, where nothing bounds them
        return MAX_INTEGER
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MAX_INTEGER if limit == resource.RLIM_INFINITY else max(limit - 16, 1)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """In a main thread SIGTERM is as Ctrl-C, unless the program has its own handler."""
    import signal

    ours = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if ours:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _server_context(certfile: str | None, keyfile: str | None) -> ssl.SSLContext | None:
    if certfile is None:
        if keyfile is not None:
            raise ValueError("a keyfile needs a certfile")
        return None
    import ssl

    for path in (certfile, keyfile or certfile):
        open(path, "rb").close()  # its error names the path; that of ssl does not
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certfile, keyfile)
    return context


def _show_log() -> None:
    """Shows the log on stderr, once however often it is asked for."""
    if not any(type(h) is logging.StreamHandler for h in _log.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        # A program with a log of its own shows these lines there.
        handler.addFilter(lambda record: not logging.getLogger().handlers)
        _log.addHandler(handler)
    _log.setLevel(logging.INFO)


# ---------------------------------------------------------------------------- client

# What a refusal by the server becomes in the client; DSMQError if not listed. A busy
# server is tried again, like one that is not there yet.
_EXCEPTIONS: dict[str, type[Exception]] = {
    "full": QueueFull,
    "authentication": AuthenticationError,
    "too_large": ValueError,
    "bad_frame": FrameError,
    "busy": ConnectionRefusedError,
}


class _Link:
    """One of a client's connections, used by one call at a time.

    It keeps its name and the number of its calls when the connection is made anew, so
    the server can tell a put sent again from a new one.
    """

    sequence = 0
    end = 0.0  # monotonic time at which a reply is given up
    connection: Any = None  # a FrameSocket, or what another engine dials
    server = ""  # the name of the one at the other end
    # Not so from before a request until its reply is in: wherever an interrupt strikes,
    # no later request can meet an earlier one's reply.
    ready = False

    def __init__(self) -> None:
        self.name = os.urandom(16).hex().encode()

    def exchange(self, request: bytes) -> _Fields:
        """The server's reply to a request."""
        self.ready = False
        self.connection.send(request, self.end)
        body = self.connection.receive(self.end)
        self.ready = True
        if body is None:
            raise ConnectionResetError("the server closed the connection")
        reply = decode_object(body)
        if "error" in reply:
            kind = _EXCEPTIONS.get(str(reply.get("code")), DSMQError)
            raise kind(str(reply["error"]))
        return reply

    def drop(self) -> None:
        """Closes the connection: lost, or with a reply still to come on it."""
        self.ready, self.server = False, ""
        connection, self.connection = self.connection, None
        if connection:
            connection.close()

    __del__ = drop  # a client that was never closed gives no ResourceWarning


class _Reader:
    """Where a client stands in a topic."""

    def __init__(self, last: int) -> None:
        self.last = last  # id of the newest message read, be it handed out or not
        # Those not handed out yet, the oldest at the end: the id before it, its text,
        # and the monotonic time at which the first of its reply expires.
        self.unread: list[tuple[int, str, float]] = []

    @property
    def cursor(self) -> int:
        """An id up to which all has been handed out, and nothing above it."""
        last, oldest = self.last, self.unread[-1:]  # in this order, for want of a lock
        return oldest[0][0] if oldest else last


class DSMQClientSideConnection:
    """A client of a dsmq server: what `connect` gives.

    Many threads may use it at once; each message goes to one of them. After a fork, or
    when it is passed to another process, each side reads on from where it stood.

    If the server refuses, drops the connection or does not answer, every method goes on
    trying for the `timeout` of `connect`, then raises ConnectionRefusedError,
    ConnectionError or TimeoutError; after `close` ConnectionError. A wrong type is a
    TypeError; a topic not of 1 to 1,000 characters, text that UTF-8 cannot carry and a
    message too long for a frame are a ValueError, before anything is sent.
    """

    # How long get_wait persists without a timeout: the sum of so many pauses, each
    # twice as long as the one before, in seconds. The original's names.
    _n_tries = 10
    _initial_retry = 0.01
    _engine = "dsmq server"  # as error messages name it
    _encode: Callable[[str], bytes] = staticmethod(encode_text)
    _message_bytes = 1  # that one takes in a request beside its text: a comma

    def __init__(
        self, host: str, port: int, timeout: float, secret: Any, tls: _TLS, since: float
    ) -> None:
        _check_address(host, port)
        _check_number("timeout", timeout, 0.001, math.inf)
        _check_number("since", since, 0, math.inf)
        _check_secret(secret)
        if not isinstance(tls, (bool, str, os.PathLike)):
            raise TypeError(f"tls must be a bool or a path, not {_shown(tls)}")
        if not isinstance(tls, bool):
            open(tls, "rb").close()  # its error names the path; that of ssl does not
        self._host, self._port = host, port
        self._timeout, self._since = float(timeout), since
        self._secret, self._tls = secret, tls
        self.closed = False  # whether `close` was called
        self._server: str | None = None  # the name of the one that the cursors are for
        self._start = 0  # where reading a topic begins: the head at connect
        self._max_frame_bytes = MAX_FRAME_BYTES
        # For one reply: as much as the line carries in two seconds.
        self._read_ahead_bytes = FIRST_READ_AHEAD_BYTES
        self._cursors: dict[str, _Reader] = {}
        self._tidy_at = 100  # cursors, to look which are needed no more
        self._begin({})
        self._call(lambda link: None)

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<{type(self).__name__} to {self._host}:{self._port}, {state}>"

    # One object in several threads and processes

    def _begin(self, state: _Fields) -> None:
        """With the state of another, and what belongs to one process alone."""
        self.__dict__.update(state)
        # Guards cursors, `_server` and `_start`; not held while talking to the server.
        # Reentrant, because a signal handler may use the client, too.
        self._lock = threading.RLock()
        # Connections: all (weakly, or one lost to an interrupt in `_call` would stay
        # open), and those not in use: a few, for of many threads most call but once.
        self._links: set[weakref.ref[_Link]] = set()
        self._idle: deque[_Link] = deque(maxlen=16)
        _forked.add(self)

    __setstate__ = _begin

    def _leave_to_parent(self) -> None:
        """The parent's connections are closed here, but not shut down."""
        for reference in list(self._links):
            if link := reference():
                link.drop()
        self._begin({})

    def _check_usable(self) -> None:
        if self.closed:
            raise ConnectionError("this client is closed")

    def __getstate__(self) -> _Fields:
        own = ("_lock", "_links", "_idle")
        state = {k: v for k, v in self.__dict__.items() if k not in own}
        cursors = {t: _Reader(r.cursor) for t, r in [*self._cursors.items()]}
        return {**state, "_cursors": cursors}

    # Reaching the server

    def _call(self, work: Callable[[_Link], _T]) -> _T:
        """`work` done with a connection; with new ones, if one is lost, until `timeout`
        has passed."""
        begun, pause = time.monotonic(), RETRY_PAUSE_SECONDS
        try:
            link = self._idle.pop()  # the one used last: the others may have aged
        except IndexError:
            link = _Link()
            self._links.add(weakref.ref(link, self._links.discard))
        link.sequence += 1  # once for all tries, so that the server knows a put again
        # It may have been forgotten on the way (by a NAT, in a suspend), which nobody
        # tells: half of the time is left for a new one.
        link.end = begun + min(self._timeout / 2, 60.0)
        try:
            while True:
                try:
                    if not link.ready or link.server != self._server:
                        link.drop()
                        self._check_usable()
                        link.end = begun + self._timeout
                        self._dial(link)
                    return work(link)
                except OSError as error:
                    link.drop()
                    self._check_usable()  # or `close` has cut it
                    left = begun + self._timeout - time.monotonic()
                    if left < 0.01 * self._timeout or _is_final(error):
                        raise self._named(error) from error
                    # Shorter and shorter towards the end, so that the time is used up;
                    # and never long, so that a server that has just started is found.
                    time.sleep(min(pause, left / 2))
                    pause = min(2 * pause, 0.25)
        finally:
            if not link.ready or self.closed:  # by another thread, meanwhile
                link.drop()
            self._idle.append(link)

    def _dial(self, link: _Link) -> None:
        """Connects a link; begins anew if it finds another server than before.

        1. client: hello, with a nonce if it has a secret.
        2. server: its name, limits and newest id, and that is all; or with a secret,
           instead of the id, a challenge and the proof that it knows the secret.
        3. client: its own proof, once the server's is seen to be right.
        4. server: the newest id.
        """
        known = self._server
        link.connection = _connected(self._host, self._port, link.end)
        self._check_usable()  # another thread may have closed it before it was there
        if self._tls is not False:
            import ssl

            cafile = None if isinstance(self._tls, bool) else self._tls
            context = ssl.create_default_context(cafile=cafile)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            link.connection.start_tls(context, link.end, self._host)
        nonce = os.urandom(32).hex()
        hello: _Fields = {"action": "hello", "protocol": PROTOCOL}
        hello["since"] = min(self._since, 1e9)  # JSON knows no infinity
        if self._secret:
            hello["nonce"] = nonce
        reply = link.exchange(encode_object(hello))
        limit = max(_reply_integer(reply, "max_frame_bytes"), MIN_FRAME_BYTES)
        if self._secret:
            words = nonce, str(reply.get("challenge"))
            if not _same(reply.get("proof"), _proof(self._secret, "server", *words)):
                raise AuthenticationError("the server does not know the secret")
            proof = _proof(self._secret, "client", *words)
            request = {"action": "authenticate", "proof": proof}
            reply |= link.exchange(encode_object(request))
        self._max_frame_bytes = link.connection.max_frame_bytes = limit
        link.server = str(reply.get("server"))
        self._note_server(known, link.server, _reply_integer(reply, "head"))

    def _note_server(
        self, known: str | None, name: str, head: int, begin: int = 0, last: int = 0
    ) -> None:
        """Takes in a server's name, where `known` was expected. If it has another, ids
        above `last` mean nothing to it: reading goes on from `begin`."""
        with self._lock:
            if self._server == name:
                return
            if self._server != known:  # by now another thread has found its successor
                raise ConnectionResetError("the server has been replaced")
            # What is new there is to be read; what was read ahead comes before.
            if known is None or self._start > last:
                self._start = head if known is None else begin
            for reader in self._cursors.values():
                if reader.last > last:
                    after = min(reader.last, begin)
                    for i, (_, text, expires) in enumerate(reader.unread):
                        reader.unread[i] = after, text, expires
                    reader.last = after
            self._server = name

    def _named(self, error: OSError) -> OSError:
        where = f"{self._engine} at {self._host}:{self._port}"
        here = self._host.startswith(("127.", "localhost", "::1"))
        hint = "" if here else "; unless told its host, a server listens on 127.0.0.1"
        for kind, text in (
            (FrameError, f"the {where} speaks another protocol: {error}"),
            (ConnectionRefusedError, f"no {where} takes the connection: {error}{hint}"),
            (TimeoutError, f"the {where} did not answer in {self._timeout:g} s"),
            (ConnectionError, f"the connection to the {where} was lost: {error}"),
            (socket.gaierror, f"no address for {_shown(self._host)}: {error.strerror}"),
        ):
            if isinstance(error, kind):
                return kind(text)
        if isinstance(error, ValueError) or error.filename:
            return error  # of a certificate, or its file
        return ConnectionError(f"the {where} cannot be reached: {error}")

    # Putting

    def put(self, topic: str, msg: str) -> None:
        """Puts `msg` into `topic`; it is stored, and can be read, when this returns.
        Raises QueueFull if the server's memory is used up. After any other error than
        that, a TypeError or ValueError it may have been stored or not, once at most."""
        self.put_many(topic, [msg])

    def put_many(self, topic: str, msgs: Iterable[str]) -> None:
        """Puts them all, in order, or none: they share one request, and nobody else's
        messages come between. Only where they are too long for one frame, or more than
        100,000, they go in several, each all or none and with its own timeout."""
        if isinstance(msgs, str):
            raise TypeError("msgs must be several messages, not one str")
        key = self._key(topic)
        room_bytes = self._max_frame_bytes - ENVELOPE_BYTES - len(key)
        loads: list[list[bytes]] = []
        left = 0
        for msg in msgs:  # all are checked before one goes
            if not isinstance(msg, str):
                hint = "json.dumps makes one of most things, base64.b64encode of bytes"
                raise TypeError(f"a message must be a str, not {_shown(msg)}: {hint}")
            body = self._encode(msg)
            if len(body) > room_bytes:
                text = f"the message {_shown(msg)} takes {len(body)} bytes, but"
                raise ValueError(f"{text} {room_bytes} fit into a frame of the server")
            cost = len(body) + self._message_bytes
            if cost > left or len(loads[-1]) >= MAX_PUT_MESSAGES:
                loads.append([])
                left = room_bytes + self._message_bytes
            loads[-1].append(body)
            left -= cost
        for load in loads:
            self._call(partial(self._store, key, load))

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
        return self._next(topic, 0.0, None) or ""

    def get_many(self, topic: str, limit: int = 100) -> list[str]:
        """All unread messages of `topic` there are, at once, up to `limit`."""
        _check_number("limit", limit, 1, MAX_INTEGER, whole=True)
        key, now = self._key(topic), time.monotonic()
        while True:
            with self._lock:
                missing = limit - len(self._reader(topic, now).unread)
            fetch = partial(self._fetch, topic, key, 0.0, missing)
            if missing <= 0 or not self._call(fetch):
                return self._take(topic, limit, now)

    def listen(self, topic: str, timeout: float = math.inf) -> Iterator[str]:
        """Iterates over the messages of `topic` as they come; ends when for `timeout`
        seconds there was none."""
        self._key(topic)
        _check_number("timeout", timeout, 0, math.inf)
        return iter(partial(self._next, topic, timeout), None)

    def _next(self, topic: str, seconds: float, wanted: int | None = 0) -> str | None:
        """The next message, or the newest; waits for it up to so many seconds."""
        now = time.monotonic()
        end, key = now + seconds, b""
        found = wanted == 0 and type(topic) is str and topic in self._cursors
        while not (found and (texts := self._take(topic, 1, now))):
            key, now = key or self._key(topic), time.monotonic()
            fetch = partial(self._fetch, topic, key, max(end - now, 0.0), wanted)
            found = self._call(fetch)
            if not found and time.monotonic() >= end:
                return None
        return texts[0]

    def _reader(self, topic: str, now: float) -> _Reader:
        """The topic's, or a new one; without what was read ahead and has expired."""
        reader = self._cursors.get(topic) or _Reader(self._start)
        if reader.unread and reader.unread[-1][2] < now:
            reader.last = reader.unread[-1][0]
            del reader.unread[:]
        return reader

    # The lock keeps other threads out, but neither a signal handler of this one nor an
    # interrupt. They strike in and after calls and jumps (in Python 3.10 also forward):
    # there is none from where a reader is looked at until it is changed.

    def _take(self, topic: str, limit: int, now: float) -> list[str]:
        """Hands out messages read ahead, up to `limit`. What has been read since `now`
        is good, however soon it expires."""
        if self.closed:
            self._check_usable()
        taken: list[tuple[int, str, float]] = []
        try:
            with self._lock:
                unread = self._reader(topic, now).unread
                taken = unread[-limit:]
                del unread[-limit:]
            return [text for _, text, _ in reversed(taken)]
        except BaseException:
            if taken:  # the caller never gets them, so they are still to be handed out
                unread += taken
            raise

    def _fetch(
        self, topic: str, key: bytes, wait: float, wanted: int | None, link: _Link
    ) -> bool:
        """Reads some messages ahead, waiting for the first; if `wanted` is None the
        newest alone, or else so many if it can. False if there were none."""
        if len(self._cursors) >= self._tidy_at:
            self._tidy(link)
        with self._lock:
            after = self._start
            if topic in self._cursors:
                reader = self._cursors[topic]
                if wanted == 0 and reader.unread:
                    return True  # another thread has just read it ahead
                after = reader.cursor if wanted is None else reader.last
        ids, texts, expires = self._read(link, key, after, wanted, wait)
        if not ids:
            return False
        if wanted is None:
            after = ids[0] - 1
        unread = [*zip([after, *ids], texts, repeat(expires))][::-1]
        reader = _Reader(after)
        with self._lock:
            if self._server != link.server:
                return True  # they are of its predecessor
            if topic in self._cursors:
                reader = self._cursors[topic]
            self._cursors[topic] = reader
            cursor = reader.unread[-1][0] if reader.unread else reader.last
            if wanted is None and cursor <= after:
                reader.last, reader.unread = after, []
            if reader.last == after:
                reader.unread[:0], reader.last = unread, ids[-1]
                return True
        return wanted is not None  # another thread has it, or a newer one

    def _tidy(self, link: _Link) -> None:
        """Forgets cursors of topics of which all that was handed out has expired."""
        expired = self._expired(link)
        with self._lock:
            if self._server == link.server:  # whose ids these are
                for topic, reader in [*self._cursors.items()]:
                    if reader.last <= expired and not reader.unread:
                        self._cursors.pop(topic, None)
                self._tidy_at = 2 * len(self._cursors) + 100

    # What another engine does in its own way

    def _key(self, topic: str) -> bytes:
        """The topic, if it is right, as a request carries it."""
        if not isinstance(topic, str):
            raise TypeError(f"a topic must be a str, not {_shown(topic)}")
        if not 1 <= len(topic) <= MAX_TOPIC_CHARACTERS:
            text = f"a topic has 1 to {MAX_TOPIC_CHARACTERS} characters, but"
            raise ValueError(f"{text} {_shown(topic)} has {len(topic)}")
        key = encode_text(topic)
        room_bytes = self._max_frame_bytes - ENVELOPE_BYTES - len('""')
        if len(key) > room_bytes:
            text = f"the topic {_shown(topic)} takes {len(key)} bytes, but {room_bytes}"
            raise ValueError(f"{text} fit into a frame of the server")
        return key

    def _store(self, key: bytes, load: list[bytes], link: _Link) -> Any:
        """Puts a load of messages, of which the link tells the number."""
        number = link.sequence
        head = b'{"action":"put","client":"%b",' % link.name
        head += b'"sequence":%d,"settled":%d,' % (number, number - 1)
        head += b'"topic":%b,"messages":[' % key
        request = encode_frame(head, b",".join(load), b"]}")
        _reply_integer(link.exchange(request), "head")

    def _read(
        self, link: _Link, key: bytes, after: int, wanted: int | None, wait: float
    ) -> _Messages:
        """What `_fetch` wants of the messages after an id."""
        begun, budget = time.monotonic(), self._read_ahead_bytes
        action = b"get_latest" if wanted is None else b"get"
        # Half of the time that is left, so that an answer that does not come is told
        # from one that comes late.
        wait = min(wait, (link.end - begun) / 2, MAX_WAIT_SECONDS)
        what = b'{"action":"%b","topic":%b,"after":%d,' % (action, key, after)
        how = b'"limit":%d,"limit_bytes":%d,' % (max(wanted or 0, 1000), budget)
        request = encode_frame(what, how, b'"wait":%.6f}' % wait)
        try:
            reply = link.exchange(request)
        except OSError:
            # A line that breaks now and then may never carry a long reply.
            self._read_ahead_bytes = max(budget // 2, 1)
            raise
        line = int(2 * link.connection.bytes_per_second) or budget  # if it was short
        line = max(line, LEAST_READ_AHEAD_BYTES)
        self._read_ahead_bytes = min(line, 4 * budget, READ_AHEAD_BYTES)
        return _reply_messages(reply, after, begun)

    def _expired(self, link: _Link) -> int:
        """An id up to which all messages have expired, by the server's own clock."""
        request = encode_object({"action": "hello", "since": 1e9})
        return _reply_integer(link.exchange(request), "head")

    def stats(self) -> _Fields:
        """What the server holds: `version`, `uptime` in seconds, `clients` (that is,
        connections), `messages`, `bytes` of memory they take, `time_to_live`,
        `max_bytes`, and of `topics` each one's `messages` and `bytes`."""
        request = encode_object({"action": "stats"})
        stats = self._call(lambda link: link.exchange(request))
        _reply_integer(stats, "messages")
        return stats

    def shutdown_server(self) -> None:
        """Stops the server. When this returns it takes no more connections."""

        def ask(link: _Link) -> None:
            try:
                link.exchange(encode_object({"action": "shutdown"}))
            except ConnectionError:
                # The answer may be lost; if so, nobody listens there now.
                with contextlib.suppress(ConnectionRefusedError):
                    _connected(self._host, self._port, link.end).close()
                    raise

        self._call(ask)

    def close(self) -> None:
        """Ends the connection, and the calls of other threads. May be called again."""
        self.closed = True
        for reference in list(self._links):
            link = reference()
            if link and (connection := link.connection):  # which its call may drop
                connection.shut()
        self._idle.clear()  # who is in none of them is dropped at once

    def __enter__(self) -> DSMQClientSideConnection:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _connected(host: str, port: int, end: float) -> FrameSocket:
    seconds = min(max(end - time.monotonic(), 0.002), LONGEST_SECONDS)
    try:
        # A name may have several addresses, and the first may be silent.
        sock = socket.create_connection((host, port), seconds / 2)
    except UnicodeError as error:  # of the encoding of names
        raise ValueError(f"host {_shown(host)} cannot be a name: {error}") from None
    return FrameSocket(sock, MAX_FRAME_BYTES)


def _is_final(error: OSError) -> bool:
    """Whether trying again would give the same."""
    if isinstance(error, socket.gaierror):
        return error.errno != socket.EAI_AGAIN  # of a name server, and may pass
    # By their names, for ssl is imported only where TLS is used.
    final = "FrameError", "SSLError", "SSLCertVerificationError"
    return type(error).__name__ in final


def _reply_integer(reply: _Fields, field: str) -> int:
    value = reply.get(field)
    if type(value) is not int:
        raise FrameError(f"a reply without the integer {field}: {_shown(str(reply))}")
    return value


def _reply_messages(reply: _Fields, after: int, now: float) -> _Messages:
    ids: Any = reply.get("ids")
    texts: Any = reply.get("messages")
    if ids == [] == texts:  # the commonest of all
        return [], [], now
    with contextlib.suppress(TypeError, KeyError):  # of what is no list, or no number
        kinds: list[type] = [int] * len(ids) + [str] * len(ids)
        growing = all(map(operator.lt, [after, *ids], ids))
        if growing and [*map(type, ids + texts)] == kinds:
            return ids, texts, now + reply["expires"]
    raise FrameError(f"a reply without sound messages: {_shown(str(reply))}")


def connect(
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    verbose: bool = False,
    *,
    timeout: float = 10.0,
    secret: str | None = None,
    tls: _TLS = False,
    since: float = 0.0,
) -> DSMQClientSideConnection:
    """A client connected to the server at `host` and `port`, or the error that is met
    after `timeout` seconds of trying, as by every later call; the class tells which.

    With a `secret` client and server prove to each other that they know it, or
    AuthenticationError is raised. `tls` is True to trust the system's authorities, or
    the path of a PEM file to trust. `verbose` shows the log on stderr. `since` is for
    who comes late: it sees what was put up to so many seconds before, too, as far as
    that lives; math.inf: all there is.

    A host redis://[user:password@]host[:port][/database], or rediss:// for TLS, gives
    the same on a Redis or a Redis Cluster; see `_RedisConnection`.
    """
    if verbose:
        _show_log()
        _log.info("connecting to %s:%s", str(host).rpartition("@")[2], port)
    engine = _RedisConnection if "://" in str(host) else DSMQClientSideConnection
    return engine(host, port, timeout, secret, tls, since)


# ------------------------------------------------------------ past one machine (Redis)

# In Redis, a topic's messages are in a stream, {dsmq:topic}, with ids of milliseconds
# and a number; the number of a client's last put is for a while in {dsmq:topic}client,
# which the braces keep on the same node of a cluster. On a single server dsmq:head is
# the newest id over all topics, and dsmq:run the run of the server (another one after a
# restart), from which id on it has put (0-0 if all was lost), and since when.
_REDIS_ID = 1 << 64  # here an id is milliseconds * this + number
_REDIS_LOOK_SECONDS = 10.0  # between looks at its clock and head

# Stores messages, all or none. KEYS: the stream, the client's last put and, unless in a
# cluster, dsmq:head and dsmq:run. ARGV: the put's number, milliseconds to keep its
# messages and its number, the server's run, and the messages. Without any it gives the
# time, the head and the run. A lower number than the last comes late, on a connection
# given up.
#
# Redis would make an id on a topic without messages from its clock alone. But two
# topics may share a millisecond, and a clock may step back. Ids made from dsmq:head
# grow over all topics, as in a dsmq server: they tell what was put before a connect.
_REDIS_PUT = """
local last = redis.call('GET', KEYS[2])
if last and tonumber(last) >= tonumber(ARGV[1]) then return end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local id = KEYS[3] and redis.call('GET', KEYS[3]) or '0-0'
local run = KEYS[4] and redis.call('GET', KEYS[4]) or ''
if KEYS[4] and string.find(run, ARGV[4], 1, true) ~= 1 then
    run = table.concat({ARGV[4], id, time[1] .. '.' .. time[2]}, ' ')
    redis.pcall('SET', KEYS[4], run)
end
if #ARGV == 4 then return {now, id, run} end
local ms, number = string.match(id, '(%d+)-(%d+)')
ms, number = tonumber(ms), tonumber(number)
for i = 5, #ARGV do
    if ms < now then ms, number = now, 0 else number = number + 1 end
    id = KEYS[3] and string.format('%.0f-%.0f', ms, number) or '*'
    redis.call('XADD', KEYS[1], id, 'message', ARGV[i])
end
if KEYS[3] then redis.call('SET', KEYS[3], id) end
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[3])
redis.call('XTRIM', KEYS[1], 'MINID', string.format('%.0f', now - ARGV[2] + 1))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

# What an error of the package becomes, by its class and text. All else (a restart, a
# failover, a slot on the move) passes: a ConnectionError, so it is retried.
_REDIS_ERRORS: dict[str, type[Exception]] = {
    "OutOfMemory|OOM": QueueFull,
    "Authentication": AuthenticationError,
    "InvalidResponse": FrameError,
    "^(ResponseError|NoPermission)(?!.*(BUSY|READONLY|UNBLOCKED))": DSMQError,
}


class _RedisConnection(DSMQClientSideConnection):
    """A client like any other, whose messages are in Redis 6.2 or later.

    On a single server all is as with a dsmq server. In a Redis Cluster each node makes
    ids from its own clock, so where reading begins is exact only up to the difference
    between the clocks, and while one that stepped back catches up, what is put to its
    node may be missed. In a failover Redis may lose messages it had acknowledged.
    """

    _engine = "Redis"
    _encode = staticmethod(str.encode)
    _message_bytes = 72  # that one takes in a request beside its text, at most
    _time_to_live = TIME_TO_LIVE_SECONDS  # to be the same for all clients
    _clustered: bool | None = None  # not known yet
    _nodes: tuple[Any, ...] = ()  # host and port of a cluster's, as last heard of
    _count = 10  # of messages to read at a time

    def __init__(
        self, url: str, port: int, timeout: float, secret: Any, tls: _TLS, since: float
    ) -> None:
        if port != DEFAULT_PORT or secret is not None:
            raise ValueError("port and password of a Redis belong in its URL")
        self._url, host, port = _redis_url(url)
        self._options: _Fields = {"protocol": 2}
        if self._url.startswith("rediss:"):
            self._options["ssl_check_hostname"] = True
            self._options["ssl_ca_certs"] = None if isinstance(tls, bool) else tls
        elif tls:
            raise ValueError("TLS to a Redis is asked for with rediss://")
        super().__init__(host, port, timeout, None, tls, since)

    def _call(self, work: Callable[[_Link], _T]) -> _T:
        return super()._call(partial(self._translated, work))

    def _dial(self, link: _Link) -> None:
        self._translated(self._connect, link)

    def _translated(self, work: Callable[[_Link], _T], link: _Link) -> _T:
        """`work` done, with errors as every dsmq client raises them."""
        before = sys.exc_info()[1]  # was there already, so it is no cause
        try:
            made = link.connection
            if made and time.monotonic() > made.looked + _REDIS_LOOK_SECONDS:
                link.ready = False
                self._look(link)
                link.ready = True
            return work(link)
        except Exception as error:
            self._check_usable()  # it may come of another thread's close
            if not type(error).__module__.startswith("redis."):
                raise
            cause: BaseException | None = error
            while cause is not None and cause is not before:
                if isinstance(cause, FileNotFoundError):  # there is no such Unix socket
                    raise ConnectionRefusedError(str(error)) from None
                if isinstance(cause, OSError):
                    raise cause from None
                cause = cause.__cause__ or cause.__context__
            said = f"{type(error.__cause__ or error).__name__} {error}"[:500]
            kinds = [k for words, k in _REDIS_ERRORS.items() if re.search(words, said)]
            raise (kinds or [ConnectionError])[0](said) from None

    def _connect(self, link: _Link) -> None:
        """One of the package's clients, for one call at a time, and none after a call
        that was broken off: its reply would be taken for the next one's."""
        try:
            redis: Any = importlib.import_module("redis")  # only who uses it needs it
        except ImportError as error:
            raise DSMQError(f"Redis needs pip install redis ({error})") from error
        # Half of the time, so that a connection forgotten on the way is made anew.
        seconds = min(max(link.end - time.monotonic(), 0.002), LONGEST_SECONDS) / 2
        options: _Fields = {
            **self._options,
            "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0),
            # Redis looks for waits that are over ten times a second.
            "socket_timeout": seconds + 0.1,
            "socket_connect_timeout": seconds / (1 + len(self._nodes)),
        }
        if self._clustered is None:
            with redis.Redis.from_url(self._url, **options) as client:
                self._clustered = client.info("cluster")["cluster_enabled"] == 1
        if self._clustered:
            nodes = [redis.cluster.ClusterNode(*node) for node in self._nodes]
            self._nodes = self._nodes[1:] + self._nodes[:1]  # the first may be silent
            options["startup_nodes"] = nodes
            client = redis.RedisCluster.from_url(self._url, **options)
            self._nodes = tuple((node.host, node.port) for node in client.get_nodes())
            close = client.disconnect_connection_pools
        else:  # one connection, not made anew unnoticed
            client = redis.Redis.from_url(self._url, **options).client()
            close = client.close
        made = SimpleNamespace(client=client, close=close, shut=close, seconds=seconds)
        link.connection = made
        self._check_usable()  # another thread may have closed it just before
        made.run = "" if self._clustered else client.info("server")["run_id"]
        self._look(link)

    def _look(self, link: _Link) -> None:
        """Notes the clock, where reading begins, and from where on if data was lost."""
        made, known = link.connection, self._server
        made.looked = time.monotonic()
        now, id_, name = self._store(b"{dsmq:}", [], link)
        made.ahead = now / 1000 - made.looked
        start, link.server = _redis_id(id_), name.decode() or "cluster"
        run, began, _ = name.split() if name else (b"", b"0-0", b"")
        if self._clustered:
            start = (now + 1) * _REDIS_ID - 1
            time.sleep(0.002)  # what is put after this millisecond gets a higher id
        if self._since:
            since = now - int(min(self._since, self._time_to_live) * 1000)
            start = min(start, since * _REDIS_ID - 1)
        # In the same run it was flushed, and some of what is new may have been read.
        last = id_ if known and known.startswith(run.decode()) else began
        ids = start, _redis_id(began), _redis_id(last)
        self._note_server(known, link.server, *ids)

    def _ask(self, link: _Link, key: bytes, *command: Any) -> Any:
        """What the server that has the key answers."""
        server = client = link.connection.client
        link.ready = False  # until the whole reply is in
        try:
            if self._clustered:  # which itself would ask where a command has its key
                server = client.get_redis_connection(client.get_node_from_key(key))
            reply = server.execute_command(*command)
        except Exception as error:
            if type(error).__name__ != "AskError":
                raise
            # A slot on the move. The link is not ready, so the next call has a new map.
            return client.execute_command(*command)
        link.ready = True
        return reply

    def _key(self, topic: str) -> bytes:
        super()._key(topic)
        return b"{dsmq:%b}" % topic.encode()

    def _store(self, key: bytes, load: list[bytes], link: _Link) -> Any:
        own = [] if self._clustered else ["dsmq:head", "dsmq:run"]
        keys = [key, key + link.name, *own]
        # As long as this call may send it again.
        remembered = max(REMEMBERED_SECONDS, min(self._timeout, LONGEST_SECONDS))
        times = [int(s * 1000) for s in (self._time_to_live, remembered)]
        rest = [link.sequence, *times, link.connection.run, *load]
        return self._ask(link, key, "EVAL", _REDIS_PUT, len(keys), *keys, *rest)

    def _read(
        self, link: _Link, key: bytes, after: int, wanted: int | None, wait: float
    ) -> _Messages:
        # The id, or that of the last that has expired, as Redis writes it.
        place = b"%d-%d" % divmod(max(after, self._expired(link)), _REDIS_ID)
        if wanted is None:
            newest = "XREVRANGE", key, "+", b"(" + place, "COUNT", 1
            return self._messages(link, self._ask(link, key, *newest))
        count = min(self._count, wanted or 100)
        self._count = max(count // 2, 1)  # unless this one gets through
        seconds = min(wait, link.connection.seconds / 2, MAX_WAIT_SECONDS)
        block = ["BLOCK", max(int(seconds * 1000), 1)] if wait else []
        oldest = "XREAD", "COUNT", count, *block, "STREAMS", key, place
        found = self._ask(link, key, *oldest)
        ids, texts, expires = self._messages(link, found[0][1] if found else [])
        mean_bytes = sum(map(len, texts)) // max(len(texts), 1) + 1
        self._count = min(2 * count, FIRST_READ_AHEAD_BYTES // mean_bytes + 1, 100)
        return ids, texts, expires

    def _messages(self, link: _Link, rows: list[Any]) -> _Messages:
        ids = [_redis_id(id_) for id_, _ in rows]
        texts = [fields[b"message"].decode(errors="replace") for _, fields in rows]
        begun = ids[0] // _REDIS_ID / 1000 if ids else 0.0
        return ids, texts, begun + self._time_to_live - link.connection.ahead

    def _expired(self, link: _Link) -> int:
        now = time.monotonic() + link.connection.ahead
        return (int((now - self._time_to_live) * 1000) + 1) * _REDIS_ID - 1

    def stats(self) -> _Fields:
        """As of a dsmq server, over all nodes. `version` and `clients` are those of
        Redis, `max_bytes` is its maxmemory, 0 for none. Looks at each of its keys."""
        topics: dict[str, dict[str, int]] = {}

        def ask(link: _Link) -> Any:
            client, oldest = link.connection.client, self._expired(link) // _REDIS_ID
            link.ready = False
            nodes = client.get_primaries() if self._clustered else ()
            servers = [client.get_redis_connection(n) for n in nodes] or [client]
            topics.clear()
            for server in servers:
                for key in server.scan_iter("{dsmq:*}", 1000, "stream"):
                    server.xtrim(key, minid=oldest + 1, approximate=False)
                    size = server.memory_usage(key)
                    if messages := server.xlen(key):
                        name = key[len("{dsmq:") : -1].decode(errors="replace")
                        topics[name] = {"messages": messages, "bytes": size or 0}
            infos = [server.info() for server in servers]
            link.ready = True
            return infos

        infos = self._call(ask)
        return {
            "version": infos[0]["redis_version"],
            "uptime": float(infos[0]["uptime_in_seconds"]),
            "clients": sum(info["connected_clients"] for info in infos),
            "messages": sum(size["messages"] for size in topics.values()),
            "bytes": sum(size["bytes"] for size in topics.values()),
            "time_to_live": self._time_to_live,
            "max_bytes": sum(info["maxmemory"] for info in infos),
            "topics": topics,
        }

    def shutdown_server(self) -> None:
        """Raises DSMQError: others may be using the Redis."""
        self._check_usable()
        raise DSMQError("a Redis is not stopped by its clients")


def _redis_url(url: str) -> tuple[str, str, int]:
    """The URL as the package takes it, and the place as error messages name it."""
    import urllib.parse

    scheme, _, rest = url.partition("://")
    if scheme not in ("redis", "rediss", "unix", "valkey", "valkeys"):
        raise ValueError(f"{_shown(scheme)}:// is no scheme known here")
    url = f"{scheme.replace('valkey', 'redis')}://{rest}"
    with contextlib.suppress(ValueError):  # whose text may show a part of the password
        parts = urllib.parse.urlsplit(url)
        place = parts.hostname or "localhost", parts.port or 6379
        if scheme == "unix":
            return url, parts.path, 0
        options = urllib.parse.parse_qs(parts.query)
        own = "@" in parts.query or {"decode_responses", "protocol"} & {*options}
        if re.fullmatch(r"/?\d*", parts.path) and not parts.fragment and not own:
            return url, *place
    text = "a Redis URL is redis://[user:password@]host[:port][/database][?options]"
    raise ValueError(f"{text}, with any /?#@ in a password as %2F and so on")


def _redis_id(text: bytes) -> int:
    milliseconds, number = text.split(b"-")
    return int(milliseconds) * _REDIS_ID + int(number)


# ---------------------------------------------------------------------- command line


def demo() -> None:
    """Shows a server, a putter and two getters that each receive everything."""
    port = _free_port()
    server = _start(serve, DEFAULT_HOST, port)
    with connect(port=port) as mq, connect(port=port) as a, connect(port=port) as b:
        _say(f"server:   listening on {DEFAULT_HOST}:{port}")
        _say("getter A: connected", "getter B: connected")
        for text in "Hello, world", "Part mail room,", "part bulletin board.", "Bye":
            _say(f"putter:   puts {text!r}")
            mq.put("greetings", text)
            _say(f"getter A: got {a.get_wait('greetings')!r}")
            _say(f"getter B: got {b.get_wait('greetings')!r}")
            time.sleep(0.3)
        _say("putter:   asks the server to stop")
        mq.shutdown_server()
    server.join()
    _say("server:   stopped")


def _start(work: Callable[..., object], *arguments: Any) -> Any:
    import multiprocessing

    context = multiprocessing.get_context("spawn")  # the same on every system
    # A daemon, so that it ends with this process, also after an exception or Ctrl-C.
    process = context.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def _free_port() -> int:
    with socket.create_server((DEFAULT_HOST, 0)) as probe:
        return int(probe.getsockname()[1])


def _say(*lines: str) -> None:
    try:
        print(*lines, sep="\n", end="\n" if lines else "", flush=True)
    except OSError as error:
        # Python would complain once more, when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # Whoever read our output may have had enough.
        sys.exit(None if isinstance(error, BrokenPipeError) else f"dsmq: {error}")


def _serve(**limits: Any) -> None:
    """Runs a server."""
    with contextlib.suppress(KeyboardInterrupt), _ended_by_sigterm():  # also early
        serve(verbose=True, **limits)


def _put(topic: str, *messages: str, **where: Any) -> None:
    """Puts messages, or the lines of standard input if there are none, or one -."""
    with connect(**where) as mq:
        if messages not in ((), ("-",)):
            mq.put_many(topic, messages)
            return
        if sys.stdin is None:
            raise ValueError("standard input is closed")
        stored, rest, cr = 0, b"", os.linesep[:-1].encode()
        try:
            # As many lines at a time as have come, at most what a pipe holds.
            while chunk := os.read(sys.stdin.fileno(), 1 << 16):
                *lines, rest = (rest + chunk).split(b"\n")
                if len(rest) > 16 << 20:  # what has no end must not fill the memory
                    raise ValueError("a line is longer than 16 MiB")
                mq.put_many(topic, [line.removesuffix(cr).decode() for line in lines])
                stored += len(lines)
            mq.put_many(topic, [rest.decode()] if rest else [])
        except (OSError, DSMQError, ValueError) as error:
            raise DSMQError(f"stopped after {stored} lines: {error}") from error


def _watch(*topics: str, as_json: bool = False, **where: Any) -> None:
    """Prints the messages of topics as they come."""
    count, timeout = where.pop("count", math.inf), where.pop("timeout", math.inf)
    told = where.pop("verbose", sys.stderr and sys.stderr.isatty())
    _check_number("timeout", timeout, 0, math.inf)
    if sys.stdout is None:
        raise ValueError("standard output is closed")
    host, port = where.get("host", DEFAULT_HOST), where.get("port", DEFAULT_PORT)
    # A URL has its port in it, and may have a password.
    place = host.rpartition("@")[2] if "://" in host else f"{host}:{port}"
    _show_log()  # a lost server is told of
    came: queue.Queue[Any] = queue.Queue(100)  # so readers wait for a slow terminal
    with connect(**where) as mq:
        if told:
            _log.info("watching %s at %s", ", ".join(topics), place)
        for topic in topics:
            follow = partial(_follow, mq, topic, came)
            threading.Thread(target=follow, daemon=True).start()
        seen, end = 0, time.monotonic() + timeout
        while seen < count and (left := end - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                # Not longer at once: on Windows Ctrl-C does not end this wait.
                topic, message = came.get(timeout=min(left, 1.0))
                if isinstance(message, Exception):
                    raise message
                line = f"{topic} {message}" if len(topics) > 1 else message
                entry = {"topic": topic, "message": message}
                _say(json.dumps(entry) if as_json else line)
                seen, end = seen + 1, time.monotonic() + timeout
    if seen < count < math.inf:
        raise TimeoutError(f"{seen} of {count} messages came")


def _follow(mq: DSMQClientSideConnection, topic: str, came: Any) -> None:
    """Passes on a topic's messages, through restarts of the server, to the end."""
    while not mq.closed:
        try:
            for message in mq.listen(topic):
                came.put((topic, message))
        except OSError as error:
            if not mq.closed:
                _log.warning("%s; trying again", error)
                time.sleep(1)  # for some errors come at once
        except Exception as error:
            came.put((topic, error))  # the main thread tells it
            return


def _stats(as_json: bool = False, **where: Any) -> None:
    """Shows what a server holds."""
    with connect(**where) as mq:
        stats = mq.stats()
    if as_json:
        _say(json.dumps(stats))
        return
    topics = stats.pop("topics")
    stats["uptime"] = int(stats["uptime"])
    _say(*(f"{name:<14}{value}" for name, value in stats.items()), "")
    _say(f"{'topic':<30}{'messages':>12}{'bytes':>14}")
    for topic, one in topics.items():
        shown = repr(topic)[1:-1]  # in one line, with nothing a terminal would obey
        _say(f"{shown:<30}{one['messages']:>12}{one['bytes']:>14}")


def _shutdown(**where: Any) -> None:
    """Stops a server."""
    with connect(**where) as mq:
        mq.shutdown_server()


def _bench(count: int = 2000, as_json: bool = False, **where: Any) -> None:
    """Measures a server of its own, or the one at --host and --port."""
    _check_number("count", count, 1, sys.maxsize, whole=True)
    if "host" not in where and "port" not in where:
        where = {"port": _free_port()}
        _start(serve, DEFAULT_HOST, where["port"])
    with connect(**where) as mq:
        figures = dict(_figures(mq, count))
    rows = [f"{name:<40} {figure:10,.1f}" for name, figure in figures.items()]
    _say(*[json.dumps(figures)] if as_json else rows)


def _figures(mq: DSMQClientSideConnection, count: int) -> Iterator[tuple[str, float]]:
    """Names and figures: microseconds, unless the name says otherwise."""
    from timeit import repeat, timeit

    def each(times: int, call: Callable[..., object], *arguments: Any) -> float:
        return timeit(partial(call, *arguments), number=times) / times * 1e6

    def trip() -> None:
        mq.put(topic, "x")
        mq.get_wait(topic + "back")

    topic = f"bench {os.urandom(4).hex()} "
    few, trips, hundred = max(count // 20, 1), max(count // 4, 1), ["x"] * 100
    yield "put", each(count, mq.put, topic, "x")
    yield "get, something there", each(count, mq.get, topic)
    yield "get, nothing there", each(count, mq.get, topic)
    yield "put_many of 100, a message", each(few, mq.put_many, topic, hundred) / 100
    yield "get_many of 100, a message", each(few, mq.get_many, topic) / 100
    yield "put, 500 kB", each(few, mq.put, topic + "long", "x" * 500_000)
    yield "get, 500 kB", each(few, mq.get, topic + "long")
    _start(_read, mq, topic, trips, partial(mq.put, topic + "back"))
    mq.get_wait(topic + "ready")
    ways = sorted(repeat(trip, number=1, repeat=trips))
    yield "one way to another process, median", ways[trips // 2] / 2 * 1e6
    topic += "fan "
    readers = [_start(_read, mq, topic, count, len) for _ in range(4)]
    for _ in readers:
        mq.get_wait(topic + "ready")
    begin = time.monotonic()
    each(count, mq.put, topic, "x")
    for reader in readers:
        reader.join()
    yield "1 writer, 4 readers, deliveries/s", 4 * count / (time.monotonic() - begin)


def _read(mq: DSMQClientSideConnection, topic: str, count: int, use: Any) -> None:
    with contextlib.suppress(KeyboardInterrupt, OSError):  # the first process tells it
        mq.put(topic + "ready", "")
        for _ in range(count):
            use(mq.get_wait(topic))


_N, _S = {"type": int, "metavar": "N"}, {"type": float, "metavar": "S"}
_PEM, _FLAG = {"metavar": "PEM"}, {"action": "store_true"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "host": {"help": f"default: {DEFAULT_HOST}"},
    "port": {**_N, "help": f"default: {DEFAULT_PORT}"},
    "secret-file": {"metavar": "FILE", "help": "or the variable DSMQ_SECRET"},
    "tls": {**_PEM, "nargs": "?", "const": True, "help": "trust this, or the system's"},
    "time-to-live": {**_S, "help": "of a message"},
    "max-bytes": {**_N, "help": "of messages"},
    "max-frame-bytes": {**_N, "help": "of a request or reply"},
    "max-clients": {**_N, "help": "at a time"},
    "certfile": {**_PEM, "help": "turns on TLS"},
    "keyfile": {**_PEM, "help": "if it is not in the certfile"},
    "timeout": {**_S, "help": "to reach the server; watch: without message"},
    "since": {**_S, "help": "show what was put in the last S seconds, too"},
    "count": {**_N, "help": "of messages to watch; bench: of calls"},
    "verbose": {**_FLAG, "help": "say when it is there"},
    "json": {**_FLAG, "dest": "as_json", "help": "for programs to read"},
    "version": {"action": "version", "version": f"dsmq {__version__}"},
}
_CLIENT = "host port secret-file tls "
# What runs, its words, and the options that, if given, it gets by name or passes on.
_COMMANDS: dict[str, tuple[Callable[..., None], str, str]] = {
    "": (demo, "", "version"),
    "serve": (
        _serve,
        "",
        "host port secret-file time-to-live max-bytes max-frame-bytes max-clients"
        " certfile keyfile",
    ),
    "put": (_put, "TOPIC [MSG ...]", _CLIENT + "timeout"),
    "watch": (_watch, "TOPIC ...", _CLIENT + "count timeout since json verbose"),
    "stats": (_stats, "", _CLIENT + "timeout json"),
    "shutdown": (_shutdown, "", _CLIENT + "timeout"),
    "bench": (_bench, "", _CLIENT + "count json"),
}


def _parsed(arguments: list[str]) -> Callable[[], None]:
    """What a command line asks for."""
    import argparse

    split = [*arguments, "--"].index("--")  # behind it nothing is an option
    name = next((word for word in arguments[:split] if word in _COMMANDS), "")
    run, words, flags = _COMMANDS[name]
    shown = [(name, words)] if name else [(n, c[1]) for n, c in _COMMANDS.items()]
    lines = (" ".join(f"dsmq {n} [options] {w}".split()) for n, w in shown)
    usage = "\n       ".join(lines)
    more = "HOST may also be the URL of a Redis, redis://..." if "tls" in flags else ""
    parser = argparse.ArgumentParser("dsmq", usage, run.__doc__, more)
    for flag in flags.split():
        parser.add_argument(f"--{flag}", default=argparse.SUPPRESS, **_OPTIONS[flag])
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    given = vars(parser.parse_intermixed_args(arguments[:split]))
    found = [*given.pop("words"), *arguments[split + 1 :]] or [""]
    if found[0] != name or bool(found[1:]) != bool(words):
        parser.error(f"not of that form: {' '.join(found)}")
    if "secret_file" in given:  # no argument, which every user of the machine can see
        with open(given.pop("secret_file"), encoding="utf-8") as file:
            given["secret"] = file.read().rstrip("\r\n")
    elif name and "DSMQ_SECRET" in os.environ:
        given["secret"] = os.environ["DSMQ_SECRET"]
    return partial(run, *found[1:], **given)


def main(arguments: list[str] | None = None) -> int:
    """The command line; gives the exit status."""
    if hasattr(sys.stdout, "reconfigure"):  # not if it is closed or replaced
        sys.stdout.reconfigure(encoding="utf-8")
    try:
        _parsed(sys.argv[1:] if arguments is None else arguments)()
    except KeyboardInterrupt:
        return 130  # as a shell tells it
    except (OSError, DSMQError, ValueError) as error:
        if sys.stderr:
            print(f"dsmq: {error}", file=sys.stderr)
        return 1
    finally:
        _say()  # flushes, be it a help nobody reads
    return 0


if __name__ == "__main__":
    sys.exit(main())
