"""Redis behind the same calls, against real redis-server processes on loopback."""

import contextlib
import importlib.util
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import dsmq

pytestmark = pytest.mark.skipif(
    not (shutil.which("redis-server") and importlib.util.find_spec("redis")),
    reason="redis-server or the package redis is missing",
)

HERE = Path(__file__).parent


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class Redis:
    """A redis-server of its own on a free port of loopback."""

    def __init__(self, directory, *options, port=None):
        self.port = port or free_port()
        self.directory, self.options = directory, options
        self.start()

    def start(self):
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--save", "", "--appendonly", "no", *self.options]
        self.process = subprocess.Popen(
            command, cwd=self.directory, stdout=subprocess.DEVNULL
        )
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            time.sleep(0.01)
        raise TimeoutError("redis-server did not start")

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}/0"

    def cli(self, *words):
        command = ["redis-cli", "--raw", "-p", str(self.port), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        return done.stdout.strip()

    def kill(self):
        self.process.kill()
        self.process.wait(10)

    def pause(self):
        self.process.send_signal(signal.SIGSTOP)

    def resume(self):
        self.process.send_signal(signal.SIGCONT)


@pytest.fixture
def servers(tmp_path):
    """Starts servers, and kills them in the end."""
    started = []

    def start(*options, **kwargs):
        directory = tmp_path / str(len(started))
        directory.mkdir()
        started.append(Redis(directory, *options, **kwargs))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture
def server(servers):
    return servers()


@pytest.fixture
def connect():
    clients = []

    def connect(target, **kwargs):
        url = target if isinstance(target, str) else target.url
        kwargs.setdefault("timeout", 5)
        clients.append(dsmq.connect(url, **kwargs))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


@pytest.fixture
def cluster(servers, tmp_path):
    return start_cluster(servers, 3)


def start_cluster(servers, masters, replicas=0):
    options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000"]
    options += ["--repl-diskless-sync-delay", "0"]
    # The nodes talk to each other on the port plus 10,000.
    ports = []
    while len(ports) < masters * (1 + replicas):
        port = free_port()
        with contextlib.suppress(OSError, OverflowError):
            socket.create_server(("127.0.0.1", port + 10_000)).close()
            ports.append(port)
    nodes = [servers(*options, port=port) for port in ports]
    addresses = [f"127.0.0.1:{node.port}" for node in nodes]
    command = ["redis-cli", "--cluster", "create", *addresses]
    command += ["--cluster-replicas", str(replicas), "--cluster-yes"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)
    wait_until(
        lambda: all("cluster_state:ok" in n.cli("cluster", "info") for n in nodes)
    )
    return nodes


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.05)


def in_thread(work, *arguments):
    """Starts a thread; gives a function that waits for its result or exception."""
    outcome = []

    def run():
        try:
            outcome.append((work(*arguments), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result(seconds=20):
        thread.join(seconds)
        assert not thread.is_alive(), "it never returned"
        value, error = outcome[0]
        if error:
            raise error
        return value

    return result


class CuttingProxy:
    """Passes bytes on to a server; while `cut` is set it takes the next reply to more
    than 100 bytes of request away, and the connection with it."""

    def __init__(self, port):
        self.port, self.cut, self.cuts = port, threading.Event(), 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=(near,), daemon=True).start()

    def serve(self, near):
        with near, socket.create_connection(("127.0.0.1", self.port)) as far:
            near.settimeout(20)
            with contextlib.suppress(OSError):
                while request := near.recv(1 << 20):
                    far.sendall(request)
                    reply = far.recv(1 << 20)
                    if len(request) > 100 and self.cut.is_set():
                        self.cut.clear()
                        self.cuts += 1
                        return
                    near.sendall(reply)


# What every client does


@pytest.fixture(params=["single", "cluster"])
def either(request):
    """A server, or a node of a cluster."""
    if request.param == "single":
        return request.getfixturevalue("server")
    return request.getfixturevalue("cluster")[0]


def test_every_client_reads_everything_in_order(either, connect):
    putter, *getters = (connect(either) for _ in range(3))
    texts = [str(n) for n in range(300)]
    for text in texts[:50]:
        putter.put("greetings", text)
    putter.put_many("greetings", texts[50:])
    for getter in getters:
        assert [getter.get("greetings") for _ in range(100)] == texts[:100]
        assert getter.get_many("greetings", 1000) == texts[100:]
        assert getter.get("greetings") == ""
        assert getter.get("other") == ""


def test_any_text_in_any_topic(either, connect):
    a, b = connect(either), connect(either)
    texts = ["", "\0", "é\n\r\n", "𝄞" * 1000, "$5\r\nhello\r\n", "x" * 3_000_000]
    for topic in ["t", "}", "{}", "}a{b}", "*", "\0", "é", "x" * 1000, "head"]:
        a.put_many(topic, texts)
        a.put(topic, "end")
        assert b.get_many(topic) == [*texts, "end"]
    assert set(b.stats()["topics"]) == {
        *["t", "}", "{}", "}a{b}", "*", "\0", "é", "x" * 1000, "head"]
    }


def test_get_latest_skips_the_older_ones(either, connect):
    a, b = connect(either), connect(either)
    assert b.get_latest("t") == ""
    a.put_many("t", ["1", "2", "3"])
    assert b.get_latest("t") == "3"
    assert b.get_latest("t") == b.get("t") == ""
    a.put_many("t", ["4", "5"])
    assert b.get("t") == "4"
    assert b.get_latest("t") == "5"


def test_get_wait_wakes_when_the_message_is_put(either, connect):
    a, b = connect(either), connect(either)
    assert b.get_wait("t", 0) == ""
    begun = time.monotonic()
    assert b.get_wait("t", 0.3) == ""
    assert 0.25 < time.monotonic() - begun < 1
    delays = []
    for _ in range(20):
        waiting = in_thread(b.get_wait, "t", 10)
        time.sleep(0.03)
        put_at = time.perf_counter()
        a.put("t", "now")
        assert waiting() == "now"
        delays.append(time.perf_counter() - put_at)
    assert sorted(delays)[10] < 0.02


def test_get_wait_persists_as_the_original(server, connect):
    mq = connect(server)
    mq._n_tries, mq._initial_retry = 5, 0.01
    begun = time.monotonic()
    assert mq.get_wait("t") == ""
    assert 0.3 < time.monotonic() - begun < 0.6


def test_listen_ends_after_silence(either, connect):
    a, b = connect(either), connect(either)
    a.put_many("t", ["1", "", "3"])
    assert list(b.listen("t", timeout=0.2)) == ["1", "", "3"]


def test_waiting_threads_hold_up_no_other_call(server, connect):
    mq, other = connect(server), connect(server)
    waiting = [in_thread(mq.get_wait, f"t{n}", 10) for n in range(30)]
    time.sleep(0.2)
    begun = time.monotonic()
    for n in range(30):
        mq.put("x", str(n))
    assert time.monotonic() - begun < 1
    for n in range(30):
        other.put(f"t{n}", str(n))
    assert [result() for result in waiting] == [str(n) for n in range(30)]


def test_each_message_goes_to_one_thread(server, connect):
    a, b = connect(server), connect(server)

    def read():
        got = []
        while (text := b.get_wait("t", 5)) != "stop":
            got.append(int(text))
        return got

    readers = [in_thread(read) for _ in range(4)]
    a.put_many("t", [str(n) for n in range(400)])
    for n in range(400, 500):
        a.put("t", str(n))
    a.put_many("t", ["stop"] * 4)
    gots = [result() for result in readers]
    assert sorted(n for got in gots for n in got) == list(range(500))
    assert all(got == sorted(got) for got in gots)


def write(url, name):
    with dsmq.connect(url) as mq:
        for n in range(100):
            mq.put("t", f"{name} {n}")


def test_four_writers_two_readers_all_in_order(either, connect):
    readers = [connect(either), connect(either)]
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write, args=(either.url, n)) for n in range(4)]
    for writer in writers:
        writer.start()
    gots = [[reader.get_wait("t", 20) for _ in range(400)] for reader in readers]
    for writer in writers:
        writer.join(20)
    assert gots[0] == gots[1]
    for name in range(4):
        mine = [text for text in gots[0] if text.startswith(f"{name} ")]
        assert mine == [f"{name} {n}" for n in range(100)]


# Where reading begins


def test_what_is_put_after_connecting_is_seen(either, connect):
    putter = connect(either)
    for n in range(1000):
        with dsmq.connect(either.url) as late:
            putter.put(f"t{n % 500}", str(n))
            assert late.get(f"t{n % 500}") == str(n)


def test_what_was_put_before_connecting_is_not_seen(either, connect):
    putter = connect(either)
    for n in range(1000):
        putter.put(f"t{n % 500}", str(n))
        with dsmq.connect(either.url) as late:
            assert late.get(f"t{n % 500}") == ""


def test_boundary_holds_with_a_clock_that_was_ahead(server, connect):
    # Like a clock that stepped back an hour: the newest id is in its future.
    ahead = int(time.time() * 1000) + 3_600_000
    server.cli("set", "dsmq:head", f"{ahead}-7")
    early, putter = connect(server), connect(server)
    putter.put("t", "behind the clock it saw")
    assert early.get("t") == "behind the clock it saw"
    for n in range(50):
        putter.put(f"a{n}", "before")
        late = connect(server)
        assert late.get(f"a{n}") == ""
        putter.put(f"b{n}", "after")
        putter.put(f"a{n}", "after")
        assert late.get(f"a{n}") == late.get(f"b{n}") == "after"


# Time to live


def short_lived(mq, seconds=0.3):
    mq._time_to_live = seconds
    return mq


def test_expired_messages_are_neither_handed_out_nor_kept(either, connect):
    a, b = short_lived(connect(either)), short_lived(connect(either))
    a.put_many("t", ["1", "2"])
    time.sleep(0.2)
    a.put("t", "3")
    time.sleep(0.2)
    assert b.get_many("t") == ["3"]
    a.put("t", "4")  # frees what has expired
    assert a.stats()["topics"]["t"]["messages"] == 2
    time.sleep(0.4)  # nobody touches it any more
    assert a.stats()["topics"] == {}
    assert b.get("t") == b.get_latest("t") == ""


def test_messages_read_ahead_expire_too(server, connect):
    a, b = short_lived(connect(server)), short_lived(connect(server))
    a.put_many("t", ["1", "2"])
    assert b.get("t") == "1"
    time.sleep(0.35)
    assert b.get("t") == ""


def test_unread_expired_ones_do_not_hide_the_live_one(server, connect):
    # Expired messages that were not trimmed: those of a putter that keeps them longer.
    a, b = connect(server), short_lived(connect(server))
    a.put_many("t", [str(n) for n in range(500)])
    time.sleep(0.35)
    assert b.get("t") == b.get_latest("t") == ""
    waiting = in_thread(b.get_wait, "t", 5)
    time.sleep(0.1)
    a.put("t", "live")
    assert waiting() == "live"


def test_nothing_is_left_of_an_abandoned_topic(server, connect):
    a = short_lived(connect(server))
    a.put("t", "1")
    assert server.cli("exists", "{dsmq:t}") == "1"
    time.sleep(0.5)
    assert server.cli("exists", "{dsmq:t}") == "0"
    keys = server.cli("keys", "*").split()
    keys.remove("dsmq:head")
    assert len(keys) == 1
    assert 0 < int(server.cli("ttl", keys[0])) <= 60  # the number of the last put


# Faults


def test_a_put_whose_answer_is_lost_is_stored_once(server, connect):
    proxy = CuttingProxy(server.port)
    a, b = connect(proxy), connect(server)
    for n in range(20):
        proxy.cut.set()
        a.put("t", str(n))
    proxy.cut.set()
    a.put_many("t", ["x", "y"])
    proxy.listener.close()
    assert proxy.cuts == 21
    assert b.get_many("t") == [*map(str, range(20)), "x", "y"]


def test_a_put_that_comes_late_is_not_stored_again(server, connect):
    a, b = connect(server, timeout=1), connect(server)
    a.put("t", "0")
    server.pause()
    waiting = in_thread(a.put, "t", "1")
    with pytest.raises(TimeoutError):
        waiting()
    server.resume()
    a.put("t", "2")
    time.sleep(0.2)
    got = b.get_many("t")
    assert got in (["0", "2"], ["0", "1", "2"])  # once at most, and never after "2"


def test_reading_carries_on_over_a_restart(server, connect):
    a, b = connect(server), connect(server)
    a.put_many("t", ["1", "2"])
    assert b.get("t") == "1"
    server.kill()
    with pytest.raises(ConnectionRefusedError, match=f"no Redis at .*{server.port}"):
        a._timeout = 0.3
        a.put("t", "lost")
    a._timeout = 5
    restart = threading.Timer(0.5, server.start)
    restart.start()
    a.put("t", "new")  # goes on trying until it is there
    restart.join()
    assert b.get("t") == "2"  # read ahead before
    assert b.get("t") == "new"
    a.put("t", "newer")
    assert b.get("t") == "newer"


def test_restored_messages_are_not_read_twice(servers, connect):
    server = servers("--save", "3600 1")
    a, b = connect(server), connect(server)
    a.put_many("t", ["1", "2"])
    server.cli("save")
    a.put("t", "3")
    assert b.get_many("t") == ["1", "2", "3"]
    server.kill()
    server.options = ("--save", "3600 1")
    server.start()
    assert b.get("t") == ""
    a.put("t", "4")
    assert b.get_many("t") == ["4"]


def test_get_wait_survives_a_restart(server, connect):
    a, b = connect(server), connect(server)
    waiting = in_thread(b.get_wait, "t", 10)
    time.sleep(0.2)
    server.kill()
    server.start()
    a.put("t", "new")
    assert waiting() == "new"


CALLS = {
    "put": lambda mq: mq.put("t", "x"),
    "put_many": lambda mq: mq.put_many("t", ["x"]),
    "get": lambda mq: mq.get("t"),
    "get_wait": lambda mq: mq.get_wait("t", 60),
    "get_latest": lambda mq: mq.get_latest("t"),
    "get_many": lambda mq: mq.get_many("t"),
    "listen": lambda mq: next(mq.listen("t")),
    "stats": lambda mq: mq.stats(),
}


def test_no_call_outlasts_its_timeout_on_a_silent_server(either, connect):
    mq = connect(either, timeout=1)
    mq.put("t", "x")
    mq.get("t")
    nodes = (
        either.cli("cluster", "nodes").split("\n")
        if "cluster_enabled:1" in (either.cli("info", "cluster"))
        else []
    )
    pids = [node_pid(node) for node in nodes] or [either.process.pid]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        for name, call in CALLS.items():
            begun = time.monotonic()
            with pytest.raises(TimeoutError, match="Redis at 127"):
                in_thread(call, mq)()
            assert time.monotonic() - begun < 2, name
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            dsmq.connect(either.url, timeout=1)
        assert time.monotonic() - begun < 2
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    mq._timeout = 5
    assert mq.get_wait("t", 1) in ("", "x")  # and it serves again


def node_pid(line):
    port = line.split()[1].split(":")[1].split("@")[0]
    info = subprocess.run(
        ["redis-cli", "-p", port, "info", "server"],
        capture_output=True,
        text=True,
        timeout=10,
    ).stdout
    return int(info.split("process_id:")[1].split()[0])


def test_a_waiting_read_ends_when_the_server_stops_answering(server, connect):
    mq = connect(server, timeout=1)
    waiting = in_thread(mq.get_wait, "t", 60)
    time.sleep(0.2)
    server.pause()
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        waiting()
    assert time.monotonic() - begun < 2
    server.resume()


def test_close_ends_the_wait_of_another_thread(either, connect):
    mq = connect(either)
    waiting = in_thread(mq.get_wait, "t", math.inf)
    time.sleep(0.3)
    begun = time.monotonic()
    mq.close()
    with pytest.raises(ConnectionError, match="closed"):
        waiting()
    assert time.monotonic() - begun < 0.5
    mq.close()
    with pytest.raises(ConnectionError, match="closed"):
        mq.put("t", "x")


def test_an_interrupt_leaves_the_client_in_step(server, connect):
    mq, other = connect(server), connect(server)

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for n in range(20):
            signal.setitimer(signal.ITIMER_REAL, 0.01 + n / 2000)
            with pytest.raises(KeyboardInterrupt):
                mq.get_wait("t", 10)
    finally:
        signal.signal(signal.SIGALRM, previous)
    other.put("t", "1")
    assert mq.get("t") == "1"
    assert mq.get("u") == ""


# Processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_both_sides_of_a_fork_read_on(server, connect):
    a, b = connect(server), connect(server)
    a.put_many("t", ["1", "2"])
    assert b.get("t") == "1"
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            assert b.get_many("t") == ["2"]
            b.put("child", "hello")
            b.close()
            status = 0
        os._exit(status)
    assert b.get_wait("child", 10) == "hello"
    assert os.waitpid(pid, 0)[1] == 0
    assert b.get("t") == "2"  # closed on the other side only
    a.put("t", "3")
    assert b.get("t") == "3"


def read_on(mq, results):
    with mq:
        results.put(mq.get_many("t"))
        mq.put("answer", "done")


def test_a_client_is_passed_to_a_spawned_process(either, connect):
    a, b = connect(either), connect(either)
    a.put_many("t", ["1", "2", "3"])
    assert b.get("t") == "1"
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=read_on, args=(b, results))
    process.start()
    assert results.get(timeout=20) == ["2", "3"]
    assert b.get_wait("answer", 10) == "done"
    process.join(20)
    assert b.get_many("t") == ["2", "3"]
    assert pickle.loads(pickle.dumps(b)).get("t") == ""


# Errors


def test_a_password_belongs_in_the_url(servers, connect):
    server = servers("--requirepass", "s3cr/et")
    good = f"redis://:s3cr%2Fet@127.0.0.1:{server.port}"
    a = connect(good)
    a.put("t", "x")
    assert "s3cr" not in repr(a)
    for wrong in ("redis://:wr0ng@127.0.0.1", "redis://127.0.0.1"):
        begun = time.monotonic()
        with pytest.raises(dsmq.AuthenticationError) as caught:
            dsmq.connect(f"{wrong}:{server.port}")
        assert time.monotonic() - begun < 1
        assert "wr0ng" not in str(caught.value)
    with pytest.raises(dsmq.AuthenticationError):
        dsmq.connect(f"redis://nobody:s3cr%2Fet@127.0.0.1:{server.port}")
    with pytest.raises(ValueError, match="URL"):
        dsmq.connect(good, secret="s3cr/et")
    with pytest.raises(ValueError) as caught:
        dsmq.connect(f"redis://:s3cr/et@127.0.0.1:{server.port}")
    assert "s3cr" not in str(caught.value)


def test_a_url_that_is_none_is_refused(server):
    for url in ("redis://h:x", "redis://h/x", "redis://h/0?db=1", "redis://[::1"):
        with pytest.raises(ValueError, match="a Redis URL is"):
            dsmq.connect(url)
    with pytest.raises(ValueError, match="port"):
        dsmq.connect(server.url, 1234)
    with pytest.raises(ValueError, match="rediss"):
        dsmq.connect(server.url, tls=True)


def test_a_database_keeps_its_messages_apart(server, connect):
    zero, one = connect(server), connect(f"redis://127.0.0.1:{server.port}/1")
    also = connect(f"redis://127.0.0.1:{server.port}/1")
    one.put("t", "x")
    assert zero.get("t") == ""
    assert also.get("t") == "x"


def test_a_full_redis_is_queue_full_and_reads_go_on(servers, connect):
    server = servers("--maxmemory", "3mb")
    a, b = connect(server), connect(server)
    a.put("t", "first")
    with pytest.raises(dsmq.QueueFull):
        for _ in range(100):
            a.put("t", "x" * 100_000)
    assert b.get("t") == "first"
    late = connect(server)  # a full one can still be connected to
    assert late.get("t") == ""
    with pytest.raises(dsmq.QueueFull):
        a.put_many("u", ["x" * 100_000] * 3)
    assert late.get_many("u") == []
    assert a.stats()["max_bytes"] == 3 << 20


def test_wrong_arguments_are_refused_before_anything_is_sent(server, connect):
    a, b = connect(server), connect(server)
    with pytest.raises(TypeError):
        a.put("t", 1)
    with pytest.raises(TypeError):
        a.put(b"t", "x")
    for topic, text in (("", "x"), ("x" * 1001, "x"), ("t", "\ud800"), ("\ud800", "x")):
        with pytest.raises(ValueError):
            a.put(topic, text)
    with pytest.raises(ValueError, match="bytes"):
        a.put("t", "x" * (dsmq.MAX_FRAME_BYTES + 1))
    with pytest.raises(TypeError):
        a.put_many("t", ["x", 1])
    assert b.get("t") == ""


def test_other_peoples_keys_are_left_alone(server, connect):
    server.cli("set", "mine", "1")
    server.cli("xadd", "stream", "*", "a", "b")
    server.cli("set", "{dsmq:t}", "not a stream")
    a = connect(server)
    with pytest.raises(dsmq.DSMQError, match="WRONGTYPE"):
        a.put("t", "x")
    with pytest.raises(dsmq.DSMQError, match="WRONGTYPE"):
        a.get("t")
    a.put("u", "x")
    assert list(a.stats()["topics"]) == ["u"]
    assert server.cli("get", "mine") == "1"


def test_a_server_that_speaks_something_else(connect):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            peer, _ = listener.accept()
            with peer:
                peer.recv(1000)
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                peer.recv(1000)

        result = in_thread(answer)
        url = f"redis://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(dsmq.FrameError, match="another protocol"):
            dsmq.connect(url, timeout=5)
        result()


def test_stats_and_shutdown(either, connect):
    a = connect(either)
    a.put_many("t", ["1", "2"])
    a.put("u", "x" * 1000)
    stats = a.stats()
    assert set(stats) == {
        *("version", "uptime", "clients", "messages", "bytes"),
        *("time_to_live", "max_bytes", "topics"),
    }
    assert stats["messages"] == 3
    assert stats["topics"]["t"]["messages"] == 2
    assert stats["topics"]["u"]["bytes"] > 1000
    assert stats["bytes"] == sum(topic["bytes"] for topic in stats["topics"].values())
    assert stats["clients"] >= 1
    assert stats["time_to_live"] == 600
    with pytest.raises(dsmq.DSMQError, match="not stopped"):
        a.shutdown_server()


def test_the_missing_package_is_named(server):
    code = f"import dsmq; dsmq.connect({server.url!r})"
    # -S: without the packages that are installed.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert "pip install dsmq[redis]" in done.stderr.splitlines()[-1]


def test_tls(servers, tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    command += " -addext subjectAltName=IP:127.0.0.1"
    words = [*command.split(), "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(words, check=True, capture_output=True, timeout=30)
    port = free_port()
    options = ["--tls-port", str(port), "--tls-auth-clients", "no"]
    options += ["--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
    server = servers(*options)
    url = f"rediss://127.0.0.1:{port}"
    with (
        dsmq.connect(url, tls=certificate) as a,
        dsmq.connect(url, tls=str(certificate)) as b,
    ):
        waiting = in_thread(b.get_wait, "t", 10)
        time.sleep(0.1)
        a.put("t", "x" * 1_000_000)
        assert len(waiting()) == 1_000_000
        waiting = in_thread(b.get_wait, "t", math.inf)
        time.sleep(0.2)
        b.close()
        with pytest.raises(ConnectionError, match="closed"):
            waiting()
    import ssl

    with pytest.raises(ssl.SSLCertVerificationError):
        dsmq.connect(url, timeout=5)  # not of an authority of the system
    with pytest.raises((ConnectionError, TimeoutError)):
        dsmq.connect(f"rediss://127.0.0.1:{server.port}", timeout=2)


# Clusters


def test_a_cluster_spreads_topics_and_follows_them(cluster, connect):
    a, b = connect(cluster[0]), connect(cluster[1])
    for n in range(100):
        a.put(f"t{n}", str(n))
    assert [b.get(f"t{n}") for n in range(100)] == [str(n) for n in range(100)]
    sizes = [int(node.cli("dbsize")) for node in cluster]
    assert all(size > 10 for size in sizes)
    assert a.stats()["messages"] == 100


def test_a_slot_that_moves_takes_nothing_along_the_way(cluster, connect):
    a, b = connect(cluster[0]), connect(cluster[0])
    a.put("t", "0")
    slot = cluster[0].cli("cluster", "keyslot", "{dsmq:t}")
    old = next(n for n in cluster if n.cli("exists", "{dsmq:t}") == "1")
    new = next(n for n in cluster if n is not old)
    waiting = in_thread(b.get_wait, "elsewhere", 20)
    done = threading.Event()

    def put():
        n = 0
        while not done.is_set():
            n += 1
            a.put("t", str(n))
        return n

    putting = in_thread(put)
    time.sleep(0.1)
    old_id, new_id = (node.cli("cluster", "myid") for node in (old, new))
    new.cli("cluster", "setslot", slot, "importing", old_id)
    old.cli("cluster", "setslot", slot, "migrating", new_id)
    time.sleep(0.1)
    assert b.get("t") == "0"  # asked of the node that still has it
    while keys := old.cli("cluster", "getkeysinslot", slot, "100").split("\n"):
        if keys == [""]:
            break
        for key in keys:
            old.cli("migrate", "127.0.0.1", str(new.port), key, "0", "5000")
    for node in (new, old, *cluster):
        node.cli("cluster", "setslot", slot, "node", new_id)
    time.sleep(0.2)
    done.set()
    last = putting()
    a.put("elsewhere", "x")
    assert waiting() == "x"
    assert b.get_many("t", 10_000_000) == [str(n) for n in range(1, last + 1)]
    assert new.cli("exists", "{dsmq:t}") == "1"


def test_a_failover_is_survived(servers, connect):
    nodes = start_cluster(servers, 3, replicas=1)
    seed = nodes[0]
    a, b = connect(seed, timeout=20), connect(seed, timeout=20)
    for n in range(30):
        a.put(f"t{n}", "before")
        assert b.get(f"t{n}") == "before"
    wait_until(lambda: "state=online" in seed.cli("info", "replication"))
    time.sleep(0.5)  # for the replica to have it all
    seed.kill()
    for n in range(30):
        a.put(f"t{n}", "after")
    assert [b.get_wait(f"t{n}", 5) for n in range(30)] == ["after"] * 30
    assert a.stats()["messages"] == 60
