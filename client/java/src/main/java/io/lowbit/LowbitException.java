package io.lowbit;

import io.grpc.Status;
import io.lowbit.status.v1.BadRequest.FieldViolation;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.Optional;

/**
 * A call or a job failed. {@link Errors} has the classes that derive from it. The message is the
 * server's and never holds text of prompts or outputs.
 */
public class LowbitException extends RuntimeException {
  private static final long serialVersionUID = 1;

  final transient Failure failure;

  LowbitException(Failure failure) {
    super(Objects.requireNonNullElse(failure.status.getDescription(), "no message"), failure.cause);
    this.failure = failure;
  }

  /** {@return the gRPC status code} */
  public Status.Code code() {
    return failure.status.getCode();
  }

  /** {@return the name of the server's ErrorReason without its prefix; empty where it gave none} */
  public String reason() {
    return failure.info.getReason();
  }

  /** {@return values that belong to the reason, such as needed and free bytes} */
  public Map<String, String> metadata() {
    return failure.info.getMetadataMap();
  }

  /** {@return every bad field of the request} */
  public List<FieldViolation> violations() {
    return failure.violations;
  }

  /** {@return how long to wait before the next try; nothing where the server named none} */
  public Optional<Duration> retryAfter() {
    return Optional.ofNullable(failure.retryAfter);
  }

  /** {@return the name of the request in the server's log; empty where it is not known} */
  public String requestId() {
    return failure.requestId;
  }

  /** Returns one line: class, reason, message and violations. */
  @Override
  public String toString() {
    String reason = reason().isEmpty() ? code().name() : reason();
    String line = getClass().getSimpleName() + ": " + reason + ": " + getMessage();
    for (FieldViolation violation : violations()) {
      String told = violation.getField() + ": " + violation.getDescription();
      line += getMessage().contains(told) ? "" : " (" + told + ")";
    }
    return line.strip().replaceAll("\\s+", " ");
  }
}
