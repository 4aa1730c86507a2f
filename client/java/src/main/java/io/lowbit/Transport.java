package io.lowbit;

import io.grpc.*;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicLong;
import java.util.regex.Pattern;

/** One channel to one server and what its calls share. */
final class Transport {
  static final String VERSION = "0.1.0";
  private static final Pattern LOOPBACK =
      Pattern.compile("(127(\\.\\d{1,3}){3}|localhost|\\[::1\\])(:\\d+)?|unix:.*");
  // Lists of many violations are longer than gRPC's 8 KiB.
  private static final int MAX_METADATA_BYTES = 64 * 1024;

  final Options options;

  /** Is cancelled when the client is closed. */
  final Context.CancellableContext life = Context.ROOT.withCancellation();

  private final ManagedChannel channel;
  private final AtomicLong budget; // in tenths of a retry

  Transport(String address, Options options) {
    boolean loopback = LOOPBACK.matcher(address).matches();
    if (options.token != null && options.tls == null && !loopback) {
      throw new IllegalArgumentException("token: without tls it is sent to loopback only");
    }
    this.options = options;
    budget = new AtomicLong(10L * options.retryBudget);
    ManagedChannelBuilder<?> builder = builder(address, options.tls);
    if (loopback) {
      builder.proxyDetector(target -> null); // a proxy cannot reach this machine's own loopback
    }
    channel =
        builder
            .directExecutor() // listeners only queue; they never wait
            .disableRetry() // gRPC would retry on its own and hide the tries
            .userAgent("lowbit-java/" + VERSION)
            .maxInboundMessageSize(options.maxMessageBytes)
            .maxInboundMetadataSize(MAX_METADATA_BYTES)
            .keepAliveTime(options.keepaliveInterval.toNanos(), TimeUnit.NANOSECONDS)
            .keepAliveTimeout(options.keepaliveTimeout.toNanos(), TimeUnit.NANOSECONDS)
            .keepAliveWithoutCalls(true)
            .build();
  }

  private static ManagedChannelBuilder<?> builder(String address, Options.Tls tls) {
    if (tls == null) {
      return Grpc.newChannelBuilder(address, InsecureChannelCredentials.create());
    }
    try {
      var credentials = TlsChannelCredentials.newBuilder();
      if (tls.ca() != null) {
        credentials.trustManager(stream(tls.ca()));
      }
      if (tls.certificate() != null) {
        credentials.keyManager(stream(tls.certificate()), stream(tls.key()));
      }
      var builder = Grpc.newChannelBuilder(address, credentials.build());
      return tls.serverName() == null ? builder : builder.overrideAuthority(tls.serverName());
    } catch (IOException | RuntimeException unreadable) {
      throw new IllegalArgumentException("tls: certificates or key cannot be read", unreadable);
    }
  }

  private static InputStream stream(String pem) {
    return new ByteArrayInputStream(pem.getBytes(StandardCharsets.US_ASCII));
  }

  <Q, R> ClientCall<Q, R> newCall(MethodDescriptor<Q, R> rpc, Deadline deadline) {
    if (channel.getState(false) == ConnectivityState.TRANSIENT_FAILURE) {
      channel.enterIdle(); // connects at once; gRPC's own waits are longer than ours
    }
    return channel.newCall(rpc, CallOptions.DEFAULT.withDeadline(deadline));
  }

  Metadata headers() {
    Metadata headers = new Metadata();
    put(headers, "authorization", options.token == null ? null : "Bearer " + options.token);
    put(headers, "traceparent", options.traceparent.get());
    return headers;
  }

  private static void put(Metadata headers, String name, String value) {
    if (value != null) {
      headers.put(Metadata.Key.of(name, Metadata.ASCII_STRING_MARSHALLER), value);
    }
  }

  /** Takes one retry from the budget; returns whether there was one. */
  boolean spend() {
    return budget.getAndUpdate(tenths -> tenths < 10 ? tenths : tenths - 10) >= 10;
  }

  /** Gives back a tenth of a retry after a success. */
  void refund() {
    budget.updateAndGet(tenths -> Math.min(tenths + 1, 10L * options.retryBudget));
  }

  void close() {
    life.cancel(null);
    channel.shutdownNow();
  }
}
