"""Tests of dsmq, through real sockets and real processes, in the order of the file."""

from __future__ import annotations

import contextlib
import doctest
import functools
import gc
import importlib.util
import itertools
import json
import logging
import math
import multiprocessing
import os
import pathlib
import pickle
import random
import re
import select
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn

import pytest

import dsmq
from dsmq import AuthenticationError, DSMQError, QueueFull

HERE = pathlib.Path(__file__).parent
HOST = "127.0.0.1"
PATIENCE_SECONDS = 20.0  # for whatever should come soon, on a machine under load
Client = dsmq.DSMQClientSideConnection
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
needs_signals = pytest.mark.skipif(os.name == "nt", reason="no such signals here")

# What a client promises on each engine: a dsmq server in this process, or in one of its
# own where the test forks; one Redis; a Redis Cluster.
everywhere = pytest.mark.parametrize(
    "connect", ["dsmq", "redis", "cluster"], indirect=True
)
everywhere_forking = pytest.mark.parametrize(
    "connect", ["process", "redis", "cluster"], indirect=True
)
past_one_machine = pytest.mark.parametrize(
    "connect", ["redis", "cluster"], indirect=True
)


def skip(reason: str) -> NoReturn:
    """Skips the test; fails it where DSMQ_TEST_EVERYTHING says that nothing may be."""
    if "DSMQ_TEST_EVERYTHING" in os.environ:
        pytest.fail(f"{reason}, and DSMQ_TEST_EVERYTHING is set")
    pytest.skip(reason)


# -------------------------------------------------------------------------- fixtures


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Makes so many seconds pass at once for all that ask time.monotonic."""
    real, passed = time.monotonic, 0.0

    def skip_ahead(seconds: float) -> None:
        nonlocal passed
        passed += seconds

    monkeypatch.setattr(time, "monotonic", lambda: real() + passed)
    return skip_ahead


@pytest.fixture
def store(clock: Clock) -> Iterator[dsmq.MessageStore]:
    with contextlib.closing(dsmq.MessageStore(600.0, 1 << 30, clock)) as one:
        yield one


class Server:
    """A server in a thread of this process, on a free port."""

    def __init__(self, store: dsmq.MessageStore, port: int = 0, **options: Any) -> None:
        self.store = store
        self.inner = dsmq._Server("127.0.0.1", port, store, **options)
        self.port: int = self.inner.server_address[1]
        self.thread = threading.Thread(target=self.inner.run)
        self.thread.start()

    def stop(self) -> None:
        if self.thread.is_alive():
            self.inner.stop()
        self.thread.join(PATIENCE_SECONDS)
        assert not self.thread.is_alive(), "the server did not stop"
        self.inner.server_close()


StartServer = Callable[..., Server]


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """Makes servers; fails the test on any fault inside one, whoever saw it or not."""
    servers: list[Server] = []
    faults: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: faults.append(  # type: ignore[method-assign]
        f"{record.getMessage()}: {record.exc_info}"
    )
    dsmq._log.addHandler(handler)

    def start(
        port: int = 0,
        time_to_live: float = 600.0,
        max_bytes: int = 1 << 30,
        **options: Any,
    ) -> Server:
        store = dsmq.MessageStore(time_to_live, max_bytes, lambda: time.monotonic())
        servers.append(Server(store, port, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
    dsmq._log.removeHandler(handler)
    assert not faults


@pytest.fixture
def server(start_server: StartServer) -> Server:
    return start_server()


class Connect:
    """Makes clients, of the engine's own server if no port or URL is given, and closes
    them."""

    def __init__(self, engine: str, request: pytest.FixtureRequest) -> None:
        self.engine = engine
        self.clients = contextlib.ExitStack()
        self._fixture = request.getfixturevalue

    @functools.cached_property
    def address(self) -> tuple[Any, ...]:
        """The engine's own server, for dsmq.connect in whichever process."""
        if self.engine == "redis":
            return (self._fixture("redis").url,)
        if self.engine == "cluster":
            return (self._fixture("cluster")[0].url,)
        if self.engine == "process":
            return HOST, self._fixture("serve_process")().port
        return HOST, self._fixture("server").port

    def __call__(self, place: int | str | None = None, **options: Any) -> Client:
        if place is None:
            address = self.address
        else:
            address = (place,) if isinstance(place, str) else (HOST, place)
        return self.clients.enter_context(dsmq.connect(*address, **options))


@pytest.fixture
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    one = Connect(getattr(request, "param", "dsmq"), request)
    with one.clients:
        yield one


class Raw:
    """A client that speaks bytes."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), PATIENCE_SECONDS)

    def send_body(self, body: bytes) -> None:
        self.sock.sendall(struct.pack(">I", len(body)) + body)

    def receive(self) -> dict[str, Any] | None:
        """The next reply; None at the end."""
        header = self._exactly(4)
        if not header:
            return None
        body = self._exactly(struct.unpack(">I", header)[0])
        reply = json.loads(body.decode("utf-8"))
        assert isinstance(reply, dict)
        return reply

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            chunk = self.sock.recv(size - len(data))
            if not chunk:
                assert not data, f"cut inside a frame, after {data[:100]!r}"
                break
            data += chunk
        return bytes(data)

    def ask(self, **fields: Any) -> dict[str, Any]:
        self.send_body(json.dumps(fields).encode())
        reply = self.receive()
        assert reply is not None, "closed instead of a reply"
        return reply


@pytest.fixture
def raw() -> Iterator[Callable[[int], Raw]]:
    raws: list[Raw] = []

    def factory(port: int) -> Raw:
        raws.append(Raw(port))
        return raws[-1]

    yield factory
    for one in raws:
        one.sock.close()


class Proxy:
    """Passes bytes on to a server, until told to cut, to stall or to be late."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.flowing = threading.Event()  # cleared, nothing gets through
        self.flowing.set()
        self.cuts = 0
        self.connections = 0
        # Bytes that each direction, up and down, may yet pass before the cut.
        self.budgets: Callable[[], list[float]] = lambda: [math.inf, math.inf]
        self.pairs: list[tuple[socket.socket, socket.socket]] = []
        self.latest_budget: list[float] = [math.inf, math.inf]
        self.closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near = self.listener.accept()[0]
            except OSError:
                return  # closed at the end of the test
            try:
                far = socket.create_connection(("127.0.0.1", self.target), 5)
            except OSError:
                near.close()
                continue
            self.connections += 1
            self.pairs.append((near, far))
            self.latest_budget = budget = self.budgets()
            for way, pair in enumerate(((near, far), (far, near))):
                for sock in pair:
                    sock.settimeout(None)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                arguments = (*pair, budget, way)
                threading.Thread(target=self._pump, args=arguments, daemon=True).start()

    def _pump(
        self, source: socket.socket, sink: socket.socket, budget: list[float], way: int
    ) -> None:
        try:
            while data := source.recv(65536):
                self.flowing.wait()
                if len(data) >= budget[way]:
                    sink.sendall(data[: int(budget[way])])
                    self.cuts += 1
                    break
                budget[way] -= len(data)
                sink.sendall(data)
        except OSError:
            pass  # the other direction was cut
        budget.append(math.nan)  # this direction has ended
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            if len(budget) == 4:  # and the other one too
                sock.close()

    def cut_latest_after(self, way: int, count: int) -> None:
        """Cuts the newest connection after so many more bytes up (0) or down (1)."""
        self.latest_budget[way] = count

    def close(self) -> None:
        self.flowing.set()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for pair in self.pairs:
            for sock in pair:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    one = Proxy(server.port)
    yield one
    one.close()


class Process:
    """`python dsmq.py serve` in a process of its own."""

    def __init__(self, *arguments: str, **options: Any) -> None:
        command = [sys.executable, str(HERE / "dsmq.py"), "serve", *arguments]
        self.popen = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, **options
        )
        self.log: list[str] = []
        self.port = 0
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.log.append(line)
            if found := re.search(r"listening on .*:(\d+)", line):
                self.port = int(found[1])
                break
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.log.append(line)
        self.popen.stderr.close()

    def stop(self, how: int = signal.SIGKILL) -> int:
        with contextlib.suppress(ProcessLookupError):
            self.popen.send_signal(how)
        status = self.popen.wait(PATIENCE_SECONDS)
        self.reader.join(PATIENCE_SECONDS)
        return status


@pytest.fixture
def serve_process() -> Iterator[Callable[..., Process]]:
    processes: list[Process] = []

    def start(*arguments: str, **options: Any) -> Process:
        port = () if "--port" in arguments else ("--port", "0")
        processes.append(Process(*port, *arguments, **options))
        return processes[-1]

    yield start
    for process in processes:
        if hasattr(signal, "SIGCONT") and process.popen.poll() is None:
            process.popen.send_signal(signal.SIGCONT)
        process.stop()
        assert "Traceback" not in "".join(process.log)


class Redis:
    """A redis-server of its own on this machine."""

    # The shell waits for its standard input to end, as it does when this process ends
    # in whichever way: no server outlives the tests.
    GUARD = 'redis-server "$@" & echo $!; read -r _; kill -9 $!; wait $! 2> log'

    def __init__(self, folder: pathlib.Path, *options: str) -> None:
        self.port = quiet_port()
        self.url = f"redis://{HOST}:{self.port}"
        self.pid = 0
        self._folder = folder
        self._options = ["--port", str(self.port), "--bind", HOST, "--save", ""]
        self._options += ["--appendonly", "no", "--logfile", "log", *options]
        self._shell: subprocess.Popen[str] | None = None

    def start(self) -> None:
        log = self._folder / "log"
        log.write_text("")
        self._shell = subprocess.Popen(
            ["sh", "-c", self.GUARD, "sh", *self._options],
            cwd=self._folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C ends it in its turn
        )
        assert self._shell.stdout is not None
        self.pid = int(self._shell.stdout.readline())
        eventually(lambda: "Ready to accept connections" in log.read_text())

    def kill(self) -> None:
        if self._shell:
            self._shell.communicate("\n", timeout=PATIENCE_SECONDS)
        self._shell = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def flush(self) -> None:
        with socket.create_connection((HOST, self.port), PATIENCE_SECONDS) as sock:
            sock.sendall(b"FLUSHALL\r\n")
            assert sock.recv(100) == b"+OK\r\n"

    def cli(self, *words: str, lines: str = "") -> str:
        done = subprocess.run(
            ["redis-cli", "--raw", "-p", str(self.port), *words],
            input=lines,
            capture_output=True,
            text=True,
            check=True,
            timeout=PATIENCE_SECONDS,
        )
        return done.stdout.strip()


def quiet_port() -> int:
    """A free port, as is the one 10,000 above it, which a cluster uses besides. Neither
    is of those that the system gives to connections, so both stay free for a while."""
    while True:
        port = random.randrange(12_000, 22_000)
        with contextlib.suppress(OSError):
            for one in (port, port + 10_000):
                socket.create_server((HOST, one)).close()
            return port


StartRedis = Callable[..., Redis]


@contextlib.contextmanager
def redis_servers(folder: pathlib.Path) -> Iterator[StartRedis]:
    """Starts Redis servers, and kills them at the end."""
    need_redis()
    with contextlib.ExitStack() as stack:

        def start(*options: str) -> Redis:
            own = folder / f"redis{len(list(folder.iterdir()))}"
            own.mkdir()
            one = Redis(own, *options)
            stack.callback(one.kill)
            one.start()
            return one

        yield start


def lacks_redis() -> str:
    """What there is not that Redis needs; "" if it can be tested."""
    if not importlib.util.find_spec("redis"):
        return "the package redis is not installed"
    if not shutil.which("redis-server") or not shutil.which("redis-cli"):
        return "no redis-server here"
    return ""


def need_redis() -> None:
    if reason := lacks_redis():
        skip(reason)


# With a short timeout nodes also tell each other of new ones sooner.
CLUSTERED = ["--cluster-enabled", "yes", "--cluster-node-timeout", "500"]
CLUSTERED += ["--repl-diskless-sync-delay", "0"]


def start_cluster(start_redis: StartRedis) -> list[Redis]:
    """Three nodes with a third of the slots each."""
    nodes = [start_redis(*CLUSTERED) for _ in range(3)]
    for number, node in enumerate(nodes):
        slots = range(number * 16384 // 3, (number + 1) * 16384 // 3)
        node.cli("cluster", "addslots", *map(str, slots))
        node.cli("cluster", "set-config-epoch", str(number + 1))
    join_cluster(nodes[:1], nodes[1:])
    for node in nodes:
        wait_for(node, "cluster_state:ok", "cluster", "info")
    set_node_timeout(nodes, 60_000)
    return nodes


def start_cluster_with_replica(start_redis: StartRedis) -> list[Redis]:
    """The last node is a replica of the first."""
    nodes = start_cluster(start_redis)
    seed, replica = nodes[0], start_redis(*CLUSTERED)
    seed_id = seed.cli("cluster", "myid")
    join_cluster(nodes, [replica])
    replica.cli("cluster", "replicate", seed_id)
    for node in nodes:  # or they would not vote for it
        wait_for(node, f"slave {seed_id}", "cluster", "nodes")
    wait_for(seed, "state=online", "info", "replication")
    return [*nodes, replica]


def set_node_timeout(nodes: list[Redis], milliseconds: int) -> None:
    """With a long one there is no failover, however long a test or the machine stops a
    node."""
    for node in nodes:
        node.cli("config", "set", "cluster-node-timeout", str(milliseconds))


def join_cluster(cluster: list[Redis], nodes: list[Redis]) -> None:
    """Returns when all know each other."""
    everyone = cluster + nodes
    for one, other in itertools.product(nodes, everyone):
        if one is not other:
            one.cli("cluster", "meet", HOST, str(other.port))
    for node in everyone:
        wait_for(node, f"known_nodes:{len(everyone)}", "cluster", "info")


def wait_for(redis: Redis, text: str, *words: str) -> None:
    """Waits until the reply to a command has the text."""
    eventually(lambda: text in redis.cli(*words))


@pytest.fixture
def start_redis(tmp_path: pathlib.Path) -> Iterator[StartRedis]:
    with redis_servers(tmp_path) as start:
        yield start


@pytest.fixture(scope="session")
def lasting_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    with redis_servers(tmp_path_factory.mktemp("redis")) as start:
        yield start()


NewClusters = list[Future[list[Redis]]]


@pytest.fixture(scope="session")
def new_clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewClusters]:
    """Two in the making, which takes two seconds: one to last, and one with a replica
    of the node that it is to lose."""
    with contextlib.ExitStack() as stack:
        starts = [
            stack.enter_context(redis_servers(tmp_path_factory.mktemp("cluster")))
            for _ in range(2)
        ]
        pool = stack.enter_context(ThreadPoolExecutor(2))
        makers = start_cluster, start_cluster_with_replica
        making = [pool.submit(make, start) for make, start in zip(makers, starts)]
        pool.shutdown(wait=False)  # its threads end then: later tests fork
        yield making


@pytest.fixture(scope="session", autouse=True)
def begin_early(request: pytest.FixtureRequest) -> None:
    """Begins what is long in coming, and not for work, before the first of many tests:
    it has come when its own tests do."""
    if len(request.session.items) > 300:
        request.getfixturevalue("demos")
        if not lacks_redis():
            request.getfixturevalue("new_clusters")


@pytest.fixture
def redis(lasting_redis: Redis) -> Redis:
    """One for all tests, emptied. Those that harm it start one of their own."""
    lasting_redis.flush()
    return lasting_redis


@pytest.fixture
def cluster(new_clusters: NewClusters) -> list[Redis]:
    nodes = new_clusters[0].result()
    for node in nodes:
        node.flush()
    return nodes


def count_threads() -> int:
    """All that run Python, also those the module threading did not start."""
    return len(sys._current_frames())


def eventually(true: Callable[[], bool]) -> None:
    """Waits until it is true."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails if the block takes much longer: it hung, or came later than it promised."""
    begin = time.monotonic()
    yield
    took = time.monotonic() - begin
    assert took < seconds, f"took {took:.2f} s"


# ---------------------------------------------------------------------------- frames


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        'quo"te',
        "back\\slash",
        "nul\0",
        "tab\t\x1f\x7f",
        "é",
        "漢字",
        "😀\u2028",
    ],
)
def test_text_is_encoded_as_json_whether_short_or_long(text: str) -> None:
    for times in (1, dsmq.LONG_TEXT_BYTES + 1):
        long = text * times
        assert json.loads(dsmq.encode_text(long).decode("utf-8")) == long
        reference = json.dumps(long, ensure_ascii=False).encode()
        assert dsmq.encode_text(long) == reference


@pytest.mark.parametrize("times", [1, dsmq.LONG_TEXT_BYTES + 1])
def test_a_lone_surrogate_cannot_be_encoded(times: int) -> None:
    with pytest.raises(UnicodeEncodeError):
        dsmq.encode_text("\ud800" * times)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b"[]",
        b'"text"',
        b"12",
        b"null",
        b'{"a":"\xff"}',
        b'\xef\xbb\xbf{"a":1}',
        '{"a":1}'.encode("utf-16"),
        b'{"a":"\n"}',
        b"{" * 3,
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
    ids=lambda body: str(body[:20]),
)
def test_a_body_that_is_no_json_object_is_a_frame_error(body: bytes) -> None:
    with pytest.raises(dsmq.FrameError) as caught:
        dsmq.decode_object(body)
    assert len(str(caught.value)) < 200


def test_an_integer_of_any_length_is_decoded_at_once_and_out_of_range() -> None:
    with within(3):
        value = dsmq.decode_object(b'{"a":' + b"9" * 1_000_000 + b"}")["a"]
    assert value > dsmq.MAX_INTEGER


def frame_pair(limit: int = 1 << 20) -> tuple[socket.socket, dsmq.FrameSocket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname(), PATIENCE_SECONDS)
        far = listener.accept()[0]
    return near, dsmq.FrameSocket(far, limit)


def send_pieces(sock: socket.socket, pieces: list[bytes]) -> None:
    for piece in pieces:
        sock.sendall(piece)


def test_frames_are_found_again_however_the_bytes_arrive() -> None:
    near, frames = frame_pair()
    bodies = [b"", b"x", b"y" * 5000, b"z" * 300_000, b"end"]
    stream = b"".join(map(dsmq.encode_frame, bodies))
    with near, contextlib.closing(frames), ThreadPoolExecutor(1) as pool:
        for size in (1, 3, 4096, len(stream)):
            step = size if size > 3 else 1000
            pieces = [stream[i : i + size] for i in range(0, 60 * size, size)]
            pieces += [
                stream[i : i + step] for i in range(60 * size, len(stream), step)
            ]
            sending = pool.submit(send_pieces, near, pieces)
            assert [bytes(frames.receive() or b"") for _ in bodies] == bodies
            sending.result(PATIENCE_SECONDS)


def test_the_end_between_frames_is_told_from_a_cut_inside_one() -> None:
    whole = dsmq.encode_frame(b"whole")
    for sent, ending in ((b"", None), (b"\0\0", "cut"), (whole[:6], "cut")):
        near, frames = frame_pair()
        with contextlib.closing(frames):
            near.sendall(whole + sent)
            near.close()
            assert frames.receive() == b"whole"
            if ending is None:
                assert frames.receive() is None
            else:
                with pytest.raises(ConnectionResetError):
                    frames.receive()


def test_a_frame_over_the_limit_is_refused_before_its_body_comes() -> None:
    near, frames = frame_pair(limit=1000)
    with near, contextlib.closing(frames):
        near.sendall(struct.pack(">I", 1001))
        with pytest.raises(dsmq.FrameError, match="1001 bytes, but the limit is 1000"):
            frames.receive()


def test_a_length_announced_and_never_sent_costs_no_memory() -> None:
    near, frames = frame_pair(limit=1 << 30)
    with near, contextlib.closing(frames):
        near.sendall(struct.pack(">I", 1 << 30) + b"x" * 1000)
        tracemalloc.start()
        with pytest.raises(TimeoutError):
            frames.receive(time.monotonic() + 0.1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 10 * dsmq.RECEIVE_BYTES


def test_a_receive_ends_at_its_end_even_if_bytes_trickle_in() -> None:
    near, frames = frame_pair()
    with near, contextlib.closing(frames), ThreadPoolExecutor(1) as pool:
        stopped = threading.Event()

        def trickle() -> None:
            near.sendall(struct.pack(">I", 1000))
            while not stopped.wait(0.02):
                near.sendall(b"x")

        sending = pool.submit(trickle)
        with within(5), pytest.raises(TimeoutError):
            frames.receive(time.monotonic() + 0.2)
        stopped.set()
        sending.result(PATIENCE_SECONDS)


# --------------------------------------------------------------------- message store

ROOM = 1 << 30


def texts(batch: dsmq.Batch) -> list[bytes]:
    assert len(batch.ids) == len(batch.bodies)
    return batch.bodies


def test_ids_grow_by_one_over_all_topics(store: dsmq.MessageStore) -> None:
    head = store.head
    assert store.put("a", [b"1"])[0] == head + 1
    assert store.put("b", [b"2", b"3"])[0] == head + 3
    assert store.put("a", [b"4"])[0] == head + 4
    assert store.get("a", head, 9, ROOM).ids == [head + 1, head + 4]
    assert store.get("b", head, 9, ROOM).ids == [head + 2, head + 3]


def test_ids_are_not_used_again_after_the_store_was_emptied(
    store: dsmq.MessageStore, clock: Clock
) -> None:
    first = store.put("a", [b"1"])[0]
    clock.now += 601
    assert store.purge()
    assert store.stats()["messages"] == 0
    assert store.put("a", [b"2"])[0] == first + 1
    assert texts(store.get("a", first, 9, ROOM)) == [b"2"]


def test_ids_of_a_later_store_are_higher(store: dsmq.MessageStore) -> None:
    store.put("a", [b"x"] * 100)
    time.sleep(0.001)
    with contextlib.closing(dsmq.MessageStore(600, ROOM)) as later:
        assert later.head > store.head


def test_ids_fit_the_integers_of_other_languages(store: dsmq.MessageStore) -> None:
    assert store.head < 2**53


def test_an_expired_message_is_left_out_before_the_purge_comes(
    store: dsmq.MessageStore, clock: Clock
) -> None:
    head = store.head
    for i in range(10):
        store.put("a", [b"%d" % i])
        clock.now += 10
    clock.now += 600 - 100 + 45  # 0 to 4 are older than 600 s
    assert texts(store.get("a", head, 99, ROOM)) == [b"5", b"6", b"7", b"8", b"9"]
    assert store.get("a", head, 99, ROOM).expires_seconds == pytest.approx(5)
    assert texts(store.get_latest("a", head)) == [b"9"]
    clock.now += 60
    assert texts(store.get("a", head, 99, ROOM)) == []
    assert texts(store.get_latest("a", head)) == []


def test_a_message_lives_exactly_as_long_as_it_should(
    store: dsmq.MessageStore, clock: Clock
) -> None:
    head = store.head
    store.put("a", [b"x"])
    clock.now += 599.999
    assert texts(store.get("a", head, 1, ROOM)) == [b"x"]
    assert not store.purge()
    clock.now += 0.001
    assert texts(store.get("a", head, 1, ROOM)) == []
    assert store.purge()


def test_the_purge_frees_topics_nobody_touches_in_steps(
    store: dsmq.MessageStore, clock: Clock
) -> None:
    for i in range(3000):
        store.put(f"topic {i % 7}", [b"x" * 10])
    store.put("large", [b"x" * dsmq.STEP_BYTES] * 3)
    clock.now += 1
    store.put("alive", [b"y"])
    clock.now += 599.5
    steps = 0
    while store.purge():
        steps += 1
    assert steps > 3000 // dsmq.STEP_MESSAGES + 2
    stats = store.stats()
    assert stats["messages"] == 1
    assert list(stats["topics"]) == ["alive"]
    assert stats["bytes"] == stats["topics"]["alive"]["bytes"] < 1000
    clock.now += 1
    assert store.purge()
    assert store.stats()["bytes"] == 0
    assert not store._topics and not store._topics_by_key


def test_the_account_of_bytes_is_the_sum_over_the_topics(
    store: dsmq.MessageStore, clock: Clock
) -> None:
    rng = random.Random(1)
    for _ in range(500):
        store.put(
            f"t{rng.randrange(5)}", [b"x" * rng.randrange(50)] * rng.randrange(1, 4)
        )
        clock.now += rng.random() * 10
        store.purge()
        stats = store.stats()
        topics = stats["topics"].values()
        assert stats["bytes"] == sum(t["bytes"] for t in topics)
        assert stats["messages"] == sum(t["messages"] for t in topics)


def test_a_get_fits_its_limit_and_its_room_but_gives_at_least_one(
    store: dsmq.MessageStore,
) -> None:
    head = store.head
    store.put("a", [b"x" * 100] * 5000)
    each = 100 + dsmq.ID_BYTES
    assert len(store.get("a", head, 3, ROOM).ids) == 3
    assert len(store.get("a", head, 9999, ROOM).ids) == 5000
    assert len(store.get("a", head, 9999, 10 * each).ids) == 10
    assert len(store.get("a", head, 9999, 2000 * each + 1).ids) == 2000
    assert len(store.get("a", head, 9999, 0).ids) == 1
    assert len(store.get("a", head + 4990, 9999, ROOM).ids) == 10
    assert store.get("a", head + 5000, 9999, ROOM).ids == []
    assert store.get("a", 2**63 - 1, 9999, ROOM).ids == []
    assert store.get("a", -(2**63), 1, ROOM).ids == [head + 1]


@pytest.fixture
def small(clock: Clock) -> Iterator[dsmq.MessageStore]:
    """A store with little room."""
    with contextlib.closing(dsmq.MessageStore(600.0, 10_000, clock)) as one:
        yield one


def test_a_put_beyond_max_bytes_stores_nothing_and_later_ones_fit_again(
    small: dsmq.MessageStore, clock: Clock
) -> None:
    head = small.put("a", [b"x" * 5000])[0]
    for _ in range(3):
        with pytest.raises(QueueFull, match="max_bytes 10000"):
            small.put("a", [b"y", b"z" * 5000])
    assert small.head == head
    assert texts(small.get("a", head - 1, 9, ROOM)) == [b"x" * 5000]
    small.put("a", [b"small"])
    clock.now += 601
    small.purge()
    small.put("a", [b"y", b"z" * 5000])
    assert texts(small.get("a", head, 9, ROOM)) == [b"y", b"z" * 5000]


@pytest.mark.parametrize("topics", [1, 1000])
def test_a_flood_of_empty_messages_is_bounded_too(
    small: dsmq.MessageStore, topics: int
) -> None:
    with pytest.raises(QueueFull):
        for i in range(1000):
            small.put(str(i % topics), [b""])
    assert small.stats()["messages"] < 140
    assert len(small._topics) < 30


def origin(client: str, sequence: int, settled: int = -1) -> dsmq.Origin:
    return dsmq.Origin(client, sequence, settled)


def test_a_repeated_put_is_stored_once_and_answered_the_same(
    store: dsmq.MessageStore,
) -> None:
    head = store.head
    first = store.put("a", [b"1"], origin("c", 7))
    assert store.put("a", [b"2"], origin("c", 8))[0] == first[0] + 1
    assert store.put("a", [b"1"], origin("c", 7))[0] == first[0]
    assert store.put("a", [b"3"], origin("d", 7))[0] == first[0] + 2
    assert store.put("a", [b"4"], origin("c", 3))[0] == first[0] + 3  # lower, but new
    assert texts(store.get("a", head, 9, ROOM)) == [b"1", b"2", b"3", b"4"]


def test_a_put_that_comes_after_its_client_settled_it_is_refused(
    store: dsmq.MessageStore,
) -> None:
    head = store.head
    store.put("a", [b"1"], origin("c", 1))
    store.put("a", [b"3"], origin("c", 3, 2))
    with pytest.raises(DSMQError, match="sequence 2 was settled"):
        store.put("a", [b"2"], origin("c", 2, 1))
    assert store.put("a", [b"1"], origin("c", 1))[0] == head + 1
    store.put("a", [b"4"], origin("d", 2))
    assert texts(store.get("a", head, 9, ROOM)) == [b"1", b"3", b"4"]


def test_puts_are_remembered_in_bounded_memory_while_messages_live(
    store: dsmq.MessageStore, clock: Clock
) -> None:
    for i in range(10 * dsmq.REMEMBERED_PUTS):
        store.put("a", [b"x"], origin("busy", i))
    assert len(store._recent["busy"].heads) == dsmq.REMEMBERED_PUTS
    head = store.put("a", [b"x"], origin("quiet", 1))[0]
    clock.now += 599
    store.forget_puts()
    assert store.put("a", [b"x"], origin("quiet", 1))[0] == head
    clock.now += 2
    store.forget_puts()
    assert not store._recent
    for i in range(dsmq.REMEMBERED_CLIENTS + 10):
        store.put("a", [b"x"], origin(str(i), 1))
    assert len(store._recent) == dsmq.REMEMBERED_CLIENTS


def waiter(topic: str, after: int) -> dsmq.Waiter:
    return dsmq.Waiter(topic, after, 1, ROOM)


def test_a_put_takes_the_waiters_of_its_topic_that_lack_the_message(
    store: dsmq.MessageStore,
) -> None:
    head = store.head
    here, above, elsewhere = (
        waiter("a", head),
        waiter("a", head + 1),
        waiter("b", head),
    )
    for one in (here, above, elsewhere):
        assert store.get(one.topic, one.after, 1, ROOM, one).ids == []
    assert store.put("a", [b"1"])[2] == [here]
    assert not store.end_wait(here)
    assert store.put("a", [b"2"])[2] == [above]
    assert store.end_wait(elsewhere)
    assert list(store.stats()["topics"]) == ["a"] == list(store._topics)


def test_a_reader_that_finds_something_does_not_wait(store: dsmq.MessageStore) -> None:
    head = store.head
    store.put("a", [b"1"])
    one = waiter("a", head)
    assert texts(store.get("a", head, 1, ROOM, one)) == [b"1"]
    assert not store.end_wait(one)


def test_closing_wakes_the_waiters_and_ends_all_use(store: dsmq.MessageStore) -> None:
    one = waiter("a", store.head)
    store.get("a", store.head, 1, ROOM, one)
    store.close()
    store.close()
    assert one.woken.acquire(timeout=1)
    for call in (
        lambda: store.put("a", [b"x"]),
        lambda: store.get("b", 0, 1, ROOM, waiter("b", 0)),
        lambda: store.get_latest("a", 0),
    ):
        with pytest.raises(ConnectionAbortedError):
            call()


def test_memory_is_given_back_after_a_flood_and_the_rest_stays_readable(
    store: dsmq.MessageStore, clock: Clock
) -> None:
    head = store.put("a", [b"x" * 1_000_000] * 2 * (dsmq.COMPACT_BYTES >> 20))[0]
    clock.now += 300
    store.put("b", [b"1", b"2"])
    clock.now += 301
    database = store._db
    store.compact()
    assert store._db is database  # nothing to gain yet
    while store.purge():
        pass
    store.compact()
    assert store._db is not database
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    assert pages < 20
    assert texts(store.get("b", head, 9, ROOM)) == [b"1", b"2"]
    store.put("b", [b"3"])
    assert texts(store.get("b", head, 9, ROOM)) == [b"1", b"2", b"3"]


# ------------------------------------------------------------------------------ wire


def test_hello_tells_the_protocol_the_head_and_the_frame_limit(
    server: Server, raw: Callable[[int], Raw]
) -> None:
    expected = {
        "protocol": 1,
        "head": server.store.head,
        "max_frame_bytes": dsmq.MAX_FRAME_BYTES,
    }
    assert raw(server.port).ask(action="hello", protocol=1) == expected
    assert raw(server.port).ask(action="hello", extra=[{}]) == expected


def test_the_actions_answer_as_the_protocol_says(
    server: Server, raw: Callable[[int], Raw]
) -> None:
    peer = raw(server.port)
    head = peer.ask(action="hello")["head"]
    assert peer.ask(action="put", topic="t", messages=["a", ""]) == {"head": head + 2}
    reply = peer.ask(action="get", topic="t", after=head)
    assert 599 < reply.pop("expires") <= 600
    assert reply == {"messages": ["a"], "ids": [head + 1]}
    reply = peer.ask(action="get", topic="t", after=head + 1, limit=5)
    assert reply["messages"] == [""] and reply["ids"] == [head + 2]
    reply = peer.ask(action="get", topic="t", after=head + 2)
    assert reply == {"messages": [], "ids": []}
    reply = peer.ask(action="get_latest", topic="t", after=0)
    assert reply["messages"] == [""] and reply["ids"] == [head + 2]
    reply = peer.ask(action="get_latest", topic="t", after=head + 2)
    assert reply == {"messages": [], "ids": []}
    stats = peer.ask(action="stats")
    assert stats["messages"] == 2 and stats["clients"] == 1
    assert peer.ask(action="shutdown") == {}
    assert peer.receive() is None


def test_after_may_lie_below_at_or_above_the_head(
    server: Server, raw: Callable[[int], Raw]
) -> None:
    peer = raw(server.port)
    head = peer.ask(action="put", topic="t", messages=["x"])["head"]
    for after, expected in (
        (-(2**63), ["x"]),
        (-1, ["x"]),
        (0, ["x"]),
        (head - 1, ["x"]),
        (head, []),
        (head + 1000, []),
        (2**63 - 1, []),
    ):
        for action in ("get", "get_latest"):
            reply = peer.ask(action=action, topic="t", after=after)
            assert reply["messages"] == expected


BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({}, "None"),
    ({"action": None}, "None"),
    ({"action": 5}, "5"),
    ({"action": ["get"]}, "a list of 1"),
    ({"action": "Get"}, "Get"),
    ({"action": "handle"}, "handle"),
    ({"action": "\ud800"}, "ud800"),
    ({"action": "hello", "protocol": 2}, "protocol is 1, not 2"),
    ({"action": "hello", "protocol": "1"}, "protocol"),
    ({"action": "hello", "protocol": True}, "protocol"),
    ({"action": "put"}, "topic"),
    ({"action": "put", "topic": "", "messages": ["x"]}, "topic"),
    ({"action": "put", "topic": "x" * 1001, "messages": ["x"]}, "1000"),
    ({"action": "put", "topic": 1, "messages": ["x"]}, "topic"),
    ({"action": "put", "topic": "\udfff", "messages": ["x"]}, "UTF-8"),
    ({"action": "put", "topic": "t"}, "messages"),
    ({"action": "put", "topic": "t", "messages": []}, "messages"),
    ({"action": "put", "topic": "t", "messages": "x"}, "messages"),
    ({"action": "put", "topic": "t", "messages": ["x", None]}, "None"),
    ({"action": "put", "topic": "t", "messages": ["x", ["y"]]}, "a list of 1"),
    ({"action": "put", "topic": "t", "messages": ["ok", "a\ud800b"]}, "surrogate"),
    ({"action": "put", "topic": "t", "messages": ["x"], "client": "c"}, "sequence"),
    ({"action": "put", "topic": "t", "messages": [""] * 100_001}, "100000"),
    ({"action": "put", "topic": "t", "messages": ["x"], "client": "\ud800"}, "UTF-8"),
    (
        {
            "action": "put",
            "topic": "t",
            "messages": ["x"],
            "client": "c",
            "sequence": 1.5,
        },
        "sequence",
    ),
    (
        {
            "action": "put",
            "topic": "t",
            "messages": ["x"],
            "client": 1,
            "sequence": 1,
        },
        "client",
    ),
    (
        {
            "action": "put",
            "topic": "t",
            "messages": ["x"],
            "client": "",
            "sequence": 1,
        },
        "client",
    ),
    ({"action": "get", "topic": "t"}, "after"),
    ({"action": "get", "topic": "t", "after": None}, "after"),
    ({"action": "get", "topic": "t", "after": True}, "True"),
    ({"action": "get", "topic": "t", "after": 1.0}, "1.0"),
    ({"action": "get", "topic": "t", "after": "1"}, "after"),
    ({"action": "get", "topic": "t", "after": 2**63}, "64-bit"),
    ({"action": "get", "topic": "t", "after": -(2**63) - 1}, "64-bit"),
    ({"action": "get", "topic": "t", "after": int("9" * 4000)}, "64-bit"),
    ({"action": "get", "topic": "t", "after": 0, "limit": 0}, "limit"),
    ({"action": "get", "topic": "t", "after": 0, "limit": -1}, "limit"),
    ({"action": "get", "topic": "t", "after": 0, "limit": True}, "limit"),
    ({"action": "get", "topic": "t", "after": 0, "limit": 1.5}, "limit"),
    ({"action": "get", "topic": "t", "after": 0, "wait": -0.1}, "wait"),
    ({"action": "get", "topic": "t", "after": 0, "wait": "1"}, "wait"),
    ({"action": "get", "topic": "t", "after": 0, "wait": True}, "wait"),
    ({"action": "get", "topic": "t", "after": 0, "wait": None}, "wait"),
    ({"action": "get_latest", "topic": "t"}, "after"),
]


@pytest.mark.parametrize(
    ("request_", "named"), BAD_REQUESTS, ids=lambda value: str(value)[:40]
)
def test_a_wrong_field_is_refused_and_the_connection_goes_on(
    server: Server, raw: Callable[[int], Raw], request_: dict[str, Any], named: str
) -> None:
    peer = raw(server.port)
    reply = peer.ask(**request_)
    assert set(reply) == {"error", "code"}
    assert named in reply["error"] and len(reply["error"]) < 300
    head = peer.ask(action="hello")["head"]
    assert head == server.store.head  # the refusal changed nothing
    assert peer.ask(action="put", topic="t", messages=["x"]) == {"head": head + 1}


def test_an_infinite_wait_is_refused(server: Server, raw: Callable[[int], Raw]) -> None:
    peer = raw(server.port)
    peer.send_body(b'{"action":"get","topic":"t","after":0,"wait":1e999}')
    assert "wait" in (peer.receive() or {})["error"]
    assert peer.ask(action="hello")["protocol"] == 1


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", 1 << 31) + b"x",
        struct.pack(">I", dsmq.MAX_FRAME_BYTES + 1),
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        dsmq.encode_frame(b""),
        dsmq.encode_frame(b"nonsense"),
        dsmq.encode_frame(b"[]"),
        dsmq.encode_frame(b'{"action":"hello","x":NaN}'),
        dsmq.encode_frame(b'{"action":"\xff"}'),
        dsmq.encode_frame(b"[" * 100_000),
        dsmq.encode_frame(b"nonsense") * 1000,
    ],
    ids=lambda data: str(data[:20]),
)
def test_broken_framing_is_answered_and_the_connection_closed(
    server: Server, raw: Callable[[int], Raw], data: bytes
) -> None:
    peer, witness = raw(server.port), raw(server.port)
    witness.ask(action="hello")
    peer.sock.sendall(data)
    reply = peer.receive()
    assert reply and reply["code"] == "bad_frame"
    with contextlib.suppress(ConnectionResetError):
        assert peer.receive() is None
    peer.sock.close()
    assert witness.ask(action="hello")["protocol"] == 1
    eventually(lambda: len(server.inner.connections) == 1)


def test_replies_to_requests_sent_together_come_in_their_order(
    server: Server, raw: Callable[[int], Raw]
) -> None:
    peer = raw(server.port)
    requests: list[dict[str, Any]] = [
        {"action": "put", "topic": "t", "messages": ["a"]},
        {"action": "get", "topic": "t", "after": 0},
        {"action": "nonsense"},
        {"action": "get", "topic": "u", "after": 0, "wait": 0.05},
        {"action": "put", "topic": "t", "messages": ["b"]},
        {"action": "get_latest", "topic": "t", "after": 0},
    ]
    bodies = [json.dumps(r).encode() for r in requests]
    peer.sock.sendall(b"".join(map(dsmq.encode_frame, bodies)))
    replies = [peer.receive() or {} for _ in requests]
    assert [sorted(r) for r in replies] == [
        ["head"],
        ["expires", "ids", "messages"],
        ["code", "error"],
        ["ids", "messages"],
        ["head"],
        ["expires", "ids", "messages"],
    ]
    assert replies[5]["messages"] == ["b"]


def test_a_waiting_get_is_answered_by_the_put_and_by_the_end_of_its_wait(
    server: Server, raw: Callable[[int], Raw]
) -> None:
    reader, writer = raw(server.port), raw(server.port)
    head = writer.ask(action="hello")["head"]
    for i in range(20):
        fields = {"action": "get", "topic": "t", "after": head + i, "wait": 20}
        reader.send_body(json.dumps(fields).encode())
        if i % 2:
            eventually(lambda: bool(server.store._topics["t"].waiters))
        writer.ask(action="put", topic="t", messages=[str(i)])
        assert (reader.receive() or {})["messages"] == [str(i)]
    with within(5):
        reply = reader.ask(action="get", topic="t", after=head + 20, wait=0.05)
    assert reply == {"messages": [], "ids": []}
    assert not server.store._topics["t"].waiters


def test_a_waiting_get_takes_only_what_fits_its_limit(
    server: Server, raw: Callable[[int], Raw]
) -> None:
    reader, writer = raw(server.port), raw(server.port)
    fields = {"action": "get", "topic": "t", "after": 0, "wait": 20, "limit": 2}
    reader.send_body(json.dumps(fields).encode())
    eventually(lambda: "t" in server.store._topics)
    head = writer.ask(action="put", topic="t", messages=["a", "b", "c"])["head"]
    reply = reader.receive() or {}
    assert reply["messages"] == ["a", "b"]
    assert reply["ids"] == [head - 2, head - 1]
    assert 599 < reply["expires"] <= 600


@pytest.fixture(params=["hears", "is woken"])
def waiting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the server's threads wait for messages: as they do where there is
    select.poll, and as over TLS and on Windows."""
    if request.param == "is woken":
        monkeypatch.setattr(dsmq, "select", None)


def begin_waits(server: Server, readers: list[Raw], seconds: float = 20) -> None:
    """A get with `wait` from each."""
    for reader in readers:
        fields = {"action": "get", "topic": "t", "after": 0, "wait": seconds}
        reader.send_body(json.dumps(fields).encode())
    topics = server.store._topics
    eventually(lambda: "t" in topics and len(topics["t"].waiters) == len(readers))


LONG = "x" * 10_000_000  # more than the system takes for a peer that does not read


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize("count", [1, 2])
def test_a_long_message_reaches_waiting_readers_that_are_slow_to_read_it(
    server: Server, raw: Callable[[int], Raw], count: int
) -> None:
    readers = [raw(server.port) for _ in range(count)]
    writer = raw(server.port)
    begin_waits(server, readers)
    with within(10):  # the readers do not read yet
        writer.ask(action="put", topic="t", messages=[LONG])
        writer.ask(action="put", topic="t", messages=["next"])
    with within(10):
        for reader in readers:
            assert (reader.receive() or {})["messages"] == [LONG]
            assert reader.ask(action="hello")["protocol"] == 1


def test_a_reply_may_take_longer_than_a_stall_as_long_as_it_moves(
    server: Server, raw: Callable[[int], Raw], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = raw(server.port), raw(server.port)
    begin_waits(server, [reader], 0.5)
    monkeypatch.setattr(dsmq, "STALL_SECONDS", 0.4)
    reader.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1_000_000)
    writer.ask(action="put", topic="t", messages=[LONG])
    (size,) = struct.unpack(">I", reader._exactly(4))
    for _ in range(8):
        time.sleep(0.07)
        reader._exactly(1_000_000)
    reader._exactly(size - 8_000_000)
    assert reader.ask(action="hello")["protocol"] == 1


@pytest.mark.usefixtures("waiting")
def test_requests_sent_ahead_of_a_reply_are_answered_in_their_turn(
    server: Server, raw: Callable[[int], Raw]
) -> None:
    reader, writer = raw(server.port), raw(server.port)
    hello = dsmq.encode_object({"action": "hello"})
    get = {"action": "get", "topic": "t", "after": 0}
    wait = dsmq.encode_object({**get, "wait": 20})
    reader.sock.sendall(wait + hello)
    eventually(lambda: "t" in server.store._topics)
    reader.sock.sendall(dsmq.encode_object(get))
    head = writer.ask(action="put", topic="t", messages=["x"])["head"]
    with within(5):
        replies = [reader.receive() or {} for _ in range(3)]
    assert [r.get("messages") for r in replies] == [["x"], None, ["x"]]
    assert replies[1]["head"] == head


@pytest.mark.usefixtures("waiting")
def test_a_waiting_reader_that_does_not_read_its_reply_is_dropped(
    start_server: StartServer,
    raw: Callable[[int], Raw],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dsmq, "STALL_SECONDS", 0.3)
    server = start_server()
    writer = raw(server.port)
    writer.ask(action="hello")
    threads = count_threads()
    begin_waits(server, [raw(server.port)])
    writer.ask(action="put", topic="t", messages=[LONG])
    eventually(lambda: len(server.inner.connections) == 1)
    eventually(lambda: count_threads() <= threads)


def fail_to_start(patch: pytest.MonkeyPatch, name: str, error: bool = True) -> None:
    """No thread for the job of that name; without `error` it dies before it begins."""
    start = dsmq._start_thread

    def start_thread(job: Callable[..., object], *arguments: Any) -> None:
        if job.__name__ != name:
            start(job, *arguments)
        elif error:
            raise RuntimeError("can't start new thread")

    patch.setattr(dsmq, "_start_thread", start_thread)


def test_a_waiting_reader_is_reached_though_no_thread_is_to_be_had(
    server: Server, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    putter, getter = connect(), connect()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(getter.get_wait, "t", PATIENCE_SECONDS)
        eventually(lambda: "t" in server.store._topics)
        fail_to_start(monkeypatch, "_finish")
        with within(4):
            putter.put("t", LONG)
            assert waiting.result(PATIENCE_SECONDS) == LONG


def test_a_thread_that_dies_before_it_begins_costs_one_connection(
    server: Server, raw: Callable[[int], Raw], monkeypatch: pytest.MonkeyPatch
) -> None:
    readers, writer = [raw(server.port) for _ in range(2)], raw(server.port)
    begin_waits(server, readers, 0.3)
    with monkeypatch.context() as patch:
        patch.setattr(dsmq, "STALL_SECONDS", 0.2)
        fail_to_start(patch, "_finish", error=False)
        writer.ask(action="put", topic="t", messages=[LONG])
        for reader in readers:
            assert reader.receive() is None
    readers = [raw(server.port) for _ in range(2)]
    for reader in readers:
        reader.send_body(b'{"action":"get","topic":"u","after":0,"wait":20}')
    writer.ask(action="put", topic="u", messages=["x"])
    for reader in readers:
        assert (reader.receive() or {})["messages"] == ["x"]


@pytest.mark.parametrize("late", [False, True])
def test_a_wait_without_memory_ends_the_connection_and_gets_no_second_reply(
    server: Server,
    raw: Callable[[int], Raw],
    monkeypatch: pytest.MonkeyPatch,
    late: bool,
) -> None:
    reader, writer = raw(server.port), raw(server.port)
    writer.ask(action="hello")

    def hear(connection: dsmq._Connection, seconds: float) -> bool:
        if late:
            writer.ask(action="put", topic="t", messages=["x"])
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(dsmq._Connection, "hear", hear)
        reader.send_body(b'{"action":"get","topic":"t","after":0,"wait":20}')
        replies = list(iter(reader.receive, None))
    assert [r["messages"] for r in replies] in ([], [["x"]] if late else [])
    assert not server.store._topics or not server.store._topics["t"].waiters
    assert writer.ask(action="put", topic="t", messages=["y"])["head"]


def test_a_put_without_memory_to_pass_it_on_is_acknowledged_once(
    server: Server, raw: Callable[[int], Raw], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = raw(server.port), raw(server.port)
    begin_waits(server, [reader])

    def deliver(server: dsmq._Server, *batch: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(dsmq._Server, "deliver", deliver)
    head = writer.ask(action="put", topic="t", messages=["x"])["head"]
    assert writer.receive() is None
    again = raw(server.port).ask(action="get", topic="t", after=head - 1)
    assert again["messages"] == ["x"]


def test_a_pair_of_client_and_sequence_is_stored_once(
    server: Server, raw: Callable[[int], Raw]
) -> None:
    peer = raw(server.port)
    put = {"action": "put", "topic": "t", "messages": ["x"], "client": "c"}
    first = peer.ask(**put, sequence=1)
    assert (
        peer.ask(**put, sequence=1) == raw(server.port).ask(**put, sequence=1) == first
    )
    assert peer.ask(**put, sequence=2)["head"] == first["head"] + 1
    reply = peer.ask(action="get", topic="t", after=0, limit=9)
    assert reply["messages"] == ["x", "x"]


def test_a_settled_put_is_stale(server: Server, raw: Callable[[int], Raw]) -> None:
    old, new = raw(server.port), raw(server.port)
    put = {"action": "put", "topic": "t", "messages": ["x"], "client": "c"}
    first = old.ask(**put, sequence=1)
    assert new.ask(**put, sequence=3, settled=2)["head"] == first["head"] + 1
    assert old.ask(**put, sequence=2)["code"] == "stale"
    assert old.ask(**put, sequence=1) == first
    assert old.ask(**put, sequence=4)["head"] == first["head"] + 2


@pytest.mark.usefixtures("waiting")
def test_a_client_that_vanishes_while_it_waits_is_dropped(
    server: Server, raw: Callable[[int], Raw], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dsmq, "VANISHED_CHECK_SECONDS", 0.05)
    peer = raw(server.port)
    begin_waits(server, [peer])
    peer.sock.close()
    eventually(lambda: not server.inner.connections and not server.store._topics)


def test_a_client_that_stalls_inside_a_frame_is_dropped(
    start_server: StartServer,
    raw: Callable[[int], Raw],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dsmq, "STALL_SECONDS", 0.3)
    server = start_server()
    idle, stalling, half = (raw(server.port) for _ in range(3))
    for peer in (idle, stalling, half):
        peer.ask(action="hello")
    stalling.sock.sendall(struct.pack(">I", 1000) + b"{")
    half.sock.sendall(b"\0")
    eventually(lambda: len(server.inner.connections) == 1)
    assert idle.ask(action="hello")["protocol"] == 1  # idle is fine for ever


def test_a_client_that_does_not_read_is_dropped_and_holds_up_nobody(
    start_server: StartServer,
    raw: Callable[[int], Raw],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = start_server()
    writer = raw(server.port)
    writer.ask(action="put", topic="t", messages=["x" * 1_000_000])
    request = dsmq.encode_frame(b'{"action":"get","topic":"t","after":0}')
    greedy = raw(server.port)
    greedy.sock.sendall(request * 50)
    eventually(lambda: len(server.inner.connections) == 2)
    with within(10):
        for _ in range(20):
            writer.ask(action="put", topic="t", messages=["y"])
    assert len(server.inner.connections) == 2
    greedy.sock.close()
    monkeypatch.setattr(dsmq, "STALL_SECONDS", 0.3)
    raw(server.port).sock.sendall(request * 50)
    eventually(lambda: len(server.inner.connections) == 2)
    eventually(lambda: len(server.inner.connections) == 1)


def test_thousands_of_partial_frames_leave_nothing_behind(
    server: Server, raw: Callable[[int], Raw]
) -> None:
    rng = random.Random(2)
    whole = dsmq.encode_frame(b'{"action":"get","topic":"t","after":0}')
    for _ in range(1000):
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(whole[: rng.randrange(1, len(whole))])
    eventually(lambda: not server.inner.connections)
    assert raw(server.port).ask(action="hello")["protocol"] == 1


def fuzzed_request(rng: random.Random) -> bytes:
    """A frame that is right, or wrong in some way."""
    values: list[Any] = [
        None, True, 0, 1, -1, 2**63, 1.5, 1e308, "", "t", "\ud800", "x" * 1001,
        [], ["m"], ["m", 1], {}, {"a": []}, "hello", math.nan,
    ]  # fmt: skip
    fields = [
        "topic",
        "after",
        "limit",
        "wait",
        "messages",
        "client",
        "sequence",
        "nonce",
    ]
    request = {
        name: rng.choice(values) for name in rng.sample(fields, rng.randrange(8))
    }
    if rng.random() < 0.5:
        request |= {"topic": "t", "after": 0, "messages": ["m"]}
    request["wait"] = rng.choice([0, 0.001, "x"])
    actions = [a for a in dsmq._Handler.ACTIONS if a != "shutdown"]
    request["action"] = rng.choice([*actions, *actions, "nonsense", None, 3])
    body = bytearray(json.dumps(request).encode())
    if rng.random() < 0.3:
        for _ in range(rng.randrange(1, 4)):
            body[rng.randrange(len(body))] = rng.randrange(256)
    frame = bytearray(dsmq.encode_frame(bytes(body)))
    if rng.random() < 0.05:
        frame[rng.randrange(4)] = rng.randrange(256)
    if rng.random() < 0.05:
        del frame[rng.randrange(len(frame)) :]
    return bytes(frame)


def test_no_bytes_a_peer_sends_cause_a_fault(
    server: Server, raw: Callable[[int], Raw]
) -> None:
    # A long run by hand: DSMQ_FUZZ_SECONDS=600 pytest -k cause_a_fault
    seconds = float(os.environ.get("DSMQ_FUZZ_SECONDS", "0"))
    seed = int(time.time()) if seconds else 3
    rng, end = random.Random(seed), time.monotonic() + seconds
    rounds = 0
    while rounds < 200 or time.monotonic() < end:
        rounds += 1
        with socket.create_connection(("127.0.0.1", server.port), 5) as sock:
            frames = b"".join(fuzzed_request(rng) for _ in range(rng.randrange(1, 30)))
            with contextlib.suppress(ConnectionError):
                sock.sendall(frames)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):
                    pass
    assert raw(server.port).ask(action="hello")["protocol"] == 1, seed
    eventually(lambda: len(server.inner.connections) == 1)


# ---------------------------------------------------------------------------- client


@everywhere
def test_a_getter_receives_what_a_putter_put(connect: Connect) -> None:
    putter, getter = connect(), connect()
    assert getter.get("t") == ""
    putter.put("t", "hello")
    assert getter.get("t") == "hello"
    assert getter.get("t") == ""


@everywhere
def test_every_client_reads_every_message_in_order_at_its_own_pace(
    connect: Connect,
) -> None:
    putter, fast, slow = connect(), connect(), connect()
    got: list[str] = []
    for i in range(1200):
        putter.put("t", str(i))
        if i % 3 == 0:
            got.append(fast.get("t"))
    while message := fast.get("t"):
        got.append(message)
    expected = [str(i) for i in range(1200)]
    assert got == expected
    assert [slow.get("t") for _ in range(1200)] == expected
    assert [putter.get("t") for _ in range(1200)] == expected
    assert slow.get("t") == putter.get("t") == ""


@everywhere
def test_late_client_does_not_see_earlier_messages(connect: Connect) -> None:
    early = connect()
    early.put("t", "before")
    late = connect()
    assert late.get("t") == late.get_latest("t") == "" and late.get_many("t") == []
    early.put("t", "after")
    assert late.get("t") == "after"


# By hand: DSMQ_ROUNDS=10000 pytest -k right_after_a_connect
ROUNDS = {"dsmq": 200, "redis": 120, "cluster": 40}


@everywhere
def test_a_put_right_after_a_connect_is_always_seen(connect: Connect) -> None:
    putter = connect()
    for i in range(int(os.environ.get("DSMQ_ROUNDS", ROUNDS[connect.engine]))):
        # On new topics, as Redis would make the ids of each from its clock alone, whose
        # milliseconds the puts before and after may share.
        putter.put(f"old {i}", "before")
        with dsmq.connect(*connect.address) as getter:
            putter.put(f"new {i}", "after")
            putter.put(f"old {i}", "after")
            assert getter.get(f"new {i}") == getter.get(f"old {i}") == "after"


@everywhere
@pytest.mark.parametrize(
    "text",
    [
        "x",
        "nul\0",
        'q"\\',
        "\x1f\x7f",
        "é漢😀",
        "\u2028",
        "line\nline\r",
        "$5\r\nhello\r\n",
        " ",
        "x" * 3_000_000,
    ],
    ids=lambda text: repr(text[:10]),
)
def test_any_text_comes_through_as_it_was(connect: Connect, text: str) -> None:
    mq = connect()
    mq.put(text[:1000], text)
    assert mq.get(text[:1000]) == text


@everywhere
def test_the_empty_string_is_a_message(connect: Connect) -> None:
    mq = connect()
    mq.put("t", "")
    mq.put("t", "x")
    assert mq.get("t") == "" and mq.get("t") == "x"
    mq.put_many("t", ["", "", "y"])
    assert mq.get_many("t") == ["", "", "y"]
    mq.put("t", "")
    assert mq.get_wait("t", timeout=20) == ""
    mq.put("t", "")
    assert list(mq.listen("t", timeout=0.01)) == [""]


@everywhere
def test_topics_do_not_mix(connect: Connect) -> None:
    mq = connect()
    topics = ["a", "A", "a ", "é", "e\u0301", "x" * 1000, "0", "\0", "*", "head"]
    topics += ["{", "}", "{}", "}a{b}"]  # braces mean something in a key of Redis
    for topic in topics:
        mq.put(topic, f"in {topic}")
    for topic in topics:
        assert mq.get_many(topic) == [f"in {topic}"]
    assert set(mq.stats()["topics"]) == set(topics)


@everywhere
def test_get_latest_skips_the_older_ones_for_ever(connect: Connect) -> None:
    putter, getter = connect(), connect()
    assert getter.get_latest("t") == ""
    putter.put_many("t", ["1", "2", "3"])
    assert getter.get_latest("t") == "3"
    assert getter.get_latest("t") == getter.get("t") == ""
    putter.put_many("t", ["4", "5", "6"])
    assert getter.get("t") == "4"  # and reads 5 and 6 ahead
    putter.put("t", "7")
    assert getter.get_latest("t") == "7"
    assert getter.get("t") == ""
    putter.put_many("t", ["8", "9"])
    assert getter.get("t") == "8"
    assert getter.get_latest("t") == "9"  # though it was read ahead
    assert getter.get_latest("t") == ""


@everywhere
def test_get_many_gives_what_is_there_up_to_its_limit(connect: Connect) -> None:
    putter, getter = connect(), connect()
    assert getter.get_many("t") == []
    putter.put_many("t", map(str, range(2500)))
    assert getter.get("t") == "0"
    assert getter.get_many("t", 3) == ["1", "2", "3"]
    assert getter.get_many("t") == [str(i) for i in range(4, 104)]
    assert getter.get_many("t", 10_000) == [str(i) for i in range(104, 2500)]
    assert getter.get_many("t", 1) == []


@everywhere
def test_put_many_is_in_order_and_nobody_comes_between(connect: Connect) -> None:
    clients = [connect() for _ in range(4)]
    getter = connect()

    def put(number: int) -> None:
        for i in range(50):
            clients[number].put_many("t", [f"{number} {i} {j}" for j in range(10)])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put, range(4)))
    got = getter.get_many("t", 10_000)
    assert len(got) == 2000
    for i in range(0, 2000, 10):
        stem = got[i].rsplit(" ", 1)[0]
        assert got[i : i + 10] == [f"{stem} {j}" for j in range(10)]


@everywhere
def test_put_many_is_all_or_none(connect: Connect) -> None:
    mq = connect()
    for bad in ("\ud800", "x" * (dsmq.MAX_FRAME_BYTES + 1)):
        with pytest.raises(ValueError):
            mq.put_many("t", ["good", bad])
    with pytest.raises(TypeError):
        mq.put_many("t", ["good", 1])  # type: ignore[list-item]
    mq.put_many("t", [])
    assert mq.get("t") == ""


def test_put_many_of_more_than_a_frame_goes_in_several(
    start_server: StartServer, connect: Connect
) -> None:
    mq = connect(start_server(max_frame_bytes=10_000).port)
    messages = [f"{i} " + "x" * (i % 3000) for i in range(200)]
    mq.put_many("t", messages)
    assert mq.get_many("t", 1000) == messages


@everywhere
def test_get_wait_wakes_when_the_message_is_put(connect: Connect) -> None:
    putter, getter = connect(), connect()
    with ThreadPoolExecutor(1) as pool:
        for i in range(40):
            waiting = pool.submit(getter.get_wait, "t", 20)
            if i % 2:
                time.sleep(0.005)  # so that it waits on the server
            putter.put("t", str(i))
            assert waiting.result(PATIENCE_SECONDS) == str(i)


@everywhere
def test_get_wait_wakes_within_milliseconds(connect: Connect) -> None:
    putter, getter = connect(), connect()
    delays = []
    with ThreadPoolExecutor(1) as pool:
        for _ in range(11):
            waiting = pool.submit(
                lambda: (getter.get_wait("t", 20), time.monotonic())[1]
            )
            time.sleep(0.02)
            begin = time.monotonic()
            putter.put("t", "x")
            delays.append(waiting.result(PATIENCE_SECONDS) - begin)
    assert sorted(delays)[5] < 0.05, delays  # polling would show


@everywhere
def test_get_wait_without_a_timeout_is_tuned_as_in_the_original(
    connect: Connect,
) -> None:
    mq = connect()
    assert mq._initial_retry * (2**mq._n_tries - 1) == pytest.approx(10.23)
    mq._n_tries, mq._initial_retry = 3, 0.02
    begin = time.monotonic()
    assert mq.get_wait("t") == ""
    assert 0.13 < time.monotonic() - begin < 5
    mq._n_tries = 10
    with within(5):
        assert mq.get_wait("t", timeout=0) == ""


@everywhere
def test_a_wait_longer_than_one_request_ends_when_it_should(connect: Connect) -> None:
    putter, getter = connect(), connect()
    getter._timeout = 0.4  # each request waits for half of it
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(getter.get_wait, "t", math.inf)
        begin = time.monotonic()
        assert getter.get_wait("u", 0.6) == ""
        assert 0.6 <= time.monotonic() - begin < 5
        putter.put("t", "at last")
        assert waiting.result(PATIENCE_SECONDS) == "at last"


@everywhere
def test_listen_gives_each_message_and_ends_after_silence(connect: Connect) -> None:
    putter, getter = connect(), connect()
    with ThreadPoolExecutor(1) as pool:
        heard = itertools.islice(getter.listen("t", timeout=PATIENCE_SECONDS), 50)
        listening = pool.submit(list, heard)
        for i in range(50):
            putter.put("t", str(i))
        assert listening.result(PATIENCE_SECONDS) == [str(i) for i in range(50)]
    putter.put_many("t", ["x", "y"])
    assert list(getter.listen("t", timeout=0.1)) == ["x", "y"]
    messages = getter.listen("t")
    putter.put("t", "a")
    assert next(messages) == "a"


def test_an_expired_message_is_not_handed_out_though_it_was_read_ahead(
    pass_time: Callable[[float], None], connect: Connect
) -> None:
    mq = connect()
    mq.put_many("t", ["1", "2", "3"])
    assert mq.get("t") == "1"  # and reads the others ahead
    pass_time(300)
    mq.put("t", "4")
    pass_time(301)
    assert mq.get("t") == "4"
    assert mq.get("t") == ""


def test_get_many_gives_what_lives_though_what_it_read_ahead_expired(
    pass_time: Callable[[float], None], connect: Connect
) -> None:
    mq = connect()
    mq.put("t", "old")
    pass_time(300)
    mq.put_many("t", ["1", "2", "3"])
    assert mq.get("t") == "old"  # and reads the others ahead
    pass_time(301)
    assert mq.get_many("t", 2) == ["1", "2"]


def test_a_time_to_live_shorter_than_the_way_hangs_no_call(
    start_server: StartServer, connect: Connect
) -> None:
    mq = connect(start_server(time_to_live=0.001).port)
    stopped = threading.Event()

    def put() -> None:
        with dsmq.connect("127.0.0.1", mq._port) as putter:
            while not stopped.is_set():
                putter.put("t", "x")

    with ThreadPoolExecutor(1) as pool:
        putting = pool.submit(put)
        with within(8):
            for _ in range(200):
                mq.get("t")
                mq.get_many("t")
            mq.get_wait("t", 0.1)
        stopped.set()
        putting.result(PATIENCE_SECONDS)


def test_expired_messages_free_their_memory_on_topics_nobody_touches(
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    pass_time: Callable[[float], None],
) -> None:
    monkeypatch.setattr(dsmq, "PURGE_SECONDS", 0.05)
    mq = connect()
    for i in range(100):
        mq.put_many(f"t{i}", ["x" * 100] * 20)
    assert mq.stats()["messages"] == 2000
    pass_time(600)
    eventually(lambda: mq.stats()["bytes"] == 0)
    assert mq.stats()["topics"] == {}


@everywhere
@needs_signals
def test_a_step_of_the_wall_clock_changes_nothing(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    putter, getter = connect(), connect()
    for step in (0, 86400, -86400):
        real = time.time
        monkeypatch.setattr(time, "time", lambda r=real, s=step: r() + s)
        monkeypatch.setattr(time, "time_ns", lambda: int(time.time() * 1e9))
        putter.put("t", str(step))
        assert getter.get("t") == str(step)
        begin = time.monotonic()
        assert getter.get_wait("t", 0.05) == ""
        assert 0.05 <= time.monotonic() - begin < 5
    assert putter.get_many("t") == ["0", "86400", "-86400"]


@everywhere
def test_stats_tell_what_the_server_holds(connect: Connect) -> None:
    one, _ = connect(), connect()
    one.put_many("a", ["x", "yy"])
    one.put("é\n", "zzz")
    stats = one.stats()
    names = "version uptime clients messages bytes time_to_live max_bytes topics"
    assert sorted(stats) == sorted(names.split())
    assert stats["messages"] == 3 and stats["time_to_live"] == 600
    assert stats["uptime"] >= 0
    if connect.engine == "dsmq":
        assert stats["version"] == dsmq.__version__ and stats["uptime"] < 60
        assert stats["clients"] == 2 and stats["max_bytes"] == 1 << 30
    else:  # those of Redis, which has other clients too
        assert stats["version"] and stats["clients"] >= 2 and stats["max_bytes"] == 0
    topics = stats["topics"]
    assert {t: n["messages"] for t, n in topics.items()} == {"a": 2, "é\n": 1}
    assert sum(n["bytes"] for n in topics.values()) == stats["bytes"] > 0


def test_stats_of_more_topics_than_a_frame_holds_say_so(
    start_server: StartServer, connect: Connect
) -> None:
    mq = connect(start_server(max_frame_bytes=5000).port)
    for i in range(300):
        mq.put(f"topic {i}", "x")
    stats = mq.stats()
    assert stats["topics"] == {} and stats["topics_left_out"] == 300
    assert stats["messages"] == 300


WRONG_CALLS: list[tuple[Callable[[Client], object], type[Exception], str]] = [
    (lambda mq: mq.put(1, "x"), TypeError, "topic must be a str"),  # type: ignore[arg-type]
    (lambda mq: mq.put(b"t", "x"), TypeError, "topic must be a str"),  # type: ignore[arg-type]
    (lambda mq: mq.put("t", b"x"), TypeError, "message must be a str"),  # type: ignore[arg-type]
    (lambda mq: mq.put("t", None), TypeError, "message must be a str"),  # type: ignore[arg-type]
    (lambda mq: mq.put("", "x"), ValueError, "1 to 1000 characters"),
    (lambda mq: mq.put("x" * 1001, "x"), ValueError, "has 1001"),
    (lambda mq: mq.put("t", "a\udfff"), ValueError, "surrogate"),
    (lambda mq: mq.put("a\udfff", "x"), ValueError, "surrogate"),
    (lambda mq: mq.put("t", "x" * ((1 << 24) + 1)), ValueError, "16777.*bytes.*fit"),
    (lambda mq: mq.put_many("t", "text"), TypeError, "not one str"),
    (lambda mq: mq.put_many("t", 5), TypeError, "iterable"),  # type: ignore[arg-type]
    (lambda mq: mq.get(None), TypeError, "topic must be a str"),  # type: ignore[arg-type]
    (lambda mq: mq.get([]), TypeError, "topic must be a str"),  # type: ignore[arg-type]
    (lambda mq: mq.get(""), ValueError, "1 to 1000 characters"),
    (lambda mq: mq.get("\ud800"), ValueError, "surrogate"),
    (lambda mq: mq.get_wait("t", "1"), TypeError, "timeout must be a number"),  # type: ignore[arg-type]
    (lambda mq: mq.get_wait("t", -1), ValueError, "timeout must be 0 to inf"),
    (lambda mq: mq.get_wait("t", math.nan), ValueError, "timeout must be"),
    (lambda mq: mq.get_wait("", 0), ValueError, "1 to 1000 characters"),
    (lambda mq: mq.get_latest(1), TypeError, "topic must be a str"),  # type: ignore[arg-type]
    (lambda mq: mq.get_many("t", 0), ValueError, "limit must be 1"),
    (lambda mq: mq.get_many("t", True), TypeError, "limit must be an int"),
    (lambda mq: mq.get_many("t", 1.0), TypeError, "limit must be an int"),  # type: ignore[arg-type]
    (lambda mq: mq.listen("t", -1), ValueError, "timeout must be"),
    (lambda mq: mq.listen(""), ValueError, "1 to 1000 characters"),
]


@everywhere
@pytest.mark.parametrize(("call", "error", "text"), WRONG_CALLS)
def test_a_wrong_call_raises_in_the_caller_and_changes_nothing(
    connect: Connect,
    call: Callable[[Client], object],
    error: type[Exception],
    text: str,
) -> None:
    mq = connect()
    with pytest.raises(error, match=text) as caught:
        call(mq)
    assert len(str(caught.value)) < 200
    mq.put("t", "x")
    assert mq.get("t") == "x"


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ((1,), {}, TypeError),
        (("127.0.0.1", "30008"), {}, TypeError),
        (("127.0.0.1", True), {}, TypeError),
        (("127.0.0.1", -1), {}, ValueError),
        (("127.0.0.1", 65536), {}, ValueError),
        ((), {"timeout": 0}, ValueError),
        ((), {"timeout": math.nan}, ValueError),
        ((), {"timeout": "1"}, TypeError),
        ((), {"secret": b"x"}, TypeError),
        ((), {"secret": ""}, ValueError),
        ((), {"secret": "\udc80"}, ValueError),
        ((), {"tls": ""}, ValueError),
        (("a" * 70,), {}, ValueError),
        (("nowhere.invalid",), {}, OSError),
        ((), {"tls": 1}, TypeError),
    ],
)
def test_wrong_arguments_of_connect_raise_at_once(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception]
) -> None:
    with within(5), pytest.raises(error):
        dsmq.connect(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"host": None}, TypeError),
        ({"port": "1"}, TypeError),
        ({"port": 65536}, ValueError),
        ({"time_to_live": 0}, ValueError),
        ({"time_to_live": math.nan}, ValueError),
        ({"time_to_live": math.inf}, ValueError),
        ({"time_to_live": "1"}, TypeError),
        ({"max_bytes": 1.5}, TypeError),
        ({"max_bytes": 0}, ValueError),
        ({"max_frame_bytes": 999}, ValueError),
        ({"max_frame_bytes": 1 << 32}, ValueError),
        ({"max_clients": 0}, ValueError),
        ({"secret": ""}, ValueError),
        ({"secret": 5}, TypeError),
        ({"certfile": "/nowhere.pem"}, FileNotFoundError),
        ({"keyfile": "/nowhere.pem"}, ValueError),
        ({"host": "256.256.256.256"}, OSError),
    ],
)
def test_wrong_arguments_of_serve_raise_at_once(
    options: dict[str, Any], error: type[Exception]
) -> None:
    with within(5), pytest.raises(error):
        dsmq.serve(**{"port": 0, **options})


def test_the_longest_message_that_fits_comes_through(
    start_server: StartServer, connect: Connect
) -> None:
    mq = connect(start_server(max_frame_bytes=1000).port)
    fits = 0
    for size in range(600, 1000):
        try:
            mq.put("t", "x" * size)
        except ValueError as error:
            assert f"takes {size + 2} bytes" in str(error)
            break
        fits = size
    assert fits > 700
    with pytest.raises(ValueError, match="takes 1002 bytes"):
        mq.put("t", '"' * 500)  # each takes two
    assert [len(m) for m in mq.get_many("t", 1000)] == list(range(600, fits + 1))


@everywhere
def test_a_closed_client_raises_and_may_be_closed_again(connect: Connect) -> None:
    mq = connect()
    mq.close()
    mq.close()
    calls: list[Callable[[], object]] = [
        lambda: mq.put("t", "x"),
        lambda: mq.put_many("t", ["x"]),
        lambda: mq.get("t"),
        lambda: mq.get_wait("t", 20),
        lambda: mq.get_latest("t"),
        lambda: mq.get_many("t"),
        lambda: next(mq.listen("t")),
        mq.stats,
        mq.shutdown_server,
    ]
    for call in calls:
        with within(5), pytest.raises(ConnectionError, match="closed"):
            call()


@everywhere
def test_a_client_is_a_context_manager(connect: Connect) -> None:
    with connect() as mq:
        mq.put("t", "x")
    with pytest.raises(ConnectionError):
        mq.get("t")


# Not of a cluster, whose sockets may be collected before what would close them.
@pytest.mark.parametrize("connect", ["dsmq", "redis"], indirect=True)
@pytest.mark.filterwarnings("error")
def test_a_forgotten_client_leaves_nothing_behind(connect: Connect) -> None:
    witness = connect()
    dsmq.connect(*connect.address).close()  # all of the server's are there now
    eventually(lambda: count_clients(witness) == 1)
    threads = count_threads()
    for _ in range(20):
        mq = dsmq.connect(*connect.address)
        mq.put("t", "x")
        del mq
    gc.collect()
    eventually(lambda: count_clients(witness) == 1)
    eventually(lambda: count_threads() <= threads)


def count_clients(witness: Client) -> int:
    return int(witness.stats()["clients"])


# ------------------------------------------------------------- threads and processes


@everywhere
def test_each_message_goes_to_exactly_one_of_a_clients_threads(
    connect: Connect,
) -> None:
    putter, getter = connect(), connect()
    readers: list[Callable[[], list[str]]] = [
        lambda: [getter.get("t")],
        lambda: [getter.get_wait("t", 0.05)],
        lambda: getter.get_many("t", 7),
    ]
    done = threading.Event()
    total = 250

    def read(number: int) -> list[str]:
        got: list[str] = []
        while True:
            last = done.is_set()
            new = [m for m in readers[number % 3]() if m]
            got += new
            if last and not new:
                return got

    with ThreadPoolExecutor(6) as pool:
        reading = [pool.submit(read, number) for number in range(6)]
        for i in range(total):
            putter.put("t", str(i))
        done.set()
        parts = [r.result(PATIENCE_SECONDS) for r in reading]
    assert sorted(int(m) for part in parts for m in part) == list(range(total))
    for part in parts:  # each thread's own are in order
        assert part == sorted(part, key=int)


@everywhere
def test_a_thread_in_get_wait_holds_up_no_other_call(connect: Connect) -> None:
    mq = connect()
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(mq.get_wait, "t", 20) for _ in range(2)]
        time.sleep(0.05)
        with within(4):
            assert mq.get("u") == mq.get("t") == ""
            mq.put("u", "x")
            assert mq.get("u") == "x"
            assert mq.stats()["messages"] == 1
        mq.put_many("t", ["1", "2"])
        assert sorted(w.result(PATIENCE_SECONDS) for w in waiting) == ["1", "2"]


@everywhere
def test_close_ends_the_calls_of_other_threads(connect: Connect) -> None:
    mq = connect()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(mq.get_wait, "t", math.inf)
        time.sleep(0.05)
        with within(4):
            mq.close()
            with pytest.raises(ConnectionError, match="closed"):
                waiting.result(PATIENCE_SECONDS)


def test_close_ends_calls_that_are_still_being_connected(
    proxy: Proxy, connect: Connect
) -> None:
    mq = connect(proxy.port, timeout=math.inf)
    proxy.flowing.clear()
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(mq.get_wait, "t", math.inf) for _ in range(3)]
        eventually(lambda: proxy.connections == 3)
        time.sleep(0.05)
        with within(5):
            mq.close()
            for one in waiting:
                with pytest.raises(ConnectionError, match="closed"):
                    one.result(PATIENCE_SECONDS)


@needs_signals
def test_a_signal_handler_may_use_the_client(connect: Connect) -> None:
    mq, busy = connect(), False
    stored = itertools.count()

    def put(number: int, frame: Any) -> None:
        nonlocal busy
        if not busy:
            busy = True
            mq.put("t", str(next(stored)))
            busy = False

    old = signal.signal(signal.SIGALRM, put)
    got: list[str] = []
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0007)
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            got += mq.get_many("t")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    got += mq.get_many("t")
    assert got == [str(i) for i in range(next(stored))] and len(got) > 50


def write(address: tuple[Any, ...], writer: int, count: int) -> None:
    with dsmq.connect(*address) as mq:
        for i in range(count):
            mq.put("crowd", f"{writer} {i}")


def read_crowd(
    address: tuple[Any, ...], total: int, ready: Any, results: Any
) -> None:  # queues of whichever start method
    with dsmq.connect(*address) as mq:
        ready.put("ready")
        got = list(itertools.islice(mq.listen("crowd", PATIENCE_SECONDS), total))
        got += mq.get_many("crowd")  # there is no more
        results.put(got)


# By hand: DSMQ_CROWD=16,1000,4 pytest -k exactly_what_all_writers
CROWD = tuple(map(int, os.environ.get("DSMQ_CROWD", "4,250,2").split(",")))


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_readers_receive_exactly_what_all_writers_put_in_each_ones_order(
    method: str,
) -> None:
    context: Any = multiprocessing.get_context(method)
    address = HOST, dsmq._free_port()
    server = context.Process(target=dsmq.serve, args=address)
    server.start()
    try:
        check_crowd(context, address)
        with dsmq.connect(*address) as mq:
            mq.shutdown_server()
        server.join(PATIENCE_SECONDS)
        assert server.exitcode == 0
    finally:
        server.kill()
        server.join()


@needs_fork
@past_one_machine
def test_readers_receive_exactly_what_all_writers_put_past_one_machine(
    connect: Connect,
) -> None:
    check_crowd(multiprocessing.get_context("fork"), connect.address)


def check_crowd(context: Any, address: tuple[Any, ...]) -> None:
    writers, each, readers = CROWD
    ready, results = context.Queue(), context.Queue()
    total = writers * each
    crowd = [
        context.Process(target=read_crowd, args=(address, total, ready, results))
        for _ in range(readers)
    ]
    crowd += [
        context.Process(target=write, args=(address, number, each))
        for number in range(writers)
    ]
    try:
        for process in crowd[:readers]:
            process.start()
        for _ in range(readers):
            ready.get(timeout=PATIENCE_SECONDS)
        for process in crowd[readers:]:
            process.start()
        for _ in range(readers):
            got = results.get(timeout=5 * PATIENCE_SECONDS)
            assert len(got) == total
            for number in range(writers):
                own = [m for m in got if m.startswith(f"{number} ")]
                assert own == [f"{number} {i}" for i in range(each)]
    finally:
        for process in crowd:
            if process.pid:
                process.kill()
                process.join()


def use_inherited(mq: Client, results: Any) -> None:
    got = [mq.get("t"), mq.get("t")]
    mq.put("t", "from the child")
    got.append(mq.get("t"))
    mq.close()
    results.put(got)


@needs_fork
@everywhere_forking
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_both_sides_of_a_fork_go_on_where_the_client_stood(
    connect: Connect,
) -> None:
    context = multiprocessing.get_context("fork")
    mq, results = connect(), context.Queue()
    mq.put_many("t", ["1", "2", "3"])
    assert mq.get("t") == "1"  # 2 and 3 are read ahead
    child = context.Process(target=use_inherited, args=(mq, results))
    child.start()
    assert results.get(timeout=PATIENCE_SECONDS) == ["2", "3", "from the child"]
    child.join(PATIENCE_SECONDS)
    assert mq.get_many("t") == ["2", "3", "from the child"]
    mq.put("t", "on the old connection")
    assert mq.get("t") == "on the old connection"


@needs_fork
@everywhere_forking
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_while_another_thread_holds_the_lock_does_not_hang(
    connect: Connect,
) -> None:
    context = multiprocessing.get_context("fork")
    mq, results = connect(), context.Queue()
    mq.put_many("t", ["1", "2"])
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with mq._lock, dsmq._fork_lock:
            held.set()
            free.wait(PATIENCE_SECONDS)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(PATIENCE_SECONDS)
    child = context.Process(target=use_inherited, args=(mq, results))
    child.start()
    free.set()
    assert results.get(timeout=PATIENCE_SECONDS) == ["1", "2", "from the child"]
    child.join(PATIENCE_SECONDS)
    holder.join(PATIENCE_SECONDS)


@needs_fork
@everywhere
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_client_forgotten_in_a_forked_child_leaves_the_parents_alone(
    connect: Connect,
) -> None:
    mq = connect()
    mq.put("t", "x")
    pid = os.fork()
    if pid == 0:
        try:
            mq.close()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    lane = mq._idle[0]._connection
    assert mq.get("t") == "x"
    assert mq._idle[0]._connection is lane  # the same connection


@everywhere
def test_a_client_passed_to_a_spawned_process_goes_on_there(connect: Connect) -> None:
    context = multiprocessing.get_context("spawn")
    mq, results = connect(), context.Queue()
    mq._n_tries = 4
    mq.put_many("t", ["1", "2", "3"])
    assert mq.get("t") == "1"
    child = context.Process(target=use_inherited, args=(mq, results))
    child.start()
    assert results.get(timeout=PATIENCE_SECONDS) == ["2", "3", "from the child"]
    child.join(PATIENCE_SECONDS)
    assert mq.get_many("t") == ["2", "3", "from the child"]
    assert pickle.loads(pickle.dumps(mq))._n_tries == 4


@everywhere
def test_a_client_pickled_closed_stays_closed(connect: Connect) -> None:
    mq = connect()
    mq.close()
    with pytest.raises(ConnectionError, match="closed"):
        pickle.loads(pickle.dumps(mq)).get("t")


# ---------------------------------------------------------------------------- faults

CALLS: dict[str, tuple[Callable[[Client], object], object]] = {
    "put": (lambda mq: mq.put("t", "é3"), None),
    "put_many": (lambda mq: mq.put_many("t", ["3", "4"]), None),
    "get": (lambda mq: mq.get("t"), "1"),
    "get_wait": (lambda mq: mq.get_wait("t", 5), "1"),
    "get_latest": (lambda mq: mq.get_latest("t"), "2"),
    "get_many": (lambda mq: mq.get_many("t"), ["1", "2"]),
    "stats": (lambda mq: mq.stats()["messages"], 2),
}
LEFT = {"get": ["2"], "get_wait": ["2"], "get_latest": [], "get_many": []}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries at once, to make many."""
    monkeypatch.setattr(dsmq, "RETRY_PAUSE_SECONDS", 0.0001)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("way", [0, 1], ids=["request", "reply"])
@pytest.mark.parametrize("name", CALLS)
def test_a_connection_cut_at_any_byte_loses_and_repeats_nothing(
    server: Server, proxy: Proxy, connect: Connect, name: str, way: int
) -> None:
    call, expected = CALLS[name]
    witness = connect()
    for count in itertools.count(1):
        server.store._topics.clear()  # an empty topic for each round
        server.store._topics_by_key.clear()
        server.store._purged = server.store._head
        mq = connect(proxy.port)
        witness.put_many("t", ["1", "2"])
        proxy.cut_latest_after(way, count)
        cuts = proxy.cuts
        assert call(mq) == expected
        if proxy.cuts == cuts:
            break  # the whole of it is shorter than that
        left = LEFT.get(name, ["1", "2"])
        stored = {"put": ["é3"], "put_many": ["3", "4"]}.get(name, [])
        assert mq.get_many("t") == left + stored
        assert witness.get_many("t") == ["1", "2", *stored]
        mq.close()
    assert count > 20
    witness.close()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("secret", [None, "s"])
@pytest.mark.parametrize("way", [0, 1], ids=["request", "reply"])
def test_a_greeting_cut_at_any_byte_is_made_again(
    start_server: StartServer, way: int, secret: str | None
) -> None:
    server = start_server(secret=secret)
    proxy = Proxy(server.port)
    for count in itertools.count(1, 7):
        budgets = iter([[math.inf, math.inf]])
        first = [math.inf, math.inf]
        first[way] = count
        proxy.budgets = lambda b=budgets, f=first: next(b, f)  # type: ignore[misc]
        # The second connection is whole: the iterator gives the first one cut.
        order = iter([first, [math.inf, math.inf]])
        proxy.budgets = lambda o=order: next(o)  # type: ignore[misc]
        cuts = proxy.cuts
        with dsmq.connect("127.0.0.1", proxy.port, secret=secret) as mq:
            mq.put("t", "x")
            assert mq.get("t") == "x"
        if proxy.cuts == cuts:
            break
    proxy.close()
    assert count > 40


# By hand: DSMQ_CUTS=100000 pytest -k cut_again_and_again
CUT_MESSAGES = int(os.environ.get("DSMQ_CUTS", "1000"))


@pytest.mark.usefixtures("impatient")
def test_messages_through_connections_cut_again_and_again_all_arrive_once(
    proxy: Proxy, connect: Connect
) -> None:
    rng = random.Random(4)
    proxy.budgets = lambda: [rng.randrange(300, 3000), rng.randrange(300, 3000)]
    patience = PATIENCE_SECONDS + CUT_MESSAGES / 100
    putter = connect(proxy.port, timeout=15)
    getters = [connect(proxy.port, timeout=15) for _ in range(3)]
    reads: list[Callable[[Client], list[str]]] = [
        lambda mq: [mq.get("t")],
        lambda mq: [mq.get_wait("t", 5)],
        lambda mq: mq.get_many("t", 7),
    ]

    def read(number: int) -> list[str]:
        got: list[str] = []
        end = time.monotonic() + patience
        while len(got) < CUT_MESSAGES and time.monotonic() < end:
            got += [m for m in reads[number](getters[number]) if m]
        return got

    with ThreadPoolExecutor(3) as pool:
        reading = [pool.submit(read, number) for number in range(3)]
        for i in range(0, CUT_MESSAGES, 5):
            putter.put("t", str(i))
            putter.put_many("t", [str(i + j) for j in range(1, 5)])
        expected = [str(i) for i in range(CUT_MESSAGES)]
        for one in reading:
            assert one.result(2 * patience) == expected
    assert [m for g in getters for m in g.get_many("t")] == []
    assert proxy.cuts > CUT_MESSAGES // 50
    print(f"{CUT_MESSAGES} messages, {proxy.cuts} cuts")


def test_clients_carry_on_after_a_restart_of_the_server(
    start_server: StartServer, connect: Connect
) -> None:
    server = start_server()
    putter, getter, waiter = (connect(server.port) for _ in range(3))
    putter.put_many("t", ["old 1", "old 2"])
    assert getter.get("t") == "old 1"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(waiter.get_wait, "u", math.inf)
        time.sleep(0.05)
        server.stop()
        again = start_server(server.port)
        with dsmq.connect("127.0.0.1", again.port) as other:
            other.put("t", "put before they noticed")
        putter.put("t", "new")
        putter.put("u", "woken")
        assert waiting.result(PATIENCE_SECONDS) == "woken"
    assert getter.get_many("t") == ["old 2", "put before they noticed", "new"]
    assert putter.get_many("t") == ["put before they noticed", "new"]


def test_clients_carry_on_with_a_server_whose_clock_is_behind(
    start_server: StartServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server()
    mq = connect(server.port)
    mq.put_many("t", ["1", "2"])
    assert mq.get("t") == "1"
    server.stop()
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() - 86400 * 10**9)
    again = start_server(server.port)
    with dsmq.connect("127.0.0.1", again.port) as other:
        other.put("t", "3")
    mq.put("t", "4")
    assert mq.get_many("t") == ["3", "4"]
    assert mq.get("t") == ""


def reader_through_restarts(port: int, results: Any) -> None:
    with dsmq.connect("127.0.0.1", port, timeout=30) as mq:
        mq.put("ready", "x")
        got: list[str] = []
        while not got or got[-1] != "end":
            got += mq.get_many("t", 1000) or [mq.get_wait("t", 1)]
        results.put([m for m in got if m])


# By hand: DSMQ_RESTARTS=20 pytest -k killed_and_restarted
RESTARTS = int(os.environ.get("DSMQ_RESTARTS", "3"))


@pytest.mark.skipif(os.name == "nt", reason="kills with SIGKILL")
def test_a_server_killed_and_restarted_under_load_hangs_and_confuses_nobody(
    serve_process: Callable[..., Process], connect: Connect
) -> None:
    context: Any = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = serve_process()
    port = process.port
    mq = connect(port, timeout=30)
    readers = [
        context.Process(target=reader_through_restarts, args=(port, results))
        for _ in range(2)
    ]
    for reader in readers:
        reader.start()
    for _ in readers:
        assert mq.get_wait("ready", PATIENCE_SECONDS) == "x"
    number = 0
    for _ in range(RESTARTS):
        end = time.monotonic() + 0.1
        while time.monotonic() < end:
            mq.put("t", str(number))
            number += 1
        process.stop()
        process = serve_process("--port", str(port))
    mq.put("t", "end")
    for _ in readers:
        got = results.get(timeout=PATIENCE_SECONDS)
        assert got.pop() == "end"
        numbers = list(map(int, got))
        # What was in a killed server's memory is gone; nothing comes twice or late.
        assert numbers == sorted(set(numbers))
    for reader in readers:
        reader.join(PATIENCE_SECONDS)


def test_nobody_there_is_refused_after_the_timeout() -> None:
    port = dsmq._free_port()

    def check(host: str) -> None:
        begin = time.monotonic()
        with pytest.raises(ConnectionRefusedError, match=f"{host}:{port}"):
            dsmq.connect(host, port, timeout=0.5)
        assert 0.2 < time.monotonic() - begin < 5

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(check, ("127.0.0.1", "localhost")))


def test_a_server_started_at_the_same_moment_is_found(
    start_server: StartServer, connect: Connect
) -> None:
    port = dsmq._free_port()
    with ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(connect, port)
        time.sleep(0.3)
        start_server(port)
        connecting.result(PATIENCE_SECONDS).put("t", "x")


def test_a_port_of_this_machine_asked_again_and_again_is_never_its_own_answer() -> None:
    # The system may give the connecting socket the very port it connects to.
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = probe.getsockname()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        try:
            sock.connect(address)
        except OSError:
            pytest.skip("this system does not connect a socket to itself")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            socket, "create_connection", lambda *_: connected_to_itself(address)
        )
        with pytest.raises(ConnectionRefusedError):
            dsmq.connect(*address, timeout=0.2)


def connected_to_itself(address: tuple[str, int]) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(address)
    sock.connect(address)
    return sock


SILENT_CALLS: list[Callable[[Client], object]] = [
    lambda mq: mq.put("t", "x"),
    lambda mq: mq.put_many("t", ["x" * 1_000_000] * 5),
    lambda mq: mq.get("t"),
    lambda mq: mq.get_wait("t", 0.1),
    lambda mq: mq.get_wait("t", math.inf),
    lambda mq: mq.get_latest("t"),
    lambda mq: mq.get_many("t"),
    lambda mq: mq.stats(),
    lambda mq: mq.shutdown_server(),
]


def check_silence(clients: list[Client]) -> None:
    """Each makes one of the calls."""

    def check(mq: Client, call: Callable[[Client], object]) -> None:
        with (
            within(5),
            pytest.raises(TimeoutError, match=r"did not answer in 0\.3 s"),
        ):
            mq._timeout = 0.3
            call(mq)
        with within(5):
            mq.close()

    with ThreadPoolExecutor(len(clients)) as pool:
        list(pool.map(check, clients, SILENT_CALLS))


def check_silent_connect(*address: Any) -> None:
    with within(5), pytest.raises(TimeoutError, match=r"did not answer in 0\.3 s"):
        dsmq.connect(*address, timeout=0.3)


def test_a_network_that_swallows_everything_is_a_timeout_in_every_call(
    proxy: Proxy, connect: Connect
) -> None:
    clients = [connect(proxy.port) for _ in SILENT_CALLS]
    proxy.flowing.clear()
    check_silence(clients)


@needs_signals
def test_a_stopped_server_is_a_timeout_in_every_call(
    serve_process: Callable[..., Process], connect: Connect
) -> None:
    process = serve_process()
    clients = [connect(process.port) for _ in SILENT_CALLS]
    process.popen.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(check_silent_connect, HOST, process.port)
        check_silence(clients)
        connecting.result(PATIENCE_SECONDS)


HELLO = {"protocol": 1, "head": 5, "max_frame_bytes": 1 << 20}
BAD_REPLIES: list[Any] = [
    {},
    [],
    {"ids": [6], "messages": []},
    {"ids": [6], "messages": [7], "expires": 9},
    {"ids": ["x"], "messages": ["x"], "expires": 9},
    {"ids": [True], "messages": ["x"], "expires": 9},
    {"ids": [6], "messages": ["x"], "expires": "z"},
    {"ids": [6], "messages": ["x"], "expires": None},
    {"ids": [5], "messages": ["x"], "expires": 9},
    {"ids": [9, 7], "messages": ["x", "y"], "expires": 9},
    {"ids": [6, 6], "messages": ["x", "y"], "expires": 9},
    {"head": None},
    {"error": None, "code": [1]},
    {"error": "x", "code": "unheard of"},
]


class Impostor:
    """A server that says hello, and then always the same."""

    def __init__(self, hello: Any, reply: Any) -> None:
        self.hello, self.reply = hello, reply
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock = self.listener.accept()[0]
                threading.Thread(target=self._talk, args=(sock,), daemon=True).start()

    def _talk(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            while sock.recv(4096):
                body = json.dumps(self.hello).encode()
                self.hello, self.hello_was = self.reply, self.hello
                sock.sendall(dsmq.encode_frame(body))
            self.hello = self.hello_was

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


@pytest.mark.parametrize("reply", BAD_REPLIES, ids=lambda reply: json.dumps(reply)[:50])
def test_a_reply_that_is_not_as_it_should_be_is_an_error_in_every_call(
    reply: Any,
) -> None:
    calls: list[Callable[[Client], object]] = [
        lambda mq: mq.get("t"),
        lambda mq: mq.get_wait("t", 0.1),
        lambda mq: mq.get_many("t"),
        lambda mq: mq.get_latest("t"),
        lambda mq: mq.put("t", "x"),
        lambda mq: mq.stats(),
    ]
    for call in calls:
        impostor = Impostor(HELLO, reply)
        with (
            contextlib.closing(impostor),
            dsmq.connect("127.0.0.1", impostor.port, timeout=8) as mq,
            within(3),
            pytest.raises(DSMQError),
        ):
            call(mq)


@pytest.mark.parametrize(
    "hello",
    [{}, {**HELLO, "head": "5"}, {**HELLO, "max_frame_bytes": None}, {"error": 1}, 7],
)
def test_a_hello_that_is_not_as_it_should_be_is_an_error(hello: Any) -> None:
    impostor = Impostor(hello, {})
    with contextlib.closing(impostor), within(3), pytest.raises(DSMQError):
        dsmq.connect("127.0.0.1", impostor.port, timeout=8)
    impostor = Impostor({**HELLO, "challenge": "\ud800", "proof": "\udc00"}, {})
    with contextlib.closing(impostor), within(3), pytest.raises(AuthenticationError):
        dsmq.connect("127.0.0.1", impostor.port, timeout=8, secret="s")


def test_a_peer_that_is_no_dsmq_server_is_an_error_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def babble() -> None:
            with listener.accept()[0] as sock:
                sock.recv(1000)
                sock.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        with ThreadPoolExecutor(1) as pool:
            answering = pool.submit(babble)
            with within(5), pytest.raises(ConnectionError, match="another protocol"):
                dsmq.connect("127.0.0.1", port)
            answering.result(PATIENCE_SECONDS)


@pytest.mark.skipif(os.name == "nt", reason="kills with SIGKILL")
def test_put_to_a_killed_server_raises_and_the_process_can_exit(
    serve_process: Callable[..., Process], connect: Connect
) -> None:
    process = serve_process()
    mq = connect(process.port)
    code = (
        "import dsmq, sys\n"
        f"mq = dsmq.connect(port={process.port})\n"
        "mq.put('t', 'x'); print('stored', flush=True); sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=HERE,
    )
    assert child.stdout is not None and child.stdout.readline() == b"stored\n"
    process.stop()
    mq._timeout = 0.3
    with within(5), pytest.raises(ConnectionError):
        mq.put("t", "x")
    with within(PATIENCE_SECONDS):
        child.communicate()
    assert child.returncode == 0


# A socket that an interrupt keeps from being closed is closed when it is collected.
interrupted = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


class Interrupt(Exception):
    """What the signal handler raises."""


def is_ours(frame: Any) -> bool:
    """Whether the interrupted code is dsmq's, or that of the package redis."""
    name = frame.f_code.co_filename if frame is not None else ""
    return name == dsmq.__file__ or f"{os.sep}redis{os.sep}" in name


@needs_signals
@interrupted
@pytest.mark.parametrize(
    ("connect", "name"),
    [
        *(("dsmq", n) for n in ("get", "get_wait", "get_many", "listen", "get_latest")),
        *itertools.product(["redis", "cluster"], ["get", "get_many"]),
    ],
    indirect=["connect"],
)
def test_an_interrupt_anywhere_in_a_call_loses_and_repeats_nothing(
    connect: Connect, name: str
) -> None:
    # Not on 3.10: it looks for signals between the instruction that leaves a `try` and
    # the one that returns.
    if sys.version_info < (3, 11):
        pytest.skip("Python 3.10 may interrupt the return itself")
    mq, putter = connect(), connect()
    total, interrupts = 3000, 0
    numbers = itertools.count(total)

    def interrupt(number: int, frame: Any) -> None:
        nonlocal interrupts
        if is_ours(frame):
            interrupts += 1
            raise Interrupt

    calls: dict[str, Callable[[], list[str]]] = {
        "get": lambda: [mq.get("t")],
        "get_wait": lambda: [mq.get_wait("t", 5)],
        "get_many": lambda: mq.get_many("t", 3),
        "listen": lambda: [next(mq.listen("t", 5))],
        "get_latest": lambda: [mq.get_latest("t")],
    }
    putter.put_many("t", map(str, range(total)))
    rng = random.Random(5)
    got: list[str] = []
    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        end = time.monotonic() + 0.4
        while time.monotonic() < end and len(got) < total:
            if name == "get_latest":
                putter.put("t", str(next(numbers)))
            signal.setitimer(signal.ITIMER_REAL, rng.random() * 0.0003)
            with contextlib.suppress(Interrupt):
                got += calls[name]()
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert interrupts > 5
    got = [m for m in got if m]
    if name == "get_latest":
        assert got == sorted(set(got), key=int)
    else:
        assert got + mq.get_many("t", total) == [str(i) for i in range(total)]
    mq.put("u", "usable")
    assert mq.get("u") == "usable"


@everywhere
@needs_signals
@interrupted
def test_interrupted_puts_are_stored_once_or_not_at_all(connect: Connect) -> None:
    mq, witness = connect(), connect()
    interrupts, version = 0, mq.stats()["version"]

    def interrupt(number: int, frame: Any) -> None:
        nonlocal interrupts
        if is_ours(frame):
            interrupts += 1
            raise Interrupt

    rng = random.Random(6)
    done: list[str] = []
    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        for i in range(1000):
            signal.setitimer(signal.ITIMER_REAL, rng.random() * 0.0005)
            with contextlib.suppress(Interrupt):
                mq.put("t", str(i))
                done.append(str(i))
            signal.setitimer(signal.ITIMER_REAL, 0)
            if i % 50 == 0:
                assert mq.stats()["version"] == version  # no mixed-up reply
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert interrupts > 20
    got = witness.get_many("t", 10_000)
    assert got == sorted(set(got), key=int)
    assert set(done) <= set(got)


def test_ctrl_c_in_a_waiting_program_is_a_plain_keyboard_interrupt(
    connect: Connect, server: Server
) -> None:
    code = (
        "import dsmq, math\n"
        f"mq = dsmq.connect(port={server.port})\n"
        "mq.put('ready', 'x')\n"
        "try:\n    mq.get_wait('t', math.inf)\n"
        "except KeyboardInterrupt:\n    mq.put('t', 'still usable')\n"
    )
    if os.name == "nt":
        pytest.skip("no such signals here")
    mq = connect()
    child = subprocess.Popen([sys.executable, "-c", code], cwd=HERE)
    assert mq.get_wait("ready", PATIENCE_SECONDS) == "x"
    eventually(lambda: "t" in server.store._topics)
    child.send_signal(signal.SIGINT)
    assert mq.get_wait("t", PATIENCE_SECONDS) == "still usable"
    assert child.wait(PATIENCE_SECONDS) == 0


# ---------------------------------------------------------------------------- limits


def test_a_full_server_refuses_puts_and_does_all_else(
    start_server: StartServer,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    pass_time: Callable[[float], None],
) -> None:
    monkeypatch.setattr(dsmq, "PURGE_SECONDS", 0.05)
    server = start_server(max_bytes=100_000)
    mq, reader = connect(server.port), connect(server.port)
    stored = 0
    with pytest.raises(QueueFull, match="max_bytes 100000"):
        for _ in range(1000):
            mq.put("t", "x" * 1000)
            stored += 1
    assert 80 < stored < 100
    with pytest.raises(QueueFull):
        mq.put_many("u", ["y" * 10] * 5000)
    assert mq.get("u") == ""
    assert len(reader.get_many("t", 1000)) == stored
    assert mq.stats()["messages"] == stored
    pass_time(600)
    eventually(lambda: mq.stats()["messages"] == 0)
    mq.put("t", "room again")
    assert reader.get("t") == "room again"


def test_the_system_gets_memory_back_once_messages_expired(
    serve_process: Callable[..., Process], connect: Connect
) -> None:
    process = serve_process("--time-to-live", "0.7")
    status = pathlib.Path(f"/proc/{process.popen.pid}/statm")
    if not status.exists():
        pytest.skip("no /proc here")

    def megabytes() -> float:
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    mq = connect(process.port)
    before = megabytes()
    for _ in range(100):
        mq.put("t", "x" * 500_000)
    assert megabytes() > before + 40
    eventually(lambda: megabytes() < before + 20)


def test_a_client_too_many_is_told_so_and_gets_in_when_another_leaves(
    start_server: StartServer, connect: Connect, raw: Callable[[int], Raw]
) -> None:
    server = start_server(max_clients=3)
    clients = [connect(server.port) for _ in range(3)]
    peer = raw(server.port)
    reply = peer.receive()
    assert reply == {"error": "max_clients 3 is reached", "code": "busy"}
    with pytest.raises(ConnectionRefusedError, match="max_clients 3 is reached"):
        connect(server.port, timeout=0.3)
    clients[0].put("t", "the others go on")
    with ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(connect, server.port)
        time.sleep(0.1)
        clients[0].close()
        connecting.result(PATIENCE_SECONDS).put("t", "x")
    assert clients[1].get_many("t") == ["the others go on", "x"]


@needs_signals
def test_a_server_without_descriptors_neither_dies_nor_spins(
    serve_process: Callable[..., Process], connect: Connect
) -> None:
    import resource

    process = serve_process(
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    )
    first = connect(process.port)
    with contextlib.ExitStack() as crowd:
        told = 0
        for _ in range(60):
            address = "127.0.0.1", process.port
            sock = crowd.enter_context(socket.create_connection(address, 5))
            sock.sendall(dsmq.encode_object({"action": "hello"}))
            told += b"no descriptor left" in sock.recv(4096)
        assert told > 10
        first.put("t", "x")  # those inside go on
        assert first.get("t") == "x"
        begin = os.times()
        before = cpu_seconds(process.popen.pid)
        time.sleep(0.3)
        assert cpu_seconds(process.popen.pid) - before < 0.2
        assert os.times().elapsed - begin.elapsed < PATIENCE_SECONDS
    connect(process.port).put("t", "y")  # serves again
    assert first.get("t") == "y"
    assert sum("refusing" in line for line in process.log) < 10


def cpu_seconds(pid: int) -> float:
    stat = pathlib.Path(f"/proc/{pid}/stat")
    if not stat.exists():
        pytest.skip("no /proc here")
    fields = stat.read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_server_without_threads_refuses_and_serves_again(
    server: Server, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = connect()
    with monkeypatch.context() as patch:
        fail_to_start(patch, "process_request_thread")
        with pytest.raises(ConnectionRefusedError, match="no thread left"):
            connect(timeout=0.3)
        first.put("t", "x")
    connect().put("t", "y")
    assert first.get_many("t") == ["x", "y"]


def test_a_burst_of_clients_is_served(server: Server) -> None:
    with ThreadPoolExecutor(100) as pool:
        list(pool.map(lambda _: greet(server.port), range(500)))
    eventually(lambda: not server.inner.connections)


def greet(port: int) -> None:
    with Raw(port).sock as sock:
        sock.sendall(dsmq.encode_object({"action": "hello"}))
        assert b"protocol" in sock.recv(4096)


# By hand: DSMQ_CYCLES=20000 pytest -k leave_nothing_behind
CYCLES = int(os.environ.get("DSMQ_CYCLES", "150"))


@everywhere
def test_clients_that_come_and_go_leave_nothing_behind(connect: Connect) -> None:
    witness = connect()

    def cycle(count: int) -> None:
        for _ in range(count):
            with dsmq.connect(*connect.address) as mq:
                mq.get("t")
        eventually(lambda: count_clients(witness) == clients)

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    clients = 3 if connect.engine == "cluster" else 1  # its connections to each node
    rounds = CYCLES if connect.engine == "dsmq" else CYCLES // 5
    cycle(rounds // 5)
    threads, files = count_threads(), descriptors()
    tracemalloc.start()
    cycle(10)
    before = tracemalloc.get_traced_memory()[0]
    cycle(rounds)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    eventually(lambda: count_threads() <= threads)
    assert descriptors() <= files
    assert grown < 100_000


def test_a_reader_that_stays_away_costs_nobody_anything(
    server: Server, connect: Connect
) -> None:
    away, putter = connect(), connect()
    for i in range(20):
        putter.put_many("t", [str(j) for j in range(i * 500, (i + 1) * 500)])
    assert not server.store._topics["t"].waiters
    assert [away.get("t") for _ in range(10_000)] == [str(i) for i in range(10_000)]


# -------------------------------------------------------------------- secret and TLS


def test_clients_with_the_secret_get_in_and_nobody_else(
    start_server: StartServer, connect: Connect, raw: Callable[[int], Raw]
) -> None:
    server = start_server(secret="s3crét")
    mq = connect(server.port, secret="s3crét")
    mq.put("t", "x")
    assert mq.get("t") == "x"
    for secret in (None, "wrong", "s3cret"):
        with within(5), pytest.raises(AuthenticationError):
            connect(server.port, secret=secret)
    requests: list[dict[str, Any]] = [
        {"action": "hello"},
        {"action": "hello", "nonce": ""},
        {"action": "put", "topic": "t", "messages": ["x"]},
        {"action": "get", "topic": "t", "after": 0},
        {"action": "get_latest", "topic": "t", "after": 0},
        {"action": "stats"},
        {"action": "shutdown"},
        {"action": "authenticate"},
        {"action": "authenticate", "proof": "0" * 64},
        {"action": "authenticate", "proof": ""},
        {"action": "authenticate", "proof": "\ud800"},
        {"action": "hello", "nonce": "\ud800"},
    ]
    peer = raw(server.port)
    for greeted in (False, True):
        for request in requests:
            if greeted:
                reply = peer.ask(action="hello", nonce="n" * 16)
                assert "head" not in reply
                reply = peer.ask(**request)
            else:
                reply = peer.ask(**request)
            assert reply["code"] in ("authentication", "bad_request")
            assert set(reply) == {"error", "code"}
    assert mq.stats()["messages"] == 1


def test_a_recorded_proof_is_worth_nothing(
    start_server: StartServer, raw: Callable[[int], Raw]
) -> None:
    server = start_server(secret="s")
    peer, thief = raw(server.port), raw(server.port)
    hello = peer.ask(action="hello", nonce="n")
    assert hello["proof"] == dsmq._proof("s", "server", "n", hello["challenge"])
    proof = dsmq._proof("s", "client", "n", hello["challenge"])
    thief.ask(action="hello", nonce="n")
    assert "error" in thief.ask(action="authenticate", proof=proof)
    thief.ask(action="hello", nonce="n")
    assert "error" in thief.ask(action="authenticate", proof=hello["proof"])
    reply = thief.ask(action="hello", nonce="n")
    assert "error" in thief.ask(action="authenticate", proof=reply["proof"])
    assert peer.ask(action="authenticate", proof=proof)["head"] == server.store.head
    assert peer.ask(action="put", topic="t", messages=["x"])["head"] > 0


def test_a_server_that_does_not_know_the_secret_is_not_trusted(
    start_server: StartServer, connect: Connect
) -> None:
    for secret in (None, "another"):
        server = start_server(secret=secret)
        with within(5), pytest.raises(AuthenticationError):
            connect(server.port, secret="s")
        assert server.store.stats()["messages"] == 0


def test_a_peer_cannot_flood_the_log(
    start_server: StartServer,
    raw: Callable[[int], Raw],
    caplog: pytest.LogCaptureFixture,
) -> None:
    thief = raw(start_server(secret="s").port)
    for _ in range(200):
        thief.ask(action="authenticate", proof="0")
    assert 1 <= caplog.text.count("does not know the secret") <= 5 * dsmq.PEER_LOG_LINES


def test_a_peer_without_the_secret_is_logged_kept_short_and_dropped(
    start_server: StartServer,
    connect: Connect,
    raw: Callable[[int], Raw],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(dsmq, "STALL_SECONDS", 0.4)
    monkeypatch.setattr(dsmq, "LINGER_SECONDS", 0.1)
    server = start_server(secret="s")
    with pytest.raises(AuthenticationError):
        connect(server.port, secret="wrong")
    # The client saw the server's proof was wrong, and said no more.
    thief = raw(server.port)
    thief.ask(action="hello", nonce="n")
    thief.ask(action="authenticate", proof="0")
    port = thief.sock.getsockname()[1]
    assert f"127.0.0.1:{port} does not know the secret" in caplog.text
    large = raw(server.port)
    large.sock.sendall(struct.pack(">I", dsmq.UNTRUSTED_FRAME_BYTES + 1))
    assert (large.receive() or {})["code"] == "bad_frame"
    eventually(lambda: not server.inner.connections)


@pytest.mark.usefixtures("impatient")
def test_lost_connections_are_made_again_with_the_secret(
    start_server: StartServer, connect: Connect
) -> None:
    server = start_server(secret="s")
    proxy = Proxy(server.port)
    mq = connect(proxy.port, secret="s")
    for i in range(20):
        proxy.cut_latest_after(i % 2, 1)
        mq.put("t", str(i))
    assert mq.get_many("t") == [str(i) for i in range(20)]
    proxy.close()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A self-signed certificate for localhost and its key, made as README says."""
    folder = tmp_path_factory.mktemp("certificate")
    if not shutil.which("openssl"):
        skip("no openssl command here")
    command = next(b for b in readme_blocks("sh") if "openssl" in b)
    command = command.replace("queue.example.com", "localhost")
    subprocess.run(command, shell=True, cwd=folder, check=True, capture_output=True)
    with open(folder / "both.pem", "w") as both:
        both.write((folder / "cert.pem").read_text() + (folder / "key.pem").read_text())
    return folder


def tls_context(folder: pathlib.Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


@pytest.fixture
def tls_server(start_server: StartServer, certificate: pathlib.Path) -> Server:
    return start_server(context=tls_context(certificate))


def test_everything_works_over_tls(
    tls_server: Server, certificate: pathlib.Path
) -> None:
    tls = certificate / "cert.pem"
    with (
        dsmq.connect("localhost", tls_server.port, tls=tls) as putter,
        dsmq.connect("localhost", tls_server.port, tls=str(tls)) as getter,
        ThreadPoolExecutor(1) as pool,
    ):
        putter.put("t", "x" * 1_000_000)
        assert len(getter.get("t")) == 1_000_000
        for i in range(20):
            waiting = pool.submit(getter.get_wait, "t", 20)
            time.sleep(0.005)
            putter.put("t", f"{i} " + "y" * 300_000 * (i % 2))
            assert waiting.result(PATIENCE_SECONDS).split()[0] == str(i)
        waiting = pool.submit(getter.get_wait, "t", math.inf)
        time.sleep(0.05)
        for connection in list(tls_server.inner.connections):
            connection.shut()
        putter.put("t", "on a new connection")
        assert waiting.result(PATIENCE_SECONDS) == "on a new connection"
        copy = pickle.loads(pickle.dumps(getter))
        putter.put("t", "z")
        assert copy.get("t") == "z"
        copy.close()
        with within(5):
            putter.shutdown_server()


def test_wrong_names_and_untrusted_certificates_are_refused(
    tls_server: Server, certificate: pathlib.Path
) -> None:
    for host, tls in (("127.0.0.1", certificate / "cert.pem"), ("localhost", True)):
        with within(5), pytest.raises(ssl.SSLCertVerificationError):
            dsmq.connect(host, tls_server.port, tls=tls)
    with pytest.raises(FileNotFoundError):
        dsmq.connect("localhost", tls_server.port, tls="/nowhere.pem")


def test_plain_talk_to_a_tls_port_and_tls_talk_to_a_plain_port_are_errors(
    server: Server,
    tls_server: Server,
    certificate: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dsmq, "LINGER_SECONDS", 0.1)
    with within(5), pytest.raises(ConnectionError):
        dsmq.connect("localhost", tls_server.port, timeout=0.5)
    with within(5), pytest.raises(ConnectionError, match="TLS"):
        dsmq.connect("localhost", server.port, tls=certificate / "cert.pem")


def test_a_client_that_stalls_in_the_handshake_holds_up_nobody_and_is_dropped(
    start_server: StartServer,
    certificate: pathlib.Path,
    raw: Callable[[int], Raw],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = start_server(context=tls_context(certificate))

    def stall() -> None:
        for _ in range(5):
            raw(server.port).sock.sendall(b"\x16\x03\x01")

    stall()
    with (
        within(5),
        dsmq.connect("localhost", server.port, tls=certificate / "cert.pem") as mq,
    ):
        mq.put("t", "x")
        assert len(server.inner.connections) == 6
    for connection in list(server.inner.connections):
        connection.shut()
    eventually(lambda: not server.inner.connections)
    monkeypatch.setattr(dsmq, "STALL_SECONDS", 0.2)
    stall()
    eventually(lambda: len(server.inner.connections) == 5)
    eventually(lambda: not server.inner.connections)


def test_secret_and_tls_together_over_the_command_line(
    serve_process: Callable[..., Process],
    certificate: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3crét\n", encoding="utf-8")
    process = serve_process(
        "--certfile", str(certificate / "both.pem"), "--secret-file", str(secret)
    )
    address = ["--host", "localhost", "--port", str(process.port)]
    tls = ["--tls", str(certificate / "cert.pem")]
    done = dsmq_command("put", "t", "x", *address, *tls, DSMQ_SECRET="s3crét")
    assert done.returncode == 0, done.stderr
    done = dsmq_command("put", "t", "x", *address, *tls, DSMQ_SECRET="wrong")
    assert done.returncode == 1
    assert done.stderr == "dsmq: the server does not know the secret\n"
    done = dsmq_command("stats", "--json", *address, "--secret-file", str(secret), *tls)
    assert json.loads(done.stdout)["messages"] == 1


# ------------------------------------------------------------------------- lifecycle


def test_shutdown_answers_wakes_everyone_frees_the_port_and_returns_soon(
    start_server: StartServer, connect: Connect
) -> None:
    threads = count_threads()
    server = start_server()
    mq, others = connect(server.port), [connect(server.port) for _ in range(5)]
    for other in others:
        other._timeout = 0.5
    with ThreadPoolExecutor(5) as pool:
        waiting = [pool.submit(other.get_wait, "t", math.inf) for other in others]
        time.sleep(0.1)
        begin = time.monotonic()
        mq.shutdown_server()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port), 1)
        socket.create_server(("127.0.0.1", server.port)).close()
        server.thread.join(PATIENCE_SECONDS)
        assert time.monotonic() - begin < 5
        for one in waiting:
            with pytest.raises(ConnectionError):
                one.result(PATIENCE_SECONDS)
    eventually(lambda: count_threads() <= threads)


def test_a_server_can_be_started_again_on_the_port_at_once(
    start_server: StartServer, connect: Connect
) -> None:
    port = 0
    for i in range(5):
        server = start_server(port)
        port = server.port
        mq = connect(port)
        mq.put("t", str(i))
        assert mq.get("t") == str(i)
        mq.shutdown_server()
        server.thread.join(PATIENCE_SECONDS)


def test_shutdown_asked_by_several_at_once_is_one_shutdown(
    server: Server, connect: Connect
) -> None:
    clients = [connect() for _ in range(5)]
    with ThreadPoolExecutor(5) as pool, within(5):
        list(pool.map(lambda mq: mq.shutdown_server(), clients))
    server.thread.join(PATIENCE_SECONDS)
    assert not server.thread.is_alive()


@pytest.mark.skipif(os.name == "nt", reason="kills with SIGKILL")
def test_shutdown_over_a_stale_connection_stops_the_server_there_is_now(
    serve_process: Callable[..., Process], connect: Connect
) -> None:
    process = serve_process()
    mq = connect(process.port, timeout=5)
    process.stop()
    again = serve_process("--port", str(process.port))
    mq.shutdown_server()
    assert again.popen.wait(PATIENCE_SECONDS) == 0


def test_a_shutdown_whose_answer_is_lost_is_done(
    server: Server, proxy: Proxy, connect: Connect
) -> None:
    mq = connect(proxy.port, timeout=5)
    proxy.cut_latest_after(1, 1)
    with pytest.raises(ConnectionError):  # the proxy is there, and cuts
        mq._timeout = 0.3
        mq.shutdown_server()
    server.thread.join(PATIENCE_SECONDS)
    assert not server.thread.is_alive()


def test_a_port_in_use_is_an_os_error_that_names_it(server: Server) -> None:
    with within(5), pytest.raises(OSError, match=f"127.0.0.1:{server.port}"):
        dsmq.serve("127.0.0.1", server.port)


def test_serve_in_a_thread_returns_and_prints_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    port = dsmq._free_port()
    serving = threading.Thread(target=dsmq.serve, args=("127.0.0.1", port))
    serving.start()
    with dsmq.connect("127.0.0.1", port) as mq:
        mq.put("t", "x")
        mq.shutdown_server()
    serving.join(PATIENCE_SECONDS)
    assert not serving.is_alive()
    assert capfd.readouterr() == ("", "")


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_forked_beside_a_server_does_not_keep_its_port(
    start_server: StartServer, connect: Connect
) -> None:
    server = start_server()
    mq = connect(server.port)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(reader, 1)  # has the listening socket and the connections open
        os._exit(0)
    try:
        with within(5):
            mq.shutdown_server()
            server.thread.join(PATIENCE_SECONDS)
        again = start_server(server.port)
        connect(again.port).put("t", "x")
    finally:
        os.write(writer, b"x")
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(
    ("host", "warns"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)]
)
def test_serving_the_network_without_a_secret_logs_what_that_means(
    host: str, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    port = dsmq._free_port()
    serving = threading.Thread(target=dsmq.serve, args=(host, port))
    with caplog.at_level(logging.INFO, "dsmq"):
        serving.start()
        with dsmq.connect("127.0.0.1" if warns else host, port) as mq:
            mq.shutdown_server()
        serving.join(PATIENCE_SECONDS)
    assert ("anyone on the network can" in caplog.text) == warns
    assert f"listening on {'0.0.0.0' if warns else '127.0.0.1'}:{port}" in caplog.text
    assert "stopped" in caplog.text


def test_both_module_names_of_the_original_work() -> None:
    code = (
        "from dsmq.server import serve\n"
        "from dsmq.client import connect\n"
        "import dsmq.server, dsmq.client, dsmq\n"
        "assert dsmq.server.serve is serve is dsmq.serve\n"
        "assert dsmq.client.connect is connect is dsmq.connect\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)


def test_nothing_outside_the_standard_library_is_imported() -> None:
    code = (
        "import sys, dsmq\n"
        "names = {name.partition('.')[0] for name in sys.modules}\n"
        "names -= {'dsmq', '__main__', '__mp_main__', *sys.stdlib_module_names}\n"
        "assert not names, names\n"
    )
    subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {str(HERE)!r})\n" + code,
        ],
        check=True,
    )


# ------------------------------------------------------------------ past one machine


def cluster_owner(cluster: list[Redis], topic: str) -> Redis:
    """The node that has the messages of a topic."""
    return next(n for n in cluster if f"{{dsmq:{topic}}}" in n.cli("keys", "*"))


def put_long_ago(redis: Redis, seconds: float, *texts: str) -> None:
    """Messages of topic t, as if put so many seconds ago."""
    then = int((time.time() - seconds) * 1000)
    lines = [
        f"xadd {{dsmq:t}} {then}-{number} message {text}"
        for number, text in enumerate(texts, 1)
    ]
    assert "ERR" not in redis.cli("-c", lines="\n".join(lines))


def with_time_to_live(mq: Client, seconds: float) -> Client:
    assert isinstance(mq, dsmq._RedisConnection)
    mq._time_to_live = seconds
    return mq


def test_where_reading_begins_is_exact_though_the_clock_of_redis_was_ahead(
    redis: Redis, connect: Connect
) -> None:
    # As after a step back by an hour: the newest id is in the future.
    ahead = int(time.time() * 1000) + 3_600_000
    redis.cli("set", "dsmq:head", f"{ahead}-7")
    early, putter = connect(redis.url), connect(redis.url)
    putter.put("t", "behind the clock")
    assert early.get("t") == "behind the clock"
    for i in range(30):
        putter.put(f"old {i}", "before")
        late = connect(redis.url)
        assert late.get(f"old {i}") == ""
        putter.put(f"new {i}", "after")
        putter.put(f"old {i}", "after")
        assert late.get(f"old {i}") == late.get(f"new {i}") == "after"


@past_one_machine
def test_what_expired_in_redis_is_neither_handed_out_nor_kept(
    connect: Connect, request: pytest.FixtureRequest
) -> None:
    putter, getter = connect(), connect()
    getter._start = 0
    node = request.getfixturevalue(connect.engine)
    node = node if isinstance(node, Redis) else node[0]
    # More than one reply holds, and not trimmed: no put came since.
    put_long_ago(node, 601, *map(str, range(250)))
    assert getter.get("t") == getter.get_latest("t") == ""
    assert getter.get_many("t") == []
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(getter.get_wait, "t", 20)
        time.sleep(0.05)
        put_long_ago(node, 590, "alive")
        assert waiting.result(PATIENCE_SECONDS) == "alive"
    assert putter.stats()["topics"]["t"]["messages"] == 1
    put_long_ago(node, 580, "younger")
    putter.put("t", "new")
    assert putter.stats()["topics"]["t"]["messages"] == 3
    assert getter.get_many("t") == ["younger", "new"]


def test_a_put_frees_what_has_expired_of_its_topic(
    redis: Redis, connect: Connect
) -> None:
    put_long_ago(redis, 601, *map(str, range(250)))
    put_long_ago(redis, 590, "alive")
    connect(redis.url).put("t", "new")
    assert redis.cli("xlen", "{dsmq:t}") == "2"


def test_nothing_but_a_number_is_left_of_an_abandoned_topic(
    redis: Redis, connect: Connect
) -> None:
    connect(redis.url).put("t", "x")
    assert 599_000 < int(redis.cli("pttl", "{dsmq:t}")) <= 600_000
    with_time_to_live(connect(redis.url), 0.1).put("t", "y")
    eventually(lambda: redis.cli("exists", "{dsmq:t}") == "0")
    numbers = set(redis.cli("keys", "*").split()) - {"dsmq:head"}
    assert len(numbers) == 2  # of the last put of each client
    for name in numbers:
        assert 0 < int(redis.cli("ttl", name)) <= dsmq.REMEMBERED_SECONDS


def test_a_message_of_redis_expires_though_it_was_read_ahead(
    redis: Redis, connect: Connect
) -> None:
    mq = with_time_to_live(connect(redis.url), 0.5)
    mq.put_many("t", ["1", "2"])
    assert mq.get("t") == "1"
    time.sleep(0.55)
    assert mq.get("t") == ""


def test_put_many_too_long_for_a_request_to_redis_goes_in_several(
    redis: Redis, connect: Connect
) -> None:
    mq = connect(redis.url)
    mq._max_frame_bytes = 10_000
    messages = [f"{i} " + "x" * (i % 3000) for i in range(200)]
    mq.put_many("t", messages)
    assert mq.get_many("t", 1000) == messages
    calls = redis.cli("info", "commandstats")
    assert int((re.search(r"cmdstat_eval:calls=(\d+)", calls) or [0, 0])[1]) > 20


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("way", [0, 1], ids=["request", "reply"])
@pytest.mark.parametrize("name", CALLS)
def test_a_connection_to_redis_cut_at_any_byte_loses_and_repeats_nothing(
    redis: Redis, connect: Connect, name: str, way: int
) -> None:
    call, expected = CALLS[name]
    witness = connect(redis.url)
    proxy = Proxy(redis.port)
    # A put is long, for it brings its script along; so is what Redis tells of itself.
    for count in itertools.count(1, 61 if name in ("put", "put_many", "stats") else 7):
        redis.flush()
        mq = connect(f"redis://{HOST}:{proxy.port}")
        witness.put_many("t", ["1", "2"])
        proxy.cut_latest_after(way, count)
        cuts = proxy.cuts
        assert call(mq) == expected
        if proxy.cuts == cuts:
            break  # the whole of it is shorter than that
        left = LEFT.get(name, ["1", "2"])
        stored = {"put": ["é3"], "put_many": ["3", "4"]}.get(name, [])
        assert mq.get_many("t") == left + stored
        assert witness.get_many("t") == ["1", "2", *stored]
        mq.close()
    proxy.close()
    assert count > 1


@needs_signals
def test_a_put_that_reaches_redis_late_is_stored_in_its_place_or_not_at_all(
    redis: Redis, connect: Connect
) -> None:
    putter, getter = connect(redis.url), connect(redis.url)
    putter.put("t", "0")
    with redis.paused(), dsmq_timeout(putter, 0.3), pytest.raises(TimeoutError):
        putter.put("t", "1")
    putter.put("t", "2")
    time.sleep(0.1)
    assert getter.get_many("t") in (["0", "2"], ["0", "1", "2"])


def test_clients_carry_on_after_a_restart_of_redis(
    start_redis: StartRedis, connect: Connect
) -> None:
    redis = start_redis()
    putter, getter, waiter = (connect(redis.url) for _ in range(3))
    putter.put_many("t", ["old 1", "old 2"])
    assert getter.get("t") == "old 1"
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(waiter.get_wait, "u", 20)
        time.sleep(0.1)
        redis.kill()
        with (
            dsmq_timeout(putter, 0.2),
            pytest.raises(ConnectionRefusedError, match=f"no Redis at .*{redis.port}"),
        ):
            putter.put("t", "lost")
        putting = pool.submit(putter.put, "t", "new")  # goes on trying
        time.sleep(0.1)
        redis.start()
        putting.result(PATIENCE_SECONDS)
        putter.put("u", "woken")
        assert waiting.result(PATIENCE_SECONDS) == "woken"
    assert getter.get_many("t") == ["old 2", "new"]
    putter.put("t", "newer")
    assert getter.get("t") == "newer"


@contextlib.contextmanager
def dsmq_timeout(mq: Client, seconds: float) -> Iterator[None]:
    mq._timeout, before = seconds, mq._timeout
    yield
    mq._timeout = before


def test_messages_that_redis_restored_are_not_read_twice(
    start_redis: StartRedis, connect: Connect
) -> None:
    redis = start_redis()
    putter, getter = connect(redis.url), connect(redis.url)
    putter.put_many("t", ["1", "2"])
    redis.cli("save")
    putter.put("t", "3")
    assert getter.get_many("t") == ["1", "2", "3"]
    redis.kill()
    redis.start()
    assert redis.cli("xlen", "{dsmq:t}") == "2"
    assert getter.get("t") == ""
    putter.put("t", "4")
    assert getter.get_many("t") == ["4"]


def test_all_is_new_in_a_redis_that_lost_everything_though_its_clock_is_behind(
    redis: Redis, connect: Connect
) -> None:
    ahead = int(time.time() * 1000) + 3_600_000
    redis.cli("set", "dsmq:head", f"{ahead}-7")
    getter = connect(redis.url)
    redis.flush()
    redis.cli("client", "kill", "type", "normal")
    assert getter.get("t") == ""
    connect(redis.url).put("t", "new")
    assert getter.get("t") == "new"


@needs_signals
@past_one_machine
def test_a_silent_redis_is_a_timeout_in_every_call(
    connect: Connect, request: pytest.FixtureRequest
) -> None:
    nodes = request.getfixturevalue(connect.engine)
    clients = [connect() for _ in SILENT_CALLS[:-1]]
    waiter = connect()
    waiter._timeout = 0.4
    with ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as pauses:
        waiting = pool.submit(waiter.get_wait, "t", math.inf)
        time.sleep(0.1)
        for node in nodes if isinstance(nodes, list) else [nodes]:
            pauses.enter_context(node.paused())
        connecting = pool.submit(check_silent_connect, *connect.address)
        check_silence(clients)
        connecting.result(PATIENCE_SECONDS)
        with within(5), pytest.raises(TimeoutError, match="Redis at 127"):
            waiting.result(PATIENCE_SECONDS)
    waiter._timeout = PATIENCE_SECONDS
    connect().put("u", "x")
    assert waiter.get("u") == "x"


def test_a_redis_is_not_stopped_by_its_clients(redis: Redis, connect: Connect) -> None:
    mq = connect(redis.url)
    with pytest.raises(DSMQError, match="not stopped"):
        mq.shutdown_server()
    mq.put("t", "x")
    assert mq.get("t") == "x"


def test_a_full_redis_refuses_puts_and_does_all_else(
    start_redis: StartRedis, connect: Connect
) -> None:
    redis = start_redis("--maxmemory", "3mb")
    putter, getter = connect(redis.url), connect(redis.url)
    putter.put("t", "first")
    with pytest.raises(QueueFull):
        for _ in range(100):
            putter.put("t", "x" * 100_000)
    assert getter.get("t") == "first"
    late = connect(redis.url)
    assert late.get("t") == ""
    with pytest.raises(QueueFull):
        putter.put_many("u", ["x" * 100_000] * 3)
    assert late.get_many("u") == []
    assert putter.stats()["max_bytes"] == 3 << 20


def test_other_peoples_keys_in_redis_are_left_alone(
    redis: Redis, connect: Connect
) -> None:
    redis.cli("set", "mine", "1")
    redis.cli("xadd", "stream", "*", "a", "b")
    redis.cli("set", "{dsmq:t}", "not a stream")
    mq = connect(redis.url)
    for call in (lambda: mq.put("t", "x"), lambda: mq.get("t")):
        with pytest.raises(DSMQError, match="WRONGTYPE"):
            call()
    mq.put("u", "x")
    assert list(mq.stats()["topics"]) == ["u"]
    assert redis.cli("get", "mine") == "1"
    assert redis.cli("xlen", "stream") == "1"


def test_a_database_of_redis_keeps_its_messages_apart(
    redis: Redis, connect: Connect
) -> None:
    zero, one, also_one = (connect(redis.url + path) for path in ("", "/1", "/1"))
    one.put("t", "x")
    assert zero.get("t") == ""
    assert also_one.get("t") == "x"


def test_the_password_of_a_redis_is_in_its_url_and_in_no_error(
    start_redis: StartRedis, connect: Connect
) -> None:
    place = f"{HOST}:{start_redis('--requirepass', 's3cr/et').port}"
    mq = connect(f"redis://:s3cr%2Fet@{place}")
    mq.put("t", "x")
    assert "s3cr" not in repr(mq)
    for login in (":wr0ng@", "", "nobody:s3cr%2Fet@"):
        with within(5), pytest.raises(AuthenticationError) as refused:
            connect(f"redis://{login}{place}")
        assert "wr0ng" not in str(refused.value) and "s3cr" not in str(refused.value)
    with pytest.raises(ValueError, match="URL") as misplaced:
        connect(f"redis://:s3cr%2Fet@{place}", secret="s3cr/et")
    with pytest.raises(ValueError, match="a Redis URL is") as unquoted:
        connect(f"redis://:s3cr/et@{place}")
    assert "s3cr" not in str(misplaced.value) + str(unquoted.value)


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        (("redis://h:x",), {}, "a Redis URL is"),
        (("redis://h/x",), {}, "a Redis URL is"),
        (("redis://h/0?db=1",), {}, "a Redis URL is"),
        (("redis://h/0#1",), {}, "a Redis URL is"),
        (("redis://[::1",), {}, "a Redis URL is"),
        (("redis://h", 1234), {}, "port"),
        (("redis://h",), {"secret": "s"}, "password"),
        (("redis://h",), {"tls": True}, "rediss"),
    ],
)
def test_a_wrong_url_of_a_redis_raises_at_once(
    arguments: tuple[Any, ...], options: dict[str, Any], text: str
) -> None:
    with within(5), pytest.raises(ValueError, match=text):
        dsmq.connect(*arguments, **options)


def test_the_missing_package_redis_is_named() -> None:
    code = "import dsmq; dsmq.connect('redis://127.0.0.1:1')"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],  # without the packages that are installed
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert "pip install dsmq[redis]" in done.stderr.splitlines()[-1]


def test_a_peer_that_is_no_redis_is_an_error_at_once() -> None:
    need_redis()
    with socket.create_server((HOST, 0)) as listener:

        def babble() -> None:
            with listener.accept()[0] as sock:
                sock.recv(1000)
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                sock.recv(1000)

        with ThreadPoolExecutor(1) as pool:
            answering = pool.submit(babble)
            url = f"redis://{HOST}:{listener.getsockname()[1]}"
            with within(5), pytest.raises(dsmq.FrameError, match="another protocol"):
                dsmq.connect(url)
            answering.result(PATIENCE_SECONDS)


def test_everything_works_over_tls_to_redis(
    start_redis: StartRedis, certificate: pathlib.Path, connect: Connect
) -> None:
    tls, port = certificate / "cert.pem", quiet_port()
    options = ["--tls-port", str(port), "--tls-auth-clients", "no"]
    options += ["--tls-cert-file", str(tls)]
    options += ["--tls-key-file", str(certificate / "key.pem")]
    plain = start_redis(*options)
    url = f"rediss://localhost:{port}"
    putter, getter = connect(url, tls=tls), connect(url, tls=str(tls))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(getter.get_wait, "t", 20)
        time.sleep(0.05)
        putter.put("t", "x" * 1_000_000)
        assert len(waiting.result(PATIENCE_SECONDS)) == 1_000_000
        waiting = pool.submit(getter.get_wait, "t", math.inf)
        time.sleep(0.1)
        getter.close()
        with pytest.raises(ConnectionError, match="closed"):
            waiting.result(PATIENCE_SECONDS)
    with within(5), pytest.raises(ssl.SSLCertVerificationError):
        connect(url)  # not of an authority of the system
    with within(5), pytest.raises(ssl.SSLCertVerificationError):
        connect(f"rediss://{HOST}:{port}", tls=tls)  # another name
    with within(5), pytest.raises((ConnectionError, TimeoutError)):
        connect(f"rediss://localhost:{plain.port}", tls=tls, timeout=0.2)


def test_topics_are_spread_over_the_nodes_of_a_cluster(
    cluster: list[Redis], connect: Connect
) -> None:
    putter, getter = connect(cluster[0].url), connect(cluster[1].url)
    for i in range(60):
        putter.put(f"t{i}", str(i))
    assert [getter.get(f"t{i}") for i in range(60)] == [str(i) for i in range(60)]
    assert all(int(node.cli("dbsize")) > 10 for node in cluster)
    assert putter.stats()["messages"] == 60


def test_a_topic_that_moves_to_another_node_loses_and_repeats_nothing(
    cluster: list[Redis], connect: Connect
) -> None:
    putter, getter = connect(cluster[0].url), connect(cluster[0].url)
    putter.put("t", "0")
    assert getter.get("t") == "0"
    waiter, late = connect(cluster[0].url), connect(cluster[0].url)
    slot = cluster[0].cli("cluster", "keyslot", "{dsmq:t}")
    old = cluster_owner(cluster, "t")
    new = next(node for node in cluster if node is not old)
    old_id, new_id = (node.cli("cluster", "myid") for node in (old, new))
    moved = threading.Event()

    def put() -> int:
        """Puts 1, 2 and so on until the topic has moved; gives the last."""
        for i in itertools.count(1):
            putter.put("t", str(i))
            if moved.is_set():
                return i
        raise AssertionError

    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(waiter.get_wait, "t", math.inf)
        putting = pool.submit(put)
        try:
            assert waiting.result(PATIENCE_SECONDS) == "1"
            new.cli("cluster", "setslot", slot, "importing", old_id)
            old.cli("cluster", "setslot", slot, "migrating", new_id)
            waiting = pool.submit(waiter.get_wait, "elsewhere", 20)
            assert getter.get("t") == "1"  # of the node that still has it
            while keys := old.cli("cluster", "getkeysinslot", slot, "100"):
                to = (HOST, str(new.port), "", "0", "5000", "keys", *keys.split("\n"))
                old.cli("migrate", *to)
            assert late.get_latest("t") != ""  # the old node says whom to ask
            for node in (new, old, *cluster):
                node.cli("cluster", "setslot", slot, "node", new_id)
            time.sleep(0.1)
        finally:
            moved.set()
            last = putting.result(PATIENCE_SECONDS)
            putter.put("elsewhere", "x")
        assert waiting.result(PATIENCE_SECONDS) == "x"
    assert getter.get_many("t", 10_000_000) == [str(i) for i in range(2, last + 1)]
    assert cluster_owner(cluster, "t") is new


def test_clients_carry_on_when_a_replica_takes_over_from_its_node(
    new_clusters: NewClusters, connect: Connect
) -> None:
    nodes = new_clusters[1].result()
    seed = nodes[0]
    putter, getter = (connect(seed.url, timeout=PATIENCE_SECONDS) for _ in range(2))
    for i in range(30):
        putter.put(f"t{i}", "before")
        assert getter.get(f"t{i}") == "before"
    assert int(seed.cli("dbsize")) > 5
    # What it has acknowledged but not passed on would be lost.
    assert seed.cli("wait", "1", "5000") == "1"
    set_node_timeout(nodes, 250)
    seed.kill()
    for i in range(30):
        putter.put(f"t{i}", "after")
    assert [getter.get_wait(f"t{i}", 5) for i in range(30)] == ["after"] * 30
    assert putter.stats()["messages"] == 60


# ---------------------------------------------------------------------- command line


def dsmq_command(
    *arguments: str, stdin: bytes | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "dsmq", *arguments],  # it need not be compiled again
        cwd=HERE,
        input=stdin if stdin is not None else b"",
        capture_output=True,
        timeout=2 * PATIENCE_SECONDS,
        env={**os.environ, **environment},
    )
    assert b"Traceback" not in done.stderr, done.stderr
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


@needs_signals
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_serve_ends_with_status_0_and_says_goodbye(
    serve_process: Callable[..., Process], connect: Connect, how: int
) -> None:
    process = serve_process()
    mq = connect(process.port)
    mq.put("t", "x")
    with within(5):
        assert process.stop(how) == 0
    log = "".join(process.log)
    for text in ("dsmq " + dsmq.__version__, "Ctrl-C", "stopped; goodbye"):
        assert text in log


def test_shutdown_ends_serve_with_status_0(
    serve_process: Callable[..., Process],
) -> None:
    process = serve_process()
    done = dsmq_command("shutdown", "--port", str(process.port))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert process.popen.wait(PATIENCE_SECONDS) == 0


def test_serve_on_a_port_in_use_is_one_line_and_status_1(server: Server) -> None:
    done = dsmq_command("serve", "--port", str(server.port))
    assert done.returncode == 1
    assert re.fullmatch(
        f"dsmq: .*cannot listen on 127.0.0.1:{server.port}: .*in use\n", done.stderr
    )


def test_put_and_watch_pass_messages_between_shells(server: Server) -> None:
    port = ["--port", str(server.port)]
    watching = subprocess.Popen(
        [
            sys.executable,
            str(HERE / "dsmq.py"),
            "watch",
            "a",
            "b",
            "--count",
            "4",
            *port,
        ],
        stdout=subprocess.PIPE,
    )
    eventually(lambda: {"a", "b"} <= set(server.store._topics))
    assert dsmq_command("put", "a", "hé llo", "two", *port).returncode == 0
    lines = b"three\nfour"
    assert dsmq_command("put", "b", *port, stdin=lines).returncode == 0
    out, _ = watching.communicate(timeout=PATIENCE_SECONDS)
    assert sorted(out.decode().splitlines()) == ["four", "hé llo", "three", "two"]
    assert watching.returncode == 0


def test_put_stores_each_line_of_a_large_standard_input_once(
    server: Server, connect: Connect
) -> None:
    mq = connect()
    lines = [f"{i} " + "x" * (i % 70) for i in range(30_000)]
    text = "\n".join(lines) + "\n"
    done = dsmq_command("put", "t", "--port", str(server.port), stdin=text.encode())
    assert done.returncode == 0
    assert mq.get_many("t", 40_000) == lines


def test_put_says_how_many_lines_it_stored_before_an_error(
    start_server: StartServer,
) -> None:
    server = start_server(max_bytes=100_000)
    text = "x\n" * 10_000
    done = dsmq_command("put", "t", "--port", str(server.port), stdin=text.encode())
    assert done.returncode == 1
    stored = server.store.stats()["messages"]
    assert f"stopped after {stored} lines: " in done.stderr
    done = dsmq_command("put", "t", "--port", str(server.port), stdin=b"\xff\n")
    assert done.returncode == 1 and "stopped after 0 lines" in done.stderr


def test_watch_ends_on_its_timeout_and_survives_a_restart(
    start_server: StartServer, connect: Connect
) -> None:
    server = start_server()
    command = [sys.executable, str(HERE / "dsmq.py"), "watch", "t", "--port"]
    command += [str(server.port), "--timeout"]
    topics, watching = server.store._topics, []
    for options in (["60", "--count", "2"], ["0.5"]):
        watching.append(subprocess.Popen([*command, *options], stdout=subprocess.PIPE))
        eventually(lambda: "t" in topics and len(topics["t"].waiters) == len(watching))
    long, brief = watching
    connect(server.port).put("t", "before")
    assert brief.communicate(timeout=PATIENCE_SECONDS)[0] == b"before\n"
    assert long.stdout is not None
    assert long.stdout.readline() == b"before\n"
    server.stop()
    again = start_server(server.port)
    connect(again.port).put("t", "after")
    assert long.communicate(timeout=PATIENCE_SECONDS)[0] == b"after\n"
    assert brief.returncode == long.returncode == 0


@needs_signals
def test_watch_ends_quietly_on_ctrl_c_and_on_a_closed_pipe(
    server: Server, connect: Connect
) -> None:
    mq = connect()
    for ending in ("interrupt", "closed pipe"):
        watching = subprocess.Popen(
            [
                sys.executable,
                str(HERE / "dsmq.py"),
                "watch",
                ending,
                "--port",
                str(server.port),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert watching.stdout is not None and watching.stderr is not None
        eventually(lambda e=ending: e in server.store._topics)  # type: ignore[misc]
        mq.put(ending, "x")
        assert watching.stdout.readline() == b"x\n"
        if ending == "interrupt":
            watching.send_signal(signal.SIGINT)
        else:
            watching.stdout.close()
            mq.put(ending, "y")
        status = watching.wait(PATIENCE_SECONDS)
        assert status == (130 if ending == "interrupt" else 0)
        assert watching.stderr.read() == b""
        watching.stdout.close()
        watching.stderr.close()


def test_stats_are_a_table_or_json(server: Server, connect: Connect) -> None:
    connect().put_many("a topic", ["x"] * 12)
    done = dsmq_command("stats", "--port", str(server.port))
    assert re.search(r"^messages +12$", done.stdout, re.M)
    assert re.search(r"^'a topic' +12 +\d+$", done.stdout, re.M)
    done = dsmq_command("stats", "--json", "--port", str(server.port))
    assert json.loads(done.stdout)["topics"]["a topic"]["messages"] == 12


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["nonsense"], 2, "invalid choice"),
        (["put"], 2, "TOPIC"),
        (["serve", "--port", "x"], 2, "invalid int"),
        (["serve", "--port", "99999"], 1, "port must be 0 to 65535"),
        (["serve", "--time-to-live", "nan"], 1, "time_to_live must be"),
        (["serve", "--certfile", "/nowhere"], 1, "No such file"),
        (["stats", "--secret-file", "/nowhere"], 1, "No such file"),
        (["watch", "t", "--timeout", "nan"], 1, "timeout must be"),
        (["stats", "--host", "nowhere.invalid"], 1, "no address for 'nowhere.invalid'"),
    ],
)
def test_errors_are_one_line_and_a_status(
    arguments: list[str], status: int, text: str
) -> None:
    done = dsmq_command(*arguments)
    assert done.returncode == status
    assert text in done.stderr
    assert status == 2 or done.stderr.count("\n") == 1


@past_one_machine
def test_the_command_line_takes_the_url_of_a_redis(connect: Connect) -> None:
    host = "--host", connect.address[0]
    mq = connect()
    command = [sys.executable, str(HERE / "dsmq.py"), "watch", "a", "--count", "3"]
    watching = subprocess.Popen([*command, *host], stdout=subprocess.PIPE)
    assert watching.stdout is not None
    with watching.stdout:
        while not select.select([watching.stdout], [], [], 0.1)[0]:
            mq.put("a", "is it there?")  # it sees what comes after it connected
        watching.stdout.readline()
        with ThreadPoolExecutor(2) as pool:
            putting = pool.submit(dsmq_command, "put", "b", *host, stdin=b"x\ny")
            assert dsmq_command("put", "a", "hé", "llo", *host).returncode == 0
            assert putting.result().returncode == 0
        watching.communicate(timeout=PATIENCE_SECONDS)
    assert watching.returncode == 0
    assert mq.get_many("b") == ["x", "y"]
    with ThreadPoolExecutor(2) as pool:
        telling = pool.submit(dsmq_command, "stats", "--json", *host)
        done = dsmq_command("shutdown", *host)
    stats = json.loads(telling.result().stdout)
    assert stats["topics"]["b"]["messages"] == 2
    assert done.returncode == 1 and "not stopped by its clients" in done.stderr


def test_bench_measures_a_private_server_or_a_running_one(server: Server) -> None:
    done = dsmq_command("bench", "--count", "20", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert len(figures) == 9 and all(f > 0 for f in figures.values())
    assert server.store.stats()["messages"] == 0
    done = dsmq_command("bench", "--count", "20", "--port", str(server.port))
    assert done.stdout.count("\n") == 9 and done.stderr.count("...") == 9
    assert server.store.stats()["messages"] > 100


@needs_signals
def test_closed_standard_streams_cause_no_traceback(server: Server) -> None:
    program = shlex.join([sys.executable, str(HERE / "dsmq.py")])
    line = f"{program} %s --port {server.port} %s"

    def check(command: str, closed: str, status: int) -> None:
        done = subprocess.run(
            ["sh", "-c", line % (command, closed)],
            stderr=subprocess.PIPE,
            timeout=2 * PATIENCE_SECONDS,
        )
        assert done.returncode == status, command
        assert b"Traceback" not in done.stderr

    cases = [
        ("put t x", ">&-", 0),
        ("stats", ">&-", 0),
        ("watch t --timeout 0", ">&-", 1),
        ("put t", "<&-", 1),
        ("--version; true", "2>&-", 0),
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(check, *zip(*cases)))
    assert server.store.stats()["messages"] == 1


@needs_signals
@pytest.mark.parametrize("path", ["dsmq.py", "demo.py"])
def test_a_demo_whose_reader_has_enough_ends(path: str) -> None:
    done = subprocess.run(
        ["sh", "-c", shlex.join([sys.executable, str(HERE / path)]) + " | head -n 1"],
        capture_output=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.stdout.startswith(b"server")


def test_an_empty_secret_in_the_environment_is_refused() -> None:
    done = dsmq_command("serve", "--port", "0", DSMQ_SECRET="")
    assert done.returncode == 1 and "secret must not be empty" in done.stderr


def test_help_and_version() -> None:
    assert dsmq_command("--version").stdout == f"dsmq {dsmq.__version__}\n"
    assert "example: dsmq" in dsmq_command("--help").stdout
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        helping = {n: pool.submit(dsmq_command, n, "--help") for n in dsmq._COMMANDS}
    for name, done in helping.items():
        text = done.result().stdout
        assert f"example: dsmq {name}" in text and "--secret-file" in text


# ------------------------------------------------------------- README and the demos


def readme_blocks(language: str) -> list[str]:
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", readme, re.S)


DEMOS = ["dsmq.py", "demo.py"]


Demos = dict[str, Future[subprocess.CompletedProcess[str]]]


@pytest.fixture(scope="session")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demos]:
    """Run once and at the same time, as each takes its time to be read; in a folder
    with nothing else."""
    folder = tmp_path_factory.mktemp("demos")
    for path in DEMOS:
        shutil.copy(HERE / path, folder)
    with ThreadPoolExecutor(2) as pool:
        running = {
            path: pool.submit(
                subprocess.run,
                [sys.executable, path],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=60,
            )
            for path in DEMOS
        }
        pool.shutdown(wait=False)  # its threads end then: later tests fork
        yield running


@pytest.mark.parametrize("path", DEMOS)
def test_the_demos_tell_their_story_and_leave_nothing_running(
    demos: Demos, path: str
) -> None:
    done = demos[path].result()
    assert done.returncode == 0 and done.stderr == ""
    for line in ("server", "putter", "getter A", "getter B", "stopped"):
        assert line in done.stdout
    received = [re.findall(rf"getter {n}: got (.*)", done.stdout) for n in "AB"]
    assert received[0] == received[1] and len(received[0]) >= 3


def test_readme_shows_what_the_demo_really_prints(demos: Demos) -> None:
    done = demos["dsmq.py"].result()
    shown = next(b for b in readme_blocks("text") if "putter:" in b)

    def lines(text: str) -> list[str]:
        return sorted(re.sub(r":\d{4,5}", ":PORT", text).strip().splitlines())

    assert lines(shown) == lines(done.stdout)


def test_the_python_examples_in_readme_run(
    server: Server, tmp_path: pathlib.Path
) -> None:
    for number, block in enumerate(readme_blocks("python")):
        path = tmp_path / f"example{number}.py"
        if "example.com" in block:
            compile(block, "README", "exec")
            continue
        port = dsmq._free_port() if "serve" in block else server.port
        block = block.replace("connect()", f"connect(port={port})")
        block = block.replace("target=serve", f"target=serve, args=({HOST!r}, {port})")
        path.write_text(block, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, path],
            env={**os.environ, "PYTHONPATH": str(HERE)},
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == re.findall(r"# -> (.*)", block)


def test_the_sessions_in_readme_print_what_it_shows(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    getter, putter = (
        doctest.DocTestParser().get_examples(block) for block in readme_blocks("pycon")
    )
    spaces: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    turns = [(0, e) for e in getter[:2]] + [(1, e) for e in putter]
    for who, example in turns + [(0, e) for e in getter[2:]]:
        source = example.source.replace("connect()", f"connect(port={server.port})")
        exec(compile(source, "README", "single"), spaces[who])
        assert capsys.readouterr().out == example.want
    for space in spaces:
        space["mq"].close()


def test_the_client_in_another_language_works(server: Server) -> None:
    if not shutil.which("node"):
        pytest.skip("no Node.js here")
    (client,) = readme_blocks("js")
    use = """
        (async () => {
          const getter = new Dsmq(PORT), putter = new Dsmq(PORT);
          await getter.hello;
          await putter.put("greetings", "Grüße, 世界 😀", "");
          console.log(await getter.get("greetings"));
          console.log(JSON.stringify(await getter.get("greetings")));
          console.log(JSON.stringify(await getter.get("greetings")));
          const waiting = getter.get("greetings", 10);
          await new Promise((resolve) => setTimeout(resolve, 100));
          await putter.put("greetings", "woken");
          console.log(await waiting);
          await putter.put("").catch((error) => console.log(error.message));
          getter.socket.end();
          putter.socket.end();
        })();
    """.replace("PORT", str(server.port))
    done = subprocess.run(
        ["node", "-e", client + use], capture_output=True, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0, done.stderr
    *lines, refusal = done.stdout.decode().splitlines()
    assert lines == ["Grüße, 世界 😀", '""', '""', "woken"]
    assert "1 to 1000 characters" in refusal


def test_readme_names_exactly_the_actions_and_methods_there_are() -> None:
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    protocol = readme[readme.index("## Protocol") :]
    actions = re.findall(r"^\| `(\w+)` \|", protocol[: protocol.index("\n## ")], re.M)
    assert actions == list(dsmq._Handler.ACTIONS)
    api = readme[readme.index("## Client") : readme.index("## Server")]
    methods = re.findall(r"^\| `(\w+)\(", api, re.M)
    public = [name for name in vars(Client) if not name.startswith("_")]
    assert sorted(methods) == sorted(n for n in public if n != "closed")
    for name in dsmq.__all__:
        assert f"`{name}" in readme


def test_readme_names_every_option_of_serve() -> None:
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    code = dsmq.serve.__code__
    for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
        assert f"`{name}" in readme, name
