import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;
import java.net.InetAddress;
import java.net.InetSocketAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.util.HashSet;
import java.util.Set;

/** A wire between a client and a server that can be cut and mended. */
final class Relay implements AutoCloseable {
    private final InetSocketAddress server;
    private final InetSocketAddress listen;
    private final Set<Socket> sockets = new HashSet<>();
    private ServerSocket listener;

    /** To the first of {@code hosts}. */
    Relay(String hosts) throws IOException {
        String host = hosts.split(",")[0];
        int colon = host.lastIndexOf(':');
        server = new InetSocketAddress(host.substring(0, colon), Integer.parseInt(host.substring(colon + 1)));
        try (ServerSocket free = new ServerSocket(0, 1, InetAddress.getLoopbackAddress())) {
            listen = new InetSocketAddress(free.getInetAddress(), free.getLocalPort());
        }
        mend();
    }

    String host() {
        return listen.getHostString() + ":" + listen.getPort();
    }

    /** Ends every connection, and refuses new ones. */
    synchronized void cut() throws IOException {
        if (listener != null) {
            listener.close();
            listener = null;
        }
        for (Socket socket : sockets) {
            socket.close();
        }
        sockets.clear();
    }

    /** Accepts connections again. */
    synchronized void mend() throws IOException {
        ServerSocket opened = new ServerSocket();
        opened.setReuseAddress(true);
        opened.bind(listen);
        listener = opened;
        background(() -> {
            while (true) {
                accept(opened);
            }
        });
    }

    private void accept(ServerSocket from) throws IOException {
        Socket client = from.accept();
        Socket upstream = new Socket();
        try {
            upstream.connect(server);
        } catch (IOException unreachable) {
            client.close();
            return;
        }
        synchronized (this) {
            if (listener != from) {
                client.close();
                upstream.close();
                return;
            }
            sockets.add(client);
            sockets.add(upstream);
        }
        background(() -> copy(client, upstream));
        background(() -> copy(upstream, client));
    }

    private static void copy(Socket from, Socket to) throws IOException {
        try (from; to) {
            InputStream in = from.getInputStream();
            OutputStream out = to.getOutputStream();
            in.transferTo(out);
        }
    }

    private interface Work {
        void run() throws IOException;
    }

    /** Runs until its sockets are closed under it. */
    private static void background(Work work) {
        Thread thread = new Thread(() -> {
            try {
                work.run();
            } catch (IOException closed) {
                return;
            }
        }, "relay");
        thread.setDaemon(true);
        thread.start();
    }

    @Override
    public void close() throws IOException {
        cut();
    }
}
