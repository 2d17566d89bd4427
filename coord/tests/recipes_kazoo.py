#!/usr/bin/env python3
"""recipes_kazoo.py HOSTS: does what it is told by lines on stdin, with kazoo's recipes, and answers each
with a line on stdout. Without kazoo it exits with status 2.

    lock|read|write|queue|barrier NAME PATH   makes a recipe's object and calls it NAME
    acquire|release NAME                      (acquire waits)
    try NAME                                  True or False
    put NAME VALUE, get NAME, consume NAME    of a queue (get waits)
    close|open|wait NAME                      of a barrier
"""
import sys

try:
    from kazoo.client import KazooClient
except ImportError as missing:
    print(f"kazoo is not installed (pip install kazoo): {missing}", file=sys.stderr)
    sys.exit(2)

WAIT = 60  # seconds


def main():
    c = KazooClient(hosts=sys.argv[1], timeout=10.0)
    c.start(WAIT)
    names = {}
    print("ready", flush=True)
    for line in sys.stdin:
        verb, name, *rest = line.split()
        if verb == "lock":
            names[name] = c.Lock(rest[0], "kazoo", extra_lock_patterns=["-lock-"])
        elif verb == "read":
            names[name] = c.ReadLock(rest[0], "kazoo", extra_lock_patterns=["__WRIT__"])
        elif verb == "write":
            patterns = ["__READ__", "__WRIT__"]
            names[name] = c.WriteLock(rest[0], "kazoo", extra_lock_patterns=patterns)
        elif verb == "queue":
            names[name] = c.LockingQueue(rest[0])
        elif verb == "barrier":
            names[name] = c.Barrier(rest[0])
        elif verb == "acquire":
            assert names[name].acquire(timeout=WAIT)
        elif verb == "release":
            names[name].release()
        elif verb == "try":
            print(names[name].acquire(blocking=False), flush=True)
            continue
        elif verb == "put":
            names[name].put(rest[0].encode())
        elif verb == "get":
            print(names[name].get(timeout=WAIT).decode(), flush=True)
            continue
        elif verb == "consume":
            assert names[name].consume()
        elif verb == "close":
            names[name].create()
        elif verb == "open":
            names[name].remove()
        elif verb == "wait":
            assert names[name].wait(WAIT)
        else:
            raise ValueError(line)
        print("ok", flush=True)
    c.stop()
    c.close()


main()
