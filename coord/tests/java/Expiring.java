import org.apache.curator.framework.CuratorFramework;
import org.apache.zookeeper.CreateMode;
import org.apache.zookeeper.data.Stat;

/** TTL nodes and containers: made in one check, gone in a later one. */
final class Expiring {
    private static final String ROOT = "/java/expiring";
    /** Well above any interval at which servers look for what is to go. */
    private static final long TOUCH_MS = 3_600_000;

    void make(Harness.Context context) throws Exception {
        CuratorFramework curator = context.curator();
        curator.create().creatingParentsIfNeeded().forPath(ROOT);
        Stat stat = new Stat();
        curator.create().withTtl(50).storingStatIn(stat)
            .withMode(CreateMode.PERSISTENT_WITH_TTL).forPath(ROOT + "/short");
        Harness.same(0L, stat.getEphemeralOwner(), "the owner");
        curator.create().withTtl(TOUCH_MS)
            .withMode(CreateMode.PERSISTENT_WITH_TTL).forPath(ROOT + "/long");
        String sequential = curator.create().withTtl(50)
            .withMode(CreateMode.PERSISTENT_SEQUENTIAL_WITH_TTL).forPath(ROOT + "/sequential-");
        Harness.require(sequential.matches(ROOT + "/sequential-\\d{10}"), sequential);
        // A TTL node with a child stays; it is given the child well within its time.
        curator.create().withTtl(3_000)
            .withMode(CreateMode.PERSISTENT_WITH_TTL).forPath(ROOT + "/parent");
        curator.create().forPath(ROOT + "/parent/child");

        curator.create().withMode(CreateMode.CONTAINER).forPath(ROOT + "/container");
        curator.create().forPath(ROOT + "/container/child");
        curator.create().withMode(CreateMode.CONTAINER).forPath(ROOT + "/full");
        curator.create().forPath(ROOT + "/full/child");
        curator.delete().forPath(ROOT + "/container/child");
    }

    void gone(Harness.Context context) throws Exception {
        CuratorFramework curator = context.curator();
        for (String name : new String[] {"short", "container"}) {
            Harness.until(name + " to go", () -> curator.checkExists().forPath(ROOT + "/" + name) == null);
        }
        Harness.until("the sequential one to go", () -> curator.getChildren().forPath(ROOT).size() == 3);
        for (String name : new String[] {"long", "parent/child", "full/child"}) {
            Harness.require(curator.checkExists().forPath(ROOT + "/" + name) != null, name + " is gone");
        }
        curator.delete().deletingChildrenIfNeeded().forPath(ROOT);
    }
}
