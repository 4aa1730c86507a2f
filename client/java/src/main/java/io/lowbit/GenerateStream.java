package io.lowbit;

import io.lowbit.v1.Completed;
import io.lowbit.v1.Delta;
import io.lowbit.v1.GenerateResponse;
import io.lowbit.v1.OutputFinished;
import io.lowbit.v1.Started;
import io.lowbit.v1.Token;
import java.util.Optional;

/** A generation: chunks of text, and what the server said about them so far. */
public final class GenerateStream extends MessageStream<Chunk> {
  private final State state;

  /** What has been read; apart from the stream, so that a dropped stream can be found. */
  static final class State {
    private final StringBuffer text = new StringBuffer();
    private volatile Started started;
    private volatile OutputFinished finished;
    private volatile Completed completed;

    /** Returns the chunk of a message; null when it has none. */
    Chunk read(GenerateResponse message) {
      switch (message.getEventCase()) {
        case STARTED -> started = message.getStarted();
        case OUTPUT_FINISHED -> finished = message.getOutputFinished();
        case COMPLETED -> completed = message.getCompleted();
        case DELTA -> {
          Delta delta = message.getDelta();
          if (delta.getOutputIndex() == 0) {
            text.append(delta.getText());
          }
          var ids = delta.getTokensList().stream().map(Token::getId).toList();
          return new Chunk(delta.getText(), ids, delta.getTokensList(), delta.getOutputIndex());
        }
        default -> { /* an event of a newer server */ }
      }
      return null;
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

  /** {@return why the output that ended last did, and at which stop} */
  public Optional<OutputFinished> finished() {
    return Optional.ofNullable(state.finished);
  }

  /** {@return tokens used and times; there when the stream has ended well} */
  public Optional<Completed> completed() {
    return Optional.ofNullable(state.completed);
  }

  /** {@return the text of output 0 that has been read so far, also after a failure} */
  public String partialText() {
    return state.text.toString();
  }

  /** {@return the whole text of output 0, read to the end} */
  public String text() {
    forEachRemaining(chunk -> {});
    return partialText();
  }
}
