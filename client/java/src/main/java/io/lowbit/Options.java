package io.lowbit;

import java.time.Duration;
import java.util.function.Consumer;
import java.util.function.Supplier;
import java.util.regex.Pattern;

/**
 * What a client may be told about its connection. Each method returns a copy with one value changed
 * and throws {@link IllegalArgumentException} for a value that makes no sense.
 */
public final class Options extends Settings implements Cloneable {
  private static final Pattern TOKEN = Pattern.compile("[A-Za-z0-9._~+/-]+=*"); // RFC 6750, 2.1

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

  @Override
  Options with(Consumer<Options> change) {
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
}
