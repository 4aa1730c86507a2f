package io.lowbit;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;

import io.grpc.Grpc;
import io.grpc.InsecureServerCredentials;
import io.grpc.Server;
import io.grpc.Status;
import io.grpc.stub.StreamObserver;
import io.lowbit.v1.DeleteModelRequest;
import io.lowbit.v1.DeleteModelResponse;
import io.lowbit.v1.GetModelRequest;
import io.lowbit.v1.GetModelResponse;
import io.lowbit.v1.ModelServiceGrpc.ModelServiceImplBase;
import java.io.IOException;
import java.time.Duration;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.ForkJoinPool;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.stream.Stream;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;

/** What the conformance suite cannot see of retries, with a server that counts tries. */
class RetryTest {
  private final AtomicInteger tries = new AtomicInteger();
  private final Options quick = new Options().firstBackoff(Duration.ofMillis(1));
  private Server server;

  @BeforeEach
  void serve() throws IOException {
    server =
        Grpc.newServerBuilderForPort(0, InsecureServerCredentials.create())
            .addService(
                new ModelServiceImplBase() {
                  @Override
                  public void getModel(GetModelRequest it, StreamObserver<GetModelResponse> to) {
                    tries.incrementAndGet();
                    to.onError(Status.UNAVAILABLE.asException());
                  }

                  @Override
                  public void deleteModel(
                      DeleteModelRequest it, StreamObserver<DeleteModelResponse> to) {
                    tries.incrementAndGet();
                    to.onError(Status.UNAVAILABLE.asException());
                  }
                })
            .build()
            .start();
  }

  @AfterEach
  void stop() {
    server.shutdownNow();
  }

  private Client client(Options options) {
    return new Client("127.0.0.1:" + server.getPort(), options);
  }

  @Test
  void readingIsTriedAgain() {
    try (var client = client(quick.maxAttempts(3))) {
      assertThrows(Errors.UnavailableException.class, () -> client.getModel("m"));
      assertEquals(3, tries.get());
    }
  }

  @Test
  void triesNeedNoThreadOfTheCommonPool() {
    var pool = ForkJoinPool.commonPool();
    try (var client = client(quick.maxAttempts(3))) {
      var calls =
          Stream.generate(() -> pool.submit(() -> client.getModel("m")))
              .limit(pool.getParallelism())
              .toList();
      for (var call : calls) {
        assertThrows(ExecutionException.class, () -> call.get(10, TimeUnit.SECONDS));
      }
      assertEquals(3 * calls.size(), tries.get());
    }
  }

  @Test
  void deletingIsNot() {
    try (var client = client(quick)) {
      assertThrows(Errors.UnavailableException.class, () -> client.deleteModel("m"));
      assertEquals(1, tries.get());
    }
  }

  @Test
  void allCallsShareOneBudget() {
    try (var client = client(quick.retryBudget(4))) {
      for (int i = 0; i < 3; i++) {
        assertThrows(Errors.UnavailableException.class, () -> client.getModel("m"));
      }
      assertEquals(3 + 4, tries.get());
    }
  }

  @Test
  void noTryIsPlannedBehindTheDeadline() {
    try (var client = client(new Options().firstBackoff(Duration.ofSeconds(20)).maxBackoff(Duration.ofSeconds(20)))) {
      var timed = client.withTimeout(Duration.ofSeconds(5));
      assertThrows(Errors.UnavailableException.class, () -> timed.getModel("m"));
      assertEquals(1, tries.get());
    }
  }
}
