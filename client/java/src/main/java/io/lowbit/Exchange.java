package io.lowbit;

import com.google.protobuf.Message;
import io.grpc.ClientCall;
import io.grpc.Deadline;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import java.net.ConnectException;
import java.net.UnknownHostException;
import java.time.Duration;
import java.util.ArrayDeque;
import java.util.Queue;
import java.util.concurrent.Future;
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
  private final MethodDescriptor<Q, R> method;
  private final Deadline deadline;
  private final boolean repeatable;
  private final BiFunction<Q, R, Q> resume;
  private final Function<R, T> convert;
  private final Queue<R> messages = new ArrayDeque<>(WINDOW);
  private Q request;
  private ClientCall<Q, R> call;
  private Future<?> next;
  private int tries = 1;
  private R last;
  private Deadline resumeBy;
  private boolean ended;
  private boolean drained;
  private LowbitException failure;
  private Runnable ready = () -> {};

  Exchange(
      Transport transport,
      MethodDescriptor<Q, R> method,
      Q request,
      Duration timeout,
      boolean repeatable,
      BiFunction<Q, R, Q> resume,
      Function<R, T> convert) {
    this.transport = transport;
    this.method = method;
    this.request = request;
    this.deadline = timeout == null ? null : after(timeout);
    this.repeatable = repeatable;
    this.resume = resume;
    this.convert = convert;
    transport.add(this);
    start();
  }

  private static Deadline after(Duration time) {
    return Deadline.after(time.toNanos(), TimeUnit.NANOSECONDS);
  }

  private synchronized void start() {
    if (ended) {
      return;
    }
    int size = request.getSerializedSize();
    if (size > transport.options.maxMessageBytes) { // gRPC's own check can leave a call hanging
      String told = "the request has " + size + " bytes, more than maxMessageBytes";
      end(failed(Status.RESOURCE_EXHAUSTED.withDescription(told)));
      return;
    }
    try {
      call = transport.newCall(method, deadline);
      call.start(this, transport.headers());
      call.request(WINDOW - messages.size());
      call.sendMessage(request);
      call.halfClose();
    } catch (RuntimeException broken) { // such as a traceparent function that throws
      end(failed(Status.UNKNOWN.withDescription("not sent").withCause(broken)));
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
    Duration wait = failed == null ? null : last == null ? retry(failed) : resume(failed);
    if (wait == null) {
      end(failed);
    } else {
      next = transport.timer.schedule(this::start, wait.toNanos(), TimeUnit.NANOSECONDS);
    }
  }

  private LowbitException failed(Status status) {
    return failed(status, new Metadata());
  }

  private LowbitException failed(Status status, Metadata trailers) {
    return Errors.of(new Failure(status, trailers, request));
  }

  private void end(LowbitException failed) {
    ended = true;
    failure = failed;
    transport.remove(this);
    wake();
  }

  private void wake() {
    notifyAll();
    ready.run();
  }

  /** Returns the wait before another try of a call without a message; null for none. */
  private Duration retry(LowbitException failed) {
    boolean unavailable = failed.code() == Status.Code.UNAVAILABLE;
    boolean safe =
        failed.retryAfter().isPresent() || unavailable && (repeatable || unconnected(failed));
    Duration wait = wait(failed, tries);
    if (!safe || tries >= transport.options.maxAttempts || late(wait, deadline) || !transport.spend()) {
      return null;
    }
    tries++;
    return wait;
  }

  /** Returns the wait before a stream that broke goes on; null when it does not. */
  private Duration resume(LowbitException failed) {
    boolean broke =
        failed.code() == Status.Code.UNAVAILABLE
            && (failed.reason().isEmpty() || failed.reason().equals("SHUTTING_DOWN"));
    boolean refused = resumeBy != null && failed.retryAfter().isPresent();
    if (resume == null || !(broke || refused)) {
      return null;
    }
    if (resumeBy == null) {
      resumeBy = after(transport.options.resumeTimeout);
      request = resume.apply(request, last);
      tries = 0;
    }
    Duration wait = wait(failed, ++tries);
    return late(wait, deadline) || late(wait, resumeBy) ? null : wait;
  }

  private static boolean late(Duration wait, Deadline deadline) {
    return deadline != null && deadline.timeRemaining(TimeUnit.NANOSECONDS) <= wait.toNanos();
  }

  private Duration wait(LowbitException failed, int tries) {
    ThreadLocalRandom random = ThreadLocalRandom.current();
    if (failed.retryAfter().isPresent()) { // later, never earlier, and not all clients at once
      return times(failed.retryAfter().get(), random.nextDouble(1.0, 1.1));
    }
    Options options = transport.options;
    Duration bound = times(options.firstBackoff, Math.scalb(1.0, Math.min(tries - 1, 30)));
    bound = bound.compareTo(options.maxBackoff) < 0 ? bound : options.maxBackoff;
    return times(bound, random.nextDouble(0.5, 1.0));
  }

  private static Duration times(Duration time, double factor) {
    return Duration.ofNanos((long) (time.toNanos() * factor));
  }

  private static boolean unconnected(Throwable failed) {
    return failed != null
        && (failed instanceof ConnectException
            || failed instanceof UnknownHostException
            || unconnected(failed.getCause()));
  }

  /** Waits for the next item; returns null at the end. Interrupting the thread cancels the call. */
  synchronized T take() {
    while (true) {
      T item = poll();
      if (item != null || drained) {
        return item;
      }
      try {
        wait();
      } catch (InterruptedException interrupted) {
        Thread.currentThread().interrupt();
        cancel();
      }
    }
  }

  /** Returns the next item if there is one; null also at the end, when {@code drained} is true. */
  synchronized T poll() {
    while (!messages.isEmpty()) {
      R message = messages.remove();
      call.request(1);
      T item = convert.apply(message);
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

  synchronized boolean drained() {
    return drained;
  }

  /** Calls back whenever there may be something to poll; the callback must not wait. */
  synchronized void onReady(Runnable callback) {
    ready = callback;
  }

  /** Cancels the call and drops what was not read; does nothing after the end. */
  synchronized void cancel() {
    if (drained) {
      return;
    }
    messages.clear();
    end(failed(Status.CANCELLED.withDescription("the call was cancelled by its caller")));
    if (next != null) {
      next.cancel(false);
    }
    if (call != null) {
      call.cancel("cancelled by the caller", null);
    }
  }
}
