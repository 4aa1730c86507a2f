package io.lowbit;

import io.lowbit.v1.*;
import java.util.Collections;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.concurrent.ConcurrentSkipListMap;

/** A generation: chunks of text, and what the server said about them so far. */
public final class GenerateStream extends MessageStream<Chunk> {
  private final State state;

  /** What has been read; apart from the stream, so that a dropped stream can be found. */
  static final class State {
    private final Map<Integer, StringBuffer> texts = new ConcurrentSkipListMap<>();
    private final Map<Integer, OutputFinished> finished = new ConcurrentSkipListMap<>();
    private volatile Started started;
    private volatile Completed completed;

    /** Returns the chunk of a message; null when it has none. */
    Chunk read(GenerateResponse message) {
      switch (message.getEventCase()) {
        case STARTED -> started = message.getStarted();
        case OUTPUT_FINISHED -> {
          OutputFinished ended = message.getOutputFinished();
          text(ended.getOutputIndex());
          finished.put(ended.getOutputIndex(), ended);
        }
        case COMPLETED -> completed = message.getCompleted();
        case DELTA -> {
          Delta delta = message.getDelta();
          text(delta.getOutputIndex()).append(delta.getText());
          var ids = delta.getTokensList().stream().map(Token::getId).toList();
          return new Chunk(delta.getText(), ids, delta.getTokensList(), delta.getOutputIndex());
        }
        default -> { /* an event of a newer server */ }
      }
      return null;
    }

    private StringBuffer text(int index) {
      return texts.computeIfAbsent(index, unused -> new StringBuffer());
    }
  }

  GenerateStream(Exchange<?, ?, Chunk> exchange, State state) {
    super(exchange);
    this.state = state;
  }

  /** {@return model revision, device and prompt tokens; there with the first chunk} */
  public Optional<Started> started() {
    return Optional.ofNullable(state.started);
  }

  /** {@return why output 0 ended, and at which stop} */
  public Optional<OutputFinished> finished() {
    return Optional.ofNullable(state.finished.get(0));
  }

  /** {@return why each output ended, by its index; those that have} */
  public Map<Integer, OutputFinished> allFinished() {
    return Collections.unmodifiableMap(state.finished);
  }

  /** {@return tokens used and times; there when the stream has ended well} */
  public Optional<Completed> completed() {
    return Optional.ofNullable(state.completed);
  }

  /** {@return the text of output 0 that has been read so far, also after a failure} */
  public String partialText() {
    return state.text(0).toString();
  }

  /** {@return the whole text of output 0, read to the end} */
  public String text() {
    forEachRemaining(chunk -> {});
    return partialText();
  }

  /** {@return the texts of all outputs, by their index, read to the end} */
  public List<String> texts() {
    forEachRemaining(chunk -> {});
    return state.texts.values().stream().map(StringBuffer::toString).toList();
  }
}
