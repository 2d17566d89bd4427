import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collections;
import java.util.HashSet;
import java.util.List;
import java.util.Set;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import org.apache.zookeeper.AddWatchMode;
import org.apache.zookeeper.CreateMode;
import org.apache.zookeeper.KeeperException;
import org.apache.zookeeper.KeeperException.Code;
import org.apache.zookeeper.Op;
import org.apache.zookeeper.OpResult;
import org.apache.zookeeper.Watcher;
import org.apache.zookeeper.Watcher.Event.EventType;
import org.apache.zookeeper.Watcher.WatcherType;
import org.apache.zookeeper.ZooDefs;
import org.apache.zookeeper.ZooDefs.Ids;
import org.apache.zookeeper.ZooKeeper;
import org.apache.zookeeper.data.ACL;
import org.apache.zookeeper.data.ClientInfo;
import org.apache.zookeeper.data.Id;
import org.apache.zookeeper.data.Stat;

/** The plain Java client: every operation it has. */
final class ClientChecks {
    private static final List<ACL> OPEN = Ids.OPEN_ACL_UNSAFE;
    private final Harness harness;

    ClientChecks(Harness harness) {
        this.harness = harness;
    }

    void run() throws InterruptedException {
        harness.check("create_modes_and_stat", this::createModesAndStat);
        harness.check("sequential_names", this::sequentialNames);
        harness.check("data", this::data);
        harness.check("errors", this::errors);
        harness.check("one_shot_watches", this::oneShotWatches);
        harness.check("persistent_watches", this::persistentWatches);
        harness.check("remove_watches", this::removeWatches);
        harness.check("multi", this::multi);
        harness.check("multi_that_fails", this::multiThatFails);
        harness.check("multi_read", this::multiRead);
        harness.check("acl_digest", this::aclDigest);
        harness.check("acl_schemes", this::aclSchemes);
        harness.check("super_user", this::superUser);
        harness.check("ephemerals", this::ephemerals);
        harness.check("all_children_number", this::allChildrenNumber);
        harness.check("who_am_i", this::whoAmI);
        harness.check("sync_then_read", this::syncThenRead);
        harness.check("chroot", this::chroot);
        harness.check("requests_in_order", this::requestsInOrder);
        harness.check("config", this::config);
    }

    private void createModesAndStat(Harness.Context context) throws Exception {
        ZooKeeper client = context.client();
        String path = context.root + "/node";
        Stat stat = new Stat();
        Harness.same(path, client.create(path, Harness.bytes("data"), OPEN, CreateMode.PERSISTENT, stat), "the path");
        Harness.same(stat, client.exists(path, false), "the stat of create and that of exists");
        Harness.same(stat.getCzxid(), stat.getMzxid(), "mzxid");
        Harness.same(stat.getCzxid(), stat.getPzxid(), "pzxid");
        Harness.same(4, stat.getDataLength(), "the length");
        Harness.same(0L, stat.getEphemeralOwner(), "the owner");
        Harness.require(Math.abs(stat.getCtime() - System.currentTimeMillis()) < 60_000, "the time of creation");

        Stat set = client.setData(path, Harness.bytes("longer data"), 0);
        Harness.same(1, set.getVersion(), "the version");
        Harness.require(set.getMzxid() > stat.getMzxid(), "mzxid grows");
        Harness.same(stat.getCzxid(), set.getCzxid(), "czxid");

        client.create(path + "/child", null, OPEN, CreateMode.PERSISTENT, stat);
        Stat parent = client.exists(path, false);
        Harness.same(stat.getCzxid(), parent.getPzxid(), "pzxid of the parent");
        Harness.same(1, parent.getCversion(), "cversion");
        Harness.same(1, parent.getNumChildren(), "children");
        client.delete(path + "/child", -1);
        Harness.same(2, client.exists(path, false).getCversion(), "cversion");

        client.create(path + "/mine", null, OPEN, CreateMode.EPHEMERAL, stat);
        Harness.same(client.getSessionId(), stat.getEphemeralOwner(), "the owner");
        client.create(path + "/container", null, OPEN, CreateMode.CONTAINER, stat);
        Harness.same(0L, stat.getEphemeralOwner(), "the owner");
    }

    private void sequentialNames(Harness.Context context) throws Exception {
        ZooKeeper client = context.client();
        String prefix = context.root + "/n-";
        for (int i = 0; i < 3; i++) {
            String made = client.create(prefix, null, OPEN, CreateMode.PERSISTENT_SEQUENTIAL);
            Harness.same(prefix + String.format("%010d", i), made, "the name");
        }
        // A deletion is not counted, a creation is, whatever its mode and name.
        client.delete(prefix + "0000000001", -1);
        client.create(context.root + "/other", null, OPEN, CreateMode.PERSISTENT);
        Harness.same(prefix + "0000000004",
            client.create(prefix, null, OPEN, CreateMode.EPHEMERAL_SEQUENTIAL), "the name");
        Harness.same(context.root + "/0000000005",
            client.create(context.root + "/", null, OPEN, CreateMode.PERSISTENT_SEQUENTIAL), "a name of digits only");
    }

    private void data(Harness.Context context) throws Exception {
        ZooKeeper client = context.client();
        String path = context.root + "/node";
        client.create(path, null, OPEN, CreateMode.PERSISTENT);
        Harness.require(client.getData(path, false, null) == null, "null data come back as null");
        client.setData(path, new byte[0], -1);
        Harness.same(0, client.getData(path, false, null).length, "the length of empty data");
        byte[] large = new byte[1_000_000];
        Arrays.fill(large, (byte) 0xa5);
        client.setData(path, large, -1);
        Harness.require(Arrays.equals(large, client.getData(path, false, null)), "a million bytes come back");
        String unicode = context.root + "/żnode-nœud-节点";
        client.create(unicode, Harness.bytes(unicode), OPEN, CreateMode.PERSISTENT);
        Harness.same(unicode, Harness.text(client.getData(unicode, false, null)), "the data of a name beyond ASCII");
        Harness.require(client.getChildren(context.root, false).contains(unicode.substring(context.root.length() + 1)),
            "a name beyond ASCII among the children");
    }

    private void errors(Harness.Context context) throws Exception {
        ZooKeeper client = context.client();
        String path = context.root + "/node";
        client.create(path, null, OPEN, CreateMode.PERSISTENT);
        Harness.refused(Code.NODEEXISTS, () -> client.create(path, null, OPEN, CreateMode.PERSISTENT));
        Harness.refused(Code.NONODE, () -> client.create(path + "/a/b", null, OPEN, CreateMode.PERSISTENT));
        Harness.refused(Code.NONODE, () -> client.getData(path + "/a", false, null));
        Harness.refused(Code.NONODE, () -> client.getChildren(path + "/a", false));
        Harness.refused(Code.NONODE, () -> client.setData(path + "/a", null, -1));
        Harness.refused(Code.NONODE, () -> client.getACL(path + "/a", null));
        Harness.refused(Code.BADVERSION, () -> client.setData(path, null, 7));
        Harness.refused(Code.BADVERSION, () -> {
            client.delete(path, 7);
            return null;
        });
        client.create(path + "/ephemeral", null, OPEN, CreateMode.EPHEMERAL);
        Harness.refused(Code.NOTEMPTY, () -> {
            client.delete(path, -1);
            return null;
        });
        Harness.refused(Code.NOCHILDRENFOREPHEMERALS,
            () -> client.create(path + "/ephemeral/child", null, OPEN, CreateMode.PERSISTENT));
        Harness.refused(Code.INVALIDACL,
            () -> client.create(path + "/x", null, Collections.emptyList(), CreateMode.PERSISTENT));
        Harness.refused(Code.BADARGUMENTS, () -> {
            client.delete("/", -1);
            return null;
        });
        Harness.require(client.exists(path + "/a", false) == null, "what is absent has no stat");
        // The connection has survived all of it.
        Harness.same(1, client.exists(path, false).getNumChildren(), "children");
    }

    private void oneShotWatches(Harness.Context context) throws Exception {
        ZooKeeper client = context.client();
        ZooKeeper other = context.client();
        String path = context.root + "/node";
        Harness.Events data = new Harness.Events();
        Harness.Events exists = new Harness.Events();
        Harness.Events children = new Harness.Events();

        client.exists(path, exists);
        other.create(path, null, OPEN, CreateMode.PERSISTENT);
        exists.next(EventType.NodeCreated, path);

        client.getData(path, data, null);
        client.exists(path, exists);
        client.getChildren(path, children);
        other.setData(path, Harness.bytes("1"), -1);
        data.next(EventType.NodeDataChanged, path);
        exists.next(EventType.NodeDataChanged, path);
        // Once only.
        other.setData(path, Harness.bytes("2"), -1);
        other.create(path + "/child", null, OPEN, CreateMode.PERSISTENT);
        children.next(EventType.NodeChildrenChanged, path);
        other.delete(path + "/child", -1);

        context.sync();
        client.getData(path, data, null);
        client.getChildren(path, children);
        other.delete(path, -1);
        data.next(EventType.NodeDeleted, path);
        children.next(EventType.NodeDeleted, path);

        // One's own write: its event has come before its answer.
        Harness.Events own = new Harness.Events();
        client.exists(path, own);
        client.create(path, null, OPEN, CreateMode.PERSISTENT);
        own.next(EventType.NodeCreated, path);
        for (Harness.Events events : Arrays.asList(data, exists, children, own)) {
            events.none(client);
        }
    }

    private void persistentWatches(Harness.Context context) throws Exception {
        ZooKeeper client = context.client();
        ZooKeeper other = context.client();
        String path = context.root + "/node";
        Harness.Events one = new Harness.Events();
        Harness.Events tree = new Harness.Events();
        client.addWatch(path, one, AddWatchMode.PERSISTENT);
        // In a session of its own: the client gives a recursive watcher whatever comes for others below it.
        ZooKeeper second = context.client();
        second.addWatch(context.root, tree, AddWatchMode.PERSISTENT_RECURSIVE);
        for (int round = 0; round < 2; round++) {
            other.create(path, null, OPEN, CreateMode.PERSISTENT);
            other.setData(path, Harness.bytes("1"), -1);
            other.setData(path, Harness.bytes("2"), -1);
            other.create(path + "/child", null, OPEN, CreateMode.PERSISTENT);
            other.delete(path + "/child", -1);
            other.delete(path, -1);
            one.next(EventType.NodeCreated, path);
            one.next(EventType.NodeDataChanged, path);
            one.next(EventType.NodeDataChanged, path);
            one.next(EventType.NodeChildrenChanged, path);
            one.next(EventType.NodeChildrenChanged, path);
            one.next(EventType.NodeDeleted, path);
            tree.next(EventType.NodeCreated, path);
            tree.next(EventType.NodeDataChanged, path);
            tree.next(EventType.NodeDataChanged, path);
            tree.next(EventType.NodeCreated, path + "/child");
            tree.next(EventType.NodeDeleted, path + "/child");
            tree.next(EventType.NodeDeleted, path);
        }
        one.none(client);
        tree.none(second);
    }

    private void removeWatches(Harness.Context context) throws Exception {
        ZooKeeper client = context.client();
        ZooKeeper other = context.client();
        String path = context.root;
        Harness.Events data = new Harness.Events();
        Harness.Events children = new Harness.Events();
        Harness.Events kept = new Harness.Events();
        Harness.refused(Code.NOWATCHER, () -> {
            client.removeWatches(path, data, WatcherType.Any, false);
            return null;
        });
        client.getData(path, data, null);
        client.getChildren(path, children);
        client.removeWatches(path, data, WatcherType.Data, false);
        data.next(EventType.DataWatchRemoved, path);
        client.removeWatches(path, children, WatcherType.Children, false);
        children.next(EventType.ChildWatchRemoved, path);

        // One of two watchers of the same node: the server's watch stays for the other.
        client.getData(path, data, null);
        client.getData(path, kept, null);
        client.removeWatches(path, data, WatcherType.Data, false);
        data.next(EventType.DataWatchRemoved, path);
        other.setData(path, Harness.bytes("1"), -1);
        kept.next(EventType.NodeDataChanged, path);

        client.addWatch(path, data, AddWatchMode.PERSISTENT_RECURSIVE);
        client.removeAllWatches(path, WatcherType.Any, false);
        data.next(EventType.PersistentWatchRemoved, path);
        other.setData(path, Harness.bytes("2"), -1);
        client.sync(path, (code, of, with) -> { }, null);
        client.getData(path, false, null);
        for (Harness.Events events : Arrays.asList(data, children, kept)) {
            events.none(client);
        }
    }

    private void multi(Harness.Context context) throws Exception {
        ZooKeeper client = context.client();
        String path = context.root + "/node";
        List<OpResult> results = client.multi(Arrays.asList(
            Op.create(path, Harness.bytes("1"), OPEN, CreateMode.PERSISTENT),
            Op.check(path, 0),
            Op.setData(path, Harness.bytes("2"), 0),
            Op.create(path + "/child-", null, OPEN, CreateMode.PERSISTENT_SEQUENTIAL),
            Op.create(path + "/gone", null, OPEN, CreateMode.EPHEMERAL),
            Op.delete(path + "/gone", 0)));
        Harness.same(6, results.size(), "results");
        Harness.same(path, ((OpResult.CreateResult) results.get(0)).getPath(), "the path");
        Harness.require(results.get(1) instanceof OpResult.CheckResult, "a check");
        Stat set = ((OpResult.SetDataResult) results.get(2)).getStat();
        Harness.same(1, set.getVersion(), "the version");
        Harness.same(path + "/child-0000000000", ((OpResult.CreateResult) results.get(3)).getPath(), "the path");
        Harness.require(results.get(5) instanceof OpResult.DeleteResult, "a deletion");
        // One zxid for all of it.
        Stat stat = client.exists(path, false);
        Harness.same(stat.getCzxid(), stat.getMzxid(), "mzxid");
        Harness.same(stat.getCzxid(), stat.getPzxid(), "pzxid");
        Harness.same(Collections.singletonList("child-0000000000"), client.getChildren(path, false), "children");
        Harness.same(0, client.multi(Collections.emptyList()).size(), "results of nothing");
    }

    private void multiThatFails(Harness.Context context) throws Exception {
        ZooKeeper client = context.client();
        String path = context.root + "/node";
        try {
            client.multi(Arrays.asList(
                Op.create(path, null, OPEN, CreateMode.PERSISTENT),
                Op.check(context.root, 7),
                Op.delete(path, -1)));
        } catch (KeeperException.BadVersionException refusal) {
            List<Integer> codes = new ArrayList<>();
            for (OpResult result : refusal.getResults()) {
                codes.add(((OpResult.ErrorResult) result).getErr());
            }
            Harness.same(Arrays.asList(
                0, Code.BADVERSION.intValue(), Code.RUNTIMEINCONSISTENCY.intValue()), codes, "the codes");
            Harness.require(client.exists(path, false) == null, "nothing of it was done");
            return;
        }
        throw new AssertionError("done");
    }

    private void multiRead(Harness.Context context) throws Exception {
        ZooKeeper client = context.client();
        client.setData(context.root, Harness.bytes("data"), -1);
        client.create(context.root + "/child", null, OPEN, CreateMode.PERSISTENT);
        List<OpResult> results = client.multi(Arrays.asList(
            Op.getData(context.root),
            Op.getData(context.root + "/absent"),
            Op.getChildren(context.root),
            Op.getChildren(context.root + "/absent")));
        OpResult.GetDataResult data = (OpResult.GetDataResult) results.get(0);
        Harness.same("data", Harness.text(data.getData()), "the data");
        Harness.same(client.exists(context.root, false), data.getStat(), "the stat");
        Harness.same(Code.NONODE.intValue(), ((OpResult.ErrorResult) results.get(1)).getErr(), "the error");
        Harness.same(Collections.singletonList("child"),
            ((OpResult.GetChildrenResult) results.get(2)).getChildren(), "the children");
        Harness.same(Code.NONODE.intValue(), ((OpResult.ErrorResult) results.get(3)).getErr(), "the error");
    }

    private void aclDigest(Harness.Context context) throws Exception {
        ZooKeeper owner = context.client();
        ZooKeeper other = context.client();
        String path = context.root + "/node";
        owner.addAuthInfo("digest", Harness.bytes("ann:secret"));
        owner.create(path, Harness.bytes("data"), Ids.CREATOR_ALL_ACL, CreateMode.PERSISTENT);
        List<ACL> acl = owner.getACL(path, null);
        Harness.same(1, acl.size(), "entries");
        Harness.same("digest", acl.get(0).getId().getScheme(), "the scheme");
        Harness.same(ZooDefs.Perms.ALL, acl.get(0).getPerms(), "the permissions");
        Harness.require(acl.get(0).getId().getId().startsWith("ann:"), "the id: " + acl.get(0).getId());

        context.sync();
        Harness.refused(Code.NOAUTH, () -> other.getData(path, false, null));
        Harness.refused(Code.NOAUTH, () -> other.setData(path, null, -1));
        Harness.refused(Code.NOAUTH, () -> other.getChildren(path, false));
        Harness.refused(Code.NOAUTH, () -> other.create(path + "/x", null, OPEN, CreateMode.PERSISTENT));
        Harness.refused(Code.NOAUTH, () -> other.setACL(path, OPEN, -1));
        Harness.refused(Code.NOAUTH, () -> other.multi(Arrays.asList(Op.setData(path, null, -1))));
        // `exists` needs no permission, and the deletion of a node that of its parent.
        Harness.same(4, other.exists(path, false).getDataLength(), "the length");
        other.addAuthInfo("digest", Harness.bytes("ann:wrong"));
        Harness.refused(Code.NOAUTH, () -> other.getData(path, false, null));
        other.addAuthInfo("digest", Harness.bytes("ann:secret"));
        Harness.same("data", Harness.text(other.getData(path, false, null)), "the data");

        ACL readers = new ACL(ZooDefs.Perms.READ, Ids.ANYONE_ID_UNSAFE);
        Stat stat = owner.setACL(path, Arrays.asList(acl.get(0), readers), 0);
        Harness.same(1, stat.getAversion(), "aversion");
        Harness.same(0, stat.getVersion(), "version");
        Harness.refused(Code.BADVERSION, () -> owner.setACL(path, OPEN, 0));
        ZooKeeper third = context.client();
        Harness.same("data", Harness.text(third.getData(path, false, null)), "the data");
        Harness.refused(Code.NOAUTH, () -> third.setData(path, null, -1));
    }

    private void aclSchemes(Harness.Context context) throws Exception {
        ZooKeeper client = context.client();
        String here = context.root + "/here";
        client.create(here, null,
            Collections.singletonList(new ACL(ZooDefs.Perms.ALL, new Id("ip", "127.0.0.0/8"))), CreateMode.PERSISTENT);
        client.setData(here, Harness.bytes("1"), -1);
        String elsewhere = context.root + "/elsewhere";
        client.create(elsewhere, null,
            Collections.singletonList(new ACL(ZooDefs.Perms.ALL, new Id("ip", "10.255.0.0/16"))), CreateMode.PERSISTENT);
        Harness.refused(Code.NOAUTH, () -> client.setData(elsewhere, null, -1));
        for (Id wrong : Arrays.asList(
                new Id("ip", "no address"), new Id("nobody", "knows"), new Id("digest", "no colon"), new Id("auth", ""))) {
            Harness.refused(Code.INVALIDACL, () -> client.create(context.root + "/x", null,
                Collections.singletonList(new ACL(ZooDefs.Perms.ALL, wrong)), CreateMode.PERSISTENT));
        }
        // A scheme that the server does not know ends the session's use.
        Harness.Events events = new Harness.Events();
        ZooKeeper stranger = context.connect(context.hosts, Harness.SESSION_MS, events);
        stranger.addAuthInfo("nobody", Harness.bytes("knows"));
        events.state(Watcher.Event.KeeperState.AuthFailed);
    }

    private void superUser(Harness.Context context) throws Exception {
        ZooKeeper owner = context.client();
        String path = context.root + "/node";
        owner.addAuthInfo("digest", Harness.bytes("ann:secret"));
        owner.create(path, Harness.bytes("data"), Ids.CREATOR_ALL_ACL, CreateMode.PERSISTENT);
        ZooKeeper all = context.client();
        Harness.refused(Code.NOAUTH, () -> all.getData(path, false, null));
        all.addAuthInfo("digest", Harness.bytes("super:test"));
        Harness.same("data", Harness.text(all.getData(path, false, null)), "the data");
        all.setACL(path, OPEN, -1);
        Harness.same("data", Harness.text(context.client().getData(path, false, null)), "the data");
    }

    private void ephemerals(Harness.Context context) throws Exception {
        ZooKeeper client = context.client();
        ZooKeeper other = context.client();
        Set<String> mine = new HashSet<>();
        for (String name : Arrays.asList("/a1", "/a2", "/b")) {
            mine.add(client.create(context.root + name, null, OPEN, CreateMode.EPHEMERAL));
        }
        other.create(context.root + "/others", null, OPEN, CreateMode.EPHEMERAL);
        Harness.same(mine, new HashSet<>(client.getEphemerals()), "all");
        mine.remove(context.root + "/b");
        Harness.same(mine, new HashSet<>(client.getEphemerals(context.root + "/a")), "those with a prefix");
        Harness.same(0, client.getEphemerals("/no/such").size(), "those with no prefix");

        Harness.Events gone = new Harness.Events();
        other.exists(context.root + "/b", gone);
        client.close();
        gone.next(EventType.NodeDeleted, context.root + "/b");
        Harness.same(Collections.singletonList("others"), other.getChildren(context.root, false), "what is left");
    }

    private void allChildrenNumber(Harness.Context context) throws Exception {
        ZooKeeper client = context.client();
        Harness.same(0, client.getAllChildrenNumber(context.root), "before");
        for (String name : Arrays.asList("/a", "/a/b", "/a/b/c", "/d")) {
            client.create(context.root + name, null, OPEN, CreateMode.PERSISTENT);
        }
        Harness.same(4, client.getAllChildrenNumber(context.root), "after");
        Harness.same(2, client.getAllChildrenNumber(context.root + "/a"), "below");
        Harness.refused(Code.NONODE, () -> client.getAllChildrenNumber(context.root + "/none"));
    }

    private void whoAmI(Harness.Context context) throws Exception {
        ZooKeeper client = context.client();
        client.addAuthInfo("digest", Harness.bytes("ann:secret"));
        Set<String> found = new HashSet<>();
        for (ClientInfo info : client.whoAmI()) {
            found.add(info.getAuthScheme() + " " + info.getUser());
        }
        Harness.require(found.contains("digest ann"), "no digest among " + found);
        Harness.require(found.stream().anyMatch(who -> who.startsWith("ip 127.")), "no address among " + found);
    }

    /** Apache ZooKeeper does not promise it, and fails here now and then (ZOOKEEPER-1675). */
    private void syncThenRead(Harness.Context context) throws Exception {
        ZooKeeper writer = context.client();
        ZooKeeper reader = context.client();
        for (int i = 0; i < 50; i++) {
            byte[] value = Harness.bytes("value " + i);
            writer.setData(context.root, value, -1);
            int[] outcome = {Integer.MIN_VALUE};
            CountDownLatch synced = new CountDownLatch(1);
            reader.sync(context.root, (code, path, with) -> {
                outcome[0] = code;
                synced.countDown();
            }, null);
            Harness.require(synced.await(Harness.EVENT_MAX_MS, TimeUnit.MILLISECONDS), "no answer to sync");
            Harness.same(0, outcome[0], "the outcome of sync");
            Harness.same(Harness.text(value), Harness.text(reader.getData(context.root, false, null)), "the data");
        }
    }

    private void chroot(Harness.Context context) throws Exception {
        ZooKeeper outer = context.client();
        ZooKeeper inner = context.connect(context.hosts + context.root, Harness.SESSION_MS, new Harness.Events());
        Harness.same("/a", inner.create("/a", Harness.bytes("1"), OPEN, CreateMode.PERSISTENT), "the path");
        context.sync();
        Harness.same("1", Harness.text(outer.getData(context.root + "/a", false, null)), "the data");
        Harness.same(Collections.singletonList("a"), inner.getChildren("/", false), "the children");
        Harness.Events events = new Harness.Events();
        inner.exists("/b", events);
        outer.create(context.root + "/b", null, OPEN, CreateMode.PERSISTENT);
        events.next(EventType.NodeCreated, "/b");
        inner.multi(Arrays.asList(
            Op.check("/a", 0), Op.create("/c-", null, OPEN, CreateMode.PERSISTENT_SEQUENTIAL)));
        Harness.require(inner.exists("/c-0000000002", false) != null, "what a transaction made");
    }

    private void requestsInOrder(Harness.Context context) throws Exception {
        ZooKeeper client = context.client();
        int count = 2_000;
        List<Integer> versions = Collections.synchronizedList(new ArrayList<>());
        CountDownLatch done = new CountDownLatch(2 * count);
        for (int i = 0; i < count; i++) {
            client.setData(context.root, Harness.bytes("" + i), i, (code, path, with, stat) -> {
                versions.add(code == 0 ? stat.getVersion() : code);
                done.countDown();
            }, null);
            client.getData(context.root, false, (code, path, with, data, stat) -> {
                versions.add(code == 0 ? stat.getVersion() : code);
                done.countDown();
            }, null);
        }
        Harness.require(done.await(Harness.EVENT_MAX_MS, TimeUnit.MILLISECONDS), "answers are missing");
        for (int i = 0; i < 2 * count; i++) {
            Harness.same(i / 2 + 1, versions.get(i), "the version that answer " + i + " tells");
        }
    }

    private void config(Harness.Context context) throws Exception {
        ZooKeeper client = context.client();
        Stat stat = new Stat();
        String config = Harness.text(client.getConfig(false, stat));
        for (int server = 1; server <= 3; server++) {
            Harness.require(config.contains("server." + server + "="), "server " + server + " in " + config);
        }
        Harness.require(config.matches("(?s).*\nversion=[0-9a-f]+"), "a version in " + config);
        Harness.refused(Code.NOAUTH, () -> client.setData("/zookeeper/config", null, -1));
    }
}
