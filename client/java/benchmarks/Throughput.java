import io.lowbit.Client;
import io.lowbit.v1.GenerateRequest;
import java.util.Arrays;
import java.util.Locale;
import java.util.stream.IntStream;

/** Tokens a second of parallel streams: java -cp ... Throughput.java ADDRESS MODEL STREAMS TOKENS. */
final class Throughput {
  public static void main(String[] arguments) throws InterruptedException {
    int streams = Integer.parseInt(arguments[2]);
    var request = GenerateRequest.newBuilder().setModel(arguments[1]).setText("measure");
    request.getStoppingBuilder().setMaxTokens(Integer.parseInt(arguments[3])).setIgnoreEos(true);
    try (var client = new Client(arguments[0])) {
      read(client, request.build()); // connects, and lets the JVM compile what it will need
      long began = System.nanoTime();
      long[] counts = new long[streams];
      var readers =
          IntStream.range(0, streams)
              .mapToObj(i -> new Thread(() -> counts[i] = read(client, request.build())))
              .toList();
      readers.forEach(Thread::start);
      for (Thread reader : readers) {
        reader.join();
      }
      double seconds = (System.nanoTime() - began) / 1e9;
      long tokens = Arrays.stream(counts).sum();
      System.out.printf(Locale.ROOT, "{\"tokens\": %d, \"seconds\": %f}%n", tokens, seconds);
    }
  }

  private static long read(Client client, GenerateRequest request) {
    var stream = client.generate(request);
    stream.text();
    return stream.completed().orElseThrow().getUsage().getOutputTokens();
  }
}
