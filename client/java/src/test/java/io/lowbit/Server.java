package io.lowbit;

import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.time.Duration;
import java.util.function.BooleanSupplier;
import java.util.function.Supplier;

/** A real server with the scripted models smollm2 and slow. It ends with this process. */
final class Server {
  static final Path ROOT = Path.of("../..").toAbsolutePath().normalize();
  static final String ADDRESS = start();

  private Server() {}

  private static String start() {
    try {
      Process process =
          new ProcessBuilder(
                  ROOT.resolve(".venv/bin/python").toString(),
                  "-m",
                  "tests.conformance.serve",
                  "smollm2={\"step_ms\": 1}",
                  "slow={\"step_ms\": 20}")
              .directory(ROOT.toFile())
              .redirectError(ProcessBuilder.Redirect.INHERIT)
              .start();
      var output = new InputStreamReader(process.getInputStream(), StandardCharsets.UTF_8);
      String line = new BufferedReader(output).readLine();
      if (line == null) {
        throw new IllegalStateException("the server did not start");
      }
      return line.strip();
    } catch (IOException failed) {
      throw new UncheckedIOException(failed);
    }
  }

  /** Returns how many requests hold a slot. */
  static int running(Client client) {
    return client.devices().get(0).getWorkers(0).getRunningRequests();
  }

  /** Waits until something is so. */
  static void until(BooleanSupplier condition) throws InterruptedException {
    until(condition, () -> "the condition never came true");
  }

  /** Waits until something is so; says what was instead. */
  static void until(BooleanSupplier condition, Supplier<String> otherwise)
      throws InterruptedException {
    long deadline = System.nanoTime() + Duration.ofSeconds(30).toNanos();
    while (!condition.getAsBoolean()) {
      if (System.nanoTime() > deadline) {
        throw new AssertionError(otherwise.get());
      }
      Thread.sleep(5); // between two looks at what cannot be awaited
    }
  }
}
