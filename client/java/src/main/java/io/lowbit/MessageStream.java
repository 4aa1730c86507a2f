package io.lowbit;

import java.lang.ref.Cleaner;
import java.lang.ref.Reference;
import java.util.Iterator;
import java.util.NoSuchElementException;
import java.util.concurrent.Flow;
import java.util.concurrent.ForkJoinPool;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicLong;
import java.util.stream.Stream;
import java.util.stream.StreamSupport;

/**
 * A running call that gives items as they arrive. It is read once, by one of: a {@code for} loop or
 * iterator, which wait; {@link #stream}; a subscriber. Reading throws {@link LowbitException} when the
 * call failed. The call is cancelled on the server by {@link #close}, by an interrupt of the thread
 * that waits, by the subscriber, and when nobody holds the stream any more.
 *
 * @param <T> what it gives
 */
public class MessageStream<T>
    implements Iterable<T>, Iterator<T>, AutoCloseable, Flow.Publisher<T> {
  private static final Cleaner CLEANER = Cleaner.create();

  private final Exchange<?, ?, T> exchange;
  private T ahead;

  MessageStream(Exchange<?, ?, T> exchange) {
    this.exchange = exchange;
    CLEANER.register(this, exchange::cancel);
  }

  /** Waits for the next item; false at the end. */
  @Override
  public boolean hasNext() {
    try {
      if (ahead == null) {
        ahead = exchange.take();
      }
      return ahead != null;
    } finally {
      Reference.reachabilityFence(this); // the cleaner must not end a stream that is being read
    }
  }

  /** Waits for the next item and returns it. */
  @Override
  public T next() {
    if (!hasNext()) {
      throw new NoSuchElementException();
    }
    T item = ahead;
    ahead = null;
    return item;
  }

  /** Returns the stream itself. */
  @Override
  public Iterator<T> iterator() {
    return this;
  }

  /** {@return the items as a sequential stream; closing it closes this} */
  public Stream<T> stream() {
    return StreamSupport.stream(spliterator(), false).onClose(this::close);
  }

  /** Does what {@link #close} does; from any thread. */
  public void cancel() {
    close();
  }

  /** Cancels the call if it still runs; reading on then throws CancelledException once. */
  @Override
  public void close() {
    exchange.cancel();
  }

  /** Gives all items to the one subscriber, in threads of the common pool. */
  @Override
  public void subscribe(Flow.Subscriber<? super T> subscriber) {
    Feed feed = new Feed(subscriber);
    subscriber.onSubscribe(feed);
    exchange.onReady(feed::signal);
    feed.signal();
  }

  /** Hands items on, one thread at a time, as far as the subscriber asks for them. */
  private final class Feed implements Flow.Subscription, Runnable {
    private final Flow.Subscriber<? super T> subscriber;
    private final AtomicLong demand = new AtomicLong();
    private final AtomicInteger signals = new AtomicInteger();
    private volatile boolean stopped;

    Feed(Flow.Subscriber<? super T> subscriber) {
      this.subscriber = subscriber;
    }

    @Override
    public void request(long items) {
      if (items < 1) {
        stop(new IllegalArgumentException("request: at least 1"));
      } else {
        demand.accumulateAndGet(items, (a, b) -> a + b < 0 ? Long.MAX_VALUE : a + b);
        signal();
      }
    }

    @Override
    public void cancel() {
      stopped = true;
      close();
    }

    void signal() {
      if (signals.getAndIncrement() == 0) {
        ForkJoinPool.commonPool().execute(this);
      }
    }

    @Override
    public void run() {
      int seen = signals.get();
      do {
        try {
          feed();
        } catch (RuntimeException failed) {
          stop(failed);
        }
        seen = signals.addAndGet(-seen);
      } while (seen != 0);
    }

    private void feed() {
      while (!stopped) {
        if (ahead == null) {
          ahead = exchange.poll();
        }
        if (ahead == null && exchange.drained()) {
          stopped = true;
          subscriber.onComplete();
        }
        if (ahead == null || demand.get() == 0) {
          return;
        }
        demand.updateAndGet(left -> left == Long.MAX_VALUE ? left : left - 1);
        subscriber.onNext(next());
      }
    }

    private void stop(RuntimeException failed) {
      cancel();
      subscriber.onError(failed);
    }
  }
}
