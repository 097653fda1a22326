"""dsmq, the dead simple message queue: one file that moves strings between processes.

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
    always an object. One reply a request, in order. Unknown fields are ignored. A reply
    with `error` (text) and `code` refuses the request. README has the details.

    hello         protocol, nonce, since     -> protocol, server, max_frame_bytes,
                                                time_to_live, head or challenge, proof
    authenticate  proof                      -> head
    put           topic, messages, client, sequence, settled      -> head
    get           topic, after, limit, limit_bytes, wait  -> messages, ids, expires
    get_latest    topic, after               -> messages, ids, expires
    stats                                    -> what the client's `stats` gives
    shutdown

Threads and locks
    Server: one thread accepts, one serves each connection, one is the timer, one
    answers the readers that wait for a topic's next round (see MessageStore), and each
    long reply to one of those has its own. `MessageStore._lock` guards what is stored,
    and is never held while sending, receiving, encoding or decoding.
    Each connection's thread sends on it, but for a get that waits: another thread that
    takes it out of the store sends its reply, then releases `FrameSocket.answered`.
    Client: each call has a connection of its own, so threads do not wait for each
    other; `DSMQClientSideConnection._lock` guards the cursors.
"""

from __future__ import annotations

import _thread
import bisect
import contextlib
import errno
import json
import logging
import math
import os
import queue
import re
import select
import signal
import socket
import socketserver
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import count, repeat
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

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
# Ids, texts, when the first of them expires, and up to when all that was put is read.
_Messages = tuple[list[int], list[str], float, float]
_Bytes = bytes | memoryview
_Path = str | os.PathLike[str]
_TLS = bool | _Path

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
# Memory of a message beside its text (row and index, measured: 65 to 75). It counts
# towards max_bytes, as do topics, so that a flood of empty messages is bounded too.
MESSAGE_OVERHEAD_BYTES = 72

STALL_SECONDS = 30.0  # a peer silent inside a frame, or not reading, is dropped
LINGER_SECONDS = 1.0  # a refused peer gets this long to read why
LONGEST_SECONDS = 1e6  # that any system can wait at a time
MAX_WAIT_SECONDS = 30.0  # one request's wait; clients ask again, so the dead are found
POLL_SECONDS = 0.05  # between looks whether the server should stop
PURGE_SECONDS = 0.5  # between looks for expired messages
STEP_MESSAGES = 500  # handled in one hold of the store's lock: about a millisecond
STEP_BYTES = 1 << 20  # likewise
RETRY_PAUSE_SECONDS = 0.01  # before the first retry; doubles up to a quarter second
RECEIVE_BYTES = 1 << 18  # at a time
READ_AHEAD_BYTES = 1 << 20  # of one reply at most, ...
FIRST_READ_AHEAD_BYTES = 1 << 16  # ... and while it is unknown what the line carries

# ---------------------------------------------------------------------------- errors


class DSMQError(Exception):
    """The root of dsmq's own errors: the server refused, for the reason it names."""

    code = "bad_request"  # as a reply tells it

    def __init__(self, text: str = "", code: str = "") -> None:
        super().__init__(text)
        self.code = code or self.code


class QueueFull(DSMQError):
    """The server's memory limit, `max_bytes`, is reached; nothing was stored."""

    code = "full"


class AuthenticationError(DSMQError):
    """A peer did not prove that it knows the shared secret."""

    code = "authentication"


class FrameError(DSMQError, ConnectionError):
    """The peer's bytes are no frame of this protocol; the connection is given up."""

    code = "bad_frame"


def _shown(value: object) -> str:
    """A value as an error message shows it: one line of bounded length, in ASCII."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    text = ascii(value[:60] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= 80 else text[:77] + "..."


# What an argument must be. Each raises TypeError or ValueError, naming the value.


def _check_server(host: object, port: object, secret: object) -> None:
    if not isinstance(host, str):
        raise TypeError(f"host must be a str, not {_shown(host)}")
    if host.count(":") == 1:  # an IPv6 address has more
        raise ValueError(f"host is {_shown(host)}: the port is an argument of its own")
    _check_number("port", port, 0, 65535)
    if secret is not None and not isinstance(secret, str):
        raise TypeError(f"secret must be a str, not a {type(secret).__name__}")
    if secret == "":
        raise ValueError("secret must not be empty: it would keep nobody out")
    if secret and secret.encode(errors="replace").decode() != secret:
        raise ValueError("secret must be text that UTF-8 can carry")


def _check_number(
    name: str,
    value: Any,
    least: float = -1 << 63,
    most: float = MAX_INTEGER,
    wrong: type[Exception] = TypeError,
) -> Any:
    """Gives the value, which must be whole if `most` is."""
    whole = isinstance(most, int)
    if not isinstance(value, int if whole else (int, float)) or isinstance(value, bool):
        kind = "an int" if whole else "a number"
        raise wrong(f"{name} must be {kind}, not {_shown(value)}")
    too_large = not whole and sys.float_info.max < value < math.inf  # for a float
    if too_large or not least <= value <= most:  # NaN is not
        bits = " (64-bit)" if most == MAX_INTEGER else ""
        raise ValueError(f"{name} must be {least} to {most}{bits}, not {_shown(value)}")
    return value


# ---------------------------------------------------------------------------- frames

_ESCAPED = b'\n"\\' + bytes(range(32))  # what JSON cannot carry as it is
_decode = json.JSONDecoder(parse_constant=int).raw_decode  # int refuses NaN and such
# glibc's malloc gives long blocks back to the system at once, for page faults later,
# until it has seen a longer one go: 500 kB are put and got in 0.75 and 0.4 ms, not 1.0.
bytearray(4 << 20)


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
        raise ValueError(f"UTF-8 has no lone surrogate, as {_shown(text)}") from None


def encode_frame(*body: bytes) -> bytes:
    """A frame, for one send, around a body that may come in parts, each copied once."""
    return b"".join((sum(map(len, body)).to_bytes(4, "big"), *body))


def encode_object(fields: _Fields) -> bytes:
    """The frame of a JSON object, in ASCII, which carries any text."""
    return encode_frame(json.dumps(fields).encode())


def decode_object(body: bytearray) -> _Fields:
    """The JSON object in a frame's body. Raises FrameError if it is not one."""
    try:
        value, end = _decode(text := str(body, "utf-8").strip(" \t\r\n"))
    except (ValueError, RecursionError) as error:
        raise FrameError(f"a frame must be UTF-8 JSON: {_shown(str(error))}") from None
    if not isinstance(value, dict) or end < len(text):
        raise FrameError(f"a frame must be one JSON object, not {_shown(text)}")
    return value


class FrameSocket:
    """A connected socket that carries frames. One thread receives, one at a time sends.

    A call that is not done by `end`, a monotonic time, raises TimeoutError; without it
    a frame may begin at any time, and each part then takes STALL_SECONDS at most.
    """

    def __init__(self, sock: socket.socket, max_frame_bytes: int) -> None:
        self.max_frame_bytes = max_frame_bytes
        self.unread = b""  # came already, for `receive`
        self.answered = threading.Lock()
        self.answered.acquire()  # until another thread has sent a reply
        # `start_tls` makes them one: there may be but one thread in OpenSSL.
        self._reading, self._writing = threading.Lock(), threading.Lock()
        # Where this tells a send not to wait (not on Windows), the socket blocks, so
        # that a server waits for a request in the system call that receives it.
        self._flag = getattr(socket, "MSG_DONTWAIT", 0)
        self._would_wait: Any = BlockingIOError
        self._sock = sock  # or the TLS around it
        self._fd = sock.fileno()  # of both, also once it is closed
        try:
            # Who asks for an idle port of this machine again and again may be given
            # that very port, and so be connected to itself.
            if sock.getpeername() == sock.getsockname():
                raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody listens there")
            # A small frame must not wait for the last one's acknowledgement.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Finds a peer whose machine vanished, after 60 s where that can be set.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE"):  # the second on macOS
                if option := getattr(socket, name, None):
                    sock.setsockopt(socket.IPPROTO_TCP, option, 60)
            sock.setblocking(bool(self._flag))
        except BaseException:
            sock.close()  # the peer has gone again
            raise

    def start_tls(self, context: ssl.SSLContext, end: float, host: str = "") -> None:
        """The handshake: a client's, if it says which host's certificate to expect."""
        import ssl

        # The handshake comes after this, when `shut` reaches it and can end it.
        tls = context.wrap_socket(self._sock, not host, False, True, host or None)
        self._sock = tls
        tls.settimeout(min(max(end - time.monotonic(), 0.001), LONGEST_SECONDS))
        try:
            tls.do_handshake()
        except ssl.SSLError as error:
            if host:
                raise
            self._sock = socket.socket(fileno=tls.detach())  # plain, to say so
            raise FrameError(f"this port speaks TLS only: {error}") from None
        tls.setblocking(False)
        self._flag, self._writing = 0, self._reading
        self._would_wait = ssl.SSLWantReadError, ssl.SSLWantWriteError

    def send(self, frame: _Bytes, end: float | None = None) -> None:
        """Sends it all."""
        while frame and (frame := self.push(frame)):
            self._wait(end or time.monotonic() + STALL_SECONDS, write=True)

    def push(self, frame: _Bytes) -> _Bytes:
        """Sends what the peer takes without waiting; gives the rest."""
        try:
            with self._writing:
                sent = self._sock.send(frame, self._flag)
            return memoryview(frame)[sent:]
        except self._would_wait:
            return frame

    def answer(self, frame: _Bytes, wait: bool = False) -> None:
        """Sends a reply for the thread that receives, and releases `answered`; does not
        wait: for the rest of a long one there is a thread of its own."""
        try:
            if wait:
                self.send(frame)
            elif rest := self.push(frame):
                _thread.start_new_thread(self.answer, (rest, True))
                return
        except (OSError, RuntimeError, MemoryError):
            self.shut()  # gone, or no thread: a client asks again
        self.answered.release()

    def receive(self, end: float | None = None) -> bytearray | None:
        """The body of the next frame; None if the peer closed after the last one.
        Raises FrameError if it is too long, ConnectionError if it breaks off."""
        data = bytearray(self.unread)
        while True:
            total = 4 + int.from_bytes(data[:4], "big")  # too low until 4 have come
            if total - 4 > (limit := self.max_frame_bytes):
                text = f"a frame of {total - 4} bytes, but the limit is {limit}"
                raise FrameError(f"{text}; it begins {_shown(bytes(data[:16]))}")
            if (left := total - len(data)) <= 0:
                self.unread = bytes(data[total:])
                del data[total:], data[:4]  # no copy of a long body
                return data
            # Memory grows with what came: a length never followed by bytes costs none.
            size = min(max(left, 4096), RECEIVE_BYTES)
            stalled = time.monotonic() + STALL_SECONDS if data else None
            if not (chunk := self.some(size, end or stalled)):
                if not data:
                    return None
                raise ConnectionResetError("the peer closed inside a frame")
            data += chunk
            # A slow line may take longer, as long as it moves: 4 kB buy a second.
            end = end and end + len(chunk) / 4000

    def some(self, size: int, end: float | None) -> bytes:
        """What has come, once there is something; b"" when the peer has closed."""
        if self._flag and end:
            self._wait(end)
        while True:
            try:
                with self._reading:
                    return self._sock.recv(size)
            except self._would_wait:
                self._wait(end)

    def _wait(self, end: float | None, write: bool = False) -> None:
        """Waits until it can be read or written, outside of the TLS layer."""
        while (left := (end or math.inf) - time.monotonic()) > 0:
            seconds = min(left, LONGEST_SECONDS)
            if hasattr(select, "poll"):
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT if write else select.POLLIN)
                ready = bool(poll.poll(1000 * seconds))
            else:  # on Windows
                ways = ([], [self._fd]) if write else ([self._fd], [])
                ready = any(select.select(*ways, [], seconds))
            if ready:
                return
        raise TimeoutError("timed out")

    def shut(self, how: int = socket.SHUT_RDWR) -> None:
        """Ends the conversation from any thread; the one using the socket finds out."""
        with contextlib.suppress(OSError):  # the peer may have been faster
            # Not SSLSocket's own, after which its user would go on in plain text.
            socket.socket.shutdown(self._sock, how)

    def close(self) -> None:
        """Frees the descriptor and no more: after a fork the other side has it too."""
        self._sock.close()


# --------------------------------------------------------------------- message store


class _Topic:
    newest = 0  # id; answers a reader that has everything without SQL
    messages = 0
    rests_until = 0.0  # before this time its waiters are not answered again
    round_due = False  # it is in `rounds`

    def __init__(self, name: str, key: int) -> None:
        self.name, self.key = name, key  # which stands for it in rows and index
        self.bytes = 400 + len(name.encode())  # measured


Message = tuple[int, float, bytes]  # id, when it expires, body
Place = tuple[int, int, int]  # of a reader: after which id, limit, room
# Of a put: client, sequence, and up to which sequence none shall come any more.
Origin = tuple[str, int, int]


class MessageStore:
    """Topics of messages, which are opaque bytes here; all semantics but the cursors.

    The rows are those with ids from `_purged + 1` to `head`, none left out, in the
    order of their age. So the oldest go first, and bisection finds which have expired.

    Readers that wait are answered by the putter, if they are few. Then their topic
    rests for four times as long as that took, 2 ms at most: who asks meanwhile waits
    for the next round, though something is there, so that a fast writer does not wake
    every reader for every message. (From one writer to eight readers 51,000 a second,
    without it 20,000; at 500 a second each message goes out at once.)
    """

    def __init__(self, time_to_live: float, max_bytes: int) -> None:
        self.time_to_live, self.max_bytes = time_to_live, max_bytes
        # Topics with readers to answer at their next round; None at the end.
        self.rounds: queue.SimpleQueue[_Topic | None] = queue.SimpleQueue()
        # Guards everything below; reentrant for the sake of `head_before`.
        self._lock = threading.RLock()
        import sqlite3  # which only a server needs

        # The journal stays on, in memory (0.7 us a put): without it a statement that
        # runs out of memory half-way leaves a broken database.
        self._db = sqlite3.connect(":memory:", check_same_thread=False)
        # Bodies are last in the row and the index holds none of them, so long messages
        # do not slow their neighbours. SQLite ends each index with the id.
        columns = "id INTEGER PRIMARY KEY, topic, expires, body"
        self._db.execute(f"CREATE TABLE messages ({columns})")
        self._db.execute("CREATE INDEX by_topic ON messages (topic)")
        # The newest id. Microseconds pass faster than ids are given, so those of a new
        # start are above old ones; below 2**53, JavaScript's limit, for two centuries.
        self.head = self._purged = time.time_ns() // 1000
        # The newest rows, still to be inserted: together they cost less (2 us each, not
        # 5), most reads are of these alone, and SQLite gives up the interpreter lock at
        # every step, so that busy threads trip over each other.
        self._young: list[tuple[int, int, float, bytes]] = []
        self._bytes, self._closed = 0, False
        self._topics: dict[str, _Topic] = {}  # that have messages
        self._topics_by_key: dict[int, _Topic] = {}
        self._keys = count()
        # By topic those who wait, in order. Whoever takes one out (a put, a round, the
        # end of its wait) owes it an answer.
        self._waiters: dict[str, dict[Any, Place]] = {}
        # By client, the last to put at the end: when that put is forgotten, up to which
        # sequence none shall come any more, and the heads by sequence.
        self._recent: dict[str, tuple[float, int, dict[int, int]]] = {}

    def put(
        self, topic: str, bodies: list[bytes], origin: Origin | None = None
    ) -> tuple[int, _Topic | None]:
        """Stores all bodies or none; gives the id of the last, and the topic, if the
        caller is to answer its readers. A put stored before gives its id and no more.
        Raises QueueFull, and DSMQError for a put that its client has settled."""
        with self._lock:
            if self._closed:
                raise ConnectionAbortedError("the server has stopped")
            expires, first = time.monotonic() + self.time_to_live, self.head + 1
            heads = self._heads(origin, expires) if origin else {}
            if origin and heads[origin[1]]:
                return heads[origin[1]], None
            entry = self._topics.get(topic) or _Topic(topic, next(self._keys))
            cost = sum(map(len, bodies)) + MESSAGE_OVERHEAD_BYTES * len(bodies)
            used = self._bytes + (0 if entry.messages else entry.bytes)
            if used + cost > self.max_bytes:
                text = f"{self._bytes} of max_bytes {self.max_bytes} are in use"
                raise QueueFull(f"no room for {cost} bytes: {text}")
            waiters = self._waiters.get(topic, ())
            # Each costs the putter 20 us, so for more than eight there is a round.
            owed = waiters and not self._defer(entry, len(waiters) > 8)
            rows = [*zip(count(first), repeat(entry.key), repeat(expires), bodies)]
            if len(rows) + len(self._young) > 32 or cost > 4096:
                self._insert(rows)
            else:
                self._young += rows
            self.head += len(bodies)  # out of memory after this: rows without a topic
            self._topics_by_key[entry.key] = self._topics[topic] = entry
            entry.newest, entry.messages = self.head, entry.messages + len(bodies)
            entry.bytes, self._bytes = entry.bytes + cost, used + cost
            if origin:
                heads[origin[1]] = self.head
            return self.head, entry if owed else None

    def _insert(self, rows: list[Any]) -> None:
        """Writes the young rows and these to the database, all or none."""
        if rows or self._young:
            with self._db:  # commits or rolls back
                sql = "INSERT INTO messages VALUES (?, ?, ?, ?)"
                self._db.executemany(sql, self._young + rows)
            self._young.clear()

    def _heads(self, origin: Origin, expires: float) -> dict[int, int]:
        """The heads of a client's latest puts by sequence; 0 for one not yet stored."""
        client, sequence, settled = origin
        _, before, heads = self._recent.pop(client, (0.0, settled, {}))
        self._recent[client] = expires, max(settled, before), heads
        # Bounded, whatever clients do: 10,000 of them, 64 puts of each.
        if len(self._recent) > 10_000:
            del self._recent[next(iter(self._recent))]
        heads.setdefault(sequence, 0)  # now, for nothing may fail after the storing
        if len(heads) > 64:
            del heads[next(iter(heads))]
        if not heads[sequence] and sequence <= before:
            raise DSMQError(f"sequence {sequence} was settled before", "stale")
        return heads

    def get(
        self, topic: str, after: int, limit: int, room: int, waiter: Any = None
    ) -> list[Message]:
        """The oldest live messages after an id, as many as fit `limit` and `room`
        (bytes, each with ID_BYTES), at least one if there is one. If there is none, or
        a round is to come, `waiter` is entered for it, and nothing is given."""
        found: list[Message] = []
        while len(found) < limit:
            # In steps, for a long read must not keep everyone else from the lock.
            with self._lock:
                more = self._read(topic, after, limit - len(found), room)
                wait = waiter and not found
                if wait and (not more or self._defer(self._topics[topic])):
                    # All who have everything read on from one id, so one read serves.
                    if not more and after <= self.head:
                        after = getattr(self._topics.get(topic), "newest", 0)
                    self._waiters.setdefault(topic, {})[waiter] = after, limit, room
                    return found  # which is empty; a new one might want memory
            if not more:
                break
            room -= sum([len(body) + ID_BYTES for _, _, body in more])
            if found and room < 0:
                break
            found += more
            after = more[-1][0]
        return found

    def get_latest(self, topic: str, after: int) -> list[Message]:
        """The newest live message after an id, or none."""
        entry = self._topics.get(topic)
        return self.get(topic, max(after, entry.newest - 1) if entry else after, 1, 0)

    def _read(self, topic: str, after: int, limit: int, room: int) -> list[Message]:
        """One step's worth of a topic's live messages; at least one if there is one."""
        if self._closed:
            raise ConnectionAbortedError("the server has stopped")
        entry = self._topics.get(topic)
        if entry is None or entry.newest <= after:
            return []
        limit, left = min(limit, STEP_MESSAGES), min(room, STEP_BYTES)
        newer, key = self.head - after, entry.key
        rows: Iterable[Message]
        if newer <= len(self._young):
            young = self._young[-newer:]
            rows = [(i, at, body) for i, k, at, body in young if k == key][:limit]
        else:
            self._insert([])
            sql = "SELECT id, expires, body FROM messages WHERE topic = ? AND id > ?"
            rows = self._db.execute(sql + " ORDER BY id LIMIT ?", (key, after, limit))
        found: list[Message] = []
        for row in rows:
            left -= len(row[2]) + ID_BYTES
            if left < 0 and found:
                break
            found.append(row)
        if found[0][1] < time.monotonic():  # of the younger ones some may live
            after = max(found[0][0], self.head_before(self.time_to_live))
            return self._read(topic, after, limit, room)
        return found

    def head_before(self, seconds: float) -> int:
        """The newest id put longer ago, by bisection; 0 seconds: the newest of all."""
        with self._lock:
            if not seconds or self._closed:
                return self.head
            self._insert([])
            end = time.monotonic() - seconds + self.time_to_live
            ids = range(self._purged + 1, self.head + 1)
            ask, sql = self._db.execute, "SELECT expires FROM messages WHERE id = ?"
            found = bisect.bisect_left(ids, end, key=lambda i: next(ask(sql, (i,)))[0])
            return self._purged + found

    def _defer(self, entry: _Topic, crowd: bool = False) -> bool:
        """Whether a round is to answer its readers; if so, sees that there is one."""
        later = crowd or time.monotonic() < entry.rests_until
        if later and not entry.round_due:
            self.rounds.put(entry)
            entry.round_due = True  # not if memory ran out
        return later

    def take_readers(self, entry: _Topic) -> list[tuple[list[Message], list[Any]]]:
        """Readers that are to be answered, no longer waiting, by what they get."""
        places: dict[Place, list[Any]] = {}  # most are at the same
        ready: list[tuple[list[Message], list[Any]]] = []
        with self._lock:
            entry.round_due = False
            entry.rests_until = time.monotonic() + 0.002
            waiters = self._waiters.get(entry.name, {})
            for waiter, place in waiters.items():
                places.setdefault(place, []).append(waiter)
            for place, some in places.items():
                # For the others there is nothing: it expired, or they want later ones.
                if len(ready) < 16 and (found := self._read(entry.name, *place)):
                    ready.append((found, some))
            if len(ready) == 16:  # the next round may have more; others want the lock
                self._defer(entry, True)
            # Only now: one taken out before memory ran out would get no answer.
            for waiter in [waiter for _, some in ready for waiter in some]:
                del waiters[waiter]
        return ready

    def end_wait(self, topic: str, waiter: Any) -> bool:
        """Whether the waiter was still waiting; if not, it is being answered."""
        with self._lock:
            waiters = self._waiters.get(topic)
            return bool(waiters and waiters.pop(waiter, None))

    def purge(self) -> bool:
        """Frees the oldest expired messages, a step's worth; whether there were any."""
        with self._lock:
            room, expired = STEP_BYTES, self.head_before(self.time_to_live)
            most = min(expired - self._purged, STEP_MESSAGES)
            sql = "SELECT topic, length(body) FROM messages WHERE id > ? ORDER BY id"
            for key, size in self._db.execute(sql + " LIMIT ?", (self._purged, most)):
                cost = size + MESSAGE_OVERHEAD_BYTES
                self._purged, room = self._purged + 1, room - cost
                entry = self._topics_by_key.get(key)
                if entry and entry.messages:  # else nobody's, see put
                    entry.messages, entry.bytes = entry.messages - 1, entry.bytes - cost
                    self._bytes -= cost
                    if not entry.messages:
                        self._bytes -= entry.bytes
                        del self._topics[entry.name], self._topics_by_key[key]
                if room <= 0:
                    break
            with self._db:
                self._db.execute("DELETE FROM messages WHERE id <= ?", (self._purged,))
            return room < STEP_BYTES

    def tidy(self) -> None:
        """Forgets where nobody waits any more, and puts too long ago to be repeated;
        once little is left of much, frees the pages that SQLite keeps."""
        with self._lock:
            self._waiters = {t: some for t, some in self._waiters.items() if some}
            past = time.monotonic() - max(60.0 - self.time_to_live, 0.0)
            while self._recent and next(iter(self._recent.values()))[0] < past:
                del self._recent[next(iter(self._recent))]
            free_pages = self._db.execute("PRAGMA freelist_count").fetchone()[0]
            if free_pages > 4096 and self._bytes <= STEP_BYTES:
                # Takes milliseconds. Of 231 MB either alone leaves 210, both 16: glibc
                # keeps what threads other than the first have freed.
                self._db.execute("VACUUM")
                with contextlib.suppress(ImportError, OSError, AttributeError):
                    import ctypes

                    ctypes.CDLL(None).malloc_trim(0)

    def stats(self) -> dict[str, Any]:
        """Counts of messages and bytes, in all and by topic."""
        with self._lock:
            messages, size = self.head - self._purged, self._bytes
            topics = [(t.name, t.messages, t.bytes) for t in self._topics.values()]
        each = {n: {"messages": m, "bytes": b} for n, m, b in topics}
        limits = {"time_to_live": self.time_to_live, "max_bytes": self.max_bytes}
        return {"messages": messages, "bytes": size, **limits, "topics": each}

    def close(self) -> None:
        """Frees the messages, and ends the rounds."""
        self.rounds.put(None)
        with self._lock:
            self._closed = True
            self._db.close()


# ---------------------------------------------------------------------------- server


class _Server(socketserver.ThreadingTCPServer):
    """Accepts connections, a thread each, and stops when a client or Ctrl-C says so."""

    request_queue_size = 1024  # clients may all come at the same moment
    allow_reuse_address = os.name == "posix"  # Windows would share a port in use

    # As `serve` is told.
    max_frame_bytes = MAX_FRAME_BYTES
    max_clients = MAX_CLIENTS
    secret = ""
    context: ssl.SSLContext | None = None

    def __init__(self, host: str, port: int, store: MessageStore, **told: Any) -> None:
        vars(self).update(told)
        with contextlib.suppress(ImportError):  # Windows knows no limit of descriptors
            import resource

            # With none left nobody could be told that it is refused.
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            if most > 16:  # -1 is for no limit
                self.max_clients = min(self.max_clients, most - 16)
        self.store = store
        self.name = os.urandom(16).hex()  # no other start has the same
        self.started, self.parent = time.monotonic(), os.getppid()
        self.stopping = threading.Event()  # set by whoever stops the server
        self.connections: set[FrameSocket] = set()
        self._noted = 0  # what was logged of peers since the last purge
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            store.close()
            text = f"cannot listen on {host}:{port}: {error.strerror or error}"
            raise OSError(error.errno, text) from None
        # A client may be gone between select and accept, which then must not wait.
        self.socket.settimeout(POLL_SECONDS)
        _forked.add(self)

    def run(self) -> None:
        place = "{}:{}".format(*self.server_address)
        _log.info("dsmq %s listening on %s; Ctrl-C stops it", __version__, place)
        if not self.secret and not place.startswith(("127.", "::1")):
            _log.warning("no secret: anyone on the network can read, put and stop it")
        with self:
            for job in (self._purge, self._run_rounds):
                _thread.start_new_thread(self._repeat, (job,))
            self.serve_forever(POLL_SECONDS)

    def server_close(self) -> None:
        """Frees port and messages, ends conversations; replies get 0.15 s more."""
        self.stopping.set()
        self.socket.close()
        self.store.close()
        for how in (socket.SHUT_RD, socket.SHUT_RDWR):
            for connection in list(self.connections):
                connection.shut(how)
            end = time.monotonic() + 0.15
            while self.connections and time.monotonic() < end:
                time.sleep(0.002)

    def _repeat(self, job: Callable[[], None]) -> None:
        """A thread whose job goes on after a fault, as all depend on it."""
        while not self.stopping.is_set():
            try:
                job()
            except Exception:  # out of memory, or the store was closed meanwhile
                if not self.stopping.is_set():
                    self.handle_error(None, "everybody")

    def _purge(self) -> None:
        """The timer: frees what has expired, and looks whether our parent lives."""
        self.stopping.wait(PURGE_SECONDS)
        self._noted = 0
        while self.store.purge():
            time.sleep(0.001)  # in which others get the lock
        self.store.tidy()
        started_by = sys.modules.get("multiprocessing")
        parent = started_by and started_by.parent_process()
        # A child that the parent forked keeps `is_alive` true: so the number, too.
        if parent and (os.getppid() != self.parent or not parent.is_alive()):
            _log.warning("stopping: the process that started this one has ended")
            self.shutdown()

    def _run_rounds(self) -> None:
        """Answers the readers who wait for their topic's next round."""
        while entry := self.store.rounds.get():
            time.sleep(max(entry.rests_until - time.monotonic(), 0))
            self.answer_readers(entry)

    def answer_readers(self, entry: _Topic) -> None:
        """Those at the same place get the same reply, made once."""
        begun = time.monotonic()
        for messages, waiters in self.store.take_readers(entry):
            try:
                reply = _messages_reply(messages)
            except MemoryError:  # what was put is stored; the reader asks again
                reply = _NO_MESSAGES
            for waiter in waiters:
                try:
                    waiter.answer(reply)
                except MemoryError:  # so its client asks again
                    waiter.answered.release()
        now = time.monotonic()
        entry.rests_until = now + min(4 * (now - begun), 0.002)

    # A connection's way: get_request accepts it, process_request starts its thread,
    # in which _Handler serves it, and shutdown_request closes it, whatever happened.

    def get_request(self) -> tuple[Any, Any]:
        try:
            sock, address = self.socket.accept()
            return FrameSocket(sock, self.max_frame_bytes), "{}:{}".format(*address)
        except (OSError, MemoryError) as error:
            # Do not spin without descriptors, nor sleep for each of 300 that are gone.
            if getattr(error, "errno", 0) not in (errno.ENOTCONN, errno.EINVAL):
                time.sleep(POLL_SECONDS)
            raise OSError from None  # socketserver goes on with the next

    def process_request(self, request: Any, peer: Any) -> None:
        self.connections.add(request)
        # Thread.start would wait for its begin: for ever, if memory runs out just then.
        _thread.start_new_thread(self.process_request_thread, (request, peer))

    def shutdown_request(self, request: Any) -> None:
        request.shut()  # also for a forked child
        request.close()
        self.connections.discard(request)

    def _leave_to_parent(self) -> None:
        """Else ports and peers would have to wait for the child's end, too."""
        self.socket.close()
        for connection in list(self.connections):
            connection.close()

    def handle_error(self, request: Any, peer: Any) -> None:
        """A fault of ours, no memory or no thread left: it ends one connection."""
        with contextlib.suppress(MemoryError):
            self.note(logging.ERROR, "a fault serving %s", peer)

    def note(self, level: int, text: str, *values: object) -> None:
        """Logs what a peer did, but twenty times a second: none may fill the disk."""
        self._noted += 1
        if self._noted <= 10:
            _log.log(level, text, *values, exc_info=level == logging.ERROR)


# Servers and clients: what a forked child closes of its parent's.
_forked: weakref.WeakSet[Any] = weakref.WeakSet()

if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(
        after_in_child=lambda: [each._leave_to_parent() for each in list(_forked)]
    )


def _messages_reply(messages: list[Message]) -> bytes:
    """The reply to a get: put together from bodies encoded when they were put."""
    if not messages:
        return _NO_MESSAGES
    ids, times, bodies = zip(*messages)
    expires = max(times[0] - time.monotonic(), 0.0)
    rest = b'],"ids":[%b],"expires":%.6f}' % (",".join(map(str, ids)).encode(), expires)
    return encode_frame(b'{"messages":[', b",".join(bodies), rest)


_NO_MESSAGES = encode_object({"messages": [], "ids": []})


def _error_reply(error: Exception) -> bytes:
    code = getattr(error, "code", "bad_request")
    return encode_object({"error": str(error), "code": code})


def _proof(secret: str, role: str, nonce: str, challenge: str) -> str:
    """What only someone who knows the secret can say to this nonce and challenge; the
    role keeps one side's proof from being sent back as the other's."""
    import hmac

    data = f"dsmq {role}:{nonce}:{challenge}".encode(errors="replace")
    return hmac.new(secret.encode(), data, "sha256").hexdigest()


def _same(proof: object, expected: str) -> bool:
    import hmac

    return hmac.compare_digest(ascii(proof), ascii(expected))


class _Handler(socketserver.BaseRequestHandler):
    server: _Server
    request: FrameSocket
    _end: float | None = None  # until it has proven the secret, by when it must
    _expected = ""  # proof of the client's, once it said hello
    _since = 0.0  # as it said there
    _owed: _Topic | None = None  # whose readers a put is to answer
    _plain = False  # there are no escapes in the request

    def handle(self) -> None:
        limit, soon = self.server.max_clients, time.monotonic() + STALL_SECONDS
        peer = self.client_address
        try:
            if self.server.context:  # not before, as the peer may stall in it
                self.request.start_tls(self.server.context, soon)
            if len(self.server.connections) > limit:
                raise DSMQError(f"max_clients {limit} is reached", "busy")
            if self.server.secret:
                # Who knows no secret must not keep a thread, or much memory.
                self._end, self.request.max_frame_bytes = soon, 4096
            self._converse()
        except DSMQError as error:
            self.server.note(logging.WARNING, "closing %s: %s", peer, error)
            # Bytes left unread would reset the connection, and the reply might be lost.
            with contextlib.suppress(OSError):  # where possible: the peer may have gone
                end = time.monotonic() + LINGER_SECONDS
                self.request.send(_error_reply(error), end)
                self.request.shut(socket.SHUT_WR)
                while self.request.some(RECEIVE_BYTES, end):
                    pass
        except OSError as error:  # vanished, stalled, or does not read
            self.server.note(logging.INFO, "closing %s: %s", peer, error)

    def _converse(self) -> None:
        while (body := self.request.receive(self._end)) is not None:
            reply: _Bytes = self._answer(body)
            del body  # a long one must not stay while the thread waits for the next
            if entry := self._owed:
                self._owed = None
                # A reader that wakes may take this core, so the putter goes first; but
                # readers do not wait for one that does not read.
                try:
                    reply = self.request.push(reply)
                finally:
                    self.server.answer_readers(entry)
            self.request.send(reply)
            del reply  # nor must this

    def _answer(self, body: bytearray) -> bytes:
        """The reply's frame; empty for a get that another thread answers."""
        try:
            request, self._plain = decode_object(body), b"\\" not in body
            action = request.get("action")
            if not isinstance(action, str) or action not in self.ACTIONS:
                raise DSMQError(f"no action {_shown(action)}", "unknown_action")
            if self._end and action not in ("hello", "authenticate"):
                raise AuthenticationError("this server requires its secret")
            return self.ACTIONS[action](self, request)
        except FrameError:  # ends the connection
            raise
        except (DSMQError, ValueError) as error:
            return _error_reply(error)
        except MemoryError:
            return _error_reply(QueueFull("out of memory"))

    def _hello(self, request: _Fields) -> bytes:
        _check_field("protocol", request.get("protocol", 1), PROTOCOL, PROTOCOL)
        since, server = request.get("since", 0), self.server
        self._since = _check_field("since", since, 0, sys.float_info.max)
        reply: _Fields = {"protocol": PROTOCOL, "server": server.name}
        reply["max_frame_bytes"] = server.max_frame_bytes
        reply["time_to_live"] = server.store.time_to_live
        if not self._end:
            reply["head"] = server.store.head_before(self._since)
        elif request.get("nonce") is None:
            raise AuthenticationError("this server requires its secret")
        else:
            words = _text(request, "nonce", 256), os.urandom(32).hex()
            self._expected = _proof(server.secret, "client", *words)
            reply["challenge"] = words[1]
            reply["proof"] = _proof(server.secret, "server", *words)
        return encode_object(reply)

    def _authenticate(self, request: _Fields) -> bytes:
        expected = self._expected
        if self._end and not (expected and _same(request.get("proof"), expected)):
            text = "%s does not know the secret"
            self.server.note(logging.WARNING, text, self.client_address)
            raise AuthenticationError("that proof is wrong")
        self._end = None
        self.request.max_frame_bytes = self.server.max_frame_bytes
        return encode_object({"head": self.server.store.head_before(self._since)})

    def _put(self, request: _Fields) -> bytes:
        topic = _text(request, "topic", MAX_TOPIC_CHARACTERS)
        texts: Any = request.get("messages")
        fit = isinstance(texts, list) and len(texts) <= MAX_PUT_MESSAGES
        if not fit or {*map(type, texts)} != {str}:
            text = f"messages must be a list of 1 to {MAX_PUT_MESSAGES} texts"
            raise ValueError(f"{text}, not {_shown(texts)}")
        if self._plain:  # a frame without escapes carries texts as they are stored
            bodies = [b'"%b"' % text.encode() for text in texts]
        else:
            bodies = [*map(encode_text, texts)]
        limit = self.server.max_frame_bytes - ENVELOPE_BYTES
        if (longest := max(map(len, bodies))) > limit:
            text = f"a message of {longest} bytes; the limit is {limit}"
            raise DSMQError(text, "too_large")
        origin = None
        if request.get("client") is not None:
            number = _check_field("sequence", request.get("sequence"))
            settled = _check_field("settled", request.get("settled", -1 << 63))
            origin = _text(request, "client", 256), number, settled
        head, self._owed = self.server.store.put(topic, bodies, origin)
        return encode_frame(b'{"head":%d}' % head)

    def _get(self, request: _Fields) -> bytes:
        topic = _text(request, "topic", MAX_TOPIC_CHARACTERS)
        after, store = _check_field("after", request.get("after")), self.server.store
        if request["action"] == "get_latest":
            return _messages_reply(store.get_latest(topic, after))
        limit = _check_field("limit", request.get("limit", 1), 1)
        room = self.server.max_frame_bytes - ENVELOPE_BYTES
        room = min(_check_field("limit_bytes", request.get("limit_bytes", room)), room)
        place = after, limit, room
        if wait := _check_field("wait", request.get("wait", 0), 0, sys.float_info.max):
            end = time.monotonic() + min(wait, MAX_WAIT_SECONDS)
            return self._wait(end, topic, place)
        return _messages_reply(store.get(topic, *place))

    def _wait(self, end: float, topic: str, place: Place) -> bytes:
        """The reply to a get that waits; empty if whoever took it from the store sends
        it. This thread learns of that by the peer's next request or end, so it need not
        be woken: with eight readers that is a third faster."""
        frames, store = self.request, self.server.store
        if messages := store.get(topic, *place, frames):
            return _messages_reply(messages)
        answered = False
        try:
            with contextlib.suppress(TimeoutError):
                frames.unread = frames.unread or frames.some(4096, end)
                if not frames.unread:  # the peer has gone
                    return b""
            # Its next request came, maybe too early: the answer is still awaited.
            left = max(end - time.monotonic(), 0)
            answered = frames.answered.acquire(timeout=left)
        except MemoryError:  # not told, for the reply may be on its way
            raise ConnectionAbortedError("out of memory") from None
        finally:  # until the reply is out, the socket stays ours
            if not answered and not store.end_wait(topic, frames):
                answered = frames.answered.acquire()
        # Maybe something, if the topic rests as the wait ends.
        return b"" if answered else _messages_reply(store.get(topic, *place))

    def _stats(self, request: _Fields) -> bytes:
        server, stats = self.server, _Fields(version=__version__)
        stats["uptime"] = time.monotonic() - server.started
        stats["clients"] = len(server.connections)
        stats |= server.store.stats()
        reply = encode_object(stats)
        if len(reply) > server.max_frame_bytes:
            stats["topics_left_out"] = len(stats["topics"])
            reply = encode_object(stats | {"topics": {}})
        return reply

    def _shutdown(self, request: _Fields) -> bytes:
        _log.info("%s asked the server to stop", self.client_address)
        self.server.shutdown()
        self.server.socket.close()  # now, for `run` may not have come to it
        return encode_object({})

    # README's table tells the fields and replies.
    ACTIONS: ClassVar[dict[str, Callable[[_Handler, _Fields], bytes]]] = {
        "hello": _hello, "authenticate": _authenticate, "put": _put, "get": _get,
        "get_latest": _get, "stats": _stats, "shutdown": _shutdown,
    }  # fmt: skip


# What a field of a request must be. Both raise ValueError, which tells the rule.

_check_field = partial(_check_number, wrong=ValueError)


def _text(request: _Fields, field: str, most: int) -> str:
    value = request.get(field)
    if not isinstance(value, str) or not 1 <= len(value) <= most:
        text = f"{field} must be a text of 1 to {most} characters"
        raise ValueError(f"{text}, not {_shown(value)}")
    value.encode()  # fails for a lone surrogate
    return value


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
    """Runs a server; blocks until a client or Ctrl-C stops it, or the parent of its
    multiprocessing.Process has ended; then returns.

    `host` 127.0.0.1 is this machine only, "0.0.0.0" the network; `port` 0 any free one,
    which the log tells; `verbose` shows that, of the logger "dsmq", on stderr. Messages
    live `time_to_live` seconds and take `max_bytes` of memory; `max_frame_bytes` is
    about the longest message. A connection beyond `max_clients` is refused, and with a
    `secret` who does not know it. `certfile` and `keyfile`, PEM files, turn on TLS.
    Raises OSError if it cannot listen, TypeError or ValueError for a wrong argument.
    """
    _check_server(host, port, secret)
    # Longer is as good as for ever, and JSON can say it; SQLite takes no longer value.
    _check_number("time_to_live", time_to_live, 0.001, 1e9)
    _check_number("max_frame_bytes", max_frame_bytes, MIN_FRAME_BYTES, 10**9)
    _check_number("max_bytes", max_bytes, 1)
    _check_number("max_clients", max_clients, 1)
    if verbose:
        _show_log()
    if keyfile is not None and certfile is None:
        raise ValueError("a keyfile needs a certfile")
    limits = {"max_frame_bytes": max_frame_bytes, "max_clients": max_clients}
    with contextlib.suppress(KeyboardInterrupt):
        context = None if certfile is None else _tls_context(None, certfile, keyfile)
        store = MessageStore(float(time_to_live), max_bytes)
        _Server(host, port, store, secret=secret, context=context, **limits).run()
    _log.info("stopped; goodbye")


def _tls_context(
    trusted: _Path | None, certfile: str | None = None, keyfile: str | None = None
) -> ssl.SSLContext:
    """A server's if it has a certificate, else a client's."""
    import ssl

    side = ssl.Purpose.SERVER_AUTH if certfile is None else ssl.Purpose.CLIENT_AUTH
    context = ssl.create_default_context(side, cafile=trusted)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if certfile is not None:
        for path in (certfile, keyfile or certfile):
            open(os.fspath(path), "rb").close()  # its error names the path
        context.load_cert_chain(certfile, keyfile)
    return context


@cache  # each line is shown once, however often it is asked for
def _show_log() -> None:
    """Shows the log on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    # A program with a log of its own shows these lines there.
    handler.addFilter(lambda record: not logging.getLogger().handlers)
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)


# ---------------------------------------------------------------------------- client

# What a refusal becomes, else DSMQError. A busy server is tried again.
_EXCEPTIONS: dict[str, type[Exception]] = {
    "full": QueueFull, "authentication": AuthenticationError, "bad_frame": FrameError,
    "too_large": ValueError, "busy": ConnectionRefusedError,
}  # fmt: skip


class _Link:
    """One of a client's connections, used by one call at a time. By its name (`client`
    in a put) and the number of its calls the server knows a put that is sent again."""

    sequence = 0
    end = 0.0  # monotonic time at which a reply is given up
    connection: Any = None  # a FrameSocket, or what another engine dials
    server = ""  # its name
    # False while a reply is to come: after an interrupt no later request may meet it.
    ready = False

    def __init__(self) -> None:
        self.name = os.urandom(16).hex().encode()

    def exchange(self, request: bytes, field: str = "") -> _Fields:
        """The server's reply, which must have an integer in that field."""
        self.ready = False
        self.connection.send(request, self.end)
        body = self.connection.receive(self.end)
        if body is None:
            raise ConnectionResetError("the server closed the connection")
        reply = decode_object(body)
        self.ready = True
        if "error" in reply:
            kind = _EXCEPTIONS.get(str(reply.get("code")), DSMQError)
            raise kind(str(reply["error"]))
        if field and type(reply.get(field)) is not int:
            raise FrameError(f"no integer {field} in {_shown(str(reply))}")
        return reply

    def drop(self) -> None:
        """Closes the connection: lost, or with a reply still to come on it."""
        self.ready, self.server = False, ""
        if self.connection:
            self.connection.close()

    __del__ = drop  # so that none gives a ResourceWarning


class _Reader:
    """Where a client stands in a topic."""

    def __init__(self, last: int) -> None:
        self.last = last  # id of the newest message read
        # Those not handed out, the oldest at the end: the id before it, its text, and
        # the monotonic time at which the first of its reply expires.
        self.unread: list[tuple[int, str, float]] = []

    @property
    def cursor(self) -> int:
        """An id up to which all has been handed out, and nothing above."""
        last, oldest = self.last, self.unread[-1:]  # in this order, unlocked
        return oldest[0][0] if oldest else last


class DSMQClientSideConnection:
    """A client of a dsmq server: what `connect` gives.

    Many threads may use it at once; each message goes to one of them. After a fork, or
    when it is passed to another process, each side reads on from where it stood.

    If the server refuses, drops the connection or does not answer, every method tries
    again for the `timeout` of `connect`, then raises ConnectionRefusedError,
    ConnectionError or TimeoutError; after `close` ConnectionError. A wrong type is a
    TypeError; a topic not of 1 to 1,000 characters, text that UTF-8 cannot carry and a
    message too long for a frame are a ValueError, before anything is sent.
    """

    # How long get_wait persists without a timeout; the original's names.
    _n_tries = 10
    _initial_retry = 0.01
    _engine = "dsmq server"  # as error messages name it
    _encode: Callable[[str], bytes] = staticmethod(encode_text)
    _message_bytes = 1  # that one takes in a request beside its text: a comma

    def __init__(
        self, host: str, port: int, timeout: float, secret: Any, tls: _TLS, since: float
    ) -> None:
        _check_server(host, port, secret)
        _check_number("timeout", timeout, 0.001, math.inf)
        _check_number("since", since, 0, math.inf)
        if not isinstance(tls, bool):  # its error names the path
            open(os.fspath(tls), "rb").close()
        self._host, self._port, self._timeout = host, port, timeout
        self._secret, self._tls, self._since = secret, tls, since
        self.closed = False
        self._server: str | None = None  # whose the cursors are
        self._start = 0  # where reading a topic begins: at connect the head
        self._max_frame_bytes = MAX_FRAME_BYTES
        # Of one reply; less over a line that is slow, or breaks before it is through.
        self._read_ahead_bytes = FIRST_READ_AHEAD_BYTES
        self._cursors: dict[str, _Reader] = {}
        self._tidy_at = 100  # cursors
        self.__setstate__({})
        self._call(lambda link: None)

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<{type(self).__name__} to {self._host}:{self._port}, {state}>"

    # One object in several threads and processes

    def __setstate__(self, state: _Fields) -> None:
        """Makes anew what belongs to one process alone."""
        self.__dict__.update(state)
        # Guards cursors, `_server` and `_start`; not held while talking to the server.
        # Reentrant, because a signal handler may use the client, too.
        self._lock = threading.RLock()
        # All (weakly, or one lost to an interrupt in `_call` would stay open), and some
        # that are idle: of many threads most call but once.
        self._links: Any = weakref.WeakValueDictionary()
        self._idle: deque[_Link] = deque(maxlen=16)
        _forked.add(self)

    def _leave_to_parent(self) -> None:
        """Closes, and does not shut down. A call whose signal handler forked goes on
        under another name."""
        for link in self._links.values():
            link.drop()
            link.name = _Link().name
        self.__setstate__({})

    def _check_usable(self) -> None:
        if self.closed:
            raise ConnectionError("this client is closed")

    def __getstate__(self) -> _Fields:
        cursors = {t: _Reader(r.cursor) for t, r in [*self._cursors.items()]}
        own = {"_lock": None, "_links": None, "_idle": None}
        return self.__dict__ | own | {"_cursors": cursors}

    # Reaching the server

    def _call(self, work: Callable[[_Link], _T]) -> _T:
        """`work` done with a connection, or with new ones, until `timeout` is over."""
        begun, pause = time.monotonic(), RETRY_PAUSE_SECONDS
        try:
            link = self._idle.pop()  # used last: others may have aged
        except IndexError:
            link = _Link()
            self._links[link.name] = link
        link.sequence += 1  # for all tries, so a put is known again
        # A connection lost unnoticed (a NAT, a suspend) leaves half for a new one.
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
                    self._check_usable()  # or `close` has cut it
                    left = begun + self._timeout - time.monotonic()
                    self._give_up(error, left)
                    # Never long, to find a server that starts; shorter at the end.
                    time.sleep(min(pause, left / 2))
                    pause = min(2 * pause, 0.25)
        finally:
            if not link.ready or self.closed:  # by another thread
                link.drop()
            self._idle.append(link)

    def _dial(self, link: _Link) -> None:
        """Connects a link, and says hello. With a secret the server must prove that it
        knows it, then the client, who then gets the head."""
        known, place = self._server, (self._host, self._port)
        seconds = min(max(link.end - time.monotonic(), 0.002), LONGEST_SECONDS)
        # A name may have several addresses, of which the first may be silent.
        tries = len(socket.getaddrinfo(*place, type=socket.SOCK_STREAM)) + 1
        sock = socket.create_connection(place, seconds / tries)
        link.connection = FrameSocket(sock, MAX_FRAME_BYTES)
        self._check_usable()  # `close` may have come when there was nothing to shut
        if self._tls:
            context = _tls_context(None if self._tls is True else self._tls)
            link.connection.start_tls(context, link.end, self._host)
            self._check_usable()  # or while it had TLS put around it
        # JSON knows no infinity.
        hello: _Fields = {"action": "hello", "since": min(self._since, 1e9)}
        hello["nonce"] = self._secret and os.urandom(32).hex()
        reply = link.exchange(encode_object(hello), "max_frame_bytes")
        if self._secret:
            words = hello["nonce"], str(reply.get("challenge"))
            if not _same(reply.get("proof"), _proof(self._secret, "server", *words)):
                raise AuthenticationError("the server does not know the secret")
            proof = _proof(self._secret, "client", *words)
            request = {"action": "authenticate", "proof": proof}
            reply |= link.exchange(encode_object(request))
        head, life = reply.get("head"), reply.get("time_to_live")
        if type(head) is not int or type(life) not in (int, float):
            raise FrameError(f"no head or time_to_live in {_shown(str(reply))}")
        self._max_frame_bytes = reply["max_frame_bytes"]
        self._time_to_live = life
        link.connection.max_frame_bytes = self._max_frame_bytes
        link.server = str(reply.get("server"))
        self._note_server(known, link.server, head)

    def _note_server(
        self, known: str | None, name: str, head: int, begin: int = 0, stale: Any = None
    ) -> None:
        """Takes in a server's name, where `known` was expected. To another server ids
        above `begin` mean nothing (or only those in `stale`, cursors by topic): reading
        goes on from there."""
        with self._lock:
            if self._server == name:
                return
            if self._server != known:  # another thread found a newer one
                raise ConnectionResetError("the server has been replaced")
            # What is new there is to be read; what was read ahead comes before.
            self._start = head if known is None else min(self._start, begin)
            for topic, reader in [*self._cursors.items()]:  # handlers add some
                old = stale is None or stale.get(topic) == reader.last
                if old and reader.last > begin and self._server == known:
                    for i, (_, text, expires) in enumerate(reader.unread):
                        reader.unread[i] = begin, text, expires
                    reader.last = begin
            self._server = name

    def _give_up(self, error: OSError, left: float) -> None:
        """Raises what came of it, if there is no use in another try."""
        # By their names, for ssl is imported only where TLS is used.
        kinds = "FrameError", "SSLError", "SSLCertVerificationError", "gaierror"
        final = type(error).__name__ in kinds and error.errno != socket.EAI_AGAIN
        # In 20 ms a try might not get as far as to meet the true error.
        if not final and left >= max(0.01 * self._timeout, 0.02):  # or both infinite
            return
        told = FrameError, ConnectionRefusedError, TimeoutError
        kind = next((k for k in told if isinstance(error, k)), ConnectionError)
        late = kind is TimeoutError
        said = f"no answer in {self._timeout:g} s" if late else str(error)
        here = self._host.startswith(("127.", "localhost", "::1", "/"))
        if kind is ConnectionRefusedError and not here:
            said += "; unless told its host, a server listens on 127.0.0.1"
        raise kind(f"{self._engine} at {self._host}:{self._port}: {said}") from error

    def put(self, topic: str, msg: str) -> None:
        """Puts `msg` into `topic`; it is stored, and can be read, when this returns.
        Raises QueueFull if the server's memory is used up. After another error, but for
        TypeError and ValueError, it may have been stored, once, or not."""
        self.put_many(topic, [msg])

    def put_many(self, topic: str, msgs: Iterable[str]) -> None:
        """Puts them all, in order, or none, and nobody else's messages between them.
        Only where they are too long for one frame, or more than 100,000, they go in
        several requests, each all or none and with its own timeout."""
        if isinstance(msgs, str):
            raise TypeError("msgs must be several messages, not one str")
        key = self._key(topic)
        room_bytes = self._max_frame_bytes - ENVELOPE_BYTES - len(key)
        loads: list[list[bytes]] = []
        left = 0
        for msg in msgs:  # all are checked before one goes
            if not isinstance(msg, str):
                hint = "json.dumps makes one, base64.b64encode of bytes"
                raise TypeError(f"a message must be a str, not {_shown(msg)}: {hint}")
            body = self._encode(msg)
            if len(body) > room_bytes:
                size = f"{len(body)} bytes, but {room_bytes} fit into a frame"
                raise ValueError(f"the message {_shown(msg)} takes {size}")
            left -= len(body) + self._message_bytes
            if left < 0 or len(loads[-1]) >= MAX_PUT_MESSAGES:
                loads.append([])
                left = room_bytes - len(body)
            loads[-1].append(body)
        for load in loads:
            self._call(partial(self._store, key, load))

    def get(self, topic: str) -> str:
        """The oldest unread message of `topic`, or at once "" if there is none."""
        return (self._some(topic, 0.0) or [""])[0]

    def get_wait(self, topic: str, timeout: float | None = None) -> str:
        """The oldest unread message of `topic`; waits for one up to `timeout` seconds
        (math.inf: for ever), then gives "". Without a timeout it persists for the sum
        of `_n_tries` doubling pauses from `_initial_retry`: 10.23 s."""
        if timeout is None:
            timeout = self._initial_retry * (2**self._n_tries - 1)
        _check_number("timeout", timeout, 0, math.inf)
        return (self._some(topic, timeout) or [""])[0]

    def get_latest(self, topic: str) -> str:
        """The newest unread message of `topic`, or at once "" if there is none; those
        before it stay unread for ever."""
        return (self._some(topic, 0.0, None) or [""])[0]

    def get_many(self, topic: str, limit: int = 100) -> list[str]:
        """All unread messages of `topic` there are, at once, up to `limit`."""
        _check_number("limit", limit, 1)
        return self._some(topic, 0.0, limit)

    def listen(self, topic: str, timeout: float = math.inf) -> Iterator[str]:
        """Iterates over the messages of `topic` as they come; ends when for `timeout`
        seconds there was none."""
        self._key(topic)
        _check_number("timeout", timeout, 0, math.inf)
        # No call to a builtin here: an interrupt may strike as one returns.
        return iter(lambda: (self._some(topic, timeout) or (None,))[0], None)

    def _some(self, topic: str, seconds: float, wanted: int | None = 1) -> list[str]:
        """The oldest messages, as many as wanted (None: the newest), or none."""
        limit, now = wanted or 1, time.monotonic()
        end = now + seconds
        found = wanted and type(topic) is str and topic in self._cursors
        while not (found and (texts := self._take(topic, limit, now, limit))):
            key = self._key(topic)
            if limit == 1:  # many might expire before they are enough
                now = time.monotonic()
            found, read_to = self._call(partial(self._fetch, topic, key, end, wanted))
            if read_to >= end:  # what is put since might have no end
                return self._take(topic, limit, now) if found or limit > 1 else []
        return texts

    # The lock keeps other threads out, but neither a signal handler of this one nor an
    # interrupt. They strike in and after calls and jumps (in Python 3.10 also forward):
    # there is none from where a reader is looked at until it is changed.

    def _take(self, topic: str, limit: int, now: float, least: int = 1) -> list[str]:
        """Hands out messages read ahead, up to `limit`, at `least` so many or none.
        What has been read since `now` is good, however soon it expires."""
        if self.closed:
            self._check_usable()
        taken: list[tuple[int, str, float]] = []
        try:
            with self._lock:
                reader = self._cursors.get(topic) or _Reader(self._start)
                if reader.unread and reader.unread[-1][2] < now:
                    reader.last, reader.unread[:] = reader.unread[-1][0], []
                if len(reader.unread) >= least:
                    unread = reader.unread  # the look: a handler may have been here
                    taken = unread[-limit:]
                    del unread[-limit:]
            return [text for _, text, _ in reversed(taken)]
        except BaseException:
            if taken:  # still to be handed out
                unread += taken
            raise

    def _fetch(
        self, topic: str, key: bytes, end: float, wanted: int | None, link: _Link
    ) -> tuple[bool, float]:
        """Reads messages ahead (None: the newest alone), waiting for the first; gives
        whether there are any, and up to when all that was put has been read."""
        if len(self._cursors) >= self._tidy_at:
            self._tidy(link)
        reader, after = self._cursors.get(topic), self._start
        if reader:
            after = reader.cursor if wanted is None else reader.last
            if reader.unread and wanted == 1:  # looked at after `last`, unlocked
                return True, 0.0  # another thread has just read it ahead
        budget, begun, most = self._read_ahead_bytes, time.monotonic(), READ_AHEAD_BYTES
        # A part of the time that is left: the rest is for an answer that comes late.
        wait = max(min(end - begun, (link.end - begun) / 3, MAX_WAIT_SECONDS), 0.0)
        self._read_ahead_bytes = max(budget // 2, 256)
        messages = self._read(link, key, after, wanted and budget, wait)
        ids, texts, expires, all_to = messages
        if time.monotonic() < begun + wait + 1.0 and sum(map(len, texts)) <= most:
            self._read_ahead_bytes = min(2 * budget, most)
        if not ids:
            return False, time.monotonic()
        if wanted is None:
            after = ids[0] - 1
        unread, read_to = [*zip([after, *ids], texts, repeat(expires))][::-1], 0.0
        with self._lock:
            if self._server == link.server:  # whose ids these are
                reader = self._cursors.setdefault(topic, _Reader(after))
                cursor = reader.unread[-1][0] if reader.unread else reader.last
                if wanted is None and cursor <= after:
                    reader.last, reader.unread = after, []
                if reader.last == after:  # else another thread has it, or newer ones
                    reader.unread[:0], reader.last = unread, ids[-1]
                    read_to = all_to
        return True, read_to

    def _tidy(self, link: _Link) -> None:
        """Forgets what has expired, and cursors with only such before."""
        expired, now = self._expired(link), time.monotonic()
        with self._lock:
            if self._server == link.server:
                for topic in [*self._cursors]:
                    self._take(topic, 1, now, MAX_INTEGER)  # drops the old
                    reader = self._cursors.get(topic)
                    if reader and not reader.unread and reader.last <= expired:
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
        key, room_bytes = encode_text(topic), self._max_frame_bytes - ENVELOPE_BYTES
        if len(key) > room_bytes:
            size = f"{len(key)} bytes, but {room_bytes} fit into a frame"
            raise ValueError(f"the topic {_shown(topic)} takes {size}")
        return key

    def _store(self, key: bytes, load: list[bytes], link: _Link) -> Any:
        """Puts a load of messages, under the number of the link's call."""
        what = b'{"action":"put","client":"%b",' % link.name
        what += b'"sequence":%d,"settled":%d,' % (link.sequence, link.sequence - 1)
        what += b'"topic":%b,"messages":[' % key
        link.exchange(encode_frame(what, b",".join(load), b"]}"), "head")

    def _read(
        self, link: _Link, key: bytes, after: int, budget: int | None, wait: float
    ) -> _Messages:
        """The messages after an id, about so many bytes (None: the newest alone)."""
        begun, action = time.monotonic(), b"get" if budget else b"get_latest"
        what = b'{"action":"%b","topic":%b,"after":%d,' % (action, key, after)
        how = b'"limit":1000,"limit_bytes":%d,"wait":%.6f}' % (budget or 0, wait)
        reply = link.exchange(encode_frame(what, how))
        try:
            ids, texts = reply["ids"], reply["messages"]
            kinds: list[type] = [int] * len(ids) + [str] * len(ids)
            growing = [after, *ids] == sorted({after, *ids})
            if growing and [*map(type, ids + texts)] == kinds:
                expires = begun + reply.get("expires", 0.0)
                return ids, texts, expires, expires - self._time_to_live
        except (TypeError, KeyError):  # of what is no list, or no number
            pass
        raise FrameError(f"a reply without sound messages: {_shown(str(reply))}")

    def _expired(self, link: _Link) -> int:
        """The newest id that has been purged: no message there is 1e9 s old."""
        request = encode_object({"action": "hello", "since": 1e9})
        return int(link.exchange(request, "head")["head"])

    def stats(self) -> _Fields:
        """What the server holds: `version`, `uptime` in seconds, `clients` (that is,
        connections), `messages`, `bytes` of memory they take, `time_to_live`,
        `max_bytes`, and of `topics` each one's `messages` and `bytes`."""
        request = encode_object({"action": "stats"})
        return self._call(lambda link: link.exchange(request, "messages"))

    def shutdown_server(self) -> None:
        """Stops the server. When this returns it takes no more connections."""

        def ask(link: _Link) -> None:
            try:
                link.exchange(encode_object({"action": "shutdown"}))
            except ConnectionError:
                # The answer may be lost; if so, nobody listens there now.
                place, seconds = (self._host, self._port), min(self._timeout / 2, 3.0)
                with contextlib.suppress(ConnectionRefusedError):
                    socket.create_connection(place, seconds).close()
                    raise

        self._call(ask)

    def close(self) -> None:
        """Ends the connection, and the calls of other threads. May be called again."""
        self.closed = True
        for reference in self._links.valuerefs():
            if connection := getattr(reference(), "connection", None):
                connection.shut()
        self._idle.clear()  # links in no call close as they go

    def __enter__(self) -> DSMQClientSideConnection:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


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

    With a `secret` both sides prove that they know it, or AuthenticationError is
    raised. `tls` is True to trust the system's authorities, or the path of a PEM file
    to trust. It sees what was put up to `since` seconds before, too, as far as that
    lives (math.inf: all there is). `verbose` shows the log on stderr.

    A host redis://[user:password@]host[:port][/database], or rediss:// for TLS, gives
    the same on a Redis or a Redis Cluster; see `_RedisConnection`.
    """
    engine = _RedisConnection if "://" in str(host) else DSMQClientSideConnection
    mq = engine(host, port, timeout, secret, tls, since)
    if verbose:
        _show_log()
        _log.info("connected to %s:%s", mq._host, mq._port)  # no password
    return mq


# ------------------------------------------------------------ past one machine (Redis)

_REDIS_ID = 1 << 64  # here an id is milliseconds * this + number

# A topic's messages are in a stream {dsmq:topic}, with ids of milliseconds and a
# number; the number of a client's last put is, while they live, in {dsmq:topic}client.
# On a single server dsmq:head is the newest id of all topics, for the clock may step
# back, and topics share a millisecond; dsmq:run is the run of the server, another one
# after a restart, from which id on that has put (0-0 if all was lost), and since when;
# "none" is one that could not be noted, on a replica or for want of memory.
#
# This stores messages, all or none. ARGV: the put's number (one below the last comes
# late, on a connection given up), the time to live, the run, the messages. Without any
# it gives the time, the head (in a cluster that of the clock) and the run.
_REDIS_PUT = """
if tonumber(redis.call('GET', KEYS[2]) or 0) >= tonumber(ARGV[1]) then return end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local head, run = now .. '-0', 'cluster 0-0 0'
if KEYS[3] then
    head = redis.call('GET', KEYS[3]) or '0-0'
    run = redis.call('GET', KEYS[4]) or 'none 0-0 0'
    if run:find(ARGV[3], 1, true) ~= 1 then
        local new = ARGV[3] .. ' ' .. head .. ' ' .. now
        if redis.pcall('SET', KEYS[4], new).ok then run = new end
    end
end
if #ARGV == 3 then return {now, head, run} end
local ms, number = head:match('(%d+)-(%d+)')
if tonumber(ms) < now then ms, number = now, -1 end
for i = 4, #ARGV do
    head = KEYS[3] and ms .. '-' .. number + i - 3 or '*'
    redis.call('XADD', KEYS[1], head, 'message', ARGV[i])
end
if KEYS[3] then redis.call('SET', KEYS[3], head) end
redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[2])
redis.call('XTRIM', KEYS[1], 'MINID', now - ARGV[2] * 1000 + 1)
redis.call('EXPIRE', KEYS[1], ARGV[2])
"""
# What an error becomes, by its kind or text. A ConnectionError is tried again.
_REDIS_ERRORS: dict[str, type[Exception]] = {
    r"OutOfMemory|\bOOM\b": QueueFull, "^Authentication": AuthenticationError,
    "BUSY|READONLY|UNBLOCKED": ConnectionError, "^InvalidResponse": FrameError,
    "^(ResponseError|NoPermission)": DSMQError, "": ConnectionError,  # in a failover
}  # fmt: skip


class _RedisConnection(DSMQClientSideConnection):
    """A client like any other, whose messages are in Redis 6.2 or later. In a cluster
    each node makes ids from its own clock, so where reading begins is less exact."""

    _engine = "Redis"
    _encode = staticmethod(str.encode)
    _message_bytes = 72  # that one takes in a request beside its text, at most
    _nodes: tuple[tuple[str, int], ...] = ()  # of a cluster, as last heard of
    _looked = _lead = 0.0  # when its clock was seen, and its lead less a life

    def __init__(
        self, url: str, port: int, timeout: float, secret: Any, tls: _TLS, since: float
    ) -> None:
        self._url = re.sub("^valkey", "redis", url)
        plain = tls and not self._url.startswith("rediss:")
        if port != DEFAULT_PORT or secret is not None or plain:
            raise ValueError("port, password and rediss:// for TLS belong in the URL")
        who, host = "(?:[^][/?#@]*@)?", r"(\[[\w:.%]+\]|[\w.-]*)"
        known = rf"(?:unix://{who}(/[^?#]*)|rediss?://{who}{host}(?::(\d+))?(?:/\d*)?)"
        # These options would change what replies are.
        known += r"(?:\?(?!.*(?:decode_responses|protocol)=)[^#@]*)?"
        form = re.fullmatch(known, self._url)
        if not form or not url.isascii():  # of which the package shows the password
            text = f"{_shown(url.partition(':')[0])}:// begins no Redis URL; one is"
            text += " redis://[user:password@]host[:port][/database][?options]"
            raise ValueError(f"{text}, in ASCII, with /?#@ in a password as %2F etc.")
        host, port = form[1] or form[2].strip("[]"), int(form[3] or 6379)
        super().__init__(host or "localhost", port, timeout, None, tls, since)

    @contextlib.contextmanager
    def _asking(self, link: _Link) -> Iterator[None]:
        """Errors of the package become those that every dsmq client raises."""
        link.ready = False  # until the whole reply is in
        before = sys.exc_info()[1]  # was there already, so it is no cause
        try:
            yield
        except Exception as error:
            self._check_usable()  # it may come of another thread's close
            cause: Any = error
            while cause is not before and type(cause).__module__.startswith("redis."):
                cause = cause.__cause__ or cause.__context__
            if isinstance(error, (TypeError, AttributeError)) and not link.connection:
                raise ValueError(f"the URL of the Redis: {error}") from None
            if cause is error:
                raise
            if isinstance(cause, OSError) and cause is not before:
                raise cause from None
            said = f"{type(error.__cause__ or error).__name__} {error}"
            found = (e for words, e in _REDIS_ERRORS.items() if re.search(words, said))
            raise next(found)(said) from None
        link.ready = True

    def _dial(self, link: _Link) -> None:
        """One of the package's clients, for one call at a time, and none after a call
        that was broken off: its reply would be taken for the next one's."""
        try:
            redis: Any = __import__("redis")  # only who uses it needs it
        except ImportError as error:
            raise DSMQError(f"Redis needs pip install redis ({error})") from error
        # Half of the time, so that a connection forgotten on the way is made anew; and
        # ten times a second Redis looks for waits that are over.
        seconds = min(max(link.end - time.monotonic(), 0.002) / 2, 60.0) + 0.1
        never = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
        options: _Fields = {"protocol": 2, "retry": never, "socket_timeout": seconds}
        # In a cluster the first may be silent.
        options["socket_connect_timeout"] = seconds / (1 + len(self._nodes))
        if self._url.startswith("rediss:"):
            trusted = None if isinstance(self._tls, bool) else self._tls
            options |= {"ssl_check_hostname": True, "ssl_ca_certs": trusted}
        with self._asking(link):
            if self._nodes:
                nodes = [redis.cluster.ClusterNode(*at) for at in self._nodes]
                options["startup_nodes"] = nodes
                client = redis.RedisCluster.from_url(self._url, **options)
                self._nodes = tuple((n.host, n.port) for n in client.get_nodes())
                close = client.disconnect_connection_pools
            else:  # one connection, not made anew unnoticed
                pool = redis.Redis.from_url(self._url, **options)
                client, close = pool.client(), pool.close
        link.connection = SimpleNamespace(client=client, close=close, shut=close)
        self._check_usable()  # another thread may have closed it just before
        info = {} if self._nodes else self._ask(link, b"", "INFO")
        if info.get("cluster_enabled"):
            self._nodes = ((self._host, self._port),)
            raise ConnectionResetError("it is a cluster, as the next try knows")
        link.connection.run = info.get("run_id", "")
        self._look(link)

    def _look(self, link: _Link) -> None:
        """Notes the clock, where reading begins, and from where on if data was lost."""
        known, begun = self._server, time.monotonic()
        lasts = {t: r.last for t, r in [*self._cursors.items()]}
        anywhere = b"{dsmq:%b}" % os.urandom(4)  # any node does, and one may hang
        now, head, name = self._store(anywhere, [], link)
        run, begin, _ = name.split()
        start = _redis_id(head)
        # In the same run (or after none) some of what is new may have been read.
        flushed = known and known.startswith((run.decode(), "none"))
        stale = {t: i for t, i in lasts.items() if i > start} if flushed else None
        since = int(min(self._since, TIME_TO_LIVE_SECONDS) * 1000)
        if since or self._nodes:  # more may be put in this millisecond, to any node
            start = min(start, (now - since) * _REDIS_ID - 1)
        self._looked, self._lead = begun, now / 1000 - TIME_TO_LIVE_SECONDS - begun
        link.server = name.decode()
        self._note_server(known, link.server, start, _redis_id(begin), stale)

    def _ask(self, link: _Link, key: bytes, *command: Any) -> Any:
        """What the server that has the key answers."""
        client, where = link.connection.client, {}
        with self._asking(link):
            if self._nodes:  # whose client would ask where a command has its key
                where["target_nodes"] = client.get_node_from_key(key)
            return client.execute_command(*command, **where)

    def _key(self, topic: str) -> bytes:
        super()._key(topic)
        return b"{dsmq:%b}" % topic.encode()

    def _store(self, key: bytes, load: list[bytes], link: _Link) -> Any:
        of_all = () if self._nodes else ("dsmq:head", "dsmq:run")
        keys = key, key + link.name, *of_all
        rest = link.sequence, int(TIME_TO_LIVE_SECONDS), link.connection.run, *load
        return self._ask(link, key, "EVAL", _REDIS_PUT, len(keys), *keys, *rest)

    def _read(
        self, link: _Link, key: bytes, after: int, budget: int | None, wait: float
    ) -> _Messages:
        # The id, or that of the last that has expired, as Redis writes it.
        place = b"%d-%d" % divmod(max(after, self._expired(link)), _REDIS_ID)
        begun, count = time.monotonic(), (budget or 0) // 6000 or 1
        if budget is None:
            rows = self._ask(link, key, "XREVRANGE", key, "+", b"(" + place, "COUNT", 1)
        else:
            block = ["BLOCK", max(int(wait * 1000), 1)] if wait else []
            what = "COUNT", count, *block, "STREAMS", key, place
            ((_, rows),) = self._ask(link, key, "XREAD", *what) or [(key, [])]
        if not all(b"message" in fields for _, fields in rows):
            raise DSMQError(f"the stream {_shown(key)} is not of dsmq alone")
        texts = [fields[b"message"].decode(errors="replace") for _, fields in rows]
        ids = [_redis_id(id_) for id_, _ in rows]
        expires = min(ids, default=0) // _REDIS_ID / 1000 - self._lead
        return ids, texts, expires, begun if len(rows) < count else 0.0

    def _expired(self, link: _Link) -> int:
        known = self._server
        if time.monotonic() > self._looked + 10.0:
            self._look(link)
        if self._server != known:  # what is to be read is known at the next try
            raise ConnectionResetError("the Redis has lost its data")
        return (int((time.monotonic() + self._lead) * 1000) + 1) * _REDIS_ID - 1

    def stats(self) -> _Fields:
        """As of a dsmq server, over all nodes. `version` and `clients` are those of
        Redis, `max_bytes` is its maxmemory, 0 for none. Looks at each of its keys."""

        def ask(link: _Link) -> _Fields:
            client, topics = link.connection.client, {}
            with self._asking(link):
                nodes = client.get_primaries() if self._nodes else ()
                servers = [client.get_redis_connection(n) for n in nodes] or [client]
                for server in servers:
                    for key in server.scan_iter("{dsmq:*}", 1000, "stream"):
                        size = server.memory_usage(key) or 0  # it may expire meanwhile
                        name = key[len("{dsmq:") : -1].decode(errors="replace")
                        topics[name] = {"messages": server.xlen(key), "bytes": size}
                infos = [server.info() for server in servers]
            return {
                "version": infos[0]["redis_version"],
                "uptime": infos[0]["uptime_in_seconds"],
                "clients": sum(info["connected_clients"] for info in infos),
                "messages": sum(size["messages"] for size in topics.values()),
                "bytes": sum(size["bytes"] for size in topics.values()),
                "time_to_live": TIME_TO_LIVE_SECONDS,
                "max_bytes": sum(info["maxmemory"] for info in infos),
                "topics": topics,
            }

        return self._call(ask)

    def shutdown_server(self) -> None:
        """Raises DSMQError: others may be using the Redis."""
        self._check_usable()
        raise DSMQError("a Redis is not stopped by its clients")


def _redis_id(text: bytes) -> int:
    milliseconds, number = text.split(b"-")
    return int(milliseconds) * _REDIS_ID + int(number)


# ---------------------------------------------------------------------- command line


def demo() -> None:
    """Shows a server, a putter and two getters that each receive everything."""
    port = _free_port()
    server = _start(serve, DEFAULT_HOST, port)
    with connect(port=port) as mq, connect(port=port) as a, connect(port=port) as b:
        print(f"server:   listening on {DEFAULT_HOST}:{port}")
        print("getter A: connected\ngetter B: connected")
        for text in "Hello, world", "Part mail room,", "part bulletin board.", "Bye":
            print(f"putter:   puts {text!r}")
            mq.put("greetings", text)
            print(f"getter A: got {a.get_wait('greetings')!r}")
            print(f"getter B: got {b.get_wait('greetings')!r}")
            time.sleep(0.3)
        print("putter:   asks the server to stop")
        mq.shutdown_server()
    server.join()
    print("server:   stopped")


def _start(work: Callable[..., object], *arguments: Any) -> Any:
    import multiprocessing

    spawn = multiprocessing.get_context("spawn")  # the same on every system
    # A daemon ends with this process, also after an exception or Ctrl-C.
    process = spawn.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def _free_port() -> int:
    with socket.create_server((DEFAULT_HOST, 0)) as probe:
        return int(probe.getsockname()[1])


def _serve(**limits: Any) -> None:
    """Runs a server."""
    # A service is told so to stop; a program that calls `serve` minds its own signals.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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
    _show_log()  # a lost server is told of
    came: queue.Queue[Any] = queue.Queue(100)  # so readers wait for a slow terminal
    mq = connect(**where)  # open to the end, as are its readers
    if told:
        _log.info("watching %s at %s:%s", ", ".join(topics), mq._host, mq._port)
    for topic in topics:
        _thread.start_new_thread(_follow, (mq, topic, came))
    seen, end = 0, time.monotonic() + timeout
    while seen < count and (left := end - time.monotonic()) > 0:
        with contextlib.suppress(queue.Empty):
            # Not longer at once: on Windows Ctrl-C does not end this wait.
            topic, message = came.get(timeout=min(left, 1.0))
            if isinstance(message, Exception):
                raise message
            line = f"{topic} {message}" if topics[1:] else message
            entry = {"topic": topic, "message": message}
            print(json.dumps(entry) if as_json else line)
            seen, end = seen + 1, time.monotonic() + timeout
    if seen < count < math.inf:
        raise TimeoutError(f"{seen} of {count} messages came")


def _follow(mq: DSMQClientSideConnection, topic: str, came: Any) -> None:
    """Passes on a topic's messages, through restarts of the server, to the end."""
    while True:
        try:
            came.put((topic, mq.get_wait(topic, math.inf)))
        except OSError as error:
            _log.warning("%s; trying again", error)
            time.sleep(1)  # for some errors come at once
        except Exception as error:
            came.put((topic, error))  # the main thread tells it, and ends


def _stats(as_json: bool = False, **where: Any) -> None:
    """Shows what a server holds."""
    with connect(**where) as mq:
        stats = mq.stats()
    if as_json:
        print(json.dumps(stats))
        return
    topics, stats["uptime"] = stats.pop("topics"), int(stats["uptime"])
    print(*(f"{name:<14}{value}" for name, value in stats.items()), "", sep="\n")
    print(f"{'topic':<30}{'messages':>12}{'bytes':>14}")
    for topic, one in topics.items():
        # In one line, with nothing a terminal would obey.
        print(f"{repr(topic)[1:-1]:<30}{one['messages']:>12}{one['bytes']:>14}")


def _shutdown(**where: Any) -> None:
    """Stops a server."""
    with connect(**where) as mq:
        mq.shutdown_server()


def _bench(count: int = 2000, as_json: bool = False, **where: Any) -> None:
    """Measures a server of its own, or the one at --host and --port."""
    from timeit import repeat, timeit

    if not where.keys() & {"host", "port"}:
        where = {"port": _free_port()}
        _start(serve, DEFAULT_HOST, where["port"])
    topic, few, figures = f"bench {os.urandom(4).hex()} ", max(count // 20, 1), {}
    with connect(**where) as mq:
        calls: list[tuple[Any, ...]] = [
            ("put", count, mq.put, topic, "x"),
            ("get, something there", count, mq.get, topic),
            ("get, nothing there", count, mq.get, topic),
            ("put_many of 100, a message", few, mq.put_many, topic, ["x"] * 100),
            ("get_many of 100, a message", few, mq.get_many, topic),
            ("put, 500 kB", few, mq.put, topic + "long", "x" * 500_000),
            ("get, 500 kB", few, mq.get, topic + "long"),
        ]
        for name, times, call, *arguments in calls:
            seconds = timeit(partial(call, *arguments), number=times) / times
            figures[name] = seconds * 1e6 / (100 if "100" in name else 1)
        ask, back = partial(mq.put, topic, "x"), topic + "back"
        _start(_read, mq, topic, count, partial(mq.put, back))
        mq.get_wait(topic + "ready")
        ways = repeat(lambda: (ask(), mq.get_wait(back)), number=1, repeat=count)
        figures["one way to another process, median"] = sorted(ways)[count // 2] / 2e-6
        topic += "fan "
        readers = [_start(_read, mq, topic, count, len) for _ in range(4)]
        for _ in readers:
            mq.get_wait(topic + "ready")
        seconds = timeit(partial(mq.put, topic, "x"), number=count)
        seconds += timeit(lambda: [reader.join() for reader in readers], number=1)
        figures["1 writer, 4 readers, deliveries/s"] = 4 * count / seconds
    rows = [f"{name:<40} {figure:10,.1f}" for name, figure in figures.items()]
    print(json.dumps(figures) if as_json else "\n".join(rows))


def _read(mq: DSMQClientSideConnection, topic: str, count: int, use: Any) -> None:
    with contextlib.suppress(KeyboardInterrupt, OSError):  # the first process tells it
        mq.put(topic + "ready", "")
        for _ in range(count):
            use(mq.get_wait(topic))


_N, _S = {"type": int, "metavar": "N"}, {"type": float, "metavar": "S"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "host": {"help": f"default: {DEFAULT_HOST}"},
    "port": {**_N, "help": f"default: {DEFAULT_PORT}"},
    "secret-file": {"metavar": "FILE", "help": "or the variable DSMQ_SECRET"},
    "tls": {"nargs": "?", "const": True, "help": "trust this PEM, or the system's"},
    "time-to-live": {**_S, "help": "of a message"},
    "max-bytes": {**_N, "help": "of messages"},
    "max-frame-bytes": {**_N, "help": "of a request or reply"},
    "max-clients": {**_N, "help": "at a time"},
    "certfile": {"help": "a PEM file, turns on TLS"},
    "keyfile": {"help": "if it is not in the certfile"},
    "timeout": {**_S, "help": "to reach the server; watch: without message"},
    "since": {**_S, "help": "show what was put in the last S seconds, too"},
    "count": {**_N, "help": "of messages to watch; bench: of calls"},
    "verbose": {"action": "store_true", "help": "say when it is there"},
    "json": {"dest": "as_json", "action": "store_true", "help": "for programs"},
    "version": {"action": "version", "version": f"dsmq {__version__}"},
}
_LIMITS = "time-to-live max-bytes max-frame-bytes max-clients certfile keyfile"
# What runs, its words, and its options beside those of all; it gets those given.
_COMMANDS: dict[str, tuple[Callable[..., None], str, str]] = {
    "": (demo, "", "version"),
    "serve": (_serve, "", _LIMITS),
    "put": (_put, "TOPIC [MSG ...]", "tls timeout"),
    "watch": (_watch, "TOPIC ...", "tls count timeout since json verbose"),
    "stats": (_stats, "", "tls timeout json"),
    "shutdown": (_shutdown, "", "tls timeout"),
    "bench": (_bench, "", "tls count json"),
}


def _parsed(arguments: list[str]) -> Callable[[], None]:
    """What a command line asks for."""
    import argparse

    split = [*arguments, "--"].index("--")  # behind it nothing is an option
    name = next((word for word in arguments[:split] if word in _COMMANDS), "")
    run, words, flags = _COMMANDS[name]
    shown = [name] if name else [*_COMMANDS][1:]
    usage = "\n       ".join(f"dsmq {n} [options] {_COMMANDS[n][1]}" for n in shown)
    more = "HOST may also be the URL of a Redis, redis://..." if "tls" in flags else ""
    parser = argparse.ArgumentParser("dsmq", usage, run.__doc__, more)
    for flag in (("host port secret-file " if name else "") + flags).split():
        parser.add_argument(f"--{flag}", default=argparse.SUPPRESS, **_OPTIONS[flag])
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    given = vars(parser.parse_intermixed_args(arguments[:split]))
    found = [*given.pop("words"), *arguments[split + 1 :]] or [""]
    if found[0] != name or bool(found[1:]) != bool(words):
        parser.error(f"not of that form: {' '.join(found)}")
    _check_number("count", given.get("count", 1), 1, sys.maxsize)
    if "secret_file" in given:  # no argument, which every user of the machine can see
        with open(given.pop("secret_file"), encoding="utf-8") as file:
            given["secret"] = file.read().rstrip("\r\n")
    elif name and "DSMQ_SECRET" in os.environ:
        given["secret"] = os.environ["DSMQ_SECRET"]
    return partial(run, *found[1:], **given)


def main() -> int | str:
    """The command line; gives what sys.exit takes."""
    if hasattr(sys.stdout, "reconfigure"):  # not if it is closed or replaced
        sys.stdout.reconfigure(encoding="utf-8", line_buffering=True)
    try:
        try:
            _parsed(sys.argv[1:])()
        finally:
            print(end="", flush=True)  # be it a help that nobody reads
        return 0
    except KeyboardInterrupt:
        return 130  # as a shell tells it
    except (OSError, DSMQError, ValueError) as error:
        # What could not be written Python would try, and tell, once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        # Whoever read our output may have had enough.
        return 0 if isinstance(error, BrokenPipeError) else f"dsmq: {error}"


if __name__ == "__main__":
    sys.exit(main())
