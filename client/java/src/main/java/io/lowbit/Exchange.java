package io.lowbit;

import com.google.protobuf.Message;
import io.grpc.*;
import java.net.ConnectException;
import java.net.UnknownHostException;
import java.time.Duration;
import java.util.ArrayDeque;
import java.util.Queue;
import java.util.Set;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;
import java.util.function.BiFunction;
import java.util.function.Function;

/**
 * One call with all its tries. gRPC fills its queue, a reader empties it.
 *
 * @param <Q> the request
 * @param <R> a message of the answer
 * @param <T> what the reader gets for it
 */
final class Exchange<Q extends Message, R, T> extends ClientCall.Listener<R> {
  // Hides the way between the threads; more would only be lost when a reader leaves.
  private static final int WINDOW = 16;

  private final Transport transport;
  private final MethodDescriptor<Q, R> rpc;
  private final Deadline deadline;
  private final boolean again;
  private final BiFunction<Q, R, Q> resume;
  private final Function<R, T> convert;
  private final Queue<R> messages = new ArrayDeque<>(WINDOW);
  private final Context.CancellationListener closing = client -> cancel();
  private Q request;
  private ClientCall<Q, R> call;
  private CompletableFuture<Void> pause = new CompletableFuture<>();
  private int failures; // since the last message
  private R last;
  private Deadline resumeBy;
  private LowbitException failure;
  private boolean ended;

  /** Whether the reader has had everything. */
  volatile boolean drained;

  /** Is called whenever there may be something to poll; must not wait. */
  volatile Runnable ready = () -> {};

  /**
   * Starts a call.
   *
   * @param timeout for all tries together; null for none
   * @param again whether a second try has the effect of one
   * @param resume makes the request that goes on after the last message; null where nothing does
   * @param convert makes what the reader gets of a message; may return null
   */
  Exchange(
      Transport transport,
      MethodDescriptor<Q, R> rpc,
      Q request,
      Duration timeout,
      boolean again,
      BiFunction<Q, R, Q> resume,
      Function<R, T> convert) {
    this.transport = transport;
    this.rpc = rpc;
    this.request = request;
    this.deadline = timeout == null ? null : in(timeout);
    this.again = again;
    this.resume = resume;
    this.convert = convert;
    transport.life.addListener(closing, Runnable::run);
    start();
  }

  private static Deadline in(Duration time) {
    return Deadline.after(time.toNanos(), TimeUnit.NANOSECONDS);
  }

  private synchronized void start() {
    if (ended) {
      return;
    }
    int size = request.getSerializedSize();
    if (size > transport.options.maxMessageBytes) { // gRPC's own check can leave a call hanging
      String told = "the request has " + size + " bytes, more than maxMessageBytes";
      end(failed(Status.RESOURCE_EXHAUSTED.withDescription(told), new Metadata()));
      return;
    }
    try {
      call = transport.newCall(rpc, deadline);
      call.start(this, transport.headers());
      call.request(WINDOW - messages.size());
      call.sendMessage(request);
      call.halfClose();
    } catch (RuntimeException broken) { // such as a traceparent function that throws
      Status status = Status.UNKNOWN.withDescription("not sent").withCause(broken);
      end(failed(status, new Metadata()));
    }
  }

  @Override
  public synchronized void onMessage(R message) {
    if (ended) {
      return;
    }
    if (last == null) {
      transport.refund();
    }
    last = message;
    failures = 0;
    resumeBy = null;
    messages.add(message);
    wake();
  }

  @Override
  public synchronized void onClose(Status status, Metadata trailers) {
    if (ended) {
      return;
    }
    LowbitException failed = status.isOk() ? null : failed(status, trailers);
    Duration wait = failed == null ? null : next(failed);
    if (wait == null) {
      end(failed);
    } else {
      pause = new CompletableFuture<>();
      pause.thenRun(this::start); // in the JDK's timer, since it does not wait for anything
      pause.completeOnTimeout(null, wait.toNanos(), TimeUnit.NANOSECONDS);
    }
  }

  private LowbitException failed(Status status, Metadata trailers) {
    return Errors.of(new Failure(status, trailers, request));
  }

  private void end(LowbitException failed) {
    ended = true;
    failure = failed;
    transport.life.removeListener(closing);
    wake();
  }

  private void wake() {
    notifyAll();
    ready.run();
  }

  /** Returns the wait before the next try; null when there is to be none. */
  private Duration next(LowbitException failed) {
    boolean told = failed.retryAfter().isPresent();
    boolean unavailable = failed.code() == Status.Code.UNAVAILABLE;
    failures++;
    Duration wait = backoff(failed);
    if (last == null) {
      boolean safe = told || unavailable && (again || unconnected(failed));
      boolean left = failures < transport.options.maxAttempts && before(deadline, wait);
      return safe && left && transport.spend() ? wait : null;
    }
    boolean broke = unavailable && Set.of("", "SHUTTING_DOWN").contains(failed.reason());
    if (resume == null || !broke && !(told && resumeBy != null)) {
      return null;
    }
    if (resumeBy == null) {
      resumeBy = in(transport.options.resumeTimeout);
      request = resume.apply(request, last);
    }
    return before(deadline, wait) && before(resumeBy, wait) ? wait : null;
  }

  private static boolean before(Deadline limit, Duration wait) {
    return limit == null || in(wait).isBefore(limit);
  }

  private Duration backoff(LowbitException failed) {
    var random = ThreadLocalRandom.current();
    double doubled = Math.scalb((double) transport.options.firstBackoff.toNanos(), failures - 1);
    double own = Math.min(doubled, transport.options.maxBackoff.toNanos());
    double nanos =
        failed
            .retryAfter() // later, never earlier, and not all clients at once
            .map(told -> told.toNanos() * random.nextDouble(1.0, 1.1))
            .orElse(own * random.nextDouble(0.5, 1.0));
    return Duration.ofNanos((long) nanos);
  }

  private static boolean unconnected(Throwable failed) {
    return failed instanceof ConnectException
        || failed instanceof UnknownHostException
        || failed != null && unconnected(failed.getCause());
  }

  /** Waits for the next item; returns null at the end. Interrupting the thread cancels the call. */
  synchronized T take() {
    T item = poll();
    while (item == null && !drained) {
      try {
        wait();
      } catch (InterruptedException interrupted) {
        Thread.currentThread().interrupt();
        cancel();
      }
      item = poll();
    }
    return item;
  }

  /** Returns the next item if there is one; null also at the end, when {@code drained} is true. */
  synchronized T poll() {
    while (!messages.isEmpty()) {
      call.request(1);
      T item = convert.apply(messages.remove());
      if (item != null) {
        return item;
      }
    }
    drained = ended;
    if (drained && failure != null) {
      LowbitException failed = failure;
      failure = null;
      failed.fillInStackTrace(); // where it was read, not a thread of gRPC
      throw failed;
    }
    return null;
  }

  /** Cancels the call and drops what was not read; does nothing after the end. */
  synchronized void cancel() {
    if (drained) {
      return;
    }
    messages.clear();
    Status status = Status.CANCELLED.withDescription("the call was cancelled by its caller");
    end(failed(status, new Metadata()));
    pause.cancel(false);
    if (call != null) {
      call.cancel(status.getDescription(), null);
    }
  }
}
