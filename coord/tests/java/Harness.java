import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.nio.charset.StandardCharsets;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Deque;
import java.util.List;
import java.util.concurrent.Callable;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import org.apache.curator.framework.CuratorFramework;
import org.apache.curator.framework.CuratorFrameworkFactory;
import org.apache.curator.retry.RetryNTimes;
import org.apache.zookeeper.CreateMode;
import org.apache.zookeeper.KeeperException;
import org.apache.zookeeper.WatchedEvent;
import org.apache.zookeeper.Watcher;
import org.apache.zookeeper.ZKUtil;
import org.apache.zookeeper.ZooDefs;
import org.apache.zookeeper.ZooKeeper;

/** Runs checks one after the other, each bounded, each with one line of output. */
final class Harness {
    /** What a check does; it fails by throwing. */
    interface Body {
        void run(Context context) throws Exception;
    }

    /** A check that has not ended after this is one that hangs. */
    private static final long CHECK_MAX_MS = 60_000;
    /** An event that has not come after this does not come. */
    static final long EVENT_MAX_MS = 20_000;
    /** Session timeout of the clients; the servers may grant less or more. */
    static final int SESSION_MS = 10_000;

    private final String hosts;
    private final List<String> only;
    private int failures;

    Harness(String hosts, List<String> only) {
        this.hosts = hosts;
        this.only = only;
    }

    int failures() {
        return failures;
    }

    /** Deletes what an earlier run has left, whoever may. */
    void sweep() throws Exception {
        try (Context context = new Context(hosts, "/java")) {
            ZooKeeper client = context.client();
            client.addAuthInfo("digest", bytes("super:test"));
            ZKUtil.deleteRecursive(client, "/java");
        }
    }

    /** Runs a check, unless others were asked for by name. */
    void check(String name, Body body) throws InterruptedException {
        if (!only.isEmpty() && !only.contains(name)) {
            return;
        }
        Throwable[] reason = new Throwable[1];
        Thread thread = new Thread(() -> {
            try (Context context = new Context(hosts, "/java/" + name)) {
                body.run(context);
            } catch (Throwable thrown) {
                reason[0] = thrown;
            }
        }, name);
        thread.setDaemon(true);
        thread.start();
        thread.join(CHECK_MAX_MS);
        if (thread.isAlive()) {
            Throwable hangs = new Throwable("hangs");
            hangs.setStackTrace(thread.getStackTrace());
            reason[0] = hangs;
        }
        if (reason[0] == null) {
            say("ok " + name);
        } else {
            failures++;
            say("FAILED " + name + ": " + describe(reason[0]));
        }
    }

    /** The reason and the line of ours where it arose, on one line. */
    private static String describe(Throwable reason) {
        StringBuilder text = new StringBuilder();
        for (Throwable cause = reason; cause != null; cause = cause.getCause()) {
            if (text.length() > 0) {
                text.append(" <- ");
            }
            text.append(cause.toString().replace('\n', ' '));
        }
        for (StackTraceElement frame : reason.getStackTrace()) {
            if (frame.getFileName() != null && frame.getFileName().endsWith("Checks.java")) {
                text.append(" (").append(frame.getFileName()).append(':');
                text.append(frame.getLineNumber()).append(')');
                break;
            }
        }
        return text.toString();
    }

    private static synchronized void say(String line) {
        System.out.println(line);
    }

    static void require(boolean holds, String what) {
        if (!holds) {
            throw new AssertionError(what);
        }
    }

    static void same(Object expected, Object found, String what) {
        if (!expected.equals(found)) {
            throw new AssertionError(what + ": " + found + " instead of " + expected);
        }
    }

    /** Waits until something holds that no event announces. */
    static void until(String what, Callable<Boolean> holds) throws Exception {
        long end = System.nanoTime() + TimeUnit.MILLISECONDS.toNanos(EVENT_MAX_MS);
        while (!holds.call()) {
            require(System.nanoTime() < end, what + ": waited for in vain");
            Thread.sleep(5);
        }
    }

    /** Something that must fail with the error {@code code}. */
    static void refused(KeeperException.Code code, Callable<?> action) throws Exception {
        try {
            action.call();
        } catch (KeeperException refusal) {
            same(code, refusal.code(), "the error");
            return;
        }
        throw new AssertionError("done, where " + code + " was due");
    }

    static byte[] bytes(String text) {
        return text.getBytes(StandardCharsets.UTF_8);
    }

    static String text(byte[] data) {
        return data == null ? "null" : new String(data, StandardCharsets.UTF_8);
    }

    /**
     * Asks whoever started the program to do something to a server ({@code kill HOST:PORT}, {@code start
     * HOST:PORT}, {@code replace HOST:PORT} by one with an empty disk): a line of output, answered by a line {@code done} of input.
     */
    static void control(String what) throws IOException {
        say("control " + what);
        String answer = Answers.READER.readLine();
        require("done".equals(answer), "control " + what + ": answered " + answer);
    }

    private static final class Answers {
        static final BufferedReader READER =
            new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
    }

    /** What a check works with: clients that are closed after it, and a znode of its own. */
    static final class Context implements AutoCloseable {
        final String hosts;
        final String root;
        private final Deque<AutoCloseable> open = new ArrayDeque<>();
        private final List<Callable<ZooKeeper>> clients = new ArrayList<>();

        private Context(String hosts, String root) {
            this.hosts = hosts;
            this.root = root;
        }

        /** Closes it after the check, the latest first. */
        <T extends AutoCloseable> T keep(T closeable) {
            open.push(closeable);
            return closeable;
        }

        /** Curator with a session of its own; {@link #root} exists. */
        CuratorFramework curator() throws Exception {
            CuratorFramework curator = start(CuratorFrameworkFactory.builder().connectString(hosts));
            curator.createContainers(root);
            return curator;
        }

        CuratorFramework start(CuratorFrameworkFactory.Builder builder) throws InterruptedException {
            CuratorFramework curator = keep(builder
                .sessionTimeoutMs(SESSION_MS)
                .connectionTimeoutMs((int) EVENT_MAX_MS)
                .retryPolicy(new RetryNTimes(100, 100))
                .build());
            curator.start();
            curator.blockUntilConnected();
            clients.add(() -> curator.getZookeeperClient().getZooKeeper());
            return curator;
        }

        /** A plain client with a session of its own; {@link #root} exists. */
        ZooKeeper client() throws Exception {
            ZooKeeper client = connect(hosts, SESSION_MS, new Events());
            String path = "";
            for (String name : root.substring(1).split("/")) {
                path += "/" + name;
                try {
                    client.create(path, new byte[0], ZooDefs.Ids.OPEN_ACL_UNSAFE, CreateMode.PERSISTENT);
                } catch (KeeperException.NodeExistsException there) {
                    continue;
                }
            }
            return client;
        }

        /** A plain client that has its session; {@code events} has seen it connect. */
        ZooKeeper connect(String hosts, int sessionMs, Events events) throws Exception {
            ZooKeeper client = keep(new ZooKeeper(hosts, sessionMs, events));
            events.state(Watcher.Event.KeeperState.SyncConnected);
            clients.add(() -> client);
            return client;
        }

        /** Every client's next read shows what was written up to now: a server may lag behind another. */
        void sync() throws Exception {
            for (Callable<ZooKeeper> client : clients) {
                CountDownLatch synced = new CountDownLatch(1);
                client.call().sync("/", (code, path, with) -> synced.countDown(), null);
                require(synced.await(EVENT_MAX_MS, TimeUnit.MILLISECONDS), "no answer to sync");
            }
        }

        @Override
        public void close() throws Exception {
            List<Exception> failures = new ArrayList<>();
            while (!open.isEmpty()) {
                try {
                    open.pop().close();
                } catch (Exception failure) {
                    failures.add(failure);
                }
            }
            if (!failures.isEmpty()) {
                throw failures.get(0);
            }
        }
    }

    /** A watcher whose events are taken one by one. */
    static final class Events implements Watcher {
        private final Deque<WatchedEvent> events = new ArrayDeque<>();

        @Override
        public synchronized void process(WatchedEvent event) {
            events.add(event);
            notifyAll();
        }

        private synchronized WatchedEvent take() throws InterruptedException {
            long end = System.nanoTime() + TimeUnit.MILLISECONDS.toNanos(EVENT_MAX_MS);
            while (events.isEmpty()) {
                long left = TimeUnit.NANOSECONDS.toMillis(end - System.nanoTime());
                require(left > 0, "an event waited for in vain");
                wait(left);
            }
            return events.remove();
        }

        /** Skips events of the connection up to this one. */
        void state(Event.KeeperState state) throws InterruptedException {
            while (true) {
                WatchedEvent event = take();
                same(Event.EventType.None, event.getType(), "the event on " + event.getPath());
                if (event.getState() == state) {
                    return;
                }
            }
        }

        /** The next event of a znode must be this one. */
        void next(Event.EventType type, String path) throws InterruptedException {
            WatchedEvent event;
            do {
                event = take();
            } while (event.getType() == Event.EventType.None);
            same(type + " " + path, event.getType() + " " + event.getPath(), "the event");
        }

        /** No event of a znode has come to {@code client}, which has this watcher and has had answers. */
        void none(ZooKeeper client) throws InterruptedException {
            // Events and the answers to asynchronous calls come on one thread, in the order of the wire.
            CountDownLatch answered = new CountDownLatch(1);
            client.exists("/", false, (code, path, with, stat) -> answered.countDown(), null);
            require(answered.await(EVENT_MAX_MS, TimeUnit.MILLISECONDS), "no answer");
            nothingLeft();
        }

        private synchronized void nothingLeft() {
            for (WatchedEvent event : events) {
                require(event.getType() == Event.EventType.None, "an event that nobody waited for: " + event);
            }
        }
    }
}
