package io.lowbit;

import io.grpc.Status;
import io.lowbit.status.v1.BadRequest.FieldViolation;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.stream.Collectors;

/**
 * A call or a job failed. {@link Errors} has the classes that derive from it. The message is the
 * server's and never holds text of prompts or outputs.
 */
public class LowbitException extends RuntimeException {
  private static final long serialVersionUID = 1;

  /** What is known about a failure. */
  record Failure(
      String message,
      Status.Code code,
      String reason,
      Map<String, String> metadata,
      List<FieldViolation> violations,
      Duration retryAfter,
      String requestId,
      Throwable cause) {}

  private final transient Failure failure;

  LowbitException(Failure failure) {
    super(failure.message(), failure.cause());
    this.failure = failure;
  }

  /** {@return the gRPC status code} */
  public Status.Code code() {
    return failure.code();
  }

  /** {@return the name of the server's ErrorReason without its prefix; empty where it gave none} */
  public String reason() {
    return failure.reason();
  }

  /** {@return values that belong to the reason, such as needed and free bytes} */
  public Map<String, String> metadata() {
    return failure.metadata();
  }

  /** {@return every bad field of the request} */
  public List<FieldViolation> violations() {
    return failure.violations();
  }

  /** {@return how long to wait before the next try; nothing where the server named none} */
  public Optional<Duration> retryAfter() {
    return Optional.ofNullable(failure.retryAfter());
  }

  /** {@return the name of the request in the server's log; empty where it is not known} */
  public String requestId() {
    return failure.requestId();
  }

  /** Returns one line: class, reason, message and violations. */
  @Override
  public String toString() {
    String untold =
        violations().stream()
            .map(violation -> violation.getField() + ": " + violation.getDescription())
            .filter(text -> !getMessage().contains(text))
            .collect(Collectors.joining("; "));
    String line =
        getClass().getSimpleName()
            + ": "
            + (reason().isEmpty() ? code().name() : reason())
            + ": "
            + getMessage()
            + (untold.isEmpty() ? "" : " (" + untold + ")");
    return String.join(" ", line.strip().split("\\s+"));
  }
}
