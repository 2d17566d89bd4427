import java.util.Arrays;

/**
 * The Java client and Curator against an ensemble: {@code java Main HOST:PORT,HOST:PORT,HOST:PORT [CHECK..]}.
 *
 * <p>Prints one line per check, {@code ok NAME} or {@code FAILED NAME: REASON}, and last how many failed. The
 * checks of {@link FaultChecks} ask on standard output for servers to be killed and started, and wait for the
 * answer on standard input ({@link Harness#control}). Servers are expected to have TTL nodes enabled, and the
 * super user's digest {@code super:test}.
 */
final class Main {
    private Main() {}

    public static void main(String[] arguments) throws Exception {
        Harness harness = new Harness(
            arguments[0], Arrays.asList(arguments).subList(1, arguments.length));
        harness.sweep();
        // Begun first, for what it makes goes only when the servers next look for it.
        Expiring expiring = new Expiring();
        harness.check("ttl_and_container_nodes_made", expiring::make);
        new ClientChecks(harness).run();
        new RecipeChecks(harness).run();
        new FaultChecks(harness).run();
        harness.check("ttl_and_container_nodes_gone", expiring::gone);
        System.out.println(harness.failures() + " failed");
        System.exit(harness.failures() == 0 ? 0 : 1);
    }
}
