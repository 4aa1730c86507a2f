package io.lowbit;

import com.google.protobuf.Message;
import io.grpc.CallOptions;
import io.grpc.ClientCall;
import io.grpc.ConnectivityState;
import io.grpc.Deadline;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.TlsChannelCredentials;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.Set;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ScheduledThreadPoolExecutor;
import java.util.concurrent.TimeUnit;
import java.util.function.BiFunction;
import java.util.function.Function;
import java.util.regex.Pattern;

/** One channel to one server and what its calls share. */
final class Transport implements AutoCloseable {
  static final String VERSION = "0.1.0";
  private static final Pattern LOOPBACK =
      Pattern.compile("(127(\\.\\d{1,3}){3}|localhost|\\[::1\\])(:\\d+)?|unix:.*");
  // Lists of many violations are longer than gRPC's 8 KiB.
  private static final int MAX_METADATA_BYTES = 64 * 1024;

  final Options options;
  final ScheduledThreadPoolExecutor timer = new ScheduledThreadPoolExecutor(1, Transport::daemon);
  private final ManagedChannel channel;
  private final Set<Exchange<?, ?, ?>> live = ConcurrentHashMap.newKeySet();
  private double budget;
  private volatile boolean closed;

  Transport(String address, Options options) {
    boolean loopback = LOOPBACK.matcher(address).matches();
    if (options.token != null && options.tls == null && !loopback) {
      throw new IllegalArgumentException("token: without tls it is sent to loopback only");
    }
    this.options = options;
    this.budget = options.retryBudget;
    timer.setRemoveOnCancelPolicy(true);
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
      TlsChannelCredentials.Builder credentials = TlsChannelCredentials.newBuilder();
      if (tls.ca() != null) {
        credentials.trustManager(stream(tls.ca()));
      }
      if (tls.certificate() != null) {
        credentials.keyManager(stream(tls.certificate()), stream(tls.key()));
      }
      ManagedChannelBuilder<?> builder = Grpc.newChannelBuilder(address, credentials.build());
      return tls.serverName() == null ? builder : builder.overrideAuthority(tls.serverName());
    } catch (IOException | RuntimeException unreadable) {
      throw new IllegalArgumentException("tls: certificates or key cannot be read", unreadable);
    }
  }

  private static InputStream stream(String pem) {
    return new ByteArrayInputStream(pem.getBytes(StandardCharsets.US_ASCII));
  }

  private static Thread daemon(Runnable work) {
    Thread thread = new Thread(work, "lowbit-retries");
    thread.setDaemon(true);
    return thread;
  }

  /** Makes a call with one answer; {@code timeout} bounds all tries together. */
  <Q extends Message, R> R call(
      MethodDescriptor<Q, R> method, Q request, Duration timeout, boolean repeatable) {
    var exchange =
        new Exchange<Q, R, R>(this, method, request, timeout, repeatable, null, Function.identity());
    R answer = exchange.take();
    exchange.take(); // the status comes behind the answer
    return answer;
  }

  /** Starts a stream; {@code resume} makes the request that goes on after the last message. */
  <Q extends Message, R, T> Exchange<Q, R, T> open(
      MethodDescriptor<Q, R> method,
      Q request,
      Duration timeout,
      BiFunction<Q, R, Q> resume,
      Function<R, T> convert) {
    return new Exchange<>(this, method, request, timeout, true, resume, convert);
  }

  <Q, R> ClientCall<Q, R> newCall(MethodDescriptor<Q, R> method, Deadline deadline) {
    if (channel.getState(false) == ConnectivityState.TRANSIENT_FAILURE) {
      channel.enterIdle(); // connects at once; gRPC's own waits are longer than ours
    }
    return channel.newCall(method, CallOptions.DEFAULT.withDeadline(deadline));
  }

  Metadata headers() {
    Metadata headers = new Metadata();
    if (options.token != null) {
      put(headers, "authorization", "Bearer " + options.token);
    }
    String traceparent = options.traceparent.get();
    if (traceparent != null) {
      put(headers, "traceparent", traceparent);
    }
    return headers;
  }

  private static void put(Metadata headers, String name, String value) {
    headers.put(Metadata.Key.of(name, Metadata.ASCII_STRING_MARSHALLER), value);
  }

  /** Notes a call that runs, so that closing the client ends it. */
  void add(Exchange<?, ?, ?> exchange) {
    live.add(exchange);
    if (closed) {
      exchange.cancel();
    }
  }

  void remove(Exchange<?, ?, ?> exchange) {
    live.remove(exchange);
  }

  /** Takes one retry from the budget; returns whether there was one. */
  synchronized boolean spend() {
    if (budget < 1) {
      return false;
    }
    budget--;
    return true;
  }

  /** Gives back a tenth of a retry after a success. */
  synchronized void refund() {
    budget = Math.min(options.retryBudget, budget + 0.1);
  }

  @Override
  public void close() {
    closed = true;
    live.forEach(Exchange::cancel);
    timer.shutdownNow();
    channel.shutdownNow();
    try {
      channel.awaitTermination(5, TimeUnit.SECONDS);
    } catch (InterruptedException interrupted) {
      Thread.currentThread().interrupt();
    }
  }
}
