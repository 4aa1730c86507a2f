package io.lowbit;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.time.Duration;
import java.util.Map;
import java.util.function.Function;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

class OptionsTest {
  @Test
  void whatMakesNoSenseIsRefusedByName() {
    Map<String, Function<Options, Options>> wrong =
        Map.of(
            "callTimeout", options -> options.callTimeout(Duration.ZERO),
            "slowCallTimeout", options -> options.slowCallTimeout(Duration.ofSeconds(-1)),
            "streamTimeout", options -> options.streamTimeout(Duration.ZERO),
            "resumeTimeout", options -> options.resumeTimeout(Duration.ZERO),
            "maxMessageBytes", options -> options.maxMessageBytes(0),
            "keepaliveInterval", options -> options.keepaliveInterval(Duration.ZERO),
            "maxAttempts", options -> options.maxAttempts(0),
            "firstBackoff", options -> options.firstBackoff(Duration.ZERO),
            "retryBudget", options -> options.retryBudget(-1),
            "tls", options -> options.tls(new Options.Tls(null, "certificate", null, null)));
    wrong.forEach(
        (name, change) -> {
          var refusal =
              assertThrows(IllegalArgumentException.class, () -> change.apply(new Options()));
          assertTrue(refusal.getMessage().startsWith(name), refusal.getMessage());
        });
  }

  @Test
  void copiesLeaveTheOriginal() {
    var options = new Options();
    assertEquals(1, options.maxAttempts(1).maxAttempts);
    assertEquals(4, options.maxAttempts);
  }

  @ParameterizedTest
  @ValueSource(strings = {"127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/tmp/lowbit"})
  void tokensGoToThisMachineInTheClear(String address) {
    new Client(address, new Options().token("secret")).close();
  }

  @ParameterizedTest
  @ValueSource(strings = {"lowbit.test:1", "10.0.0.1:1", "127.evil.test:1", "localhost.evil.test:1"})
  void tokensGoElsewhereWithTlsOnly(String address) {
    var options = new Options().token("secret");
    assertThrows(IllegalArgumentException.class, () -> new Client(address, options));
    new Client(address, options.tls(new Options.Tls())).close();
  }

  @ParameterizedTest
  @ValueSource(strings = {"", "two words", "two\nlines", "gar\u00e7on", "=", "a=b"})
  void tokensHaveTheCharactersOfBearerTokens(String token) {
    var refusal =
        assertThrows(IllegalArgumentException.class, () -> new Options().token(token));
    assertTrue(refusal.getMessage().startsWith("token has other"), refusal.getMessage());
    new Options().token("aZ09._~+/-==").token(null);
  }

  @Test
  void unreadableCertificatesAreRefused() {
    var options = new Options().tls(new Options.Tls("no certificate", null, null, null));
    assertThrows(IllegalArgumentException.class, () -> new Client("lowbit.test:1", options));
  }
}
