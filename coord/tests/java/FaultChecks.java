import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collections;
import java.util.List;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;
import org.apache.curator.framework.CuratorFramework;
import org.apache.curator.framework.CuratorFrameworkFactory;
import org.apache.curator.framework.recipes.cache.CuratorCache;
import org.apache.curator.framework.recipes.locks.InterProcessMutex;
import org.apache.curator.framework.state.ConnectionState;
import org.apache.zookeeper.AddWatchMode;
import org.apache.zookeeper.CreateMode;
import org.apache.zookeeper.KeeperException;
import org.apache.zookeeper.KeeperException.Code;
import org.apache.zookeeper.Watcher.Event.EventType;
import org.apache.zookeeper.Watcher.Event.KeeperState;
import org.apache.zookeeper.ZooDefs.Ids;
import org.apache.zookeeper.ZooKeeper;
import org.apache.zookeeper.admin.ZooKeeperAdmin;
import org.apache.zookeeper.data.ACL;
import org.apache.zookeeper.data.Stat;

/** Connections that break, sessions that end, servers that die, ensembles that change. */
final class FaultChecks {
    private static final List<ACL> OPEN = Ids.OPEN_ACL_UNSAFE;
    /** Servers may grant more. */
    private static final int SHORT_MS = 1_000;
    private final Harness harness;

    FaultChecks(Harness harness) {
        this.harness = harness;
    }

    void run() throws InterruptedException {
        harness.check("connection_lost_and_found", this::connectionLostAndFound);
        harness.check("very_many_watches_set_again", this::veryManyWatchesSetAgain);
        harness.check("session_resumed", this::sessionResumed);
        harness.check("session_expired", this::sessionExpired);
        harness.check("curator_session_expired", this::curatorSessionExpired);
        harness.check("server_killed_under_a_client", this::serverKilledUnderAClient);
        harness.check("server_killed_under_curator", this::serverKilledUnderCurator);
        harness.check("reconfig", this::reconfig);
    }

    /** What happened meanwhile is told; watches of all kinds stand again. */
    private void connectionLostAndFound(Harness.Context context) throws Exception {
        ZooKeeper other = context.client();
        Relay relay = context.keep(new Relay(context.hosts));
        Harness.Events session = new Harness.Events();
        ZooKeeper client = context.connect(relay.host(), Harness.SESSION_MS, session);
        String changed = other.create(context.root + "/changed", null, OPEN, CreateMode.PERSISTENT);
        String deleted = other.create(context.root + "/deleted", null, OPEN, CreateMode.PERSISTENT);
        String quiet = other.create(context.root + "/quiet", null, OPEN, CreateMode.PERSISTENT);
        String created = context.root + "/created";
        client.create(context.root + "/mine", null, OPEN, CreateMode.EPHEMERAL);
        context.sync();
        Harness.Events[] events = new Harness.Events[6];
        Arrays.setAll(events, i -> new Harness.Events());
        client.getData(changed, events[0], null);
        client.getData(deleted, events[1], null);
        client.exists(created, events[2]);
        client.getChildren(context.root, events[3]);
        client.getData(quiet, events[4], null);
        // In a session of its own: the client gives a recursive watcher whatever comes for others below it.
        Harness.Events recursiveSession = new Harness.Events();
        ZooKeeper recursive = context.connect(relay.host(), Harness.SESSION_MS, recursiveSession);
        recursive.addWatch(context.root, events[5], AddWatchMode.PERSISTENT_RECURSIVE);

        relay.cut();
        session.state(KeeperState.Disconnected);
        recursiveSession.state(KeeperState.Disconnected);
        other.setData(changed, Harness.bytes("1"), -1);
        other.delete(deleted, -1);
        other.create(created, null, OPEN, CreateMode.PERSISTENT);
        relay.mend();
        session.state(KeeperState.SyncConnected);
        recursiveSession.state(KeeperState.SyncConnected);
        events[0].next(EventType.NodeDataChanged, changed);
        events[1].next(EventType.NodeDeleted, deleted);
        events[2].next(EventType.NodeCreated, created);
        events[3].next(EventType.NodeChildrenChanged, context.root);
        Harness.require(client.exists(context.root + "/mine", false) != null, "the ephemeral of a living session");
        // Persistent watches are not told what they missed; they stand again.
        other.setData(quiet, Harness.bytes("1"), -1);
        events[4].next(EventType.NodeDataChanged, quiet);
        events[5].next(EventType.NodeDataChanged, quiet);
        for (int i = 0; i < events.length; i++) {
            events[i].none(i == 5 ? recursive : client);
        }
    }

    /** More than fit into one request: the client sends several. */
    private void veryManyWatchesSetAgain(Harness.Context context) throws Exception {
        ZooKeeper other = context.client();
        Relay relay = context.keep(new Relay(context.hosts));
        Harness.Events session = new Harness.Events();
        ZooKeeper client = context.connect(relay.host(), Harness.SESSION_MS, session);
        Harness.Events events = new Harness.Events();
        String longName = "/" + String.join("", Collections.nCopies(200, "x"));
        int count = 3_000;
        BlockingQueue<Integer> answers = new LinkedBlockingQueue<>();
        for (int i = 0; i < count; i++) {
            client.exists(context.root + longName + i, events, (code, path, with, stat) -> answers.add(code), null);
        }
        for (int i = 0; i < count; i++) {
            Harness.same(Code.NONODE.intValue(), answers.poll(Harness.EVENT_MAX_MS, TimeUnit.MILLISECONDS), "the answer");
        }
        relay.cut();
        session.state(KeeperState.Disconnected);
        other.create(context.root + longName + 0, null, OPEN, CreateMode.PERSISTENT);
        relay.mend();
        session.state(KeeperState.SyncConnected);
        events.next(EventType.NodeCreated, context.root + longName + 0);
        other.create(context.root + longName + (count - 1), null, OPEN, CreateMode.PERSISTENT);
        events.next(EventType.NodeCreated, context.root + longName + (count - 1));
        events.none(client);
    }

    private void sessionResumed(Harness.Context context) throws Exception {
        ZooKeeper other = context.client();
        Relay relay = context.keep(new Relay(context.hosts));
        Harness.Events events = new Harness.Events();
        ZooKeeper first = context.connect(relay.host(), Harness.SESSION_MS, events);
        String path = first.create(context.root + "/mine", null, OPEN, CreateMode.EPHEMERAL);
        long id = first.getSessionId();
        byte[] password = first.getSessionPasswd();
        relay.cut();
        events.state(KeeperState.Disconnected);

        // Not without its password, and the attempt does it no harm.
        Harness.Events thief = new Harness.Events();
        context.keep(new ZooKeeper(context.hosts, Harness.SESSION_MS, thief, id, new byte[16]));
        thief.state(KeeperState.Expired);
        context.sync();
        Harness.require(other.exists(path, false) != null, "the ephemeral of a living session");

        Harness.Events resumed = new Harness.Events();
        ZooKeeper second = context.keep(new ZooKeeper(context.hosts, Harness.SESSION_MS, resumed, id, password));
        resumed.state(KeeperState.SyncConnected);
        Harness.same(id, second.getSessionId(), "the session");
        Harness.same(id, second.exists(path, false).getEphemeralOwner(), "the owner");
        Harness.Events gone = new Harness.Events();
        other.exists(path, gone);
        second.close();
        gone.next(EventType.NodeDeleted, path);
        // The session is closed: its first client, back again, is told.
        relay.mend();
        events.state(KeeperState.Expired);
    }

    private void sessionExpired(Harness.Context context) throws Exception {
        ZooKeeper other = context.client();
        Relay relay = context.keep(new Relay(context.hosts));
        Harness.Events events = new Harness.Events();
        ZooKeeper client = context.connect(relay.host(), SHORT_MS, events);
        String path = client.create(context.root + "/mine", null, OPEN, CreateMode.EPHEMERAL);
        Harness.Events gone = new Harness.Events();
        context.sync();
        other.exists(path, gone);
        relay.cut();
        gone.next(EventType.NodeDeleted, path);
        relay.mend();
        events.state(KeeperState.Expired);
        Harness.refused(Code.SESSIONEXPIRED, () -> client.exists(path, false));
    }

    /** Curator opens a new session by itself, and its recipes go on. */
    private void curatorSessionExpired(Harness.Context context) throws Exception {
        CuratorFramework other = context.curator();
        Relay relay = context.keep(new Relay(context.hosts));
        BlockingQueue<ConnectionState> states = new LinkedBlockingQueue<>();
        CuratorFramework curator = context.start(CuratorFrameworkFactory.builder().connectString(relay.host()));
        curator.getConnectionStateListenable().addListener((client, state) -> {
            // It may be told late that it is connected at all.
            if (state != ConnectionState.CONNECTED) {
                states.add(state);
            }
        });
        CuratorCache cache = context.keep(CuratorCache.build(curator, context.root));
        cache.start();
        long before = curator.getZookeeperClient().getZooKeeper().getSessionId();
        // As the injection of an expiry does: somebody resumes the session and closes it.
        byte[] password = curator.getZookeeperClient().getZooKeeper().getSessionPasswd();
        relay.cut();
        Harness.same(ConnectionState.SUSPENDED, states.poll(Harness.EVENT_MAX_MS, TimeUnit.MILLISECONDS), "the state");
        Harness.Events resumed = new Harness.Events();
        ZooKeeper thief = new ZooKeeper(context.hosts, Harness.SESSION_MS, resumed, before, password);
        resumed.state(KeeperState.SyncConnected);
        thief.close();
        other.create().forPath(context.root + "/meanwhile");
        relay.mend();
        Harness.same(ConnectionState.LOST, states.poll(Harness.EVENT_MAX_MS, TimeUnit.MILLISECONDS), "the state");
        Harness.same(ConnectionState.RECONNECTED, states.poll(Harness.EVENT_MAX_MS, TimeUnit.MILLISECONDS), "the state");
        Harness.require(curator.getZookeeperClient().getZooKeeper().getSessionId() != before, "the session is another");
        Harness.until("the cache", () -> cache.get(context.root + "/meanwhile").isPresent());
    }

    /** A client with this server first and the others after it. */
    private static String first(String hosts, String server) {
        StringBuilder list = new StringBuilder(server);
        for (String host : hosts.split(",")) {
            if (!host.equals(server)) {
                list.append(',').append(host);
            }
        }
        return list.toString();
    }

    /** Each of the servers in turn, whichever leads. */
    private void serverKilledUnderAClient(Harness.Context context) throws Exception {
        for (String server : context.hosts.split(",")) {
            Harness.Events events = new Harness.Events();
            String hosts = first(context.hosts, server);
            // The client would shuffle them.
            ZooKeeper client = context.keep(
                new ZooKeeper(hosts, Harness.SESSION_MS, events, false, new InOrder(hosts)));
            events.state(KeeperState.SyncConnected);
            context.client();
            long id = client.getSessionId();
            String path = client.create(context.root + "/mine", null, OPEN, CreateMode.EPHEMERAL);
            Harness.Events watch = new Harness.Events();
            client.exists(context.root + "/later", watch);
            Harness.control("kill " + server);
            events.state(KeeperState.Disconnected);
            events.state(KeeperState.SyncConnected);
            Harness.same(id, client.getSessionId(), "the session");
            String later = insist(client, context.root + "/later");
            watch.next(EventType.NodeCreated, later);
            Harness.control("start " + server);
            // It has what it missed: a write, then a read of it there.
            ZooKeeper there = context.keep(new ZooKeeper(server, Harness.SESSION_MS, new Harness.Events()));
            Harness.until(server + " to serve", () -> {
                try {
                    return there.exists(later, false) != null;
                } catch (KeeperException.ConnectionLossException notYet) {
                    return false;
                }
            });
            Harness.same(id, there.exists(path, false).getEphemeralOwner(), "the owner");
            client.delete(later, -1);
            client.close();
            Harness.until("the ephemeral to go", () -> there.exists(path, false) == null);
        }
    }

    /** Creates it although leaders change: a connection that is lost loses the answer only. */
    private static String insist(ZooKeeper client, String path) throws Exception {
        while (true) {
            try {
                return client.create(path, null, OPEN, CreateMode.PERSISTENT);
            } catch (KeeperException.NodeExistsException before) {
                return path;
            } catch (KeeperException.ConnectionLossException lost) {
                continue;
            }
        }
    }

    /** The host list as it was given. */
    private static final class InOrder implements org.apache.zookeeper.client.HostProvider {
        private final List<java.net.InetSocketAddress> servers = new ArrayList<>();
        private int next;

        InOrder(String hosts) {
            for (String host : hosts.split(",")) {
                int colon = host.lastIndexOf(':');
                servers.add(new java.net.InetSocketAddress(
                    host.substring(0, colon), Integer.parseInt(host.substring(colon + 1))));
            }
        }

        @Override
        public int size() {
            return servers.size();
        }

        @Override
        public java.net.InetSocketAddress next(long spinDelay) {
            return servers.get(next++ % servers.size());
        }

        @Override
        public void onConnected() {
            next = 0;
        }

        @Override
        public boolean updateServerList(
                java.util.Collection<java.net.InetSocketAddress> addresses, java.net.InetSocketAddress current) {
            return false;
        }
    }

    private void serverKilledUnderCurator(Harness.Context context) throws Exception {
        List<CuratorFramework> clients = new ArrayList<>();
        for (String server : context.hosts.split(",")) {
            clients.add(context.start(
                CuratorFrameworkFactory.builder().connectString(first(context.hosts, server))));
        }
        clients.get(0).createContainers(context.root);
        InterProcessMutex held = new InterProcessMutex(clients.get(0), context.root + "/mutex");
        held.acquire();
        String victim = context.hosts.split(",")[0];
        Harness.control("kill " + victim);
        // Whoever it hit, all go on, and the lock is where it was.
        for (CuratorFramework client : clients) {
            client.setData().forPath(context.root, Harness.bytes("1"));
        }
        InterProcessMutex other = new InterProcessMutex(clients.get(1), context.root + "/mutex");
        Harness.require(!other.acquire(0, TimeUnit.MILLISECONDS), "held by two");
        held.release();
        Harness.require(other.acquire(Harness.EVENT_MAX_MS, TimeUnit.MILLISECONDS), "never released");
        other.release();
        Harness.control("start " + victim);
    }

    /** A server goes and comes back, as the super user says. */
    private void reconfig(Harness.Context context) throws Exception {
        Harness.Events events = new Harness.Events();
        ZooKeeperAdmin admin = context.keep(new ZooKeeperAdmin(context.hosts, Harness.SESSION_MS, events));
        events.state(KeeperState.SyncConnected);
        // A server that was just started may not follow yet.
        Harness.refused(Code.NOAUTH, () -> again(() -> Harness.text(admin.reconfigure((String) null, "3", null, -1, null))));
        admin.addAuthInfo("digest", Harness.bytes("super:test"));
        Stat stat = new Stat();
        String before = Harness.text(admin.getConfig(false, stat));
        String third = value(before, "server.3");
        // Servers may have names; then that is what a new one is known by, and its number is another.
        String name = before.contains("name.3=") ? value(before, "name.3") : "3";
        String joining = "server." + name + "=" + third
            + (third.contains(";") ? "" : ";" + context.hosts.split(",")[2]);
        Harness.refused(Code.BADVERSION,
            () -> again(() -> Harness.text(admin.reconfigure((String) null, "3", null, 0x7fffff, null))));
        Harness.refused(Code.BADARGUMENTS,
            () -> again(() -> Harness.text(admin.reconfigure("server.4=nonsense", null, null, -1, null))));

        Harness.Events changed = new Harness.Events();
        admin.getConfig(changed, null);
        String without = again(() -> Harness.text(admin.reconfigure((String) null, "3", null, -1, stat)));
        Harness.require(!without.contains("server.3="), "server 3 in " + without);
        Harness.require(without.contains("server.2="), "server 2 in " + without);
        changed.next(EventType.NodeDataChanged, "/zookeeper/config");
        String with = again(() -> Harness.text(admin.reconfigure(joining, null, null, -1, stat)));
        Harness.require(with.contains(third.split(":participant")[0]), "no " + third + " in " + with);
        // One that stopped when it was removed comes back as a new one, and has to catch up first.
        Harness.control("replace " + context.hosts.split(",")[2]);
        Harness.until(third, () -> again(() -> Harness.text(admin.getConfig(false, null))).contains(third));
    }

    /** What a line of the configuration says. */
    private static String value(String config, String key) {
        return Arrays.stream(config.split("\n")).filter(line -> line.startsWith(key + "="))
            .findFirst().orElseThrow().substring(key.length() + 1);
    }

    /** Does it again while the connection breaks or a change is still under way. */
    private static String again(java.util.concurrent.Callable<String> action) throws Exception {
        String[] result = new String[1];
        Harness.until("the change", () -> {
            try {
                result[0] = action.call();
                return true;
            } catch (KeeperException.ConnectionLossException
                    | KeeperException.ReconfigInProgress
                    | KeeperException.NewConfigNoQuorum notYet) {
                return false;
            }
        });
        return result[0];
    }
}
