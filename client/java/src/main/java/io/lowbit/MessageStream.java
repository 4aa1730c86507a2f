package io.lowbit;

import java.lang.ref.Cleaner;
import java.lang.ref.Reference;
import java.util.Iterator;
import java.util.NoSuchElementException;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.Flow;
import java.util.concurrent.ForkJoinPool;
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
    exchange.ready = () -> feed.run(0);
    feed.run(0);
  }

  /** Hands items on, one run after another, as far as the subscriber asks for them. */
  private final class Feed implements Flow.Subscription {
    private final Flow.Subscriber<? super T> subscriber;
    private CompletableFuture<Void> runs = CompletableFuture.completedFuture(null);
    private long demand;
    private volatile boolean stopped;

    Feed(Flow.Subscriber<? super T> subscriber) {
      this.subscriber = subscriber;
    }

    @Override
    public void request(long items) {
      run(items < 1 ? -1 : items);
    }

    @Override
    public void cancel() {
      stopped = true;
      close();
    }

    synchronized void run(long more) {
      runs = runs.thenRunAsync(() -> feed(more), ForkJoinPool.commonPool());
    }

    private void feed(long more) {
      try {
        if (more < 0 && !stopped) {
          throw new IllegalArgumentException("request: at least 1");
        }
        demand = demand + more < 0 ? Long.MAX_VALUE : demand + more;
        while (!stopped) {
          ahead = ahead == null ? exchange.poll() : ahead;
          if (ahead == null && exchange.drained) {
            stopped = true;
            subscriber.onComplete();
          }
          if (ahead == null || demand == 0) {
            return;
          }
          demand--;
          subscriber.onNext(next());
        }
      } catch (RuntimeException failed) {
        cancel();
        subscriber.onError(failed);
      }
    }
  }
}
