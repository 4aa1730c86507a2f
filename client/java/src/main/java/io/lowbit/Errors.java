package io.lowbit;

import io.grpc.Status;
import io.lowbit.LowbitException.Failure;
import io.lowbit.v1.ErrorReason;
import io.lowbit.v1.Job;
import java.util.List;
import java.util.Locale;
import java.util.Map;

/** The classes of failures. The server's reason chooses one; for other reasons its code does. */
@SuppressWarnings("serial") // none has state of its own that is worth sending
public final class Errors {
  private Errors() {}

  /** The request is wrong and stays wrong however often it is sent. */
  public static class InvalidArgumentException extends LowbitException {
    InvalidArgumentException(Failure failure) { super(failure); }
  }

  /** The prompt has more tokens than the model's context. */
  public static class ContextLengthException extends InvalidArgumentException {
    ContextLengthException(Failure failure) { super(failure); }
  }

  /** What was to be imported is unsafe, damaged or of an unknown format. */
  public static class SourceRejectedException extends InvalidArgumentException {
    SourceRejectedException(Failure failure) { super(failure); }
  }

  /** There is no such model, job, device or source. */
  public static class NotFoundException extends LowbitException {
    NotFoundException(Failure failure) { super(failure); }
  }

  /** No model or alias has this name. */
  public static class ModelNotFoundException extends NotFoundException {
    ModelNotFoundException(Failure failure) { super(failure); }
  }

  /** No job has this id. */
  public static class JobNotFoundException extends NotFoundException {
    JobNotFoundException(Failure failure) { super(failure); }
  }

  /** The name or the request id is taken. */
  public static class AlreadyExistsException extends LowbitException {
    AlreadyExistsException(Failure failure) { super(failure); }
  }

  /** The caller may not do this, or the path is outside the import roots. */
  public static class PermissionDeniedException extends LowbitException {
    PermissionDeniedException(Failure failure) { super(failure); }
  }

  /** The server does not know who calls. */
  public static class UnauthenticatedException extends LowbitException {
    UnauthenticatedException(Failure failure) { super(failure); }
  }

  /** The server's state does not allow this now. */
  public static class FailedPreconditionException extends LowbitException {
    FailedPreconditionException(Failure failure) { super(failure); }
  }

  /** The model is in the store but not loaded. */
  public static class ModelNotLoadedException extends FailedPreconditionException {
    ModelNotLoadedException(Failure failure) { super(failure); }
  }

  /** The model is loaded, or a job reads it. */
  public static class ModelInUseException extends FailedPreconditionException {
    ModelInUseException(Failure failure) { super(failure); }
  }

  /** A worker could not make the model live; the message says why. */
  public static class LoadFailedException extends FailedPreconditionException {
    LoadFailedException(Failure failure) { super(failure); }
  }

  /** A job's checkpoint was made from other inputs; the message names what differs. */
  public static class CheckpointMismatchException extends FailedPreconditionException {
    CheckpointMismatchException(Failure failure) { super(failure); }
  }

  /** The job has not ended, ended well or would fail again. */
  public static class JobNotResumableException extends FailedPreconditionException {
    JobNotResumableException(Failure failure) { super(failure); }
  }

  /** The scheme cannot be used on this server; the message says what to install. */
  public static class SchemeUnavailableException extends FailedPreconditionException {
    SchemeUnavailableException(Failure failure) { super(failure); }
  }

  /** Measured quality is outside the allowed values. */
  public static class QualityGateException extends FailedPreconditionException {
    QualityGateException(Failure failure) { super(failure); }
  }

  /** Memory, disk, a queue or a size limit is used up. */
  public static class ResourceExhaustedException extends LowbitException {
    ResourceExhaustedException(Failure failure) { super(failure); }
  }

  /** The admission queue is full; {@code retryAfter} says when to ask again. */
  public static class QueueFullException extends ResourceExhaustedException {
    QueueFullException(Failure failure) { super(failure); }
  }

  /** The stream was not read fast enough and was ended. */
  public static class ClientStalledException extends ResourceExhaustedException {
    ClientStalledException(Failure failure) { super(failure); }
  }

  /** The model does not fit; {@code metadata} has needed and free bytes per device. */
  public static class InsufficientMemoryException extends ResourceExhaustedException {
    InsufficientMemoryException(Failure failure) { super(failure); }
  }

  /** The server cannot be reached, or does not take calls now. */
  public static class UnavailableException extends LowbitException {
    UnavailableException(Failure failure) { super(failure); }
  }

  /** The model is being loaded; {@code retryAfter} says when to ask again. */
  public static class ModelLoadingException extends UnavailableException {
    ModelLoadingException(Failure failure) { super(failure); }
  }

  /** The worker process died. Text that arrived before stays on the stream. */
  public static class WorkerLostException extends LowbitException {
    WorkerLostException(Failure failure) { super(failure); }
  }

  /** The call was cancelled, here or on the server. */
  public static class CancelledException extends LowbitException {
    CancelledException(Failure failure) { super(failure); }
  }

  /** The call took longer than its timeout. */
  public static class DeadlineExceededException extends LowbitException {
    DeadlineExceededException(Failure failure) { super(failure); }
  }

  /** The API defines this; this server does not offer it. */
  public static class NotImplementedByServerException extends LowbitException {
    NotImplementedByServerException(Failure failure) { super(failure); }
  }

  /** Stored data is damaged: a file's digest differs from its manifest. */
  public static class DataLossException extends LowbitException {
    DataLossException(Failure failure) { super(failure); }
  }

  /** A fault of the server; its log has the cause under {@code requestId}. */
  public static class InternalException extends LowbitException {
    InternalException(Failure failure) { super(failure); }
  }

  /** A job that was waited for did not succeed. */
  public static class JobFailedException extends LowbitException {
    private final transient Job job;

    JobFailedException(Job job) {
      super(failure(job));
      this.job = job;
    }

    /** {@return the job in its last state} */
    public Job job() {
      return job;
    }

    private static Failure failure(Job job) {
      String state = job.getState().name().replace("JOB_STATE_", "");
      ErrorReason reason = job.getError().getReason();
      String told = job.getError().getMessage();
      return new Failure(
          "job " + job.getId() + " " + state.toLowerCase(Locale.ROOT) + (told.isEmpty() ? "" : ": " + told),
          Status.Code.ABORTED,
          reason == ErrorReason.ERROR_REASON_UNSPECIFIED
              ? state
              : reason.name().replace("ERROR_REASON_", ""),
          Map.of(),
          List.of(),
          null,
          job.getRequestId(),
          null);
    }
  }
}
