#!/usr/bin/env python3
"""kazoo_recipes.py HOSTS: kazoo (an unchanged ZooKeeper client) against the servers HOSTS.

Its Lock and Election recipes, and the operations they stand on. Ends with "PASS", or with an
exception and exit status 1. Without kazoo it exits with status 2 and says which package is missing.
"""
import sys
import threading

try:
    from kazoo.client import KazooClient, KazooState
    from kazoo.exceptions import (
        BadVersionError,
        NoChildrenForEphemeralsError,
        NodeExistsError,
        NoNodeError,
        NotEmptyError,
        RolledBackError,
    )
    from kazoo.protocol.states import EventType
    from kazoo.security import CREATOR_ALL_ACL, make_digest_acl
except ImportError as missing:
    print(f"kazoo is not installed (pip install kazoo): {missing}", file=sys.stderr)
    sys.exit(2)

WAIT = 30  # seconds: how long something that must happen may take on a slow machine
ROOT = "/kazoo"


def client(hosts, timeout=10.0):
    c = KazooClient(hosts=hosts, timeout=timeout)
    c.start(WAIT)
    return c


def expect(error, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except error:
        return
    raise AssertionError(f"{call.__name__}{args} did not raise {error.__name__}")


def happens(event, what):
    assert event.wait(WAIT), f"did not happen: {what}"


def basics(c, other):
    path = ROOT + "/basics"
    assert c.create(path, b"one") == path
    expect(NodeExistsError, c.create, path)
    expect(NoNodeError, c.create, path + "/no/parent")
    data, stat = c.get(path)
    assert (data, stat.version, stat.data_length) == (b"one", 0, 3)
    assert stat.czxid == stat.mzxid == stat.pzxid > 0
    stat = c.set(path, b"two", 0)
    assert stat.version == 1 and stat.mzxid > stat.czxid
    expect(BadVersionError, c.set, path, b"three", 0)
    expect(BadVersionError, c.delete, path, 0)
    other.sync(path)
    assert other.get(path)[0] == b"two"
    assert c.exists(path + "/none") is None
    created, stat = c.create(path + "/child", b"", include_data=True)
    assert created == path + "/child" and stat.version == 0
    assert c.get_children(path) == ["child"]
    children, stat = c.get_children(path, include_data=True)
    assert children == ["child"] and stat.numChildren == 1 and stat.cversion == 1
    expect(NotEmptyError, c.delete, path)
    c.delete(path, recursive=True)
    expect(NoNodeError, c.get, path)


def sequential(c):
    path = ROOT + "/sequential"
    c.create(path)
    first = c.create(path + "/n-", sequence=True)
    c.delete(first)
    second = c.create(path + "/n-", sequence=True)
    third = c.create(path + "/", sequence=True)
    # The counter counts creations only, and is ten digits.
    assert [p[len(path) + 1:] for p in (first, second, third)] == [
        "n-0000000000", "n-0000000001", "0000000002",
    ]


def ephemeral(hosts, c):
    path = ROOT + "/ephemeral"
    owner = client(hosts)
    owner.create(path, b"", ephemeral=True)
    expect(NoChildrenForEphemeralsError, owner.create, path + "/child")
    c.sync(path)
    assert c.exists(path).owner_session_id == owner.client_id[0]
    gone = threading.Event()
    c.exists(path, watch=lambda event: gone.set())
    owner.stop()
    owner.close()
    happens(gone, "an ephemeral znode goes with its session")
    assert c.exists(path) is None


def watches(c, other):
    path = ROOT + "/watches"
    seen, told = [], threading.Condition()

    def watch(event):
        with told:
            seen.append((event.type, event.path))
            told.notify()

    def next_is(kind, where):
        with told:
            assert told.wait_for(lambda: seen, WAIT), f"no {kind} {where}"
            assert seen.pop(0) == (kind, where)

    assert c.exists(path, watch=watch) is None
    other.create(path, b"one")
    next_is(EventType.CREATED, path)
    c.sync(path)
    c.get(path, watch=watch)
    other.set(path, b"two")
    next_is(EventType.CHANGED, path)
    c.sync(path)
    c.get_children(path, watch=watch)
    other.create(path + "/child")
    next_is(EventType.CHILD, path)
    c.sync(path)
    c.get(path + "/child", watch=watch)
    c.get_children(path, watch=watch)
    other.delete(path + "/child")
    with told:
        assert told.wait_for(lambda: len(seen) == 2, WAIT), seen
        assert set(seen) == {(EventType.DELETED, path + "/child"), (EventType.CHILD, path)}
        seen.clear()
    # A watch is told before the change can be seen, by one's own write, too.
    c.get(path, watch=watch)
    c.set(path, b"three")
    next_is(EventType.CHANGED, path)
    assert not seen


def transactions(c):
    path = ROOT + "/transactions"
    c.create(path, b"one")
    t = c.transaction()
    t.check(path, 0)
    t.create(path + "/a", b"a")
    t.set_data(path, b"two", 0)
    t.create(path + "/b", b"b", ephemeral=True)
    t.delete(path + "/b")
    results = t.commit()
    assert results[0] is True and results[1] == path + "/a", results
    assert results[2].version == 1 and results[4] is True, results
    # Every znode of one transaction has its zxid.
    assert c.get(path + "/a")[1].czxid == c.get(path)[1].mzxid == results[2].mzxid
    t = c.transaction()
    t.create(path + "/c")
    t.check(path, 99)
    t.delete(path + "/a")
    results = t.commit()
    kinds = [type(result).__name__ for result in results]
    assert kinds == ["RolledBackError", "BadVersionError", "RuntimeInconsistency"], kinds
    assert isinstance(results[0], RolledBackError)
    assert c.exists(path + "/c") is None and c.exists(path + "/a")


def acls(c, other):
    path = ROOT + "/acls"
    c.create(path, b"")
    acl, stat = c.get_acls(path)
    assert [(a.perms, a.id.scheme, a.id.id) for a in acl] == [(31, "world", "anyone")]
    assert stat.aversion == 0
    c.add_auth("digest", "user:password")
    mine = make_digest_acl("user", "password", all=True)
    c.create(path + "/auth", b"", acl=CREATOR_ALL_ACL)
    assert c.get_acls(path + "/auth")[0] == [mine]
    assert c.set_acls(path, [mine], 0).aversion == 1
    assert c.get_acls(path)[0] == [mine]
    assert c.get(path)[0] == b""
    other.sync(path)
    try:
        other.get(path)
    except Exception as error:
        assert type(error).__name__ == "NoAuthError", error
    else:
        raise AssertionError("read without permission")
    c.delete(path, recursive=True)


def lock_recipe(hosts):
    """Each holder sees itself alone; the waiters get the lock in the order they came."""
    path = ROOT + "/lock"
    contenders = [client(hosts) for _ in range(5)]
    holders, most, order = 0, 0, []
    guard = threading.Lock()

    def hold(number, rounds):
        nonlocal holders, most
        lock = contenders[number].Lock(path, f"c{number}")
        for _ in range(rounds):
            with lock:
                with guard:
                    holders += 1
                    most = max(most, holders)
                    order.append(number)
                with guard:
                    holders -= 1

    threads = [threading.Thread(target=hold, args=(i, 10)) for i in range(len(contenders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive(), f"stuck after {order}"
    assert most == 1 and len(order) == 50, (most, order)

    # The holder dies without unlocking: the next one gets the lock.
    first = contenders[0].Lock(path, "first")
    second = contenders[1].Lock(path, "second")
    assert first.acquire(timeout=WAIT)
    assert not second.acquire(blocking=False)
    assert second.contenders() == ["first"]
    waiting = threading.Thread(target=second.acquire)
    waiting.start()
    contenders[0].stop()
    waiting.join(WAIT)
    assert not waiting.is_alive() and second.is_acquired
    second.release()
    for c in contenders[1:]:
        c.stop()
    for c in contenders:
        c.close()


def election_recipe(hosts):
    """One leads at a time; when it ends, by itself or with its session, the next one leads."""
    path = ROOT + "/election"
    candidates = [client(hosts) for _ in range(3)]
    leading, resign = [threading.Event() for _ in candidates], threading.Event()
    led = []

    def lead(number):
        led.append(number)
        leading[number].set()
        if number == 0:
            happens(resign, "the first leader is told to resign")

    def run(number):
        candidates[number].Election(path, f"m{number}").run(lead, number)

    threads = []
    for number in range(len(candidates)):
        thread = threading.Thread(target=run, args=(number,))
        thread.start()
        threads.append(thread)
        if number == 0:
            happens(leading[0], "the first candidate leads")
    assert led == [0]
    resign.set()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive(), led
    assert sorted(led) == [0, 1, 2] and led[0] == 0, led
    for c in candidates:
        c.stop()
        c.close()


def large_and_many(c):
    path = ROOT + "/many"
    c.create(path)
    big = bytes(range(256)) * 3900  # just below the limit of a frame
    c.create(path + "/big", big)
    assert c.get(path + "/big")[0] == big
    asked = [c.create_async(f"{path}/{i:04d}", b"x") for i in range(500)]
    assert [answer.get(timeout=WAIT) for answer in asked] == [f"{path}/{i:04d}" for i in range(500)]
    assert len(c.get_children(path)) == 501
    c.delete(path, recursive=True)


def main():
    hosts = sys.argv[1]
    servers = hosts.split(",")
    # Two sessions on different servers, where there are several.
    c, other = client(servers[0]), client(servers[-1])
    assert c.state == KazooState.CONNECTED
    assert c.command(b"ruok") == "imok"
    assert c.command(b"srvr").startswith("Zookeeper version: ")
    if c.exists(ROOT):
        c.delete(ROOT, recursive=True)
    c.create(ROOT)
    other.sync(ROOT)
    for name, check in [
        ("basics", lambda: basics(c, other)),
        ("sequential", lambda: sequential(c)),
        ("ephemeral", lambda: ephemeral(servers[-1], c)),
        ("watches", lambda: watches(c, other)),
        ("transactions", lambda: transactions(c)),
        ("large and many", lambda: large_and_many(c)),
        ("lock", lambda: lock_recipe(hosts)),
        ("election", lambda: election_recipe(hosts)),
        ("acls", lambda: acls(c, other)),
    ]:
        check()
        print("ok", name, flush=True)
    c.delete(ROOT, recursive=True)
    for session in (c, other):
        session.stop()
        session.close()
    print("PASS")


main()
