package io.lowbit;

import io.lowbit.v1.LoadResponse;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/** Progress of a load. The load is cancelled when its last reader leaves before the end. */
public final class LoadStream extends MessageStream<LoadResponse> {
  LoadStream(Exchange<?, ?, LoadResponse> exchange) {
    super(exchange);
  }

  /** {@return the last message of each replica, once all are live} */
  public List<LoadResponse> await() {
    Map<List<String>, LoadResponse> last = new LinkedHashMap<>();
    forEachRemaining(step -> last.put(List.of(step.getDevice(), step.getWorker()), step));
    return List.copyOf(last.values());
  }
}
