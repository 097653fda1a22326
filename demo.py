"""A server, a putter and two getters, each in a process of its own.

    python3 demo.py

Copy from here: `serve` is a process target, `connect` gives a client, and every getter
receives every message that was put after it connected.
"""

import sys
import time
from multiprocessing import Process

from dsmq import connect, serve

HOST = "127.0.0.1"
PORT = int(sys.argv[1]) if len(sys.argv) > 1 else 30009


def say(line: str) -> None:
    # Line and line end together, for the other processes print here too.
    print(line + "\n", end="", flush=True)


def put_greetings(count: int) -> None:
    with connect(HOST, PORT) as mq:
        for i in range(count):
            text = f"{i}. Hello, world"
            say(f"putter: puts {text}")
            mq.put("greetings", text)
            time.sleep(0.3)
        mq.put("greetings", "goodbye")


def get_greetings(name: str) -> None:
    with connect(HOST, PORT) as mq:
        mq.put("ready", name)
        for text in mq.listen("greetings", timeout=10):
            say(f"getter {name}: got {text}")
            if text == "goodbye":
                return


def main() -> None:
    # Python ends daemons when it ends, also after an exception. If it is killed, the
    # server notices that, and the others that the server is gone.
    server = Process(target=serve, args=(HOST, PORT), daemon=True)
    getters = [Process(target=get_greetings, args=(n,), daemon=True) for n in "AB"]
    putter = Process(target=put_greetings, args=(5,), daemon=True)
    server.start()
    with connect(HOST, PORT) as mq:  # waits until the server is there
        say(f"server: started on {HOST}, port {PORT}")
        for getter in getters:
            getter.start()
        for _ in getters:  # they would miss what is put before they are connected
            say(f"getter {mq.get_wait('ready')}: connected")
        putter.start()
        for process in (putter, *getters):
            process.join()
        mq.shutdown_server()
    server.join()
    say("server: stopped")


if __name__ == "__main__":
    main()
