import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collection;
import java.util.Collections;
import java.util.List;
import java.util.Set;
import java.util.TreeSet;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;
import org.apache.curator.framework.CuratorFramework;
import org.apache.curator.framework.CuratorFrameworkFactory;
import org.apache.curator.framework.api.transaction.CuratorTransactionResult;
import org.apache.curator.framework.recipes.atomic.AtomicValue;
import org.apache.curator.framework.recipes.atomic.DistributedAtomicLong;
import org.apache.curator.framework.recipes.barriers.DistributedBarrier;
import org.apache.curator.framework.recipes.barriers.DistributedDoubleBarrier;
import org.apache.curator.framework.recipes.cache.CuratorCache;
import org.apache.curator.framework.recipes.cache.CuratorCacheListener;
import org.apache.curator.framework.recipes.cache.PathChildrenCache;
import org.apache.curator.framework.recipes.leader.LeaderLatch;
import org.apache.curator.framework.recipes.leader.LeaderSelector;
import org.apache.curator.framework.recipes.leader.LeaderSelectorListenerAdapter;
import org.apache.curator.framework.recipes.locks.InterProcessMultiLock;
import org.apache.curator.framework.recipes.locks.InterProcessMutex;
import org.apache.curator.framework.recipes.locks.InterProcessReadWriteLock;
import org.apache.curator.framework.recipes.locks.InterProcessSemaphoreMutex;
import org.apache.curator.framework.recipes.locks.InterProcessSemaphoreV2;
import org.apache.curator.framework.recipes.locks.Lease;
import org.apache.curator.framework.recipes.nodes.GroupMember;
import org.apache.curator.framework.recipes.nodes.PersistentNode;
import org.apache.curator.framework.recipes.nodes.PersistentTtlNode;
import org.apache.curator.framework.recipes.queue.DistributedIdQueue;
import org.apache.curator.framework.recipes.queue.DistributedPriorityQueue;
import org.apache.curator.framework.recipes.queue.DistributedQueue;
import org.apache.curator.framework.recipes.queue.QueueBuilder;
import org.apache.curator.framework.recipes.queue.QueueConsumer;
import org.apache.curator.framework.recipes.queue.QueueSerializer;
import org.apache.curator.framework.recipes.queue.SimpleDistributedQueue;
import org.apache.curator.framework.recipes.shared.SharedCount;
import org.apache.curator.framework.recipes.watch.PersistentWatcher;
import org.apache.curator.framework.state.ConnectionState;
import org.apache.curator.retry.RetryNTimes;
import org.apache.zookeeper.CreateMode;
import org.apache.zookeeper.KeeperException;
import org.apache.zookeeper.Watcher.Event.EventType;
import org.apache.zookeeper.data.Stat;

/** Curator: its recipes, between sessions of their own. */
final class RecipeChecks {
    private static final long WAIT = Harness.EVENT_MAX_MS;
    private static final TimeUnit MS = TimeUnit.MILLISECONDS;
    private final Harness harness;

    RecipeChecks(Harness harness) {
        this.harness = harness;
    }

    void run() throws InterruptedException {
        harness.check("leader_latch", this::leaderLatch);
        harness.check("leader_selector", this::leaderSelector);
        harness.check("mutex", this::mutex);
        harness.check("semaphore_mutex", this::semaphoreMutex);
        harness.check("multi_lock", this::multiLock);
        harness.check("read_write_lock", this::readWriteLock);
        harness.check("semaphore", this::semaphore);
        harness.check("barrier", this::barrier);
        harness.check("double_barrier", this::doubleBarrier);
        harness.check("queue", this::queue);
        harness.check("priority_queue", this::priorityQueue);
        harness.check("id_queue", this::idQueue);
        harness.check("simple_queue", this::simpleQueue);
        harness.check("persistent_node", this::persistentNode);
        harness.check("persistent_ttl_node", this::persistentTtlNode);
        harness.check("persistent_watcher", this::persistentWatcher);
        harness.check("cache_of_a_tree", this::cacheOfATree);
        harness.check("cache_of_one_node", this::cacheOfOneNode);
        harness.check("path_children_cache", this::pathChildrenCache);
        harness.check("shared_count", this::sharedCount);
        harness.check("atomic_long", this::atomicLong);
        harness.check("group_member", this::groupMember);
        harness.check("transaction", this::transaction);
        harness.check("namespace", this::namespace);
        harness.check("protected_ephemeral", this::protectedEphemeral);
        harness.check("curator_watches", this::curatorWatches);
        harness.check("curator_config", this::curatorConfig);
    }

    private void leaderLatch(Harness.Context context) throws Exception {
        List<LeaderLatch> latches = new ArrayList<>();
        for (int i = 0; i < 3; i++) {
            LeaderLatch latch = new LeaderLatch(context.curator(), context.root + "/latch", "p" + i);
            latch.start();
            latches.add(latch);
            // So that their order is known.
            int participants = i + 1;
            Harness.until("p" + i, () -> latches.get(0).getParticipants().size() == participants);
        }
        for (int i = 0; i < 3; i++) {
            LeaderLatch leader = latches.get(i);
            Harness.require(leader.await(WAIT, MS), "p" + i + " never leads");
            context.sync();
            Harness.same("p" + i, latches.get(2).getLeader().getId(), "the leader");
            for (int later = i + 1; later < 3; later++) {
                Harness.require(!latches.get(later).hasLeadership(), "two lead");
            }
            leader.close();
        }
    }

    private void leaderSelector(Harness.Context context) throws Exception {
        BlockingQueue<String> terms = new LinkedBlockingQueue<>();
        int[] leading = {0};
        for (String name : Arrays.asList("a", "b", "c")) {
            LeaderSelector selector = new LeaderSelector(
                context.curator(), context.root + "/selector", new LeaderSelectorListenerAdapter() {
                    @Override
                    public void takeLeadership(CuratorFramework client) {
                        synchronized (leading) {
                            leading[0]++;
                            terms.add(leading[0] == 1 ? name : "two lead");
                        }
                        Thread.yield();
                        synchronized (leading) {
                            leading[0]--;
                        }
                    }
                });
            selector.setId(name);
            selector.autoRequeue();
            context.keep(selector);
            selector.start();
        }
        Set<String> seen = new TreeSet<>();
        for (int i = 0; i < 9; i++) {
            seen.add(terms.poll(WAIT, MS));
        }
        Harness.same(new TreeSet<>(Arrays.asList("a", "b", "c")), seen, "who has led in nine terms");
    }

    private void mutex(Harness.Context context) throws Exception {
        int threads = 4;
        int rounds = 25;
        int[] holders = {0};
        int[] entered = {0};
        ExecutorService pool = Executors.newFixedThreadPool(threads);
        List<Future<Void>> ends = new ArrayList<>();
        for (int i = 0; i < threads; i++) {
            InterProcessMutex mutex = new InterProcessMutex(context.curator(), context.root + "/mutex");
            ends.add(pool.submit(() -> {
                for (int round = 0; round < rounds; round++) {
                    Harness.require(mutex.acquire(WAIT, MS), "never acquired");
                    synchronized (holders) {
                        Harness.same(1, ++holders[0], "holders");
                        entered[0]++;
                    }
                    Thread.yield();
                    synchronized (holders) {
                        holders[0]--;
                    }
                    mutex.release();
                }
                return null;
            }));
        }
        for (Future<Void> end : ends) {
            end.get();
        }
        pool.shutdown();
        Harness.same(threads * rounds, entered[0], "entries");

        InterProcessMutex one = new InterProcessMutex(context.curator(), context.root + "/mutex");
        InterProcessMutex two = new InterProcessMutex(context.curator(), context.root + "/mutex");
        one.acquire();
        Harness.require(one.acquire(0, MS), "a mutex is reentrant");
        Harness.require(!two.acquire(0, MS), "held by two");
        one.release();
        Harness.require(!two.acquire(0, MS), "released too early");
        one.release();
        Harness.require(two.acquire(WAIT, MS), "never released");
        two.release();
        Harness.same(0, two.getParticipantNodes().size(), "participants");
    }

    private void semaphoreMutex(Harness.Context context) throws Exception {
        InterProcessSemaphoreMutex one = new InterProcessSemaphoreMutex(context.curator(), context.root + "/mutex");
        InterProcessSemaphoreMutex two = new InterProcessSemaphoreMutex(context.curator(), context.root + "/mutex");
        one.acquire();
        Harness.require(!two.acquire(100, MS), "held by two");
        one.release();
        Harness.require(two.acquire(WAIT, MS), "never released");
        two.release();
    }

    private void multiLock(Harness.Context context) throws Exception {
        List<String> paths = Arrays.asList(context.root + "/a", context.root + "/b");
        CuratorFramework other = context.curator();
        InterProcessMultiLock both = new InterProcessMultiLock(context.curator(), paths);
        InterProcessMutex second = new InterProcessMutex(other, paths.get(1));
        InterProcessMutex first = new InterProcessMutex(other, paths.get(0));
        second.acquire();
        Harness.require(!both.acquire(100, MS), "acquired though one of its locks is held");
        Harness.require(first.acquire(WAIT, MS), "keeps a part of what it did not get");
        first.release();
        second.release();
        Harness.require(both.acquire(WAIT, MS), "never acquired");
        Harness.require(!first.acquire(0, MS), "held by two");
        both.release();
    }

    private void readWriteLock(Harness.Context context) throws Exception {
        String path = context.root + "/lock";
        InterProcessReadWriteLock a = new InterProcessReadWriteLock(context.curator(), path);
        InterProcessReadWriteLock b = new InterProcessReadWriteLock(context.curator(), path);
        InterProcessReadWriteLock c = new InterProcessReadWriteLock(context.curator(), path);
        a.readLock().acquire();
        Harness.require(b.readLock().acquire(WAIT, MS), "two readers");
        Harness.require(!c.writeLock().acquire(0, MS), "a writer beside readers");
        a.readLock().release();
        Harness.require(!c.writeLock().acquire(0, MS), "a writer beside a reader");
        ExecutorService thread = Executors.newSingleThreadExecutor();
        Future<Boolean> writes = thread.submit(() -> c.writeLock().acquire(WAIT, MS));
        Harness.until("the writer to wait", () -> c.writeLock().getParticipantNodes().size() == 1);
        // Readers do not pass a writer that waits.
        Harness.require(!a.readLock().acquire(0, MS), "a reader before the writer that waits");
        b.readLock().release();
        Harness.require(writes.get(), "never acquired for writing");
        Harness.require(!a.readLock().acquire(0, MS), "a reader beside a writer");
        Harness.require(!a.writeLock().acquire(0, MS), "two writers");
        // A writer may read and then let others read.
        Future<Void> downgrades = thread.submit(() -> {
            c.readLock().acquire();
            c.writeLock().release();
            return null;
        });
        downgrades.get();
        Harness.require(a.readLock().acquire(WAIT, MS), "a reader after the writer");
        a.readLock().release();
        thread.shutdown();
    }

    private void semaphore(Harness.Context context) throws Exception {
        CuratorFramework here = context.curator();
        InterProcessSemaphoreV2 one = new InterProcessSemaphoreV2(here, context.root + "/semaphore", 3);
        InterProcessSemaphoreV2 two =
            new InterProcessSemaphoreV2(context.curator(), context.root + "/semaphore", 3);
        Collection<Lease> leases = one.acquire(2);
        Lease third = two.acquire(WAIT, MS);
        Harness.require(third != null, "three of three");
        Harness.require(two.acquire(100, MS) == null, "four of three");
        one.returnLease(leases.iterator().next());
        Lease again = two.acquire(WAIT, MS);
        Harness.require(again != null, "a lease that was given back");
        // What a client held is free when its session ends.
        here.close();
        Lease freed = two.acquire(WAIT, MS);
        Harness.require(freed != null, "a lease of a session that has ended");
        two.returnAll(Arrays.asList(third, again, freed));
        Harness.until("the leases to go", () -> two.getParticipantNodes().isEmpty());
    }

    private void barrier(Harness.Context context) throws Exception {
        DistributedBarrier holder = new DistributedBarrier(context.curator(), context.root + "/barrier");
        holder.setBarrier();
        ExecutorService pool = Executors.newFixedThreadPool(3);
        List<Future<Boolean>> waits = new ArrayList<>();
        for (int i = 0; i < 3; i++) {
            DistributedBarrier waiter = new DistributedBarrier(context.curator(), context.root + "/barrier");
            Harness.require(!waiter.waitOnBarrier(10, MS), "through a barrier that is set");
            waits.add(pool.submit(() -> waiter.waitOnBarrier(WAIT, MS)));
        }
        holder.removeBarrier();
        for (Future<Boolean> wait : waits) {
            Harness.require(wait.get(), "the barrier is never passed");
        }
        pool.shutdown();
    }

    private void doubleBarrier(Harness.Context context) throws Exception {
        int parties = 4;
        int[] inside = {0};
        ExecutorService pool = Executors.newFixedThreadPool(parties);
        List<Future<Void>> ends = new ArrayList<>();
        for (int i = 0; i < parties; i++) {
            DistributedDoubleBarrier barrier =
                new DistributedDoubleBarrier(context.curator(), context.root + "/barrier", parties);
            ends.add(pool.submit(() -> {
                synchronized (inside) {
                    inside[0]++;
                }
                Harness.require(barrier.enter(WAIT, MS), "never entered");
                synchronized (inside) {
                    Harness.require(inside[0] >= parties, "entered before all had come");
                    inside[0]++;
                }
                Harness.require(barrier.leave(WAIT, MS), "never left");
                synchronized (inside) {
                    Harness.same(2 * parties, inside[0], "those who came and entered");
                }
                return null;
            }));
        }
        for (Future<Void> end : ends) {
            end.get();
        }
        pool.shutdown();
    }

    /** Texts as bytes. */
    private static final class Texts implements QueueSerializer<String> {
        @Override
        public byte[] serialize(String item) {
            return Harness.bytes(item);
        }

        @Override
        public String deserialize(byte[] data) {
            return Harness.text(data);
        }
    }

    /** Keeps what it consumes. */
    private static final class Consumed implements QueueConsumer<String> {
        final BlockingQueue<String> items = new LinkedBlockingQueue<>();

        @Override
        public void consumeMessage(String item) {
            items.add(item);
        }

        @Override
        public void stateChanged(CuratorFramework client, ConnectionState state) {}

        List<String> take(int count) throws InterruptedException {
            List<String> taken = new ArrayList<>();
            for (int i = 0; i < count; i++) {
                String item = items.poll(WAIT, MS);
                Harness.require(item != null, "an item of the queue is missing after " + taken);
                taken.add(item);
            }
            return taken;
        }
    }

    private void queue(Harness.Context context) throws Exception {
        Consumed consumed = new Consumed();
        QueueSerializer<String> texts = new Texts();
        DistributedQueue<String> from = context.keep(QueueBuilder
            .builder(context.curator(), consumed, texts, context.root + "/queue")
            .lockPath(context.root + "/locks").buildQueue());
        DistributedQueue<String> to = context.keep(QueueBuilder
            .builder(context.curator(), null, texts, context.root + "/queue").buildQueue());
        to.start();
        List<String> items = new ArrayList<>();
        for (int i = 0; i < 20; i++) {
            items.add("item " + i);
            to.put("item " + i);
        }
        Harness.require(to.flushPuts(WAIT, MS), "items are not put");
        from.start();
        Harness.same(items, consumed.take(20), "the items");
        to.put("late");
        Harness.same(Collections.singletonList("late"), consumed.take(1), "the items");
    }

    private void priorityQueue(Harness.Context context) throws Exception {
        Consumed consumed = new Consumed();
        QueueSerializer<String> texts = new Texts();
        DistributedPriorityQueue<String> to = context.keep(QueueBuilder
            .builder(context.curator(), null, texts, context.root + "/queue").buildPriorityQueue(1));
        to.start();
        for (int priority : new int[] {5, 1, 9, -3, 7}) {
            to.put("item " + priority, priority);
        }
        Harness.require(to.flushPuts(WAIT, MS), "items are not put");
        DistributedPriorityQueue<String> from = context.keep(QueueBuilder
            .builder(context.curator(), consumed, texts, context.root + "/queue").buildPriorityQueue(1));
        context.sync();
        from.start();
        Harness.same(Arrays.asList("item -3", "item 1", "item 5", "item 7", "item 9"), consumed.take(5), "the items");
    }

    private void idQueue(Harness.Context context) throws Exception {
        Consumed consumed = new Consumed();
        QueueSerializer<String> texts = new Texts();
        DistributedIdQueue<String> to = context.keep(QueueBuilder
            .builder(context.curator(), null, texts, context.root + "/queue").buildIdQueue());
        to.start();
        for (String id : Arrays.asList("a", "b", "c")) {
            to.put("item " + id, id);
        }
        Harness.require(to.flushPuts(WAIT, MS), "items are not put");
        Harness.same(1, to.remove("b"), "items removed");
        DistributedIdQueue<String> from = context.keep(QueueBuilder
            .builder(context.curator(), consumed, texts, context.root + "/queue").buildIdQueue());
        context.sync();
        from.start();
        Harness.same(Arrays.asList("item a", "item c"), consumed.take(2), "the items");
    }

    private void simpleQueue(Harness.Context context) throws Exception {
        SimpleDistributedQueue to = new SimpleDistributedQueue(context.curator(), context.root + "/queue");
        SimpleDistributedQueue from = new SimpleDistributedQueue(context.curator(), context.root + "/queue");
        Harness.require(from.poll() == null, "an item in an empty queue");
        ExecutorService thread = Executors.newSingleThreadExecutor();
        Future<byte[]> taken = thread.submit(() -> from.poll(WAIT, MS));
        to.offer(Harness.bytes("1"));
        Harness.same("1", Harness.text(taken.get()), "the item");
        to.offer(Harness.bytes("2"));
        to.offer(Harness.bytes("3"));
        context.sync();
        Harness.same("2", Harness.text(from.peek()), "the first item");
        Harness.same("2", Harness.text(from.take()), "the first item");
        Harness.same("3", Harness.text(from.remove()), "the second item");
        thread.shutdown();
    }

    private void persistentNode(Harness.Context context) throws Exception {
        CuratorFramework other = context.curator();
        String path = context.root + "/a/b/node";
        PersistentNode node = new PersistentNode(
            context.curator(), CreateMode.EPHEMERAL, false, path, Harness.bytes("data"));
        node.start();
        Harness.require(node.waitForInitialCreate(WAIT, MS), "never made");
        context.sync();
        Harness.same("data", Harness.text(other.getData().forPath(path)), "the data");
        Stat before = other.checkExists().forPath(path);
        other.delete().forPath(path);
        Harness.until("the node to come back", () -> {
            Stat after = other.checkExists().forPath(path);
            return after != null && after.getCzxid() > before.getCzxid();
        });
        node.setData(Harness.bytes("new"));
        Harness.until("the data", () -> "new".equals(Harness.text(other.getData().forPath(path))));
        node.close();
        context.sync();
        Harness.require(other.checkExists().forPath(path) == null, "the node of a closed recipe");
    }

    private void persistentTtlNode(Harness.Context context) throws Exception {
        CuratorFramework other = context.curator();
        String path = context.root + "/node";
        try (PersistentTtlNode node = new PersistentTtlNode(
                context.curator(), path, 2_000, Harness.bytes("data"))) {
            node.start();
            Harness.require(node.waitForInitialCreate(WAIT, MS), "never made");
            // It is touched well within its time, again and again.
            Harness.until("the second touch", () -> {
                Stat touch = other.checkExists().forPath(path + "/" + PersistentTtlNode.DEFAULT_CHILD_NODE_NAME);
                return touch != null && touch.getVersion() > 1;
            });
            Harness.same("data", Harness.text(other.getData().forPath(path)), "the data");
        }
    }

    private void persistentWatcher(Harness.Context context) throws Exception {
        CuratorFramework other = context.curator();
        Harness.Events events = new Harness.Events();
        PersistentWatcher watcher = new PersistentWatcher(context.curator(), context.root, true);
        CountDownLatch set = new CountDownLatch(1);
        watcher.getListenable().addListener(events);
        watcher.getResetListenable().addListener(set::countDown);
        watcher.start();
        Harness.require(set.await(WAIT, MS), "never set");
        other.create().forPath(context.root + "/a");
        other.create().forPath(context.root + "/a/b");
        other.setData().forPath(context.root + "/a/b", new byte[1]);
        other.delete().deletingChildrenIfNeeded().forPath(context.root + "/a");
        events.next(EventType.NodeCreated, context.root + "/a");
        events.next(EventType.NodeCreated, context.root + "/a/b");
        events.next(EventType.NodeDataChanged, context.root + "/a/b");
        events.next(EventType.NodeDeleted, context.root + "/a/b");
        events.next(EventType.NodeDeleted, context.root + "/a");
        watcher.close();
    }

    private void cacheOfATree(Harness.Context context) throws Exception {
        CuratorFramework other = context.curator();
        other.create().forPath(context.root + "/old", Harness.bytes("0"));
        BlockingQueue<String> events = new LinkedBlockingQueue<>();
        CountDownLatch ready = new CountDownLatch(1);
        CuratorCache cache = context.keep(CuratorCache.build(context.curator(), context.root));
        cache.listenable().addListener(CuratorCacheListener.builder()
            .forInitialized(ready::countDown)
            .forCreates(node -> events.add("created " + node.getPath()))
            .forChanges((before, after) -> events.add("changed " + after.getPath()))
            .forDeletes(node -> events.add("deleted " + node.getPath()))
            .afterInitialized()
            .build());
        context.sync();
        cache.start();
        Harness.require(ready.await(WAIT, MS), "never filled");
        Harness.same("0", Harness.text(cache.get(context.root + "/old").get().getData()), "what was there");
        other.create().forPath(context.root + "/new");
        other.create().forPath(context.root + "/new/child");
        Harness.same("created " + context.root + "/new", events.poll(WAIT, MS), "the event");
        Harness.same("created " + context.root + "/new/child", events.poll(WAIT, MS), "the event");
        other.setData().forPath(context.root + "/new/child", Harness.bytes("1"));
        Harness.same("changed " + context.root + "/new/child", events.poll(WAIT, MS), "the event");
        Harness.same("1", Harness.text(cache.get(context.root + "/new/child").get().getData()), "the data");
        other.delete().forPath(context.root + "/new/child");
        Harness.same("deleted " + context.root + "/new/child", events.poll(WAIT, MS), "the event");
        Harness.require(!cache.get(context.root + "/new/child").isPresent(), "a deleted node in the cache");
        Harness.same(3, cache.size(), "nodes");
    }

    private void cacheOfOneNode(Harness.Context context) throws Exception {
        CuratorFramework other = context.curator();
        BlockingQueue<String> events = new LinkedBlockingQueue<>();
        CountDownLatch ready = new CountDownLatch(1);
        CuratorCache cache = context.keep(CuratorCache.build(
            context.curator(), context.root, CuratorCache.Options.SINGLE_NODE_CACHE, CuratorCache.Options.COMPRESSED_DATA));
        cache.listenable().addListener(CuratorCacheListener.builder()
            .forInitialized(ready::countDown)
            .forAll((type, before, after) -> events.add(type + " " + (after == null ? before : after).getPath()))
            .afterInitialized()
            .build());
        other.setData().compressed().forPath(context.root, Harness.bytes("0"));
        context.sync();
        cache.start();
        Harness.require(ready.await(WAIT, MS), "never filled");
        other.create().forPath(context.root + "/child");
        other.setData().compressed().forPath(context.root, Harness.bytes("1"));
        Harness.same("NODE_CHANGED " + context.root, events.poll(WAIT, MS), "the event");
        Harness.same("1", Harness.text(cache.get(context.root).get().getData()), "the data");
        Harness.same(1, cache.size(), "nodes");
    }

    @SuppressWarnings("deprecation") // It is what older programs use, and it works otherwise than its successor.
    private void pathChildrenCache(Harness.Context context) throws Exception {
        CuratorFramework other = context.curator();
        BlockingQueue<String> events = new LinkedBlockingQueue<>();
        PathChildrenCache cache = context.keep(new PathChildrenCache(context.curator(), context.root, true));
        cache.getListenable().addListener((client, event) ->
            events.add(event.getType() + (event.getData() == null ? "" : " " + event.getData().getPath())));
        cache.start(PathChildrenCache.StartMode.POST_INITIALIZED_EVENT);
        Harness.same("INITIALIZED", events.poll(WAIT, MS), "the event");
        other.create().forPath(context.root + "/child", Harness.bytes("1"));
        Harness.same("CHILD_ADDED " + context.root + "/child", events.poll(WAIT, MS), "the event");
        other.setData().forPath(context.root + "/child", Harness.bytes("2"));
        Harness.same("CHILD_UPDATED " + context.root + "/child", events.poll(WAIT, MS), "the event");
        Harness.same("2", Harness.text(cache.getCurrentData(context.root + "/child").getData()), "the data");
        other.delete().forPath(context.root + "/child");
        Harness.same("CHILD_REMOVED " + context.root + "/child", events.poll(WAIT, MS), "the event");
        Harness.same(0, cache.getCurrentData().size(), "children");
    }

    private void sharedCount(Harness.Context context) throws Exception {
        SharedCount one = context.keep(new SharedCount(context.curator(), context.root + "/count", 5));
        SharedCount two = context.keep(new SharedCount(context.curator(), context.root + "/count", 9));
        one.start();
        two.start();
        Harness.same(5, two.getCount(), "the count");
        var stale = two.getVersionedValue();
        one.setCount(6);
        Harness.until("the count", () -> two.getCount() == 6);
        Harness.require(!two.trySetCount(stale, 7), "set over a newer value");
        Harness.require(two.trySetCount(two.getVersionedValue(), 8), "not set over the newest value");
        Harness.until("the count", () -> one.getCount() == 8);
    }

    private void atomicLong(Harness.Context context) throws Exception {
        int threads = 4;
        int rounds = 25;
        ExecutorService pool = Executors.newFixedThreadPool(threads);
        List<Future<Void>> ends = new ArrayList<>();
        for (int i = 0; i < threads; i++) {
            DistributedAtomicLong value = new DistributedAtomicLong(
                context.curator(), context.root + "/value", new RetryNTimes(10_000, 1));
            value.initialize(0L);
            ends.add(pool.submit(() -> {
                for (int round = 0; round < rounds; round++) {
                    Harness.require(value.increment().succeeded(), "not incremented");
                }
                return null;
            }));
        }
        for (Future<Void> end : ends) {
            end.get();
        }
        pool.shutdown();
        DistributedAtomicLong value = new DistributedAtomicLong(
            context.curator(), context.root + "/value", new RetryNTimes(1, 1));
        context.sync();
        AtomicValue<Long> last = value.get();
        Harness.same((long) threads * rounds, last.postValue(), "the value");
    }

    private void groupMember(Harness.Context context) throws Exception {
        GroupMember one = context.keep(
            new GroupMember(context.curator(), context.root + "/group", "one", Harness.bytes("1")));
        one.start();
        try (GroupMember two = new GroupMember(context.curator(), context.root + "/group", "two", Harness.bytes("2"))) {
            two.start();
            Harness.until("both", () -> one.getCurrentMembers().size() == 2 && two.getCurrentMembers().size() == 2);
            Harness.until("the data", () -> "2".equals(Harness.text(one.getCurrentMembers().get("two"))));
            two.setThisData(Harness.bytes("3"));
            Harness.until("the data", () -> "3".equals(Harness.text(one.getCurrentMembers().get("two"))));
        }
        Harness.until("one alone", () -> one.getCurrentMembers().size() == 1);
    }

    private void transaction(Harness.Context context) throws Exception {
        CuratorFramework curator = context.curator();
        String path = context.root + "/node";
        List<CuratorTransactionResult> results = new ArrayList<>(curator.transaction().forOperations(
            curator.transactionOp().create().withMode(CreateMode.PERSISTENT).forPath(path, Harness.bytes("1")),
            curator.transactionOp().check().withVersion(0).forPath(path),
            curator.transactionOp().setData().withVersion(0).forPath(path, Harness.bytes("2")),
            curator.transactionOp().create().withMode(CreateMode.EPHEMERAL_SEQUENTIAL).forPath(path + "-"),
            curator.transactionOp().create().withMode(CreateMode.CONTAINER).forPath(context.root + "/container"),
            curator.transactionOp().create().withTtl(3_600_000)
                .withMode(CreateMode.PERSISTENT_WITH_TTL).forPath(context.root + "/ttl")));
        Harness.same(6, results.size(), "results");
        Harness.same(path, results.get(0).getResultPath(), "the path");
        Harness.same(1, results.get(2).getResultStat().getVersion(), "the version");
        Harness.same(path + "-0000000001", results.get(3).getResultPath(), "the path");
        for (String name : Arrays.asList("/container", "/ttl")) {
            Harness.require(curator.checkExists().forPath(context.root + name) != null, name + " is absent");
        }
        try {
            curator.transaction().forOperations(
                curator.transactionOp().setData().forPath(path, Harness.bytes("3")),
                curator.transactionOp().check().withVersion(1).forPath(path));
            throw new AssertionError("done");
        } catch (KeeperException.BadVersionException refusal) {
            Harness.same("2", Harness.text(curator.getData().forPath(path)), "the data");
        }
    }

    private void namespace(Harness.Context context) throws Exception {
        CuratorFramework plain = context.curator();
        CuratorFramework named = context.start(CuratorFrameworkFactory.builder()
            .connectString(context.hosts).namespace(context.root.substring(1) + "/names"));
        Harness.same("/a", named.create().creatingParentsIfNeeded().forPath("/a"), "the path");
        context.sync();
        Harness.require(plain.checkExists().forPath(context.root + "/names/a") != null, "it stands below");
        CuratorFramework chrooted = context.start(CuratorFrameworkFactory.builder()
            .connectString(context.hosts + context.root).namespace("names"));
        context.sync();
        Harness.same(Collections.singletonList("a"), chrooted.getChildren().forPath("/"), "the children");
        Harness.Events events = new Harness.Events();
        chrooted.checkExists().usingWatcher(events).forPath("/b");
        named.create().forPath("/b");
        events.next(EventType.NodeCreated, "/b");
    }

    private void protectedEphemeral(Harness.Context context) throws Exception {
        CuratorFramework curator = context.curator();
        String made = curator.create().creatingParentsIfNeeded().withProtection()
            .withMode(CreateMode.EPHEMERAL_SEQUENTIAL).forPath(context.root + "/parents/node-");
        Harness.require(made.matches(".*/_c_[-0-9a-f]+-node-0000000000"), made);
        curator.create().orSetData().forPath(context.root + "/value", Harness.bytes("1"));
        curator.create().orSetData().forPath(context.root + "/value", Harness.bytes("2"));
        Harness.same("2", Harness.text(curator.getData().forPath(context.root + "/value")), "the data");
        CountDownLatch done = new CountDownLatch(1);
        curator.delete().guaranteed().deletingChildrenIfNeeded().inBackground(
            (client, event) -> done.countDown()).forPath(context.root + "/parents");
        Harness.require(done.await(WAIT, MS), "no answer in the background");
        Harness.require(curator.checkExists().forPath(made) == null, "it is gone");
    }

    private void curatorWatches(Harness.Context context) throws Exception {
        CuratorFramework curator = context.curator();
        Harness.Events events = new Harness.Events();
        curator.watchers().add().withMode(org.apache.zookeeper.AddWatchMode.PERSISTENT)
            .usingWatcher(events).forPath(context.root);
        curator.setData().forPath(context.root, Harness.bytes("1"));
        events.next(EventType.NodeDataChanged, context.root);
        curator.watchers().remove(events).forPath(context.root);
        events.next(EventType.PersistentWatchRemoved, context.root);
        curator.setData().forPath(context.root, Harness.bytes("2"));
        events.none(curator.getZookeeperClient().getZooKeeper());
    }

    private void curatorConfig(Harness.Context context) throws Exception {
        CuratorFramework curator = context.curator();
        Harness.require(Harness.text(curator.getConfig().forEnsemble()).contains("server.1="), "the servers");
        try {
            curator.reconfig().leaving("3").forEnsemble();
            throw new AssertionError("anyone may change the ensemble");
        } catch (KeeperException.NoAuthException refusal) {
            return;
        }
    }
}
