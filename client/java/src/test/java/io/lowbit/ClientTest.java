package io.lowbit;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.lowbit.v1.GenerateRequest;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.Collection;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.Flow;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicReference;
import org.junit.jupiter.api.Test;

class ClientTest {
  private static GenerateRequest ask(String model, String prompt, int tokens) {
    var request = GenerateRequest.newBuilder().setModel(model).setText(prompt);
    request.getStoppingBuilder().setMaxTokens(tokens).setIgnoreEos(true);
    return request.build();
  }

  @Test
  void factsComeWithTheChunks() {
    try (var client = new Client(Server.ADDRESS);
        var stream = client.generate(ask("smollm2", "héllo", 12))) {
      assertEquals("h", stream.next().text());
      assertEquals("smollm2", stream.started().orElseThrow().getModel());
      assertTrue(stream.completed().isEmpty());
      assertEquals("héllohéllo", stream.text());
      assertEquals(12, stream.completed().orElseThrow().getUsage().getOutputTokens());
      assertFalse(stream.hasNext());
      stream.cancel();
      assertFalse(stream.hasNext(), "after the end cancelling does nothing");
    }
  }

  @Test
  void eachOutputHasItsTextAndItsEnd() {
    var request = ask("smollm2", "abc", 3).toBuilder();
    request.getSamplingBuilder().setN(2);
    try (var client = new Client(Server.ADDRESS);
        var stream = client.generate(request.build())) {
      assertTrue(stream.finished().isEmpty());
      assertEquals("", stream.partialText());
      assertEquals(List.of("abc", "bca"), stream.texts());
      assertEquals("abc", stream.text());
      assertEquals(0, stream.finished().orElseThrow().getOutputIndex());
      assertEquals(1, stream.allFinished().get(1).getOutputIndex());
    }
  }

  @Test
  void leavingTheBlockFreesTheSlot() throws Exception {
    try (var client = new Client(Server.ADDRESS)) {
      try (var stream = client.generate(ask("slow", "a", 4000))) {
        stream.next();
        assertEquals(1, Server.running(client));
      }
      Server.until(() -> Server.running(client) == 0);
    }
  }

  @Test
  void readingOnAfterCancellationFailsOnce() {
    try (var client = new Client(Server.ADDRESS);
        var stream = client.generate(ask("slow", "a", 4000))) {
      stream.next();
      stream.cancel();
      assertThrows(Errors.CancelledException.class, stream::hasNext);
      assertFalse(stream.hasNext());
      assertEquals("a", stream.partialText());
    }
  }

  @Test
  void whatNobodyHoldsIsCancelled() throws Exception {
    try (var client = new Client(Server.ADDRESS)) {
      drop(client);
      Server.until(
          () -> {
            System.gc();
            return Server.running(client) == 0;
          });
    }
  }

  private static void drop(Client client) {
    client.generate(ask("slow", "a", 4000)).next();
    assertEquals(1, Server.running(client));
  }

  @Test
  void anInterruptCancelsWhatWaits() throws Exception {
    var failure = new AtomicReference<RuntimeException>();
    try (var client = new Client(Server.ADDRESS)) {
      var started = new CountDownLatch(1);
      var reader =
          new Thread(
              () -> {
                var stream = client.generate(ask("slow", "a", 4000));
                stream.next();
                started.countDown();
                failure.set(assertThrows(RuntimeException.class, stream::text));
                assertTrue(Thread.currentThread().isInterrupted());
              });
      reader.start();
      started.await();
      reader.interrupt();
      reader.join();
      assertEquals(Errors.CancelledException.class, failure.get().getClass());
      Server.until(() -> Server.running(client) == 0);
    }
  }

  @Test
  void closingTheClientEndsItsStreamsAndThreads() throws Exception {
    String address = Server.ADDRESS; // its process has a thread too
    Collection<Thread> before = Thread.getAllStackTraces().keySet();
    var client = new Client(address);
    var stream = client.generate(ask("slow", "a", 4000));
    stream.next();
    var rest = CompletableFuture.supplyAsync(stream::text);
    client.close();
    var failure = assertThrows(ExecutionException.class, () -> rest.get(10, TimeUnit.SECONDS));
    assertEquals(Errors.CancelledException.class, failure.getCause().getClass());
    assertThrows(Errors.CancelledException.class, client::devices);
    Server.until(() -> left(before).isEmpty(), () -> "left: " + left(before));
  }

  /** Returns the threads that were not there before, without the JDK's own and shared ones. */
  private static List<String> left(Collection<Thread> before) {
    return Thread.getAllStackTraces().keySet().stream()
        .filter(thread -> !before.contains(thread))
        .map(Thread::getName)
        .filter(name -> !name.startsWith("ForkJoinPool.common") && !name.startsWith("Cleaner-"))
        .toList();
  }

  /** Asks for a number of items at a time and keeps what it is told. */
  private static final class Collector implements Flow.Subscriber<Chunk> {
    private final LinkedBlockingQueue<String> told = new LinkedBlockingQueue<>();
    private Flow.Subscription subscription;

    @Override
    public void onSubscribe(Flow.Subscription given) {
      subscription = given;
    }

    @Override
    public void onNext(Chunk chunk) {
      told.add(chunk.text());
    }

    @Override
    public void onError(Throwable failure) {
      told.add(failure.getClass().getSimpleName());
    }

    @Override
    public void onComplete() {
      told.add("complete");
    }

    String next() throws InterruptedException {
      return told.poll(30, TimeUnit.SECONDS);
    }
  }

  @Test
  void aSubscriberGetsWhatItAsksFor() throws Exception {
    try (var client = new Client(Server.ADDRESS)) {
      var collector = new Collector();
      client.generate(ask("smollm2", "abc", 3)).subscribe(collector);
      collector.subscription.request(2);
      assertEquals("a", collector.next());
      assertEquals("b", collector.next());
      Server.until(() -> Server.running(client) == 0);
      assertTrue(collector.told.isEmpty(), "nothing was asked for");
      collector.subscription.request(1);
      assertEquals("c", collector.next());
      assertEquals("complete", collector.next());
    }
  }

  @Test
  void aSubscriberMayLeave() throws Exception {
    try (var client = new Client(Server.ADDRESS)) {
      var collector = new Collector();
      client.generate(ask("slow", "a", 4000)).subscribe(collector);
      collector.subscription.request(1);
      assertEquals("a", collector.next());
      collector.subscription.cancel();
      Server.until(() -> Server.running(client) == 0);
    }
  }

  @Test
  void aSubscriberIsToldOfFailures() throws Exception {
    try (var client = new Client(Server.ADDRESS)) {
      var collector = new Collector();
      client.generate("nothing", "a").subscribe(collector);
      assertEquals("ModelNotFoundException", collector.next());
    }
  }

  @Test
  void aFailureIsOneLineWithoutThePrompt() {
    try (var client = new Client(Server.ADDRESS)) {
      var request = ask("smollm2", "xyzzy", 1).toBuilder();
      request.getSamplingBuilder().setTemperature(-1).setTopP(2);
      var stream = client.generate(request.build());
      var failure = assertThrows(Errors.InvalidArgumentException.class, stream::text);
      assertEquals(2, failure.violations().size());
      String line = failure.toString();
      assertTrue(line.startsWith("InvalidArgumentException: INVALID_FIELD: "), line);
      assertTrue(line.contains("sampling.top_p: "), line);
      assertFalse(line.contains("\n") || line.contains("xyzzy"), line);
    }
  }

  @Test
  void aTimeoutIsTheDeadlineOfACall() {
    try (var client = new Client(Server.ADDRESS)) {
      var stream = client.withTimeout(Duration.ofMillis(300)).generate(ask("slow", "a", 4000));
      assertThrows(Errors.DeadlineExceededException.class, stream::text);
      assertTrue(stream.partialText().startsWith("a"));
    }
  }

  @Test
  void theVersionIsThePoms() throws Exception {
    String pom = Files.readString(Path.of("pom.xml"));
    assertTrue(pom.contains("<version>" + Transport.VERSION + "</version>"));
  }
}
