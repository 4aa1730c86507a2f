package io.lowbit;

import java.time.Duration;
import java.util.function.Consumer;
import java.util.function.Supplier;
import java.util.regex.Pattern;

/**
 * What a client may be told about its connection. Each method returns a copy with one value changed
 * and throws {@link IllegalArgumentException} for a value that makes no sense.
 */
public final class Options implements Cloneable {
  private static final Pattern TOKEN = Pattern.compile("[A-Za-z0-9._~+/-]+=*"); // RFC 6750, 2.1

  Duration callTimeout = Duration.ofSeconds(30);
  Duration slowCallTimeout = Duration.ofSeconds(600);
  Duration streamTimeout;
  Duration resumeTimeout = Duration.ofSeconds(60);
  int maxMessageBytes = 64 * 1024 * 1024;
  Duration keepaliveInterval = Duration.ofSeconds(30);
  Duration keepaliveTimeout = Duration.ofSeconds(10);
  int maxAttempts = 4;
  Duration firstBackoff = Duration.ofMillis(100);
  Duration maxBackoff = Duration.ofSeconds(2);
  int retryBudget = 20;
  Tls tls;
  String token;
  Supplier<String> traceparent = () -> null;

  /** Makes the defaults. */
  public Options() {}

  /**
   * TLS to a server; what is null is left out.
   *
   * @param ca certificates of the authorities to trust, PEM; null: the system's
   * @param certificate the client's own certificate, PEM; goes with {@code key}
   * @param key its private key, PEM (PKCS 8)
   * @param serverName name to check in place of the address's
   */
  public record Tls(String ca, String certificate, String key, String serverName) {
    /** Trusts the system's authorities. */
    public Tls() {
      this(null, null, null, null);
    }
  }

  /**
   * Sets the deadline of a call with one answer, over all tries.
   *
   * @param value 30 seconds by default
   * @return the copy
   */
  public Options callTimeout(Duration value) {
    return with(copy -> copy.callTimeout = positive("callTimeout", value));
  }

  /**
   * Sets the deadline of {@code verifyModel} and {@code score}.
   *
   * @param value 600 seconds by default
   * @return the copy
   */
  public Options slowCallTimeout(Duration value) {
    return with(copy -> copy.slowCallTimeout = positive("slowCallTimeout", value));
  }

  /**
   * Sets the deadline of {@code generate} and {@code load}.
   *
   * @param value none by default
   * @return the copy
   */
  public Options streamTimeout(Duration value) {
    return with(copy -> copy.streamTimeout = positive("streamTimeout", value));
  }

  /**
   * Sets how long {@code watchJob} and {@code load} try to get back to a server.
   *
   * @param value 60 seconds by default
   * @return the copy
   */
  public Options resumeTimeout(Duration value) {
    return with(copy -> copy.resumeTimeout = positive("resumeTimeout", value));
  }

  /**
   * Sets the largest message that is sent or accepted.
   *
   * @param value 64 MiB by default
   * @return the copy
   */
  public Options maxMessageBytes(int value) {
    return with(copy -> copy.maxMessageBytes = atLeast(1, "maxMessageBytes", value));
  }

  /**
   * Sets the time between two pings; the server allows one every 10 seconds.
   *
   * @param value 30 seconds by default
   * @return the copy
   */
  public Options keepaliveInterval(Duration value) {
    return with(copy -> copy.keepaliveInterval = positive("keepaliveInterval", value));
  }

  /**
   * Sets after which time without an answer to a ping a connection is given up.
   *
   * @param value 10 seconds by default
   * @return the copy
   */
  public Options keepaliveTimeout(Duration value) {
    return with(copy -> copy.keepaliveTimeout = positive("keepaliveTimeout", value));
  }

  /**
   * Sets the tries of one call in all; 1 switches retries off.
   *
   * @param value 4 by default
   * @return the copy
   */
  public Options maxAttempts(int value) {
    return with(copy -> copy.maxAttempts = atLeast(1, "maxAttempts", value));
  }

  /**
   * Sets the wait before the second try where the server names none; it doubles each time.
   *
   * @param value 0.1 seconds by default
   * @return the copy
   */
  public Options firstBackoff(Duration value) {
    return with(copy -> copy.firstBackoff = positive("firstBackoff", value));
  }

  /**
   * Sets the longest wait between two tries where the server names none.
   *
   * @param value 2 seconds by default
   * @return the copy
   */
  public Options maxBackoff(Duration value) {
    return with(copy -> copy.maxBackoff = positive("maxBackoff", value));
  }

  /**
   * Sets the retries in a row over all calls; each success gives back a tenth.
   *
   * @param value 20 by default
   * @return the copy
   */
  public Options retryBudget(int value) {
    return with(copy -> copy.retryBudget = atLeast(0, "retryBudget", value));
  }

  /**
   * Connects with TLS.
   *
   * @param value whom to trust and who the client is
   * @return the copy
   */
  public Options tls(Tls value) {
    if ((value.certificate() == null) != (value.key() == null)) {
      throw new IllegalArgumentException("tls: certificate and key go together");
    }
    return with(copy -> copy.tls = value);
  }

  /**
   * Sends a bearer token; without TLS only to loopback.
   *
   * @param value with the characters of RFC 6750; none by default
   * @return the copy
   */
  public Options token(String value) {
    if (value != null && !TOKEN.matcher(value).matches()) {
      throw new IllegalArgumentException("token has other characters than RFC 6750 allows, or none");
    }
    return with(copy -> copy.token = value);
  }

  /**
   * Passes a trace on.
   *
   * @param value called for each try; gives a W3C traceparent or null
   * @return the copy
   */
  public Options traceparent(Supplier<String> value) {
    return with(copy -> copy.traceparent = value);
  }

  private Options with(Consumer<Options> change) {
    try {
      Options copy = (Options) clone();
      change.accept(copy);
      return copy;
    } catch (CloneNotSupportedException impossible) {
      throw new AssertionError(impossible);
    }
  }

  static Duration positive(String name, Duration value) {
    if (value.isNegative() || value.isZero()) {
      throw new IllegalArgumentException(name + " must be above 0");
    }
    return value;
  }

  private static int atLeast(int least, String name, int value) {
    if (value < least) {
      throw new IllegalArgumentException(name + " must be at least " + least);
    }
    return value;
  }
}
