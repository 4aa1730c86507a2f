package io.lowbit;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.List;
import org.junit.jupiter.api.Test;

/** The quick start and the examples run as they are printed. */
class ExamplesTest {
  private static final String CLASS_PATH = "target/classes:target/lib/*";

  private static String run(String input, int code, String... command) throws Exception {
    var builder = new ProcessBuilder(command).redirectErrorStream(true);
    builder.environment().put("LOWBIT_ADDRESS", Server.ADDRESS);
    Process process = builder.start();
    try (var to = process.getOutputStream()) {
      to.write(input.getBytes(StandardCharsets.UTF_8));
    }
    String output = new String(process.getInputStream().readAllBytes(), StandardCharsets.UTF_8);
    assertEquals(code, process.waitFor(), output);
    return output;
  }

  private static String example(int code, String name, String... arguments) throws Exception {
    List<String> command = new ArrayList<>(List.of("java", "-cp", CLASS_PATH, name));
    command.addAll(List.of(arguments));
    return run("", code, command.toArray(String[]::new));
  }

  private static String quickStart() throws IOException {
    String readme = Files.readString(Path.of("README.md"));
    String code = readme.split("```java\n", 2)[1].split("```", 2)[0];
    assertEquals(5, code.lines().count());
    return code;
  }

  @Test
  void quickStartInTheShell() throws Exception {
    String jars;
    try (var libraries = Files.list(Path.of("target/lib"))) {
      jars = String.join(":", libraries.map(Path::toString).toList());
    }
    String output =
        run(quickStart(), 0, "jshell", "--class-path", "target/classes:" + jars, "-s", "-");
    assertTrue(output.strip().endsWith("The capital of F"), output);
  }

  @Test
  void chat() throws Exception {
    String output = example(0, "examples/Chat.java", "smollm2", "hello");
    assertTrue(output.startsWith("<user>hello"), output);
    assertTrue(output.endsWith("\n200 tokens\n"), output);
  }

  @Test
  void cancel() throws Exception {
    assertEquals("Once \nleft early\n", example(0, "examples/Cancel.java", "slow"));
  }

  @Test
  void errors() throws Exception {
    String output = example(0, "examples/Errors.java");
    assertEquals(2, output.split("MODEL_NOT_FOUND", -1).length - 1, output);
    assertTrue(output.contains("sampling.temperature: "), output);
  }

  @Test
  void quantizeNeedsWeights() throws Exception {
    String output = example(1, "examples/QuantizeThenLoad.java", "smollm2", "small");
    assertTrue(output.contains("smollm2 is a scripted test model without weights"), output);
  }

  @Test
  void throughput() throws Exception {
    String output = example(0, "benchmarks/Throughput.java", Server.ADDRESS, "smollm2", "2", "50");
    assertTrue(output.startsWith("{\"tokens\": 100, \"seconds\": "), output);
  }
}
