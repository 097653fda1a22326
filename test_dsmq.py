"""Tests of dsmq, through real sockets and real processes, in the order of the file."""

from __future__ import annotations

import contextlib
import doctest
import functools
import gc
import importlib.util
import inspect
import itertools
import json
import logging
import math
import multiprocessing
import os
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
import tempfile
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, TypeVar
from unittest.mock import Mock

import pytest

import dsmq
from dsmq import AuthenticationError, DSMQError, QueueFull

HERE, HOST = Path(__file__).parent, "127.0.0.1"
PATIENCE_SECONDS = 20.0  # for whatever should come soon, on a machine under load
Client = dsmq.DSMQClientSideConnection
Log = pytest.LogCaptureFixture
Patch = pytest.MonkeyPatch
PassTime = Callable[[float], None]
Serve = Callable[..., "Server"]
Launch = Callable[..., "Process"]
NewRedis = Callable[..., "Redis"]
Raws = Callable[..., "Raw"]
T = TypeVar("T")

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
needs_signals = pytest.mark.skipif(os.name == "nt", reason="no such signals here")
over_tls_too = pytest.mark.parametrize("server", ["plain", "tls"], indirect=True)


def engines(*names: str) -> pytest.MarkDecorator:
    """Runs the test on each: a dsmq server in this process, or in a process of its own
    where the test forks or stops it; one Redis; a Redis Cluster."""
    return pytest.mark.parametrize("connect", names, indirect=True)


everywhere = engines("dsmq", "redis", "cluster")
# A socket that an interrupt, or redis 5, leaves unclosed is closed when collected.
unclosed = "ignore::pytest.PytestUnraisableExceptionWarning"
leaves_sockets = pytest.mark.filterwarnings(unclosed)

# For long runs by hand: DSMQ_CUTS=100000 pytest -k many_cuts; the others are for -k
# writers_put, killed, fault, connected_and_no and nothing_behind.
KNOBS = {"CUTS": "1000", "CROWD": "4,250,2", "RESTARTS": "2", "FUZZ_SECONDS": "0"}
KNOBS |= {"ROUNDS": "", "CYCLES": "100"}
KNOBS = {name: os.environ.get(f"DSMQ_{name}", usual) for name, usual in KNOBS.items()}


def skip(reason: str) -> NoReturn:
    """Skips the test; fails it where DSMQ_TEST_EVERYTHING says that nothing may be."""
    if "DSMQ_TEST_EVERYTHING" in os.environ:
        pytest.fail(f"{reason}, and DSMQ_TEST_EVERYTHING is set")
    pytest.skip(reason)


# --------------------------------------------------------------- waiting, and threads


def eventually(true: Callable[[], bool], now: Any = time.monotonic) -> None:
    """Waits until it is true, by the real clock, whatever a test makes of it."""
    end = now() + PATIENCE_SECONDS
    while not true():
        assert now() < end, "it never came true"
        time.sleep(0.005)


@contextlib.contextmanager
def within(seconds: float, least_seconds: float = 0.0) -> Iterator[None]:
    """Fails if the block hangs, or takes much longer than it promises, or less."""
    begun = time.monotonic()
    yield
    took = time.monotonic() - begun
    assert least_seconds <= took < seconds, f"took {took:.2f} s"


def raises(error: Any, text: str | None, work: Any, *a: Any, **options: Any) -> str:
    """The call soon raises such an error, which says such a text; gives all it says."""
    with within(5), pytest.raises(error, match=text) as caught:
        work(*a, **options)
    return str(caught.value)


def begin(work: Callable[..., T], *arguments: Any) -> Callable[..., T]:
    """Does the work in a thread of its own, and gives what waits for its outcome."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return lambda patience=PATIENCE_SECONDS: future.result(patience)


def together(work: Callable[..., T], *arguments: Iterable[Any]) -> list[T]:
    """Like map, each call in a thread of its own, all at once."""
    return [outcome() for outcome in [begin(work, *one) for one in zip(*arguments)]]


@contextlib.contextmanager
def meanwhile(pause_seconds: float, work: Any, *a: Any) -> Iterator[None]:
    """Does the work again and again, in a thread of its own, until the block ends."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(pause_seconds):
            work(*a)

    repeating = begin(repeat)
    yield
    ended.set()
    repeating()


def count_threads() -> int:
    """All that run Python, also those the module threading did not start."""
    return len(sys._current_frames())


# ------------------------------------------------------------------- other processes

PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
DSMQ = [sys.executable, "-m", "dsmq"]  # as a module it need not be compiled again
Done = tuple[int, str, str]


def start_command(*arguments: str, **options: Any) -> Any:
    """`python dsmq.py` with arguments."""
    return subprocess.Popen([*DSMQ, *arguments], cwd=HERE, **options)


@contextlib.contextmanager
def run_code(*lines: str) -> Iterator[Any]:
    """A Python of its own that runs the lines."""
    command = [sys.executable, "-c", "\n".join(lines)]
    with subprocess.Popen(command, stdin=-1, cwd=HERE, **PIPES) as child:
        yield child


def rest(process: Any, stdin: bytes | None = None) -> Done:
    """The status, and what it still says on both ways, once it has ended."""
    out, errors = process.communicate(stdin, timeout=2 * PATIENCE_SECONDS)
    return process.returncode, out.decode(), errors.decode()


# -------------------------------------------------------------------------- fixtures


@pytest.fixture
def pass_time(monkeypatch: Patch) -> PassTime:
    """Makes so many seconds pass at once for all that ask time.monotonic."""
    real, passed = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: real() + sum(passed))
    return passed.append


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a certificate for localhost and its key, made as README says."""
    folder = tmp_path_factory.mktemp("certificate")
    if not shutil.which("openssl"):
        skip("no openssl command here")
    command = next(b for b in readme_blocks("sh") if "openssl" in b)
    command = command.replace("queue.example.com", "localhost")
    subprocess.run(command, shell=True, cwd=folder, check=True, capture_output=True)
    return folder


class Server:
    """A server in a thread of this process, with TLS if there is a certificate."""

    def __init__(self, port: int = 0, tls: Path | None = None, **rest: Any):
        bounds = rest.pop("time_to_live", 600.0), rest.pop("max_bytes", 1 << 30)
        self.store = dsmq.MessageStore(*bounds)
        self.tls = tls
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls / "cert.pem", tls / "key.pem")
            rest["context"] = context
        self.inner = dsmq._Server(HOST, port, self.store, **rest)
        self.port: int = self.inner.server_address[1]
        self.thread = threading.Thread(target=self.inner.run)
        self.thread.start()

    def clients(self) -> int:
        return len(self.inner.connections)

    def join(self) -> None:
        self.thread.join(PATIENCE_SECONDS)
        assert not self.thread.is_alive(), "the server did not stop"

    def stop(self) -> None:
        if self.thread.is_alive():
            self.inner.shutdown()
        self.join()
        self.inner.server_close()


def eventually_waiting(server: Server, topic: str, count: int = 1) -> None:
    """Waits until so many readers wait for a message on the topic."""
    eventually(lambda: len(server.store._waiters.get(topic, ())) == count)


@pytest.fixture
def serve(caplog: Log) -> Iterator[Serve]:
    """Makes servers; fails the test on any fault inside one, whoever saw it or not."""
    with contextlib.ExitStack() as servers:

        def start(*arguments: Any, **options: Any) -> Server:
            one = Server(*arguments, **options)
            servers.callback(one.stop)
            return one

        yield start
    records = caplog.get_records("call") + caplog.get_records("teardown")
    faults = [r for r in records if r.name == "dsmq" and r.levelno >= logging.ERROR]
    assert not faults, [(fault.getMessage(), fault.exc_info) for fault in faults]


@pytest.fixture
def server(serve: Serve, request: pytest.FixtureRequest) -> Server:
    tls = getattr(request, "param", "plain") == "tls"
    return serve(tls=request.getfixturevalue("certificate") if tls else None)


class Process:
    """`python dsmq.py serve` in a process of its own."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        with open(log, "wb") as stderr:
            self.popen = start_command("serve", *arguments, stderr=stderr)
        self.pid = self.popen.pid
        eventually(lambda: "Ctrl-C" in log.read_text())
        self.port = int(re.findall(r"listening on .*:(\d+)", log.read_text())[0])

    def stop(self, how: int = 9) -> int:
        self.popen.send_signal(how)
        return int(self.popen.wait(PATIENCE_SECONDS))


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    processes: list[Process] = []

    def start(*arguments: str) -> Process:
        log = tmp_path / f"serve{len(processes)}.log"
        processes.append(Process(log, "--port", "0", *arguments))  # the last one counts
        return processes[-1]

    yield start
    for process in processes:
        process.stop()
        assert "Traceback" not in process.log.read_text()


class Connect:
    """Makes clients of its engine's server, or of the one at a port; closes them."""

    def __init__(self, engine: str, request: pytest.FixtureRequest) -> None:
        self.engine = engine
        self.clients = contextlib.ExitStack()
        self.fixture = request.getfixturevalue

    @functools.cached_property
    def nodes(self) -> list[Any]:
        """What serves: a Server, a Process, or each Redis."""
        if self.engine == "process":
            return [self.fixture("launch")()]
        nodes = self.fixture("server" if self.engine == "dsmq" else self.engine)
        return nodes if isinstance(nodes, list) else [nodes]

    def address(self, port: int | None = None) -> tuple[Any, ...]:
        """For dsmq.connect, in whichever process."""
        port = port or self.nodes[0].port
        past_one_machine = self.engine in ("redis", "cluster")
        return (f"redis://{HOST}:{port}",) if past_one_machine else (HOST, port)

    def __call__(self, port: int | None = None, **options: Any) -> Client:
        return self.clients.enter_context(dsmq.connect(*self.address(port), **options))


@pytest.fixture
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    one = Connect(getattr(request, "param", "dsmq"), request)
    with one.clients:
        yield one


class Raw:
    """A client that speaks bytes."""

    def __init__(self, server: Server) -> None:
        self.sock = socket.create_connection((HOST, server.port), PATIENCE_SECONDS)
        if server.tls:
            context = ssl.create_default_context(cafile=server.tls / "cert.pem")
            self.sock = context.wrap_socket(self.sock, server_hostname="localhost")
        self._frames = dsmq.FrameSocket(self.sock, 1 << 30)

    def send(self, **fields: Any) -> None:
        self.sock.sendall(dsmq.encode_frame(json.dumps(fields).encode()))

    def receive(self) -> Any:
        """The next reply; None at the end."""
        body = self._frames.receive(time.monotonic() + PATIENCE_SECONDS)
        return None if body is None else dsmq.decode_object(body)

    def ask(self, **fields: Any) -> Any:
        self.send(**fields)
        return self.receive()


@pytest.fixture
def raw(request: pytest.FixtureRequest) -> Iterator[Raws]:
    """Makes raw clients, of the fixture `server` if no other is given."""
    with contextlib.ExitStack() as socks:

        def connected(server: Server | None = None) -> Raw:
            one = Raw(server or request.getfixturevalue("server"))
            socks.enter_context(one.sock)
            return one

        yield connected


class Proxy:
    """Passes bytes on to a server, until told to cut."""

    def __init__(self, port: int) -> None:
        self._target = HOST, port
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self.cuts = self.connections = 0
        self.bytes_per_second = math.inf  # on the way down
        self.forgotten = 0  # of the connections so many, as by a NAT: nothing passes
        # Bytes that may pass, up and down, before the cut: of the next connections, and
        # of the newest.
        self.budgets: Callable[[], list[float]] = lambda: [math.inf, math.inf]
        self.budget = self.budgets()
        self._accepted: list[socket.socket] = []
        begin(self._accept)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed at the end of the test
            while True:
                self._accepted.append(self._listener.accept()[0])
                self.connections += 1
                self.budget = self.budgets()
                begin(self._pass, self._accepted[-1], self.budget)

    def _pass(self, near: socket.socket, left: list[float]) -> None:
        # One side may be gone, or both.
        with near, contextlib.suppress(OSError), socket.socket() as far:
            far.connect(self._target)
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            number = self.connections
            while min(left) > 0:
                for source in select.select([near, far], [], [])[0]:
                    sink, way = (far, 0) if source is near else (near, 1)
                    slow = way and self.bytes_per_second < math.inf
                    if not (data := source.recv(4000 if slow else 65536)):
                        return
                    if number <= self.forgotten:
                        continue
                    time.sleep(len(data) / self.bytes_per_second if slow else 0)
                    passed = data[: int(min(left[way], len(data)))]
                    left[way] -= len(data)  # before the test can know, and set it
                    sink.sendall(passed)
            self.cuts += 1

    def close(self) -> None:
        for sock in (self._listener, *self._accepted):
            with contextlib.suppress(OSError):  # it was closed already
                sock.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def proxy(connect: Connect, monkeypatch: Patch) -> Iterator[Proxy]:
    """Before the engine's own server. Clients retry at once, to meet many cuts."""
    monkeypatch.setattr(dsmq, "RETRY_PAUSE_SECONDS", 0.0001)
    with contextlib.closing(Proxy(connect.nodes[0].port)) as one:
        yield one


class Redis:
    """A redis-server of its own on this machine."""

    # The shell waits for its standard input to end, as it does when this process ends
    # in whichever way: no server outlives the tests.
    GUARD = 'redis-server "$@" & echo $!; read -r _; kill -9 $!; wait $! 2> log'

    def __init__(self, folder: str, *options: str) -> None:
        self.port, self._folder = quiet_port(), folder
        self._command = ["sh", "-c", self.GUARD, "sh", "--port", str(self.port)]
        self._command += ["--bind", HOST, "--save", "", "--logfile", "log", *options]
        self.start()

    def start(self) -> None:
        # In a session of its own: Ctrl-C ends it in its turn.
        options: Any = {"stdin": -1, "stdout": -1, "start_new_session": True}
        self._shell = subprocess.Popen(self._command, cwd=self._folder, **options)
        assert self._shell.stdout is not None
        self.pid = int(self._shell.stdout.readline())
        eventually(lambda: self.cli("ping") != "")

    def stop(self) -> None:
        if self._shell.poll() is None:
            self._shell.communicate(b"\n", timeout=PATIENCE_SECONDS)

    def cli(self, *words: str) -> str:
        command = ["redis-cli", "--raw", "-p", str(self.port), *words]
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE_SECONDS)
        return done.stdout.decode().strip()


def quiet_port() -> int:
    """A free port, as is the one 10,000 above it, which a cluster uses besides. Neither
    is of those that the system gives to connections, so both stay free for a while."""
    while True:
        port = random.randrange(12_000, 22_000)
        with contextlib.suppress(OSError):
            for one in (port, port + 10_000):
                socket.create_server((HOST, one)).close()
            return port


def redis_servers() -> Iterator[NewRedis]:
    """Starts Redis servers, and kills them at the end."""
    with contextlib.ExitStack() as stack:
        stack.callback(gc.collect)  # in this test, what redis 5 leaves unclosed

        def start(*options: str) -> Redis:
            if not importlib.util.find_spec("redis"):
                skip("the package redis is not installed")
            if not shutil.which("redis-server") or not shutil.which("redis-cli"):
                skip("no redis-server here")
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            one = Redis(folder, *options)
            stack.callback(one.stop)
            return one

        yield start


new_redis = pytest.fixture(redis_servers, name="new_redis")
start_lasting = pytest.fixture(redis_servers, name="start_lasting", scope="session")


@pytest.fixture(scope="session")
def lasting_redis(start_lasting: NewRedis) -> Redis:
    return start_lasting()


@pytest.fixture
def redis(lasting_redis: Redis) -> Redis:
    """One for all tests, emptied. Those that harm it start one of their own."""
    lasting_redis.cli("flushall")
    return lasting_redis


def form_cluster(start: NewRedis) -> list[Redis]:
    """Three nodes with a third of the slots each, and a replica of one of them."""
    options = ["--cluster-enabled", "yes", "--repl-diskless-sync-delay", "0"]
    # With a short timeout nodes also tell each other of new ones sooner.
    options += ["--cluster-node-timeout", "500"]
    nodes = together(lambda _: start(*options), range(4))
    seed, *places = (f"{HOST}:{node.port}" for node in nodes)
    nodes[0].cli("--cluster", "create", seed, *places[:2], "--cluster-yes")
    eventually(lambda: all("state:ok" in n.cli("cluster", "info") for n in nodes[:3]))
    nodes[0].cli("--cluster", "add-node", places[2], seed, "--cluster-slave")
    eventually(lambda: all("slave" in n.cli("cluster", "nodes") for n in nodes[:3]))
    # With a long one there is no failover, however long a node is stopped.
    nodes[0].cli("--cluster", "set-timeout", seed, "60000")
    return nodes


@pytest.fixture(scope="session", autouse=True)
def lasting_cluster(
    request: pytest.FixtureRequest, start_lasting: NewRedis
) -> Callable[[], list[Redis]]:
    """It takes seconds to form, in which the tests before its first go on."""
    wanted = any("cluster" in item.name for item in request.session.items)
    return begin(form_cluster, start_lasting) if wanted else list


@pytest.fixture
def cluster(lasting_cluster: Callable[[], list[Redis]]) -> list[Redis]:
    """Its masters, emptied: one may have been killed, and replaced by the replica."""
    role = "info", "replication"
    masters = [node for node in lasting_cluster() if "role:master" in node.cli(*role)]
    together(lambda node: node.cli("flushall"), masters)
    return masters


# ---------------------------------------------------------------------------- frames

TEXTS = [
    "", "a", " ", 'quo"te', "back\\slash", "nul\0", "tab\t\x1f\x7f", "line\nline\r",
    "é", "漢字", "😀\u2028", "$5\r\nhello\r\n",
]  # fmt: skip
NO_OBJECTS = [
    b"", b"nonsense", b"[]", b'"text"', b"12", b"null", b"{" * 3, b'{"a":"\n"}',
    b'{"a":NaN}', b'{"a":-Infinity}', b'{"a":"\xff"}', b'\xef\xbb\xbf{"a":1}',
    '{"a":1}'.encode("utf-16"), b"[" * 100_000, b'{"a":' * 100_000,
]  # fmt: skip


def test_text_is_encoded_as_json_and_what_is_no_json_object_is_refused() -> None:
    for text, times in itertools.product(TEXTS, (1, 10_000)):
        reference = json.dumps(text * times, ensure_ascii=False).encode()
        assert dsmq.encode_text(text * times) == reference
    for times in (1, 10_000):
        raises(ValueError, "surrogate", dsmq.encode_text, "\ud800" * times)
    for body in NO_OBJECTS:
        assert len(raises(dsmq.FrameError, None, dsmq.decode_object, body)) < 200


@contextlib.contextmanager
def frame_pair(limit_bytes: int = 1 << 20) -> Iterator[Any]:
    with socket.create_server((HOST, 0)) as listener:
        near = socket.create_connection(listener.getsockname(), PATIENCE_SECONDS)
        frames = dsmq.FrameSocket(listener.accept()[0], limit_bytes)
    with near, contextlib.closing(frames):
        yield near, frames


def test_frames_are_found_again_however_the_bytes_arrive() -> None:
    bodies = [b"", b"x", b"y" * 5000, b"z" * 300_000, b"end"]
    stream = b"".join(map(dsmq.encode_frame, bodies))
    with frame_pair() as (near, frames):
        for size in (1, 3, 4096, len(stream)):
            pieces = [stream[i : i + size] for i in range(0, 60 * size, size)]
            pieces.append(stream[60 * size :])
            sent = begin(lambda p=pieces: list(map(near.sendall, p)))
            assert [bytes(frames.receive() or b"") for _ in bodies] == bodies
            sent()
    for rest in (b"", b"\0\0", dsmq.encode_frame(b"whole")[:6]):
        with frame_pair() as (near, frames):
            near.sendall(dsmq.encode_frame(b"whole") + rest)
            near.close()
            assert frames.receive() == b"whole"
            if rest:
                raises(ConnectionResetError, None, frames.receive)
            else:  # the end between frames is told from a cut inside one
                assert frames.receive() is None


def test_a_frame_too_long_is_refused_and_one_that_never_comes_costs_no_memory() -> None:
    with frame_pair(1000) as (near, frames):
        near.sendall(struct.pack(">I", 1001))
        raises(dsmq.FrameError, "1001 bytes, but the limit is 1000", frames.receive)
    with frame_pair(1 << 30) as (near, frames):
        near.sendall(struct.pack(">I", 1 << 30))
        with meanwhile(0.02, near.sendall, b"x"):
            tracemalloc.start()
            end = time.monotonic() + 0.1  # though bytes go on coming
            raises(TimeoutError, None, frames.receive, end)
            assert tracemalloc.get_traced_memory()[1] < 10_000_000
            tracemalloc.stop()


# --------------------------------------------------------------------- message store

ROOM = 1 << 30
Store = dsmq.MessageStore


@pytest.fixture
def clock(monkeypatch: Patch) -> SimpleNamespace:
    moved = SimpleNamespace(now=1000.0)  # by the test
    monkeypatch.setattr(time, "monotonic", lambda: moved.now)
    return moved


@pytest.fixture
def store(clock: Any) -> Iterator[Store]:
    with contextlib.closing(Store(600.0, 4_000_000)) as one:
        yield one


def put(store: Store, topic: str, *bodies: bytes, origin: Any = None) -> int:
    """Gives the id of the last one."""
    return int(store.put(topic, list(bodies), origin)[0])


def read(store: Store, topic: str, after: int, *limits: int) -> dict[int, bytes]:
    """The messages by id."""
    return {i: body for i, _, body in store.get(topic, after, *limits or (9999, ROOM))}


def tidy(store: Store) -> None:
    """What the timer thread does."""
    while store.purge():
        pass
    store.tidy()


def test_ids_grow_by_one_and_are_never_used_again(store: Store, clock: Any) -> None:
    head = store.head
    assert head < 2**53  # where the integers of other languages end
    assert put(store, "a", b"1") == head + 1
    assert put(store, "b", b"2", b"3") == head + 3
    assert put(store, "a", b"4") == head + 4 == store.head
    assert read(store, "a", head) == {head + 1: b"1", head + 4: b"4"}
    assert read(store, "b", head) == {head + 2: b"2", head + 3: b"3"}
    clock.now += 601
    assert store.purge() and store.stats()["messages"] == 0
    assert put(store, "a", b"5") == head + 5
    assert read(store, "a", head) == {head + 5: b"5"}
    time.sleep(0.001)
    with contextlib.closing(Store(600, ROOM)) as later:
        assert later.head > store.head


def test_what_expired_is_left_out_and_purged_in_steps(store: Store, clock: Any) -> None:
    head = store.head
    for i in range(10):
        put(store, "a", b"%d" % i)
        clock.now += 10
    clock.now += 600 - 100 + 45  # 0 to 4 are older than 600 s
    assert list(read(store, "a", head).values()) == [b"5", b"6", b"7", b"8", b"9"]
    assert store.get("a", head, 99, ROOM)[0][1] - clock.now == pytest.approx(5)
    assert store.get_latest("a", head)[0][2] == b"9"
    clock.now += 60
    assert read(store, "a", head) == {} and store.get_latest("a", head) == []
    tidy(store)
    put(store, "a", b"exactly")
    clock.now += 599.999
    assert read(store, "a", head) and not store.purge()
    clock.now += 0.002
    assert not read(store, "a", head) and store.purge()
    for i in range(3000):
        put(store, f"topic {i % 7}", b"x" * 10)
    put(store, "large", *[b"x" * (1 << 20)] * 3)
    clock.now += 1
    put(store, "alive", b"y")
    clock.now += 599.5
    assert len(list(iter(store.purge, False))) > 5
    stats = store.stats()
    assert stats["messages"] == 1 and list(stats["topics"]) == ["alive"]
    assert stats["bytes"] == stats["topics"]["alive"]["bytes"] < 1000
    clock.now += 1
    assert store.purge()
    stats = store.stats()
    assert stats["bytes"] == 0 and stats["topics"] == {}
    rng = random.Random(1)
    for _ in range(500):
        bodies = [b"x" * rng.randrange(50)] * rng.randrange(1, 4)
        put(store, f"t{rng.randrange(5)}", *bodies)
        clock.now += rng.random() * 10
        store.purge()
        stats = store.stats()
        for what in ("bytes", "messages"):
            assert stats[what] == sum(t[what] for t in stats["topics"].values())


def test_a_get_fits_its_limit_and_its_room_but_gives_at_least_one(store: Store) -> None:
    head, each = store.head, 100 + dsmq.ID_BYTES
    put(store, "a", *[b"x" * 100] * 5000)
    assert len(read(store, "a", head, 3, ROOM)) == 3
    counts = {ROOM: 5000, 10 * each: 10, 2000 * each + 1: 2000, 0: 1}
    for room_bytes, count in counts.items():
        assert len(read(store, "a", head, 9999, room_bytes)) == count
    assert len(read(store, "a", head + 4990)) == 10
    assert read(store, "a", head + 5000) == read(store, "a", 2**63 - 1) == {}
    assert list(read(store, "a", -(2**63), 1, ROOM)) == [head + 1]


def test_a_late_reader_begins_exactly_at_its_message(store: Store, clock: Any) -> None:
    first = store.head
    for i in range(10):  # at 1000, 1010 ... 1090 s
        put(store, "a", b"%d" % i)
        clock.now += 10
    for seconds, unseen in ((0, 10), (0.5, 10), (10, 9), (10.5, 9), (55, 5), (1e9, 0)):
        assert store.head_before(seconds) == first + unseen
    clock.now += 505  # the oldest has expired
    assert b"0" not in read(store, "a", store.head_before(1e9)).values()


def test_a_put_beyond_max_bytes_stores_nothing(store: Store, clock: Any) -> None:
    head = put(store, "a", b"x" * 2_000_000)
    for _ in range(3):
        raises(QueueFull, "max_bytes 4000000", put, store, "a", b"y", b"z" * 2_000_000)
    assert store.head == head
    assert list(read(store, "a", head - 1)) == [head]
    for topics, most in ((1, 60_000), (1_000_000, 12_000)):
        clock.now += 601
        tidy(store)
        assert put(store, "a", b"y", b"z" * 2_000_000)  # which fits again
        clock.now += 601
        tidy(store)
        with pytest.raises(QueueFull):  # though they are empty
            for i in range(1_000_000):
                put(store, str(i % topics), b"")
        assert store.stats()["messages"] < most


def test_a_repeated_put_is_stored_once_or_refused_if_settled(store: Store) -> None:
    head = store.head
    puts = [(1, "c", 7, -1), (2, "c", 8, -1), (1, "c", 7, -1), (3, "d", 7, -1)]
    puts += [(4, "c", 3, -1)]  # a sequence that is lower, but new
    puts += [(5, "c", 10, 9), (1, "c", 7, -1), (6, "d", 9, -1)]
    for expected, client, sequence, settled in puts:
        origin = client, sequence, settled
        assert put(store, "a", b"%d" % expected, origin=origin) == head + expected
    late = "c", 9, 8
    raises(DSMQError, "sequence 9 was settled", store.put, "a", [b"late"], late)
    assert list(read(store, "a", head).values()) == [b"%d" % i for i in range(1, 7)]


def test_puts_are_remembered_in_bounded_memory(store: Store, clock: Any) -> None:
    def is_known(client: str, sequence: int) -> bool:
        head = store.head
        return put(store, "a", b"x", origin=(client, sequence, -1)) <= head

    for seconds, known in ((0, False), (599, True), (601, False)):
        clock.now += seconds
        tidy(store)
        assert is_known("quiet", 1) == known
    for i in range(640):
        assert not is_known("busy", i)
    assert is_known("busy", i) and not is_known("busy", 0)
    for i in range(10_010):
        assert not is_known(str(i), 1)
    tidy(store)
    assert is_known(str(i), 1) and not is_known("0", 1)


# ------------------------------------------------------------------------------ wire

PUT: dict[str, Any] = {"action": "put", "topic": "t", "messages": ["x"]}
GET: dict[str, Any] = {"action": "get", "topic": "t", "after": 0}
HELLO: dict[str, Any] = {"action": "hello", "protocol": 1}
ACTIONS = [*dsmq._Handler.ACTIONS]


def test_the_actions_answer_as_told(server: Server, serve: Serve, raw: Raws) -> None:
    peer, head, limit = raw(), server.store.head, dsmq.MAX_FRAME_BYTES
    hello: dict[str, Any] = {"protocol": 1, "head": head, "max_frame_bytes": limit}
    hello |= {"server": server.inner.name, "time_to_live": 600}
    assert peer.ask(**HELLO) == raw().ask(action="hello", extra=[{}]) == hello
    assert peer.ask(**PUT | {"messages": ["a", ""]}) == {"head": head + 2}
    reply = peer.ask(**GET)
    assert 599 < reply.pop("expires") <= 600
    assert reply == {"messages": ["a"], "ids": [head + 1]}
    reply = peer.ask(**GET | {"after": head + 1}, limit=5)
    assert reply["messages"] == [""] and reply["ids"] == [head + 2]
    latest = GET | {"action": "get_latest", "limit": 0}  # a field it does not have
    for after in (-(2**63), -1, 0, head, head + 1, head + 2, head + 1000, 2**63 - 1):
        there = after < head + 2  # below the head, and not at or above it
        reply = peer.ask(**latest | {"after": after})
        assert reply["messages"] == [""] * there and reply["ids"] == [head + 2] * there
        reply = peer.ask(**GET | {"after": after})
        assert reply["ids"] == [max(head + 1, after + 1)] * there
    put = PUT | {"client": "c"}
    for sequence, settled, id_ in ((1, 0, 3), (1, 0, 3), (3, 2, 4), (1, 0, 3)):
        reply = peer.ask(**put, sequence=sequence, settled=settled)
        assert reply == {"head": head + id_}
    assert peer.ask(**put, sequence=2)["code"] == "stale"
    stats = peer.ask(action="stats")
    assert stats["messages"] == 4 and stats["clients"] == 2
    assert peer.ask(**HELLO, since=0)["head"] == head + 4
    assert peer.ask(**HELLO, since=1e9)["head"] == head
    assert peer.ask(action="shutdown") == {}
    assert peer.receive() is None
    another = raw(serve(server.port, time_to_live=7)).ask(**HELLO)
    assert another["server"] != hello["server"] and another["time_to_live"] == 7


# The field that is wrong in a request (`...`: missing), and what the refusal names.
ORIGIN = {"client": "c", "sequence": 1}
BAD_FIELDS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    *(({}, {"action": a}, str(a)) for a in (None, 5, "Get", "handle")),
    *(({}, {"action": a}, n) for a, n in ((["get"], "list of 1"), ("\ud800", "d800"))),
    (HELLO, {"protocol": 2}, "protocol must be 1 to 1, not 2"),
    *((HELLO, {"protocol": p}, "protocol") for p in ("1", True)),
    *((HELLO, {"since": s}, "since") for s in (-1, "1", True, None)),
    *((PUT, {"topic": t}, "topic") for t in (..., "", 1)),
    *((PUT, {"topic": t}, n) for t, n in (("x" * 1001, "1000"), ("\udfff", "udfff"))),
    *((PUT, {"messages": m}, "messages") for m in (..., (), "x")),
    *((PUT, {"messages": ["x", m]}, "1 to 100000 texts") for m in (None, ["y"])),
    (PUT, {"messages": ["ok", "a\ud800b"]}, "surrogate"),
    (PUT, {"messages": [""] * 100_001}, "100000"),
    (PUT, {"client": "c"}, "sequence"),
    (PUT | ORIGIN, {"sequence": 1.5}, "sequence"),
    *((PUT | ORIGIN, {"client": c}, "client") for c in (1, "")),
    (PUT | ORIGIN, {"client": "\ud800"}, "ud800"),
    *((GET, {"after": a}, "after") for a in (..., None, "1")),
    *((GET, {"after": a}, str(a)) for a in (True, 1.0)),
    *((GET, {"after": a}, "64-bit") for a in (2**63, -(2**63) - 1, int("9" * 4000))),
    *((GET, {"limit": n}, "limit") for n in (0, -1, True, 1.5)),
    *((GET, {"wait": w}, "wait") for w in (-0.1, "1", True, None)),
    (GET | {"action": "get_latest"}, {"after": ...}, "after"),
]
BROKEN = [*map(dsmq.encode_frame, NO_OBJECTS), dsmq.encode_frame(b"nonsense") * 1000]
BROKEN += [struct.pack(">I", 1 << 31) + b"x", b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"]
BROKEN += [struct.pack(">I", dsmq.MAX_FRAME_BYTES + 1)]


def test_bad_requests_and_frames_are_refused(server: Server, raw: Raws) -> None:
    peer, head = raw(), server.store.head

    def check(reply: dict[str, Any], named: str) -> None:
        assert set(reply) == {"error", "code"}
        assert named in reply["error"] and len(reply["error"]) < 300
        assert peer.ask(**HELLO)["head"] == head  # it changed nothing

    for fields, wrong, named in BAD_FIELDS:
        request = {k: v for k, v in (fields | wrong).items() if v != ...}
        check(peer.ask(**request), named)
    infinite = b'{"action":"get","topic":"t","after":0,"wait":1e999}'
    peer.sock.sendall(dsmq.encode_frame(infinite))
    check(peer.receive(), "wait")
    peer.sock.sendall(dsmq.encode_frame(b'{"after":' + b"9" * 1_000_000 + b"}"))
    with within(3):
        assert peer.receive()["error"]
    for data in BROKEN:
        broken = raw()
        broken.sock.sendall(data)
        assert broken.receive()["code"] == "bad_frame"
        with contextlib.suppress(ConnectionResetError):
            assert broken.receive() is None
        broken.sock.close()
    assert raw().ask(**PUT) == {"head": head + 1}
    eventually(lambda: server.clients() == 2)


@over_tls_too
def test_requests_wait_their_turn_or_for_a_put(server: Server, raw: Raws) -> None:
    reader, writer, ahead, elsewhere = (raw() for _ in range(4))
    requests = [PUT | {"messages": ["a"]}, GET, {}, GET | {"topic": "u", "wait": 0.05}]
    requests += [PUT | {"messages": ["b"]}, GET | {"action": "get_latest"}]
    reader.sock.sendall(b"".join(map(dsmq.encode_object, requests)))
    replies = [reader.receive() for _ in requests]
    assert [r.get("messages") for r in replies] == [None, ["a"], None, [], None, ["b"]]
    assert set(replies[2]) == {"code", "error"} and set(replies[4]) == {"head"}
    wait = dsmq.encode_object(GET | {"topic": "v", "wait": 20})
    reader.sock.sendall(wait + dsmq.encode_object(HELLO))
    eventually_waiting(server, "v")
    reader.send(**GET)
    head = writer.ask(**PUT | {"topic": "v"})["head"]
    replies = [reader.receive() for _ in range(3)]
    assert [r.get("messages") for r in replies] == [["x"], None, ["a"]]
    assert replies[1]["head"] == head
    last = GET | {"after": head + 20}
    ahead.send(**last, wait=20)  # it is above the head
    elsewhere.send(**GET | {"topic": "u"}, wait=0.3)
    for i in range(20):
        reader.send(**GET | {"after": head + i}, wait=20)
        if i % 2:
            eventually_waiting(server, "t", 2)
        writer.ask(**PUT | {"messages": [str(i)]})
        assert reader.receive()["messages"] == [str(i)]
    assert set(writer.ask(action="stats")["topics"]) == {"t", "v"}
    with within(5):
        reply = reader.ask(**last, wait=0.05)
        assert reply == elsewhere.receive() == {"messages": [], "ids": []}
    reader.send(**last, wait=20, limit=2)
    eventually_waiting(server, "t", 2)
    writer.ask(**PUT | {"messages": ["a", "b", "c"]})
    for peer, messages in ((reader, ["a", "b"]), (ahead, ["a"])):
        reply = peer.receive()
        assert reply["messages"] == messages
        assert reply["ids"] == [head + 21, head + 22][: len(messages)]
        assert 599 < reply["expires"] <= 600
    eventually_waiting(server, "t", 0)


def test_a_crowd_that_waits_is_answered_at_once(server: Server, raw: Raws) -> None:
    crowd = [raw() for _ in range(40)]  # more than a putter answers by itself, ...
    for i, peer in enumerate(crowd):
        peer.send(**GET, wait=30, limit=1 + i % 20)  # ... and than fit one round
    eventually_waiting(server, "t", len(crowd))
    with within(10):
        raw().ask(**PUT)
        assert {str(peer.receive()["messages"]) for peer in crowd} == {"['x']"}


LONG = "x" * 10_000_000  # more than the system takes for a peer that does not read


@over_tls_too
def test_long_messages_reach_slow_waiting_readers(server: Server, raw: Raws) -> None:
    writer, lone, *crowd = (raw() for _ in range(4))
    for topic, readers in (("lone", [lone]), ("crowd", crowd)):
        for reader in readers:
            reader.send(**GET | {"topic": topic}, wait=20)
        eventually_waiting(server, topic, len(readers))
        with within(10):  # the readers do not read yet
            writer.ask(**PUT | {"topic": topic, "messages": [LONG]})
            writer.ask(**PUT | {"topic": topic, "messages": ["next"]})
        for reader in readers:
            assert reader.receive()["messages"] == [LONG]
            assert reader.ask(**HELLO)["protocol"] == 1


def test_slowness_is_no_stall(server: Server, raw: Raws, monkeypatch: Patch) -> None:
    reader, writer = raw(), raw()
    reader.send(**GET, wait=1)
    eventually_waiting(server, "t")
    monkeypatch.setattr(dsmq, "STALL_SECONDS", 0.25)
    reader.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1_000_000)
    writer.ask(**PUT | {"messages": [LONG]})
    with reader.sock.makefile("rb") as stream:
        (left,) = struct.unpack(">I", stream.read(4))
        assert left > 8_000_000
        for step in [1_000_000] * 8 + [left - 8_000_000]:
            stream.read(step)
            time.sleep(0.075)
    assert reader.ask(**HELLO)["protocol"] == 1


@over_tls_too
def test_non_readers_are_dropped(server: Server, raw: Raws, monkeypatch: Patch) -> None:
    writer = raw()
    writer.ask(**PUT | {"messages": ["x" * 1_000_000]})
    threads, greedy, closing = count_threads(), raw(), raw()
    for peer in (greedy, closing):
        peer.sock.sendall(dsmq.encode_object(GET) * 50)
    eventually(lambda: server.clients() == 3)
    with within(10):
        for _ in range(20):
            writer.ask(**PUT)
    assert server.clients() == 3
    for peer in (greedy, closing):
        peer.sock.close()
    eventually(lambda: server.clients() == 1)
    monkeypatch.setattr(dsmq, "STALL_SECONDS", 0.3)
    greedy, waiting = raw(), raw()
    greedy.sock.sendall(dsmq.encode_object(GET) * 50)
    waiting.send(**GET | {"topic": "u"}, wait=20)
    eventually_waiting(server, "u")
    with within(10):
        writer.ask(**PUT | {"topic": "u", "messages": [LONG]})
    eventually(lambda: server.clients() == 1)
    eventually(lambda: count_threads() <= threads)


def test_who_stalls_is_cut(server: Server, raw: Raws, monkeypatch: Patch) -> None:
    monkeypatch.setattr(dsmq, "STALL_SECONDS", 0.2)
    idle, stalling, half, vanishing = (raw() for _ in range(4))
    assert idle.ask(**HELLO) == stalling.ask(**HELLO)
    stalling.sock.sendall(struct.pack(">I", 1000) + b"{")
    half.sock.sendall(b"\0")
    vanishing.send(**GET, wait=20)
    eventually_waiting(server, "t")
    vanishing.sock.close()
    eventually(lambda: server.clients() == 1)
    eventually_waiting(server, "t", 0)
    assert idle.ask(**HELLO)["protocol"] == 1  # idle is fine for ever


def fuzzed_request(rng: random.Random) -> bytes:
    """A frame that is right, or wrong in some way."""
    values: list[Any] = [
        None, True, 0, 1, -1, 2**63, 1.5, 1e308, "", "t", "\ud800", "x" * 1001,
        [], ["m"], ["m", 1], {}, {"a": []}, "hello", math.nan,
    ]  # fmt: skip
    request = dict(PUT | GET if rng.random() < 0.5 else {})
    fields = ["after", "client", "limit", "limit_bytes", "messages", "nonce"]
    fields += ["sequence", "settled", "since", "topic"]
    for name in rng.sample(fields, rng.randrange(5)):
        request[name] = rng.choice(values)
    request["wait"] = rng.choice([0, 0.001, "x"])
    request["action"] = rng.choice([*ACTIONS[:-1] * 2, "nonsense", None, 3])
    frame = bytearray(dsmq.encode_frame(json.dumps(request).encode()))
    for _ in range(rng.choice([0, 0, 1, 3])):
        frame[rng.randrange(rng.choice([4, *[len(frame)] * 9]))] = rng.randrange(256)
    if rng.random() < 0.05:
        del frame[rng.randrange(len(frame)) :]
    return bytes(frame)


def test_no_bytes_a_peer_sends_cause_a_fault(server: Server, raw: Raws) -> None:
    seconds = float(KNOBS["FUZZ_SECONDS"])
    seed = int(time.time()) if seconds else 3
    rng, end = random.Random(seed), time.monotonic() + seconds
    rounds, whole = 0, dsmq.encode_object(GET)
    while rounds < 500 or time.monotonic() < end:
        rounds += 1
        with socket.create_connection((HOST, server.port), 5) as sock:
            sock.sendall(whole[: rng.randrange(1, len(whole))])  # and no more
        with socket.create_connection((HOST, server.port), 5) as sock:
            frames = b"".join(fuzzed_request(rng) for _ in range(rng.randrange(1, 12)))
            with contextlib.suppress(ConnectionError):
                sock.sendall(frames)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):
                    pass
    assert raw().ask(**HELLO)["protocol"] == 1, seed
    eventually(lambda: server.clients() == 1)


# ---------------------------------------------------------------------------- client

# The newest id in Redis, as after a step back of its clock by an hour.
AHEAD = f"{int(time.time() * 1000) + 3_600_000}-7"


def numbers(*bounds: int) -> list[str]:
    return list(map(str, range(*bounds)))


@everywhere
def test_any_text_comes_through_and_topics_do_not_mix(connect: Connect) -> None:
    mq, late = connect(), connect()
    assert mq.get("a") == mq.get_latest("a") == "" and mq.get_many("a") == []
    topics = {*TEXTS[1:], "A", "a ", "e\u0301", "x" * 1000, "0", "*", "head"}
    topics |= {"{", "}", "{}", "}a{b}"}  # braces mean something in a key of Redis
    for topic in topics:
        mq.put(topic, f"in {topic}")
    for topic in topics:
        assert mq.get(topic) == f"in {topic}"
        assert mq.get(topic) == mq.get_latest(topic) == ""
    assert set(mq.stats()["topics"]) == topics
    for text in [*TEXTS, "x" * 3_000_000]:
        mq.put("texts", text)
        assert mq.get("texts") == text
    assert late.get_many("texts") == [*TEXTS, "x" * 3_000_000]


@everywhere
def test_every_client_reads_every_message_at_its_own_pace(connect: Connect) -> None:
    putter, fast, slow, away = (connect() for _ in range(4))
    got: list[str] = []
    for text in numbers(1200):
        putter.put("t", text)
        if text.endswith("0"):
            got.append(fast.get("t"))
    got += iter(lambda: fast.get("t"), "")
    assert got == numbers(1200)
    for mq in (slow, putter):
        assert [mq.get("t") for _ in range(1201)] == [*numbers(1200), ""]
    putter.put_many("t", numbers(1200, 10_000))
    assert away.get_many("t", 20_000) == numbers(10_000)


@everywhere
def test_a_client_sees_all_put_after_it_connected_and_no_more(
    connect: Connect, monkeypatch: Patch
) -> None:
    putter, rounds = connect(), {"dsmq": 120, "redis": 100, "cluster": 12}
    real = time.time_ns
    for i in range(int(KNOBS["ROUNDS"] or rounds[connect.engine])):
        step = (0, 86400, -86400)[i % 3] * 10**9  # of this process's clock
        monkeypatch.setattr(time, "time_ns", lambda s=step: real() + s)
        monkeypatch.setattr(time, "time", lambda: time.time_ns() / 1e9)
        if i < 3:
            with within(5, 0.05):
                assert putter.get_wait("never", 0.05) == ""
        if i == 90 and connect.engine == "redis":
            connect.nodes[0].cli("set", "dsmq:head", AHEAD)
        # On new topics, as Redis would make the ids of each from its clock alone, whose
        # milliseconds the puts before and after may share.
        putter.put(f"old {i}", "before")
        with dsmq.connect(*connect.address()) as late:
            if i % 2:
                assert late.get(f"old {i}") == late.get_latest(f"old {i}") == ""
            putter.put(f"new {i}", "after")
            putter.put(f"old {i}", "after")
            assert late.get(f"new {i}") == "after"
            assert late.get_many(f"old {i}") == ["after"]


def test_a_late_reader_sees_the_past(pass_time: PassTime, connect: Connect) -> None:
    putter = connect()
    putter.put_many("t", ["1", "2"])
    assert connect(since=math.inf).get_many("t") == ["1", "2"]
    assert connect(since=60).get_latest("t") == "2"
    assert connect().get("t") == connect(since=0).get("t") == ""
    pass_time(100)
    putter.put("t", "3")
    assert connect(since=60).get_many("t") == ["3"]


@everywhere
def test_reads_give_one_or_the_newest_or_many(connect: Connect) -> None:
    putter, getter, mq = connect(), connect(), connect()
    putter.put_many("t", ["1", "2", "3"])
    assert getter.get_latest("t") == "3"
    assert getter.get_latest("t") == getter.get("t") == ""
    putter.put_many("t", ["4", "5", "6"])
    assert getter.get("t") == "4"  # and reads 5 and 6 ahead
    putter.put("t", "7")
    assert [getter.get_latest("t"), getter.get("t")] == ["7", ""]
    putter.put_many("t", ["8", "9"])
    assert getter.get("t") == "8"
    assert getter.get_latest("t") == "9"  # though it was read ahead
    assert getter.get_latest("t") == ""
    putter.put_many("t", numbers(10, 2500))
    assert mq.get("t") == "1"
    assert mq.get_many("t", 3) == ["2", "3", "4"]
    assert mq.get_many("t") == numbers(5, 105)
    assert mq.get_many("t", 10_000) == numbers(105, 2500)
    assert mq.get_many("t", 1) == []
    mq.put_many("t", ["", "", "", "", "x", ""])  # empty ones are messages, too
    assert mq.get_many("t", 2) == ["", ""]
    assert [mq.get("t"), mq.get_wait("t", 20), mq.get("t")] == ["", "", "x"]
    assert list(mq.listen("t", timeout=0.01)) == [""]


@engines("dsmq", "redis")
def test_put_many_of_more_than_a_frame_goes_in_several(connect: Connect) -> None:
    mq = connect()
    messages = [f"{i} " + "x" * (i % 4 * 500_000) for i in range(40)]
    assert sum(map(len, messages)) > dsmq.MAX_FRAME_BYTES
    mq.put_many("t", messages)
    assert mq.get_many("t", 1000) == messages
    if connect.engine == "redis":
        calls = connect.nodes[0].cli("info", "commandstats")
        assert re.search(r"cmdstat_eval:calls=([2-9]|\d\d)", calls)


@everywhere
def test_a_waiting_reader_wakes_within_milliseconds(connect: Connect) -> None:
    putter, getter, late = (connect() for _ in range(3))
    listener = connect().listen("t")
    delays = []
    for text in numbers(41):
        waiting = begin(lambda: (getter.get_wait("t", 20), time.monotonic()))
        listening = begin(next, listener)
        time.sleep(0.01 * (int(text) % 2))  # so that they wait on the server
        put_at = time.monotonic()
        putter.put("t", text)
        assert late.get_wait("t", 0.001) == text  # be the others' round still to come
        got, woken_at = waiting()
        assert got == listening() == text
        delays.append(woken_at - put_at)
    assert sorted(delays)[20] < 0.05, delays  # polling would show


@everywhere
def test_a_wait_lasts_as_long_as_it_should(connect: Connect) -> None:
    mq = connect()
    # Without a timeout it is tuned as in the original.
    assert mq._initial_retry * (2**mq._n_tries - 1) == pytest.approx(10.23)
    mq._n_tries, mq._initial_retry = 3, 0.01
    mq._timeout = 0.2  # each request waits for half of it
    waiting = begin(mq.get_wait, "t", math.inf)
    for arguments, least in ((("u",), 0.07), (("u", 0), 0.0), (("u", 0.15), 0.15)):
        with within(least + 5, least):
            assert mq.get_wait(*arguments) == ""
    mq.put_many("t", ["at last", "x", "y"])
    assert waiting() == "at last"
    with within(5, 0.05):
        assert list(mq.listen("t", timeout=0.05)) == ["x", "y"]


@engines("dsmq", "redis")
def test_long_messages_are_read_ahead_as_short_ones_are(connect: Connect) -> None:
    mq = connect()
    mq.put_many("t", ["x" * 100_000] * 30)
    assert len(mq.get_many("t", 30)) == 30
    assert mq._read_ahead_bytes >= dsmq.FIRST_READ_AHEAD_BYTES


def test_what_was_read_ahead_expires_too(pass_time: PassTime, connect: Connect) -> None:
    mq = connect()
    mq.put_many("t", ["1", "2", "3"])
    assert mq.get("t") == "1"  # and reads the others ahead
    pass_time(300)
    mq.put_many("t", ["4", "5", "6", "7"])
    pass_time(301)
    assert mq.get("t") == "4"
    pass_time(300)
    mq.put("t", "8")
    assert mq.get_many("t", 2) == ["8"]
    assert mq.get("t") == ""


def test_a_tiny_time_to_live_hangs_no_call(serve: Serve, connect: Connect) -> None:
    port = serve(time_to_live=0.001).port
    mq, putter = connect(port), connect(port)
    with within(8), meanwhile(0, putter.put, "t", "x"):
        for _ in range(200):
            mq.get("t")
            mq.get_many("t")
        mq.get_wait("t", 0.1)


@everywhere
def test_stats_tell_what_the_server_holds(connect: Connect) -> None:
    one, _ = connect(), connect()
    one.put_many("a", ["x", "yy"])
    one.put("é\n", "zzz")
    stats = one.stats()
    topics, ours = stats.pop("topics"), connect.engine == "dsmq"
    assert {t: n["messages"] for t, n in topics.items()} == {"a": 2, "é\n": 1}
    assert sum(n["bytes"] for n in topics.values()) == stats.pop("bytes") > 0
    assert 0 <= stats.pop("uptime") < (60 if ours else math.inf)
    clients, version = stats.pop("clients"), stats.pop("version")
    # Redis has other clients too, and a version of its own.
    assert clients == 2 and version == dsmq.__version__ if ours else clients >= 2
    max_bytes = (1 << 30) * ours
    assert stats == {"messages": 3, "time_to_live": 600, "max_bytes": max_bytes}


def test_what_a_small_frame_cannot_hold_is_said(serve: Serve, connect: Connect) -> None:
    mq, sizes = connect(serve(max_frame_bytes=1000).port), []
    with pytest.raises(ValueError) as refused:
        for size in range(600, 1000):
            mq.put("t", "x" * size)
            sizes.append(size)
    assert len(sizes) > 100 and f"takes {sizes[-1] + 3} bytes" in str(refused.value)
    raises(ValueError, "takes 1002 bytes", mq.put, "t", '"' * 500)  # each takes two
    assert [len(m) for m in mq.get_many("t", 1000)] == sizes
    for i in range(100):
        mq.put(f"topic {i}", "x")
    stats = mq.stats()
    assert stats["topics"] == {} and stats["topics_left_out"] == 101
    assert stats["messages"] == 100 + len(sizes)


LONGEST = "x" * dsmq.MAX_FRAME_BYTES
Call = tuple[Any, ...]  # of a client: the method's name and its arguments
CALLS: list[Call] = [
    ("put", "t", "x"), ("put_many", "t", ["x" * 1_000_000] * 5), ("get", "t"),
    ("get_wait", "t", 0.1), ("get_wait", "t", math.inf), ("get_latest", "t"),
    ("get_many", "t"), ("stats",), ("shutdown_server",),
]  # fmt: skip
WRONG_CALLS: list[tuple[type[Exception], str, list[Call]]] = [
    (TypeError, "topic must be a str", [
        ("put", 1, "x"), ("put", b"t", "x"), ("get", None), ("get", []),
        ("get_latest", 1)]),
    (TypeError, r"message must be a str.*json\.dumps.*base64", [
        *itertools.product(["put"], "t", [{}, [1], 1, 1.5, b"x", None, bytearray(1)]),
        ("put_many", "t", ["good", 1])]),
    (TypeError, "not one str", [("put_many", "t", "text")]),
    (TypeError, "iterable", [("put_many", "t", 5)]),
    (TypeError, "timeout must be a number", [("get_wait", "t", "1")]),
    (TypeError, "limit must be an int", [("get_many", "t", n) for n in (True, 1.0)]),
    (ValueError, "limit must be 1", [("get_many", "t", 0)]),
    (ValueError, "timeout must be 0", [
        ("get_wait", "t", -1), ("get_wait", "t", math.nan), ("listen", "t", -1)]),
    (ValueError, "1 to 1000 characters", [
        ("put", "", "x"), ("get", ""), ("listen", ""), ("put", "x" * 1001, "x")]),
    (ValueError, "surrogate", [
        ("put", "t", "a\udfff"), ("put", "a\udfff", "x"), ("get", "\ud800"),
        ("put_many", "t", ["good", "\ud800"])]),
    (ValueError, "takes 1677721. bytes.*fit", [
        ("put", "t", LONGEST + "x"), ("put_many", "t", ["x", LONGEST + "x"])]),
]  # fmt: skip


def call(mq: Client, name: str, *arguments: Any) -> Any:
    return getattr(mq, name)(*arguments)


@everywhere
def test_a_wrong_call_or_a_closed_client_raises_at_once(connect: Connect) -> None:
    mq = connect()
    for error, text, calls in WRONG_CALLS:
        for wrong in calls:
            assert len(raises(error, text, call, mq, *wrong)) < 200
    mq.put_many("t", [])
    with mq:
        mq.put("t", "x")
        assert mq.get_many("t") == ["x"]  # nothing of all that was stored
    mq.close()
    assert f"{HOST}:{mq._port}, closed" in repr(mq) and "open" in repr(connect())
    for closed in (mq, pickle.loads(pickle.dumps(mq))):
        for one in CALLS:
            raises(ConnectionError, "closed", call, closed, *one)
        raises(ConnectionError, "closed", next, closed.listen("t"))


BAD_ARGUMENTS: list[tuple[Callable[..., object], type[Exception], dict[str, Any]]] = [
    (dsmq.connect, TypeError, {
        "host": [1], "port": ["30008", True], "timeout": ["1"], "secret": [b"x"],
        "tls": [1]}),
    (dsmq.connect, ValueError, {
        "host": ["a" * 70, "localhost:30008", "redis://h:x", "redis://h/x",
                 "redis://h/0#1", "redis://[::1", "redis://:12?34@h",
                 "redis://h?protocol=3", "redis://h?decode_responses=1", "http://h",
                 "tcp://h", "REDIS://h", "redis+sentinel://h"],
        "port": [-1, 65536], "timeout": [0, math.nan], "secret": ["", "\udc80"],
        "since": [-1, math.nan]}),
    (functools.partial(dsmq.connect, port=1, timeout=0.1), OSError, {
        "host": ["nowhere.invalid", "0.0.0.0"], "tls": ["", "/nowhere.pem"]}),
    *((functools.partial(dsmq.connect, f"{name}://h"), ValueError, {
        "port": [1234], "secret": ["s"], "tls": [True]})
      for name in ("redis", "valkey", "unix")),
    (dsmq.serve, TypeError, {
        "host": [None], "port": ["1"], "time_to_live": ["1"], "max_bytes": [1.5],
        "secret": [5]}),
    (dsmq.serve, ValueError, {
        "port": [65536], "time_to_live": [0, math.nan, math.inf], "max_bytes": [0],
        "max_frame_bytes": [999, 1 << 32], "max_clients": [0], "secret": [""],
        "keyfile": ["/nowhere.pem"]}),
    (dsmq.serve, OSError, {"host": ["256.256.256.256"], "certfile": ["/nowhere.pem"]}),
    (functools.partial(dsmq.serve, certfile=__file__), OSError, {
        "keyfile": ["/nowhere.pem"]}),
]  # fmt: skip
NAMED = {"host": "host|URL|idna", "secret": "secret|password", "tls": "PathLike|TLS"}


def test_wrong_arguments_of_connect_and_serve_raise_at_once() -> None:
    for function, error, options in BAD_ARGUMENTS:
        for name, values in options.items():
            for value in values:
                named = NAMED.get(name, name)
                if error is OSError:  # for the hint, see 0.0.0.0
                    named = r"nowhere|''|256\.256|a server listens on 127\.0\.0\.1"
                raises(error, named, function, **{name: value})


# ------------------------------------------------------------- threads and processes

READS: list[Callable[[Client], list[str]]] = [
    lambda mq: list(filter(None, [mq.get("t")])),
    lambda mq: list(filter(None, [mq.get_wait("t", 0.05)])),
    lambda mq: mq.get_many("t", 7),
]


@everywhere
def test_each_message_goes_to_one_of_a_clients_threads(connect: Connect) -> None:
    putter, getter, done = connect(), connect(), threading.Event()

    def read_until_done(reader: Callable[[Client], list[str]]) -> list[int]:
        got: list[str] = []
        while not done.is_set():
            got += reader(getter)
        while new := reader(getter):
            got += new
        return list(map(int, got))

    reading = [begin(read_until_done, reader) for reader in READS * 2]
    for text in numbers(250):
        putter.put("t", text)
    done.set()
    parts = [outcome() for outcome in reading]
    assert sorted(itertools.chain(*parts)) == list(range(250))
    assert parts == [sorted(part) for part in parts]  # each thread's own are in order
    for _ in range(60):  # none finds nothing while there is something
        putter.put_many("t", numbers(32))
        getter._read_ahead_bytes = dsmq.FIRST_READ_AHEAD_BYTES
        got = together(lambda _: [getter.get("t") for _ in range(4)], range(8))
        assert sorted(itertools.chain(*got)) == sorted(numbers(32))


@everywhere
def test_a_waiting_thread_holds_up_no_call_and_close_ends_it(connect: Connect) -> None:
    mq = connect()
    waiting = [begin(mq.get_wait, "t", 20) for _ in range(2)]
    for_ever = begin(mq.get_wait, "v", math.inf)
    time.sleep(0.05)
    with within(4):
        assert mq.get("u") == mq.get("t") == ""
        mq.put("u", "x")
        assert mq.get("u") == "x" and mq.stats()["messages"] == 1
    mq.put_many("t", ["1", "2"])
    assert sorted(outcome() for outcome in waiting) == ["1", "2"]
    mq.close()
    raises(ConnectionError, "closed", for_ever)


def test_many_threads_leave_few_connections(server: Server, connect: Connect) -> None:
    mq, barrier = connect(), threading.Barrier(60)

    def use(number: int) -> str:
        barrier.wait(PATIENCE_SECONDS)
        return mq.get_wait(f"t{number}", 0.1)

    assert together(use, range(60)) == [""] * 60
    eventually(lambda: len(server.inner.connections) <= 16)


@contextlib.contextmanager
def on_alarm(handler: Callable[[int, Any], object]) -> Iterator[None]:
    """With a signal handler, for what setitimer brings."""
    old = signal.signal(signal.SIGALRM, handler)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@needs_signals
def test_a_signal_handler_may_use_the_client(connect: Connect) -> None:
    mq, idle, stored = connect(), threading.Lock(), itertools.count()

    def put(*_: Any) -> None:
        if idle.acquire(blocking=False):
            mq.put("t", str(next(stored)))
            idle.release()

    got: list[str] = []
    with on_alarm(put):
        signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0007)
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            got += mq.get_many("t")
    got += mq.get_many("t")
    assert got == numbers(next(stored)) and len(got) > 50


def write(address: tuple[Any, ...], writer: int, count: int) -> None:
    """Odd ones put five at a time."""
    texts, step = [f"{writer} {i}" for i in range(count)], 1 + writer % 2 * 4
    with dsmq.connect(*address) as mq:
        for i in range(0, count, step):
            mq.put_many("crowd", texts[i : i + step])


def read_crowd(address: tuple[Any, ...], total: int, said: Any) -> None:
    with dsmq.connect(*address) as mq:
        said.put("ready")
        got = list(itertools.islice(mq.listen("crowd", PATIENCE_SECONDS), total))
        said.put(got + mq.get_many("crowd"))  # there is no more


METHODS = multiprocessing.get_all_start_methods()
CROWDS = [*itertools.product(["dsmq"], METHODS), ("redis", "fork"), ("cluster", "fork")]


@pytest.mark.parametrize(("connect", "method"), CROWDS, indirect=["connect"])
def test_readers_get_exactly_what_writers_put(connect: Connect, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    said = context.Queue()
    writers, each, readers = map(int, KNOBS["CROWD"].split(","))
    if connect.engine == "dsmq" and method != METHODS[0]:
        writers, readers = 2, 1  # enough to see that they start that way, too

    def start(target: Callable[..., None], *arguments: Any) -> Any:
        process = context.Process(target=target, args=arguments)
        process.start()
        processes.callback(process.kill)
        return process

    with contextlib.ExitStack() as processes:
        address, server = connect.address(), None
        if connect.engine == "dsmq":
            address = HOST, dsmq._free_port()
            server = start(dsmq.serve, *address)
        for _ in range(readers):
            start(read_crowd, address, writers * each, said)
            assert said.get(timeout=PATIENCE_SECONDS) == "ready"
        for number in range(writers):
            start(write, address, number, each)
        for _ in range(readers):
            got = said.get(timeout=5 * PATIENCE_SECONDS)
            assert len(got) == writers * each
            for number in range(writers):
                own = [m for m in got if m.startswith(f"{number} ")]
                assert own == [f"{number} {i}" for i in range(each)]
            for before, text in itertools.pairwise(got):
                writer, number = map(int, text.split())
                alone = writer % 2 == 0 or number % 5 == 0
                assert alone or before == f"{writer} {number - 1}"  # nobody between
        if server:
            dsmq.connect(*address).shutdown_server()
            server.join(PATIENCE_SECONDS)
            assert server.exitcode == 0


def use_inherited(mq: Client, unused: Client, results: Any) -> None:
    unused.close()
    got = [mq.get("t"), mq.get("t")]
    mq.put("t", "from the child")
    got.append(mq.get("t"))
    mq.close()
    results.put((got, mq._n_tries))


@needs_fork
@engines("dsmq", "redis")
def test_a_call_in_which_a_signal_handler_forks_goes_on_twice(connect: Connect) -> None:
    putter, mq, got = connect(), connect(timeout=1), ""
    pids: list[int] = []
    near, far = os.pipe()

    def put_then() -> None:
        eventually(lambda: bool(pids))
        putter.put("t", "x")

    putting = begin(put_then)
    with on_alarm(lambda *_: pids.append(os.fork())):
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            got = mq.get_wait("t", 10)
        finally:
            if pids == [0]:  # the child, which must not go on with the tests
                os.write(far, got.encode())
                os._exit(0)
    putting()
    os.waitpid(pids[0], 0)
    os.close(far)
    assert os.read(near, 100) == got.encode() == b"x"
    os.close(near)


@engines("process", "redis", "cluster")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_may_use_a_client(connect: Connect, proxy: Proxy, method: str) -> None:
    if method not in METHODS:
        pytest.skip(f"no {method} here")
    context: Any = multiprocessing.get_context(method)
    port = None if connect.engine == "cluster" else proxy.port
    mq, unused, results = connect(port), connect(port), context.Queue()
    mq._n_tries = 4
    mq.put_many("t", ["1", "2", "3"])
    assert mq.get("t") == unused.get("t") == "1"  # 2 and 3 are read ahead
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with mq._lock:
            held.set()
            free.wait(PATIENCE_SECONDS)

    holding = begin(hold)  # another thread is in the middle of something
    assert held.wait(PATIENCE_SECONDS)
    child = context.Process(target=use_inherited, args=(mq, unused, results))
    child.start()
    free.set()
    holding()
    assert results.get(timeout=PATIENCE_SECONDS) == (["2", "3", "from the child"], 4)
    child.join(PATIENCE_SECONDS)
    connections = proxy.connections
    mq.put("t", "on the old connection")
    expected = ["2", "3", "from the child", "on the old connection"]
    assert mq.get_many("t") == unused.get_many("t") == expected
    assert proxy.connections == connections


# ---------------------------------------------------------------------------- faults

# A call, what it gives, what it leaves to read of messages 1 and 2, and what it stores.
CUT: dict[str, tuple[Call, object, list[str], list[str]]] = {
    "put": (("put", "t", "é3"), None, ["1", "2"], ["é3"]),
    "put_many": (("put_many", "t", ["3", "4"]), None, ["1", "2"], ["3", "4"]),
    "get": (("get", "t"), "1", ["2"], []),
    "get_wait": (("get_wait", "t", 5), "1", ["2"], []),
    "get_latest": (("get_latest", "t"), "2", [], []),
    "get_many": (("get_many", "t"), ["1", "2"], [], []),
    "stats": (("stats",), ["t"], ["1", "2"], []),
}


@engines("dsmq", "redis")
@pytest.mark.parametrize("way", [0, 1], ids=["request", "reply"])
@pytest.mark.parametrize("name", CUT)
def test_a_cut_at_any_byte_loses_and_repeats_nothing(
    proxy: Proxy, connect: Connect, name: str, way: int
) -> None:
    one, expected, left, stored = CUT[name]
    witness, mq = connect(), connect(proxy.port)
    # To Redis a put is long, for it brings its script along; so is what it tells.
    long = name in ("put", "put_many", "stats")
    steps = {"dsmq": 1 if name in ("put", "get") else 4, "redis": 61 if long else 7}
    for count in itertools.count(1, steps[connect.engine]):
        witness.put_many("t", ["1", "2"])
        cuts, proxy.budget[way] = proxy.cuts, count
        got = call(mq, *one)
        assert (list(got["topics"]) if name == "stats" else got) == expected
        if proxy.cuts == cuts:
            break  # the whole of it is shorter than that
        assert mq.get_many("t") == left + stored
        assert witness.get_many("t") == ["1", "2", *stored]
    assert count > (20 if connect.engine == "dsmq" else 1)


@pytest.mark.parametrize("secret", [None, "s"])
def test_all_arrive_once_through_many_cuts(
    serve: Serve, connect: Connect, monkeypatch: Patch, secret: str | None
) -> None:
    monkeypatch.setattr(dsmq, "RETRY_PAUSE_SECONDS", 0.0001)
    total = int(KNOBS["CUTS"])
    patience = PATIENCE_SECONDS + total / 100
    up, down = itertools.cycle(range(1, 3000, 29)), itertools.cycle(range(3000, 1, -31))
    with contextlib.closing(Proxy(serve(secret=secret).port)) as proxy:
        proxy.budgets = lambda: [next(up), next(down)]  # in the greeting, too
        putter, *getters = (connect(proxy.port, secret=secret) for _ in range(4))

        def read_all(mq: Client, reader: Callable[[Client], list[str]]) -> list[str]:
            got: list[str] = []
            end = time.monotonic() + patience
            while len(got) < total and time.monotonic() < end:
                got += reader(mq)
            return got + mq.get_many("t")

        reading = [begin(read_all, *pair) for pair in zip(getters, READS)]
        for i in range(0, total, 5):
            putter.put("t", str(i))
            putter.put_many("t", numbers(i + 1, i + 5))
        for outcome in reading:
            assert outcome(2 * patience) == numbers(total)
        assert proxy.cuts > total // 50


def test_a_slow_line_is_busy_and_no_call_raises(proxy: Proxy, connect: Connect) -> None:
    mq = connect(proxy.port, timeout=0.2)
    connect().put_many("t", ["x" * 1000] * 100)
    proxy.bytes_per_second = 60_000
    with within(100 * 1000 / 60_000 / 0.7):  # seven tenths of the line at least
        assert mq.get_wait("t", math.inf)[999:] == "x"  # with 64 kB, which take 1.1 s
        assert mq._read_ahead_bytes == dsmq.FIRST_READ_AHEAD_BYTES / 2
        got = [*mq.get_many("t", 10), *mq.listen("t", 0.05)]
    assert len(got) == 99


def test_a_wait_on_a_broken_line_ends_in_time(proxy: Proxy, connect: Connect) -> None:
    mq = connect(proxy.port)
    with within(0.9, 0.6):
        waiting = begin(mq.get_wait, "t", 0.6)
        time.sleep(0.4)
        proxy._accepted[-1].shutdown(socket.SHUT_RDWR)
        assert waiting() == ""


@engines("dsmq", "redis")
def test_get_many_ends_though_a_topic_does_not(proxy: Proxy, connect: Connect) -> None:
    mq, writer = connect(proxy.port), connect()
    writer.put_many("t", numbers(100))
    proxy.bytes_per_second = 20_000
    with meanwhile(0.002, writer.put, "t", "x"):
        assert begin(mq.get_many, "t", 1_000_000)(5)[:100] == numbers(100)


def test_a_forgotten_connection_is_made_anew(proxy: Proxy, connect: Connect) -> None:
    calls: list[Call] = [("put", "t", "x"), ("get", "t"), ("get_wait", "u", 0.05)]
    clients, witness = [connect(proxy.port, timeout=1) for _ in calls], connect()
    proxy.forgotten = proxy.connections
    with within(0.95):
        together(lambda mq, one: call(mq, *one), clients, calls)
    assert witness.get_many("t") == ["x"]


@engines("dsmq", "redis")
def test_clients_carry_on_after_a_restart(connect: Connect) -> None:
    ours = connect.engine == "dsmq"
    start = connect.fixture("serve" if ours else "new_redis")
    server = start()
    putter, getter, waiter, trier = (connect(server.port) for _ in range(4))
    putter.put_many("t", ["old 1", "old 2"])
    assert getter.get("t") == "old 1"
    waiter._timeout = 2
    waiting = begin(waiter.get_wait, "u", math.inf)
    time.sleep(0.1)
    server.stop()
    trier._timeout = 0.15
    where = f" at .*:{server.port}: "
    works = trier.stats, lambda: connect(server.port, timeout=0.15)
    with within(5, 0.1):
        together(lambda work: raises(ConnectionRefusedError, where, work), works)
    trier._timeout = PATIENCE_SECONDS
    endless = functools.partial(connect, timeout=math.inf)
    trying = begin(trier.put, "v", "x"), begin(endless, server.port)
    start(server.port) if ours else server.start()
    connect(server.port).put("t", "put before they noticed")
    putter.put("t", "new")
    putter.put("u", "woken")
    assert waiting() == "woken" and [outcome() for outcome in trying]
    getter._tidy_at = 0  # it looks which cursors may go
    expected = ["put before they noticed", "new"]
    assert getter.get_many("t") == ["old 2", *expected]
    assert putter.get_many("t") == expected
    assert getter.get("t") == putter.get("t") == ""


FIRST_READS: list[Call] = [("get", "t"), ("get_wait", "t", 0), ("get_many", "t")]
FIRST_READS += [("get_latest", "t"), ("listen", "t", 0)]
# An engine, by how many hours its clock has moved, and what was restored of 1 to 4.
OTHERS: list[Any] = [*itertools.product(["dsmq", "redis"], (-24, 24), [[]])]
OTHERS += [("redis", 24, ["1", "2"])]


@pytest.mark.parametrize(("connect", "hours", "restored"), OTHERS, indirect=["connect"])
def test_the_very_call_that_meets_another_server_reads_what_it_has(
    connect: Connect, monkeypatch: Patch, hours: int, restored: list[str]
) -> None:
    ours, real = connect.engine == "dsmq", time.time_ns
    start = connect.fixture("serve" if ours else "new_redis")
    server = start()
    if hours < 0 and not ours:
        server.cli("set", "dsmq:head", AHEAD)
    clients = [connect(server.port) for _ in FIRST_READS]
    clients[0].put_many("t", ["1", "2"])
    if restored:
        server.cli("save")
    clients[0].put_many("t", ["3", "4"])
    for mq in clients:
        assert mq.get_many("t") == numbers(1, 5)
    server.stop()
    monkeypatch.setattr(time, "time_ns", lambda: real() + hours * 3600 * 10**9)
    start(server.port) if ours else server.start()
    late = connect(server.port, since=math.inf)
    late.put("t", "5")
    for mq, read in zip(clients, FIRST_READS):
        assert [*call(mq, *read)] == ["5"]
        assert mq.get("t") == mq.get_latest("t") == ""
    assert late.get_many("t") == [*restored, "5"]


def test_connecting_goes_on_until_the_timeout(serve: Serve, connect: Connect) -> None:
    port, begun = dsmq._free_port(), time.monotonic()
    connecting = begin(functools.partial(connect, timeout=0.3), port)
    time.sleep(0.2)
    serve(port)
    late = time.monotonic() - begun > 0.27  # a busy machine
    with contextlib.suppress(*[ConnectionError] * late):
        connecting().put("t", "x")


def read_through_restarts(port: int, results: Any) -> None:
    with dsmq.connect(HOST, port, timeout=30) as mq:
        mq.put("ready", "x")
        got: list[str] = []
        while not got or got[-1] != "end":
            got += mq.get_many("t", 1000) or [mq.get_wait("t", 1)]
        results.put([m for m in got if m])


@needs_signals
def test_a_killed_server_confuses_nobody(launch: Launch, connect: Connect) -> None:
    context: Any = multiprocessing.get_context("spawn")
    process, results = launch(), context.Queue()
    arguments = process.port, results
    mq = connect(process.port, timeout=30)
    for _ in range(2):
        context.Process(target=read_through_restarts, args=arguments).start()
        assert mq.get_wait("ready", PATIENCE_SECONDS) == "x"
    number = itertools.count()
    for _ in range(int(KNOBS["RESTARTS"])):
        end = time.monotonic() + 0.1
        while time.monotonic() < end:
            mq.put("t", str(next(number)))
        process.stop()
        process = launch("--port", str(process.port))
    mq.put("t", "end")
    for _ in range(2):
        *got, last = results.get(timeout=PATIENCE_SECONDS)
        # What was in a killed server's memory is gone; nothing comes twice or late.
        assert last == "end" and got == sorted(set(got), key=int)
    for reader in multiprocessing.active_children():
        reader.join(PATIENCE_SECONDS)
    process.stop()
    process = launch("--port", str(process.port))
    mq.shutdown_server()  # over a connection to the one before
    assert process.popen.wait(PATIENCE_SECONDS) == 0
    process = launch("--port", str(process.port))
    connected = f"import dsmq, sys; mq = dsmq.connect(port={process.port})"
    with run_code(connected, "mq.put('u', 'x'); sys.stdin.read()") as child:
        assert mq.get_wait("u", PATIENCE_SECONDS) == "x"
        process.stop()
        mq._timeout = 0.3
        raises(ConnectionError, None, mq.put, "u", "x")
        assert rest(child) == (0, "", "")  # it need not be there for a client to end


def test_a_port_is_never_its_own_answer(monkeypatch: Patch) -> None:
    address = HOST, dsmq._free_port()

    def connected_to_itself(*_: Any) -> socket.socket:
        """As may happen when the system gives a socket the very port it asks for."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.connect(address)
        return sock

    monkeypatch.setattr(socket, "create_connection", connected_to_itself)
    raises(ConnectionRefusedError, None, dsmq.connect, *address, timeout=0.1)


@needs_signals
@engines("process", "redis", "cluster")
def test_a_silent_server_times_out_every_call(connect: Connect) -> None:
    past_one_machine = connect.engine != "process"
    calls = CALLS[:-1] if past_one_machine else CALLS
    clients = [connect(timeout=0.3) for _ in (*calls, "waiter")]
    ending, waiting = connect(), begin(clients[-1].get_wait, "t", math.inf)
    check = functools.partial(raises, TimeoutError, r"no answer in 0\.3 s")
    time.sleep(0.1)
    with contextlib.ExitStack() as pauses:
        for node in connect.nodes:
            os.kill(node.pid, signal.SIGSTOP)
            pauses.callback(os.kill, node.pid, signal.SIGCONT)
        time.sleep(0.05)  # until the last of their threads has stopped, too
        checks = [begin(check, call, mq, *one) for mq, one in zip(clients, calls)]
        checks.append(begin(functools.partial(check, connect, timeout=0.3)))
        connecting = [begin(ending.get_wait, "t", math.inf) for _ in range(3)]
        for outcome in [*checks, begin(check, waiting)]:
            outcome()
        ending.close()
        for under_way in connecting if not past_one_machine else ():
            raises(ConnectionError, "closed", under_way)
        with within(5):
            for mq in clients[1:-1]:
                mq.close()
    if past_one_machine:  # the others were asked to stop
        putter, waiter = clients[0], clients[-1]
        putter._timeout = waiter._timeout = PATIENCE_SECONDS
        putter.put("t", "y")
        time.sleep(0.1)
        got = [text for text in waiter.get_many("t") if len(text) == 1]
        assert got in (["y"], ["x", "y"])  # in its place, or not at all


@contextlib.contextmanager
def impostor(*replies: bytes) -> Iterator[int]:
    """A server that says these on each connection, the last ever again; its port."""
    with socket.create_server((HOST, 0)) as listener:

        def accept() -> None:
            while True:
                sock = listener.accept()[0]
                with sock, contextlib.suppress(ConnectionError):
                    for reply in (*replies, *[replies[-1]] * 100):
                        if not sock.recv(4096):
                            break
                        sock.sendall(reply)

        begin(accept)
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


WELCOME: dict[str, Any] = {"protocol": 1, "server": "x", "head": 5}
WELCOME |= {"max_frame_bytes": 1 << 20, "time_to_live": 600}
BAD_HELLOS: list[Any] = [{}, {"error": 1}, 7]
BAD_HELLOS += [WELCOME | wrong for wrong in ({"head": "5"}, {"max_frame_bytes": None})]
BAD_REPLIES: list[Any] = [
    *({}, [], {"head": None}, {"error": None, "code": [1]}, {"error": "x", "code": 1}),
    *({"ids": [6], "messages": m, "expires": 9} for m in ([], [7])),
    *({"ids": [6], "messages": ["x"], "expires": e} for e in ("z", None)),
    *({"ids": [i], "messages": ["x"], "expires": 9} for i in ("x", True, 5)),
    *({"ids": i, "messages": ["x", "y"], "expires": 9} for i in ([9, 7], [6, 6])),
]
STRANGERS = {"HTTP": b"HTTP/1.1 400 Bad Request\r\n\r\n", "SSH": b"SSH-2.0-OpenSSH\r\n"}


def test_a_reply_that_is_not_as_it_should_be_is_an_error_in_every_call() -> None:
    def frame(reply: Any) -> bytes:
        return dsmq.encode_frame(json.dumps(reply).encode())

    connect = functools.partial(dsmq.connect, HOST, timeout=8)
    for hello in BAD_HELLOS:
        with impostor(frame(hello)) as port:
            raises(DSMQError, None, connect, port)
    with impostor(frame(WELCOME | {"challenge": "\ud800", "proof": "\udc00"})) as port:
        raises(AuthenticationError, None, connect, port, secret="s")
    for reply in BAD_REPLIES:
        with impostor(frame(WELCOME), frame(reply)) as port:
            for one in CALLS[:-1]:
                with connect(port) as mq:
                    raises(DSMQError, None, call, mq, *one)
    for name, said in STRANGERS.items():
        with impostor(said) as port:
            raises(dsmq.FrameError, f"dsmq server at.*{name}", connect, port)
    pytest.importorskip("redis")
    with impostor(STRANGERS["HTTP"]) as port:
        url = f"redis://{HOST}:{port}"
        raises((ConnectionError, DSMQError), None, dsmq.connect, url)


# What is interrupted: not what in redis up to version 6 makes another error of it.
OURS = re.compile(r"[/\\](dsmq\.py |redis[/\\]\S+ (?!__init__$))")


class Interrupts:
    """Strikes in the code of dsmq, or of the package redis, and counts."""

    armed, count, _rng = False, 0, random.Random(5)

    def handle(self, number: int, frame: Any) -> None:
        code = frame.f_code
        if self.armed and OURS.search(f"{code.co_filename} {code.co_name}"):
            self.count += 1
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def strike(self, most_seconds: float) -> Iterator[None]:
        """At some moment of the block, which it ends, or not at all."""
        self.armed = True
        signal.setitimer(signal.ITIMER_REAL, self._rng.random() * most_seconds)
        with contextlib.suppress(KeyboardInterrupt):
            yield
        self.armed = False  # the signal may still be on its way, in another thread
        signal.setitimer(signal.ITIMER_REAL, 0)


INTERRUPTED = ["get", "get_wait", "get_many", "listen", "get_latest", "put"]
INTERRUPTS = [*itertools.product(["dsmq"], INTERRUPTED)]
INTERRUPTS += [("redis", "get"), ("redis", "put"), ("cluster", "get_many")]


@needs_signals
@leaves_sockets
@pytest.mark.parametrize(("connect", "name"), INTERRUPTS, indirect=["connect"])
def test_an_interrupt_loses_and_repeats_nothing(connect: Connect, name: str) -> None:
    # It looks for signals between the instruction that leaves a `try` and the one that
    # returns.
    if sys.version_info < (3, 11) and name != "put":
        pytest.skip("Python 3.10 may interrupt the return itself")
    mq, putter, interrupts = connect(), connect(), Interrupts()
    number, version = itertools.count(3000), mq.stats()["version"]

    def put() -> list[str]:
        text = str(next(number))
        mq.put("t", text)
        return [text]

    calls: dict[str, Callable[[], list[str]]] = {
        "get": lambda: [mq.get("t")],
        "get_wait": lambda: [mq.get_wait("t", 5)],
        "get_many": lambda: mq.get_many("t", 3),
        "listen": lambda: [next(mq.listen("t", 5))],
        "get_latest": lambda: [mq.get_latest("t")],
        "put": put,
    }
    putter.put_many("t", numbers(3000))
    got: list[str] = []
    with on_alarm(interrupts.handle):
        end = time.monotonic() + 0.2
        while len(got) < 3000 and (time.monotonic() < end or interrupts.count <= 5):
            if name == "get_latest":
                putter.put("t", str(next(number)))
            with interrupts.strike(0.0005 if name == "put" else 0.0003):
                got += calls[name]()
            if len(got) % 50 == 0:
                assert mq.stats()["version"] == version  # no mixed-up reply
    assert interrupts.count > 5
    got, rest = [m for m in got if m], mq.get_many("t", 10_000)
    if name == "put":
        assert rest == sorted(set(rest), key=int) and set(got) <= set(rest)
    elif name == "get_latest":
        assert got == sorted(set(got), key=int)
    else:
        assert got + rest == numbers(3000)
    gc.collect()


@needs_signals
def test_ctrl_c_interrupts_a_wait_plainly(connect: Connect, server: Server) -> None:
    mq = connect()
    with run_code(
        f"import dsmq, math; mq = dsmq.connect(port={server.port})",
        "try: mq.get_wait('t', math.inf)",
        "except KeyboardInterrupt: mq.put('t', 'still usable')",
    ) as child:
        eventually_waiting(server, "t")
        child.send_signal(signal.SIGINT)
        assert mq.get_wait("t", PATIENCE_SECONDS) == "still usable"
        assert rest(child) == (0, "", "")


# ---------------------------------------------------------------------------- limits


@engines("dsmq", "redis")
def test_a_full_server_refuses_only_puts(
    connect: Connect, monkeypatch: Patch, pass_time: PassTime
) -> None:
    monkeypatch.setattr(dsmq, "PURGE_SECONDS", 0.05)
    ours, most = connect.engine == "dsmq", 3 << 20
    if ours:
        port = connect.fixture("serve")(max_bytes=most).port
    else:
        port = connect.fixture("new_redis")("--maxmemory", str(most)).port
    mq, reader, number = connect(port), connect(port), itertools.count()
    with pytest.raises(QueueFull):
        for text in map(str, number):
            mq.put(text[-1], "x" * 100_000)
    stored = next(number) - 1
    late = connect(port)
    raises(QueueFull, None, mq.put_many, "u", ["x" * 100_000] * 30)
    assert late.get("0") == late.get("u") == ""
    assert sum(len(reader.get_many(topic)) for topic in "0123456789") == stored
    stats = mq.stats()
    assert stats["messages"] == stored > 3 and stats["max_bytes"] == most
    if ours:
        pass_time(600)  # topics that nobody touches are freed too
        eventually(lambda: mq.stats()["bytes"] == 0)
        assert mq.stats()["messages"] == 0 and mq.stats()["topics"] == {}
        mq.put("0", "room again")
        assert reader.get("0") == "room again"


def test_a_client_keeps_cursors_of_what_lives_and_nothing_else(
    server: Server, connect: Connect, monkeypatch: Patch, pass_time: PassTime
) -> None:
    monkeypatch.setattr(dsmq, "PURGE_SECONDS", 0.01)
    mq = connect()
    tracemalloc.start()
    mq.put("large", "x" * 10_000_000)
    assert len(mq.get_many("large")[0]) == 10_000_000
    for i in range(400):
        mq.put(f"reply {i}", "x" * 10_000)
        assert mq.get(f"reply {i}")
        if i % 100 == 99:
            pass_time(601)
            eventually(lambda: not server.store.stats()["messages"])
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(mq._cursors) < 300
    assert kept < 2_000_000
    for topic in numbers(500):
        mq.put(topic, "x")
        assert mq.get(topic) == "x"
    assert [mq.get(topic) for topic in numbers(500)] == [""] * 500


@needs_signals
def test_memory_and_descriptors_come_back(launch: Launch, connect: Connect) -> None:
    process = launch("--time-to-live", "0.5")
    if not os.path.isdir("/proc"):
        pytest.skip("no /proc here")
    resource = pytest.importorskip("resource")
    of_process = Path(f"/proc/{process.pid}")
    putter, late = connect(process.port), connect(process.port)
    number = itertools.count()

    def megabytes() -> float:
        putter.put("lives", str(next(number)))
        pages = int((of_process / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def cpu_seconds() -> float:
        fields = (of_process / "stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before = megabytes()
    for _ in range(100):
        putter.put("t", "x" * 500_000)
    assert megabytes() > before + 40
    eventually(lambda: megabytes() < before + 20)
    living = late.get_many("lives", 10_000)  # what has not expired stays readable
    assert living == numbers(int(living[0]), next(number))
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (40, 40))
    with contextlib.ExitStack() as crowd:
        for _ in range(60):
            crowd.enter_context(socket.create_connection((HOST, process.port), 5))
        putter.put("t", "x")  # those inside go on
        assert putter.get("t") == "x"
        before = cpu_seconds()
        time.sleep(0.2)
        assert cpu_seconds() - before < 0.12  # it does not spin
    connect(process.port).put("t", "y")
    assert putter.get("t") == "y"


def test_a_client_too_many_is_told(
    serve: Serve, connect: Connect, raw: Raws, monkeypatch: Patch, caplog: Log
) -> None:
    server = serve(max_clients=3)
    clients = [connect(server.port) for _ in range(3)]
    why = "max_clients 3 is reached"
    with (told := raw(server)).sock:
        assert told.receive() == {"error": why, "code": "busy"}
    raises(ConnectionRefusedError, why, connect, server.port, timeout=0.3)
    clients[0].put("t", "the others go on")
    connecting = begin(connect, server.port)
    time.sleep(0.1)
    clients[0].close()  # and it gets in
    connecting().put("t", "x")
    start = Mock(side_effect=RuntimeError("can't start new thread"))
    clients[2].close()
    with monkeypatch.context() as patch:
        patch.setattr("_thread.start_new_thread", start)
        for name in ("_start_new_thread", "_start_joinable_thread"):
            patch.setattr(threading, name, start, raising=False)
        eventually(lambda: server.clients() == 2)
        raises(ConnectionError, "dsmq server at", connect, server.port, timeout=0.3)
        clients[1].put("t", "those inside go on")
    caplog.clear()  # of these faults
    connect(server.port).put("t", "y")
    expected = ["the others go on", "x", "those inside go on", "y"]
    assert clients[1].get_many("t") == expected


@everywhere
@pytest.mark.filterwarnings("error")
def test_clients_that_come_and_go_leave_nothing_behind(connect: Connect) -> None:
    witness = connect()
    clients = 3 if connect.engine == "cluster" else 1  # its connections to each node
    share = {"dsmq": 1, "redis": 5, "cluster": 50}[connect.engine]
    rounds = int(KNOBS["CYCLES"]) // share

    def cycle(count: int) -> None:
        if connect.engine != "cluster":  # whose map of nodes is much to keep
            together(lambda _: dsmq.connect(*connect.address()).close(), range(count))
        for i in range(count):
            with dsmq.connect(*connect.address()) as mq:
                mq.get("t")
            # Not of a cluster: its sockets may be collected before what closes them.
            if connect.engine != "cluster" and i % 5 == 0:
                dsmq.connect(*connect.address()).put("t", "x")  # forgotten
        gc.collect()
        eventually(lambda: int(witness.stats()["clients"]) == clients)

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    cycle(rounds // 5)
    threads, files = count_threads(), descriptors()
    tracemalloc.start()
    cycle(rounds // 10 + 1)
    before = tracemalloc.get_traced_memory()[0]
    cycle(rounds)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    eventually(lambda: count_threads() <= threads)
    assert descriptors() <= files
    # A witness may have read the map of the nodes anew: 2 MB.
    assert grown < (4_000_000 if connect.engine == "cluster" else 100_000)


# -------------------------------------------------------------------- secret and TLS


def test_only_the_secret_lets_in(serve: Serve, connect: Connect, raw: Raws) -> None:
    server = serve(secret="s3crét")
    mq = connect(server.port, secret="s3crét")
    mq.put("t", "x")
    assert mq.get("t") == "x"
    for secret in (None, "wrong", "s3cret"):
        raises(AuthenticationError, None, connect, server.port, secret=secret)
    for secret in (None, "another"):  # a server that does not know it is not trusted
        other = serve(secret=secret)
        raises(AuthenticationError, None, connect, other.port, secret="s")
        assert other.store.stats()["messages"] == 0
    requests = [HELLO, HELLO | {"nonce": ""}, HELLO | {"nonce": "\ud800"}, PUT, GET]
    requests += [{"action": a} for a in ("get_latest", "stats", "shutdown")]
    proofs = (None, "", "0" * 64, "\ud800")
    requests += [{"action": "authenticate", "proof": proof} for proof in proofs]
    peer = raw(server)
    for request, greeted in itertools.product(requests, (False, True)):
        assert not greeted or "head" not in peer.ask(**HELLO, nonce="n" * 16)
        reply = peer.ask(**request)
        assert reply["code"] in ("authentication", "bad_request")
        assert set(reply) == {"error", "code"}
    assert mq.stats()["messages"] == 1
    thief, hello = raw(server), peer.ask(**HELLO, nonce="n")
    roles = "server", "client"
    servers, proof = (dsmq._proof("s3crét", r, "n", hello["challenge"]) for r in roles)
    assert hello["proof"] == servers
    for stolen in (proof, servers, None):  # of another conversation, or its own
        own = thief.ask(**HELLO, nonce="n")["proof"]
        assert thief.ask(action="authenticate", proof=stolen or own)["error"]
    head = server.store.head
    assert peer.ask(action="authenticate", proof=proof)["head"] == head
    assert peer.ask(**PUT) == {"head": head + 1}


def test_who_lacks_the_secret_is_dropped(
    serve: Serve, connect: Connect, raw: Raws, monkeypatch: Patch, caplog: Log
) -> None:
    monkeypatch.setattr(dsmq, "STALL_SECONDS", 0.4)
    monkeypatch.setattr(dsmq, "LINGER_SECONDS", 0.1)
    server = serve(secret="s")
    # This client sees that the server's proof is wrong, and says no more.
    raises(AuthenticationError, None, connect, server.port, secret="wrong")
    thief, large = raw(server), raw(server)
    for _ in range(100):
        thief.ask(action="authenticate", proof="0")
    text = f"{HOST}:{thief.sock.getsockname()[1]} does not know the secret"
    assert 1 <= caplog.text.count(text) <= 50
    large.sock.sendall(struct.pack(">I", 5000))
    assert large.receive()["code"] == "bad_frame"
    eventually(lambda: server.clients() == 0)


@engines("dsmq", "redis")
@leaves_sockets
def test_all_works_over_tls(connect: Connect, certificate: Path) -> None:
    tls, port, ours = certificate / "cert.pem", quiet_port(), connect.engine == "dsmq"
    places: Any = *[("localhost", port)] * 2, (HOST, port), connect.address()
    address, again, wrong, plain = places
    if ours:
        server = connect.fixture("serve")(port, tls=certificate)
    else:
        options = ["--tls-port", str(port), "--tls-auth-clients", "no"]
        options += ["--tls-cert-file", str(tls), "--tls-key-file"]
        connect.fixture("new_redis")(*options, str(certificate / "key.pem"))
        address, wrong = (f"rediss://localhost:{port}",), (f"rediss://{HOST}:{port}",)
        plain = (plain[0].replace("redis:", "rediss:"),)
        again = (f"valkeys://localhost:{port}?ssl_ca_certs={tls}",)
    a, b = dsmq.connect(*address, tls=tls), dsmq.connect(*again, tls=ours and str(tls))
    with a, b:
        a.put("t", "x" * 1_000_000)
        assert len(b.get("t")) == 1_000_000
        for i in range(20):
            waiting = begin(b.get_wait, "t", 20)
            time.sleep(0.005)
            a.put("t", f"{i} " + "y" * 300_000 * (i % 2))
            assert waiting().split()[0] == str(i)
        waiting = begin(b.get_wait, "t", math.inf)
        if ours:
            eventually_waiting(server, "t")
            for connection in list(server.inner.connections):
                connection.shut()
        copy = pickle.loads(pickle.dumps(b))
        a.put("t", "z")
        assert waiting() == copy.get("t") == "z"
        waiting = begin(copy.get_wait, "t", math.inf)
        time.sleep(0.1)
        copy.close()
        raises(ConnectionError, "closed", waiting)
    # Another name; no authority of the system; no file; no TLS.
    connect_to = functools.partial(dsmq.connect, timeout=0.3)
    raises(ConnectionError, "certificate verify", connect_to, *wrong, tls=tls)
    raises(ConnectionError, "certificate verify", connect_to, *address, tls=ours)
    named = "nowhere" if ours else None
    raises(FileNotFoundError, named, connect_to, *address, tls="/nowhere.pem")
    lost = ConnectionError, TimeoutError
    raises(lost, None, connect_to, *plain, tls=tls, timeout=0.1)
    gc.collect()


@pytest.mark.parametrize("server", ["tls"], indirect=True)
def test_no_handshake_may_stall(server: Server, raw: Raws, monkeypatch: Patch) -> None:
    monkeypatch.setattr(dsmq, "STALL_SECONDS", 0.3)
    raises(ConnectionError, "speaks TLS only", dsmq.connect, HOST, server.port)
    eventually(lambda: server.clients() == 0)
    with contextlib.ExitStack() as stalling:
        for _ in range(5):
            sock = socket.create_connection((HOST, server.port), 5)
            stalling.enter_context(sock).sendall(b"\x16\x03\x01")
        assert raw().ask(**PUT)["head"]
        assert server.clients() == 6
        eventually(lambda: server.clients() == 1)


# ------------------------------------------------------------------------- lifecycle


def test_shutdown_wakes_all_and_frees_the_port(serve: Serve, connect: Connect) -> None:
    threads, port = count_threads(), 0
    for askers in (1, 5):  # the second server at once on the port of the first
        server = serve(port)
        port = server.port
        first, others = ([connect(port, timeout=t) for _ in range(5)] for t in (9, 0.2))
        first[0].put("t", "x")
        waiting = [begin(other.get_wait, "u", math.inf) for other in others]
        eventually_waiting(server, "u", 5)
        with within(5):
            together(lambda mq: mq.shutdown_server(), first[:askers])
            raises(ConnectionRefusedError, None, socket.create_connection, (HOST, port))
            server.join()
        for outcome in waiting:
            raises(ConnectionError, None, outcome)
    eventually(lambda: count_threads() <= threads)


def test_a_lost_answer_of_shutdown_is_an_error(connect: Connect, proxy: Proxy) -> None:
    mq = connect(proxy.port, timeout=5)
    mq._timeout, proxy.budget[1] = 0.1, 1
    raises((ConnectionError, TimeoutError), None, mq.shutdown_server)  # it cuts
    connect.nodes[0].join()  # but it is done


@pytest.mark.parametrize("cycle", [False, True])
def test_a_put_at_exit_is_stored_or_an_error(connect: Connect, cycle: bool) -> None:
    mq = connect()
    with run_code(
        "import dsmq, gc",
        "class Last:",
        f"    mq = dsmq.connect{connect.address()}",
        "    def __del__(self):",
        "        try: self.mq.put('t', 'bye')",
        "        except ConnectionError as error: print(error)",
        "last = Last(); last.me = last",
        "del last; gc.collect()" if cycle else "",
    ) as child:
        status, told, errors = rest(child)
    assert (status, errors) == (0, "") and (mq.get("t") == "bye" or told)


@pytest.mark.parametrize("host", [HOST, "localhost", "0.0.0.0"])
def test_serve_logs_and_prints_nothing(host: str, caplog: Log, capfd: Any) -> None:
    port, everyone = dsmq._free_port(), host == "0.0.0.0"
    with caplog.at_level(logging.INFO, "dsmq"):
        serving = begin(dsmq.serve, host, port)
        with dsmq.connect(HOST if everyone else host, port) as mq:
            raises(OSError, f"{host}:{port}", dsmq.serve, host, port)
            mq.shutdown_server()
        serving()
    assert ("anyone on the network can" in caplog.text) == everyone
    assert f"listening on {host if everyone else HOST}:{port}" in caplog.text
    assert "stopped" in caplog.text
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("own", ["", "logging.basicConfig(level=logging.INFO)"])
def test_verbose_prints_each_line_once_beside_a_programs_own_log(own: str) -> None:
    with run_code(
        f"import dsmq, logging, threading; {own}",
        f"address = {HOST!r}, {dsmq._free_port()}, True",
        "serving = threading.Thread(target=dsmq.serve, args=address)",
        "serving.start(); dsmq.connect(*address).shutdown_server(); serving.join()",
    ) as child:
        errors = rest(child)[2]
    assert errors.count("listening on") == errors.count("connected to") == 1


@needs_fork
def test_a_child_forked_beside_a_server_keeps_neither_port_nor_peers() -> None:
    port = dsmq._free_port()
    with (
        run_code(
            "import dsmq, os, sys, threading, time",
            f"options = {{'target': dsmq.serve, 'args': ({HOST!r}, {port})}}",
            "threading.Thread(**options).start()",
            f"mq = dsmq.connect(port={port})",
            "if not os.fork(): sys.exit(sys.stdin.read())",
            "mq.put('t', 'forked'); time.sleep(60)",
        ) as parent,
        dsmq.connect(port=port, since=60) as mq,
    ):
        assert mq.get_wait("t", PATIENCE_SECONDS) == "forked"
        parent.kill()
        parent.wait(PATIENCE_SECONDS)
        mq._timeout = 0.1
        raises(ConnectionRefusedError, None, mq.put, "t", "y")
        socket.create_server((HOST, port)).close()


@needs_fork
@pytest.mark.parametrize("ending", ["p.terminate()", "os.kill(os.getpid(), 9)"])
def test_serve_in_a_process_ends_when_told_and_with_its_parent(ending: str) -> None:
    port = dsmq._free_port()
    with run_code(
        "import dsmq, multiprocessing, os, signal, sys; dsmq.PURGE_SECONDS = 0.05",
        f"options = {{'target': dsmq.serve, 'args': ({HOST!r}, {port})}}",
        "p = multiprocessing.get_context('fork').Process(**options)",
        "p.start()",
        f"dsmq.connect(port={port}).close()",
        f"{ending}; p.join(); sys.exit(p.exitcode + signal.SIGTERM)",
    ) as child:
        status, _, errors = rest(child)  # and of the server, which has ended, too
    assert status == (-9 if "kill" in ending else 0) and "Traceback" not in errors
    socket.create_server((HOST, port)).close()


def test_both_names_of_the_original_are_quick_and_need_no_package() -> None:
    code = """
import sys; sys.path.append(".")
from dsmq.server import serve; from dsmq.client import connect
import dsmq.server, dsmq.client, dsmq
assert dsmq.server.serve is serve is dsmq.serve
assert dsmq.client.connect is connect is dsmq.connect
names = {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names
assert names <= {"dsmq", "__main__", "__mp_main__"}, names
slow = {"argparse", "multiprocessing", "sqlite3", "ssl", "urllib.parse"}
assert not slow & {*sys.modules}
try: dsmq.connect("redis://127.0.0.1:1")
except dsmq.DSMQError as error: assert "pip install redis" in str(error)
"""
    subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=HERE, check=True)


def put_long_ago(redis: Redis, seconds: float, topic: str, *texts: str) -> None:
    """Messages, as if put so many seconds ago."""
    then = int((time.time() - seconds) * 1000)
    script = "for i = 2, #ARGV do redis.call('XADD', KEYS[1], ARGV[1] .. '-' .. i,"
    script += " 'message', ARGV[i]) end"
    key = f"{{dsmq:{topic}}}"
    assert not redis.cli("-c", "eval", script, "1", key, str(then), *texts)


@engines("redis", "cluster")
def test_what_expired_in_redis_is_gone(connect: Connect, pass_time: PassTime) -> None:
    node, putter, late = connect.nodes[0], connect(), connect(since=math.inf)
    # More than one reply holds, and not trimmed: no put came since.
    put_long_ago(node, 601, "t", *numbers(250))
    assert late.get("t") == late.get_latest("t") == "" and late.get_many("t") == []
    put_long_ago(node, 601, "u", "1", "2")
    putter.put("u", "3")
    assert node.cli("-c", "xlen", "{dsmq:u}") == "1"
    put_long_ago(node, 597, "t", "1", "2")
    assert late.get("t") == "1"  # and reads 2 ahead
    pass_time(4)
    assert late.get("t") == ""
    waiting = begin(late.get_wait, "t", 20)
    time.sleep(0.05)
    put_long_ago(node, 580, "t", "a", "b")
    assert waiting() == "a"
    putter.put("t", "c")
    for since, expected in ((0, []), (570, ["c"]), (590, ["a", "b", "c"])):
        assert connect(since=since).get_many("t") == expected


@engines("redis")
def test_a_flush_of_redis_is_noticed(redis: Redis, connect: Connect) -> None:
    redis.cli("set", "dsmq:head", AHEAD)
    putter, getter = connect(), connect()
    putter.put("t", "old")
    assert getter.get("t") == "old"
    redis.cli("flushall")
    putter.put("t", "1")  # is behind the clock that was
    vars(getter)["_looked"] = -math.inf  # when it looked last
    assert getter.get("t") == "1"


@engines("redis")
def test_what_is_not_ours_in_redis_is_kept(redis: Redis, connect: Connect) -> None:
    redis.cli("set", "mine", "1")
    redis.cli("xadd", "stream", "*", "a", "b")
    redis.cli("set", "{dsmq:t}", "not a stream")
    mq = connect()
    raises(DSMQError, "not stopped", mq.shutdown_server)
    raises(DSMQError, "WRONGTYPE", mq.put, "t", "x")
    raises(DSMQError, "WRONGTYPE", mq.get, "t")
    mq.put("u", "x")
    assert list(mq.stats()["topics"]) == ["u"]
    redis.cli("xadd", "{dsmq:v}", "*", "a", "b")
    raises(DSMQError, "not of dsmq", mq.get, "v")
    redis.cli("del", "{dsmq:v}")
    assert redis.cli("get", "mine") == redis.cli("xlen", "stream") == "1"
    (url,) = connect.address()
    one, also_one = (dsmq.connect(url + database) for database in ("/1", "?db=1"))
    with one, also_one:  # another database
        one.put("u", "y")
        assert also_one.get("u") == "y"
    assert mq.get_many("u") == ["x"]


@leaves_sockets
def test_redis_is_reached_in_every_way_and_tells_no_secret(new_redis: NewRedis) -> None:
    connect = functools.partial(dsmq.connect, timeout=0.5)
    # That of tmp_path may be longer than the system takes.
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as clients:
        path = f"{folder}/socket"
        there, nobody = f"unix://{path}", f"Redis at {path}"
        raises(ConnectionError, nobody, connect, there, timeout=0.1)
        raises(ValueError, "'x'", connect, f"{there}?password=s3cr&x=s3cr")
        port = new_redis("--unixsocket", path, "--requirepass", "s3cr/et").port
        place = f"{HOST}:{port}"
        urls = [f"{scheme}://:s3cr%2Fet@{place}" for scheme in ("redis", "valkey")]
        urls += [f"unix://:s3cr%2Fet@{path}"]
        urls += [f"{there}?password=s3cr%2Fet&db={number}" for number in (0, 1)]
        a, b, c, d, elsewhere = (clients.enter_context(connect(url)) for url in urls)
        a.put("t", "x")
        assert b.get("t") == c.get("t") == d.get_wait("t", 5) == "x"
        assert elsewhere.get("t") == "" and "s3cr" not in repr([a, b, c, d])
        logins = ":wr0ng@", "", "nobody:s3cr%2Fet@", ":s3cr/et@", ":s3cr%2Fet@"
        wrong = [*(f"redis://{login}{place}" for login in logins)]
        for url in (f"{there}?password=wr0ng", *wrong):
            secret = "s3cr/et" if url == urls[0] else None
            error = ValueError if secret or "r/e" in url else AuthenticationError
            said = raises(error, None, connect, url, secret=secret)
            assert "wr0ng" not in said and "s3cr" not in said


def test_a_read_only_or_full_redis_is_one_server_for_all(new_redis: NewRedis) -> None:
    master = new_redis("--repl-diskless-sync-delay", "0")
    full = new_redis("--maxmemory", "1")
    replica = new_redis("--replicaof", HOST, str(master.port))
    eventually(lambda: "link_status:up" in replica.cli("info", "replication"))
    for port in (master.port, replica.port, full.port):
        with contextlib.ExitStack() as stack:
            urls = [f"redis://{HOST}:{one}" for one in (port, port, master.port)]
            *clients, putter = [stack.enter_context(dsmq.connect(url)) for url in urls]
            assert len({mq._server for mq in clients}) == 1
            if port == replica.port:
                putter.put("t", "x")
                assert clients[0].get_wait("t", 5) == "x"
                vars(clients[0])["_looked"] = -math.inf  # which gives nothing twice
                assert clients[0].get("t") == ""


@engines("cluster")
def test_topics_move_within_a_cluster(cluster: list[Redis], connect: Connect) -> None:
    putter, getter, waiter, late = (connect(n.port) for n in [*cluster, cluster[0]])
    for i in range(60):
        putter.put(f"t{i}", str(i))
    assert [getter.get(f"t{i}") for i in range(60)] == numbers(60)
    assert all(int(node.cli("dbsize")) > 10 for node in cluster)
    assert putter.stats()["messages"] == 60
    slot = cluster[0].cli("cluster", "keyslot", "{dsmq:t}")
    putter.put("t", "0")
    assert getter.get("t") == waiter.get("t") == "0"
    old = next(n for n in cluster if n.cli("cluster", "getkeysinslot", slot, "1"))
    new = next(node for node in cluster if node is not old)
    old_id, new_id = (node.cli("cluster", "myid") for node in (old, new))
    moved = threading.Event()

    def put() -> int:
        """Puts 1, 2 and so on until the topic has moved; gives the last."""
        for i in itertools.count(1):
            putter.put("t", str(i))
            if moved.is_set():
                break
        return i

    waiting, putting = begin(waiter.get_wait, "t", math.inf), begin(put)
    assert waiting() == "1"
    new.cli("cluster", "setslot", slot, "importing", old_id)
    old.cli("cluster", "setslot", slot, "migrating", new_id)
    waiting = begin(waiter.get_wait, "elsewhere", 20)
    assert getter.get("t") == "1"  # of the node that still has it
    while keys := old.cli("cluster", "getkeysinslot", slot, "100"):
        to = (HOST, str(new.port), "", "0", "5000", "keys", *keys.split("\n"))
        old.cli("migrate", *to)
    assert late.get_latest("t") != ""  # the old node says whom to ask
    for node in (new, old, *cluster):
        node.cli("cluster", "setslot", slot, "node", new_id)
    time.sleep(0.1)
    moved.set()
    expected = numbers(2, putting() + 1)
    putter.put("elsewhere", "x")
    assert waiting() == "x"
    assert getter.get_many("t", 10_000_000) == expected
    assert new.cli("cluster", "getkeysinslot", slot, "1")


@engines("cluster")
def test_clients_survive_a_failover(cluster: list[Redis], connect: Connect) -> None:
    (replica,) = {*connect.fixture("lasting_cluster")()} - {*cluster}
    told = replica.cli("info", "replication")
    seed, other, _ = sorted(cluster, key=lambda n: f"master_port:{n.port}" not in told)
    set_timeout = "--cluster", "set-timeout", f"{HOST}:{other.port}"
    putter, getter = (connect(seed.port, timeout=PATIENCE_SECONDS) for _ in range(2))
    for i in range(30):
        putter.put(f"t{i}", "before")
        assert getter.get(f"t{i}") == "before"
    assert int(seed.cli("dbsize")) > 5
    # What it has acknowledged but not passed on would be lost.
    assert seed.cli("wait", "1", "5000") == "1"
    other.cli(*set_timeout, "250")
    seed.stop()
    putting = begin(lambda: [call(putter, "put", f"t{i}", "after") for i in range(30)])
    eventually(lambda: "cluster_state:fail" in other.cli("cluster", "info"))
    replica.cli("cluster", "failover", "takeover")  # an election takes a second
    putting()
    assert [getter.get_wait(f"t{i}", 5) for i in range(30)] == ["after"] * 30
    assert putter.stats()["messages"] == 60
    other.cli(*set_timeout, "60000")


def shell(command: str, stdin: str | bytes = b"", **environment: str) -> Done:
    """The status, output and errors of a shell's command, in which dsmq is dsmq."""
    script = ["sh", "-c", f'dsmq() {{ {shlex.join(DSMQ)} "$@"; }}; {command}']
    env = {**os.environ, "PYTHONUNBUFFERED": "", **environment}
    with subprocess.Popen(script, stdin=-1, cwd=HERE, env=env, **PIPES) as process:
        done = rest(process, stdin if isinstance(stdin, bytes) else stdin.encode())
    assert "Traceback" not in done[2] and "Exception" not in done[2]
    return done


@contextlib.contextmanager
def watching(options: str) -> Iterator[Any]:
    """`dsmq watch` in a process, once it has said that it is there."""
    with start_command("watch", "--verbose", *shlex.split(options), **PIPES) as process:
        try:
            said = process.stderr.readline()
            assert b" watching " in said and b"hidden" not in said
            yield process
        finally:
            process.kill()


@needs_signals
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, 0])
def test_signals_and_shutdown_end_serve_with_status_0(launch: Launch, how: int) -> None:
    process = launch()
    shutdown = f"dsmq --timeout 5 shutdown --port {process.port}"
    with within(10):
        assert how or shell(shutdown) == (0, "", "")
        assert process.stop(how) == 0
    for text in (f"dsmq {dsmq.__version__}", "Ctrl-C", "stopped; goodbye"):
        assert text in process.log.read_text()


@needs_signals
@pytest.mark.parametrize("how", ["INT", "TERM"])
def test_a_signal_before_serve_is_ready_ends_it_quietly(how: str) -> None:
    early = f"dsmq._Server = lambda *_, **__: os.kill(os.getpid(), signal.SIG{how})"
    serve = "sys.argv.append('serve'); sys.exit(dsmq.main())"
    with run_code("import dsmq, os, signal, sys", early, serve) as it:
        assert rest(it)[0] == 0


MANY = "".join(f"{i}\n" for i in range(30_000))
ENTRY = '{"topic": "%s", "message": "%s"}'


@pytest.mark.parametrize(("words", "stdin", "messages"), [
    ("put t --port $PORT hello --timeout 5 you", "", ["hello", "you"]),
    ("put --port=$PORT t -5 -- -x -- ''", "", ["-5", "-x", "--", ""]),
    ("--port $PORT put -- t -x", "", ["-x"]),
    ("put t --port $PORT", "a\n\n世\nlast", ["a", "", "世", "last"]),
    ("put t - --port $PORT", "a\n", ["a"]),
    ("put t --port $PORT", "", []),
    ("put t --port $PORT", MANY, MANY.split()),
    ("put t --port $PORT", "x" * 300_000 + "\ny\n", ["x" * 300_000, "y"]),
])  # fmt: skip
def test_put_takes_messages_or_lines_and_options_anywhere(
    server: Server, connect: Connect, words: str, stdin: str, messages: list[str]
) -> None:
    mq = connect()
    assert shell(f"dsmq {words}", stdin, PORT=str(server.port)) == (0, "", "")
    assert mq.get_many("t", 40_000) == messages


def test_put_says_what_was_stored_at_an_error(serve: Serve, monkeypatch: Patch) -> None:
    server = serve(max_bytes=3_000_000)
    put = f"dsmq put t --port {server.port}"
    status, _, errors = shell(put, "x\n" * 50_000)
    stored = server.store.stats()["messages"]
    assert status == 1 and f"dsmq: stopped after {stored} lines: " in errors and stored
    assert "dsmq: stopped after 0 lines" in shell(put, b"x\n\xff\n")[2]
    assert shell(f"{put} 2>&-", b"\xff") == (1, "", "")  # nowhere to say it
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(fileno=lambda: 0))
    monkeypatch.setattr(os, "read", lambda *_: b"x" * (5 << 20))  # no end of a line
    raises(DSMQError, "lines: a line is longer", dsmq._put, "t", port=server.port)


def test_put_hands_on_each_line_as_it_comes(server: Server, connect: Connect) -> None:
    mq = connect()
    with start_command("put", "t", "--port", str(server.port), stdin=-1) as process:
        for text in ("one", "two"):
            os.write(process.stdin.fileno(), text.encode() + b"\n")
            assert mq.get_wait("t", PATIENCE_SECONDS) == text


@pytest.mark.parametrize(("options", "status", "lines"), [
    ("a --count 2", 0, ["hé", "llo", ""]),
    ("a --timeout 0.3", 0, ["hé", "llo", ""]),
    ("a --timeout 0.3 --count 3", 1, ["hé", "llo", ""]),
    ("a --count 3 b", 0, ["a hé", "llo", "a ", "b y"]),
    ("a --json --count 2", 0, [ENTRY % ("a", r"h\u00e9\nllo"), ENTRY % ("a", "")]),
    ("b --json --timeout inf --count 1", 0, [ENTRY % ("b", "y")]),
])  # fmt: skip
def test_watch_shows_messages_alone_or_with_their_topics(
    server: Server, connect: Connect, options: str, status: int, lines: list[str]
) -> None:
    with watching(f"{options} --port {server.port}") as process:
        connect().put_many("a", ["hé\nllo", ""])
        connect().put("b", "y")
        told = "dsmq: 2 of 3 messages came\n" if status else ""
        ended, out, errors = rest(process)
    assert (ended, errors) == (status, told)
    assert sorted(out.splitlines()) == sorted(lines)


def test_watch_goes_on_through_a_restart(serve: Serve, connect: Connect) -> None:
    server = serve()
    with watching(f"t --count 2 --port {server.port}") as process:
        connect(server.port).put("t", "before")
        assert process.stdout.readline() == b"before\n"
        server.stop()
        connect(serve(server.port).port).put("t", "after")
        assert rest(process)[:2] == (0, "after\n")


@needs_signals
def test_watch_says_that_it_is_there_on_a_terminal(server: Server) -> None:
    near, far = os.openpty()
    options = "--port", str(server.port), "--timeout", "0.05"
    for stderr in (subprocess.PIPE, far):
        with start_command("watch", "t", *options, stderr=stderr) as process:
            assert not process.communicate(timeout=PATIENCE_SECONDS)[1]
        assert process.returncode == 0
    os.close(far)
    assert f"watching t at 127.0.0.1:{server.port}".encode() in os.read(near, 1000)
    os.close(near)


@needs_signals
@pytest.mark.parametrize("status", [130, 0])
def test_watch_ends_quietly(server: Server, connect: Connect, status: int) -> None:
    mq = connect()
    with watching(f"t --port {server.port}") as process:
        mq.put("t", "x")
        assert process.stdout.readline() == b"x\n"
        if status:
            process.send_signal(signal.SIGINT)
        else:
            process.stdout.close()
            mq.put("t", "y")
        assert process.wait(PATIENCE_SECONDS) == status
        assert process.stderr.read() == b""


def test_stats_are_a_table_or_json(server: Server, connect: Connect) -> None:
    mq = connect()
    topics = {"a tópic": "a tópic", "\n\x1b[31m": r"\n\x1b[31m", "x" * 50: "x" * 50}
    for topic in topics:
        mq.put_many(topic, ["x"] * 12)
    table = shell(f"dsmq stats --port {server.port}")[1]
    rows = [re.escape(shown) + r" +12 +\d+" for shown in topics.values()]
    for row in (r"messages +36", r"uptime +\d+", *rows):
        assert re.search(f"^{row}$", table, re.M)
    stats = json.loads(shell(f"dsmq --port {server.port} stats --json")[1])
    assert stats.keys() == mq.stats().keys() and stats["topics"] == mq.stats()["topics"]


ERRORS = [
    ("nonsense", 2, "not of that form: nonsense"),
    ("put", 2, r"put \[options\] TOPIC \[MSG ...\]"),
    ("watch --timeout 1", 2, "TOPIC ..."),
    ("stats x", 2, "not of that form: stats x"),
    ("put t --bogus x", 2, "unrecognized arguments: --bogus"),
    ("serve --tls", 2, "unrecognized arguments: --tls"),
    ("serve --port x", 2, "invalid int"),
    ("serve --port $USED", 1, "cannot listen on 127.0.0.1:.*in use"),
    ("--port 99999 serve", 1, "port must be 0 to 65535"),
    ("serve --time-to-live nan", 1, "time_to_live must be"),
    ("serve --certfile /nowhere", 1, "No such file"),
    ("stats --secret-file /nowhere", 1, "No such file"),
    ("DSMQ_SECRET= dsmq serve --port 0", 1, "secret must not be empty"),
    ("watch t --port $USED --timeout nan", 1, "timeout must be"),
    ("watch t --port $USED --since nan", 1, "since must be"),
    ("watch '' --port $USED", 1, "a topic"),
    *((f"{what} --count 0", 1, "count must be") for what in ("bench", "watch t")),
    ("stats --host nowhere.invalid", 1, "dsmq server at nowhere.invalid"),
    ("put t x --timeout 0.2 --port $FREE", 1, "refused"),
    ("--port $FREE shutdown --timeout 0.2", 1, "refused"),
    ("put t x --port $USED >&-", 0, ""),
    ("stats --port $USED >&-", 0, ""),
    ("stats --port $USED | true", 0, ""),
    ("stats --port $USED > /dev/full", 1, "No space left"),
    ("--help | true", 0, ""),
    ("--help > /dev/full", 1, "No space left"),
    ("watch t --port $USED >&-", 1, "output is closed"),
    ("put t --port $USED <&-", 1, "input is closed"),
]


def test_errors_are_one_line_and_a_status(server: Server) -> None:
    ports = {"USED": str(server.port), "FREE": str(quiet_port())}

    def check(errors: list[tuple[str, int, str]]) -> None:
        for words, status, text in errors:
            with within(8):
                done = shell(words if "dsmq" in words else f"dsmq {words}", **ports)
            assert done[:2] == (status, "") and re.search(text, done[2]), words
            assert status == 2 or done[2].count("\n") == status, words

    together(check, (ERRORS[::2], ERRORS[1::2]))


def test_the_command_line_takes_the_url_of_a_redis(redis: Redis) -> None:
    redis.cli("acl", "setuser", "me", "on", ">hidden", "~*", "&*", "+@all")
    host = f"--host redis://me:hidden@{HOST}:{redis.port}/0"
    with watching(f"{host} a --count 2") as process:
        puts = f"dsmq put b {host}", f"dsmq put a {host} hé llo"
        assert together(shell, puts, ("x\ny", "")) == [(0, "", "")] * 2
        assert rest(process) == (0, "hé\nllo\n", "")
    stats = json.loads(shell(f"dsmq stats --json {host}")[1])
    assert stats["topics"]["b"]["messages"] == 2
    put_long_ago(redis, 100, "c", "1")
    put_long_ago(redis, 50, "c", "2")
    with watching(f"c {host} --since 60.5 --count 1") as process:
        assert rest(process) == (0, "2\n", "")
    assert "not stopped by its clients" in shell(f"dsmq shutdown {host}")[2]


def test_bench_measures_a_private_server_or_a_running_one(server: Server) -> None:
    status, out, errors = shell("dsmq bench --count 20 --json", DSMQ_SECRET="another's")
    assert (status, errors) == (0, "")
    assert [*map(bool, json.loads(out).values())] == [True] * 9
    assert server.store.stats()["messages"] == 0
    status, out, errors = shell(f"dsmq bench --count 20 --port {server.port}")
    assert (status, out.count("\n"), errors) == (0, 9, "")
    assert server.store.stats()["messages"] > 100


# On a port of its own, as others may run the tests, too.
DEMOS = [["dsmq.py"], ["demo.py", str(quiet_port())]]


@needs_signals
def test_a_demo_that_is_cut_short_leaves_nothing_running() -> None:
    def cut(command: list[str], how: int) -> bytes:
        demo: Any
        options = {**PIPES, "cwd": HERE, "start_new_session": True}
        with subprocess.Popen([sys.executable, *command], **options) as demo:
            while b"putter" not in demo.stdout.readline():
                pass  # all have begun
            os.killpg(demo.pid, how) if how else demo.stdout.close()
            # Whoever is left would keep it open.
            return bytes(demo.communicate(timeout=PATIENCE_SECONDS)[1])

    assert together(cut, [*DEMOS, DEMOS[0]], (2, 2, 0))[::2] == [b"", b""]


def test_help_and_version() -> None:
    assert shell("dsmq --version") == (0, f"dsmq {dsmq.__version__}\n", "")
    overview = shell("dsmq --help")[1]
    for name in filter(None, dsmq._COMMANDS):
        text = shell(f"dsmq {name} --help")[1]
        assert f"usage: dsmq {name}" in text and "--secret-file" in text
        assert ("redis://" in text) == (name != "serve")
        assert f" dsmq {name}" in overview


def test_secret_and_tls_on_a_command_line(launch: Launch, certificate: Path) -> None:
    names = "secret", "both.pem", "cert.pem", "key.pem"
    secret, both, cert, key = (certificate / name for name in names)
    secret.write_text("s3crét\n", encoding="utf-8")
    both.write_text(cert.read_text() + key.read_text())
    process = launch("--certfile", str(both), "--secret-file", str(secret))
    where = f"--host localhost --port {process.port} --tls {cert}"
    assert shell(f"dsmq put t x {where}", DSMQ_SECRET="s3crét") == (0, "", "")
    refusal = "dsmq: the server does not know the secret\n"
    assert shell(f"dsmq put t x {where}", DSMQ_SECRET="wrong") == (1, "", refusal)
    stats = f"dsmq stats --json {where} --secret-file {secret}"
    assert json.loads(shell(stats, DSMQ_SECRET="wrong")[1])["messages"] == 1


# ------------------------------------------------ README, the demos and the package

README = (HERE / "README.md").read_text(encoding="utf-8")


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_demos_tell_their_story_and_readme_shows_it(tmp_path: Path) -> None:
    def run(name: str, *port: str) -> str:
        code = (HERE / name).read_text("utf-8").replace("sleep(0.3)", "sleep(0)")
        (tmp_path / name).write_text(code, "utf-8")  # without the pauses
        command = [sys.executable, name, *port]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == ""
        return done.stdout

    def lines(text: str) -> list[str]:
        return sorted(re.sub(r":\d{4,5}", ":PORT", text).strip().splitlines())

    told = together(lambda command: run(*command), DEMOS)
    for out in told:
        for who in ("server", "putter", "getter A", "getter B", "stopped"):
            assert who in out
        got_a, got_b = (re.findall(rf"getter {n}: got (.*)", out) for n in "AB")
        assert got_a == got_b and len(got_a) >= 3
    shown = next(b for b in readme_blocks("text") if "putter:" in b)
    assert lines(shown) == lines(told[0])


def test_python_examples_in_readme_run(server: Server, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    for number, block in enumerate(readme_blocks("python")):
        path = tmp_path / f"example{number}.py"
        if "example.com" in block:
            compile(block, "README", "exec")
            continue
        port = dsmq._free_port() if "serve" in block else server.port
        block = block.replace("connect()", f"connect(port={port})")
        block = block.replace("target=serve", f"target=serve, args=({HOST!r}, {port})")
        path.write_text(block, encoding="utf-8")
        done = subprocess.run([sys.executable, str(path)], env=env, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode().splitlines() == re.findall(r"# -> (.*)", block)


def test_sessions_in_readme_print_what_it_says(server: Server, capsys: Any) -> None:
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
          const slow = getter.get("nothing", 30), begin = Date.now();
          slow.catch((error) => console.log(error.message));
          const waiting = [1, 2, 3].map(() => getter.get("greetings", 10));
          await new Promise((resolve) => setTimeout(resolve, 100));
          await getter.put("greetings", "first", "second", "third");
          console.log((await Promise.all(waiting)).join());
          console.log(Date.now() - begin < 5000 ? "at once" : "late");
          await putter.put("").catch((error) => console.log(error.message));
          getter.close();
          putter.close();
        })();
    """.replace("PORT", str(server.port))
    command = ["node", "-e", client + use]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr
    *lines, refusal, closed = done.stdout.decode().splitlines()
    expected = ["Grüße, 世界 😀", '""', '""', "first,second,third", "at once"]
    assert lines == expected and closed == "connection closed"
    assert "1 to 1000 characters" in refusal


def test_readme_names_all_actions_methods_and_options() -> None:
    protocol, client = (
        re.search(rf"^## {title}\n.*?^## ", README, re.M | re.S)
        for title in ("Protocol", "Client")
    )
    assert protocol and client
    assert re.findall(r"^\| `(\w+)` \|", protocol[0], re.M) == ACTIONS
    methods = re.findall(r"^\| `(\w+)\(", client[0], re.M)
    public = {name for name in vars(Client) if not name.startswith("_")}
    assert sorted(methods) == sorted(public - {"closed"})
    for name in (*dsmq.__all__, *inspect.signature(dsmq.serve).parameters):
        assert f"`{name}" in README, name


PACKAGE = ["__init__.py", "__main__.py", "client.py", "py.typed", "server.py"]
TYPED_PROGRAM = """
import dsmq, multiprocessing
from dsmq.client import connect
from dsmq.server import serve
if __name__ == "__main__":
    address = "127.0.0.1", dsmq._free_port()
    multiprocessing.get_context("spawn").Process(target=serve, args=address).start()
    with connect(*address) as mq, dsmq.connect(*address) as other:
        # Without types to see there is nothing to ignore, which is an error too.
        put_wrong = lambda: mq.put("t", 5)  # type: ignore[arg-type]
        mq.put("t", "Hello, world")
        print(other.get_wait("t") + "!")
        mq.shutdown_server()
"""


def test_the_package_brings_types_and_starts_in_every_way(tmp_path: Path) -> None:
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 60}
    options["env"] = {**os.environ, "PYTHONPATH": ""}  # this folder is not seen

    def run(*command: str | Path, cwd: Path = tmp_path) -> str:
        done = subprocess.run(command, cwd=cwd, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return str(done.stdout)

    for name in ("pip", "hatchling", "mypy"):
        if importlib.util.find_spec(name) is None:
            skip(f"no {name} here")
    module, quiet = (sys.executable, "-m"), ("-q", "--disable-pip-version-check")
    run(*module, "hatchling", "build", "-t", "sdist", "-d", tmp_path, cwd=HERE)
    (sdist,) = tmp_path.glob("*.tar.gz")  # which must do for the wheel
    run(*module, "pip", *quiet, "wheel", "--no-build-isolation", "--no-deps", sdist)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("dsmq/__init__.py") == (HERE / "dsmq.py").read_bytes()
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        assert names == {f"dsmq/{name}" for name in PACKAGE}
    run(*module, "venv", "--without-pip", "v")
    scripts = tmp_path / "v" / ("Scripts" if os.name == "nt" else "bin")
    python, program = scripts / "python", tmp_path / "program.py"
    run(*module, "pip", *quiet, "--python", python, "install", "--no-deps", wheel)
    program.write_text(TYPED_PROGRAM, encoding="utf-8")
    check = "--strict", "--cache-dir", tmp_path / "mypy", "--python-executable", python
    demo = python, "-m", "dsmq"
    checking = begin(run, *module, "mypy", *check, program)
    showing = begin(run, *demo)
    assert run(python, program) == "Hello, world!\n"
    for command in (demo, (scripts / "dsmq",)):
        assert run(*command, "--version") == f"dsmq {dsmq.__version__}\n"
    assert showing(60).endswith("stopped\n") and checking(60)
