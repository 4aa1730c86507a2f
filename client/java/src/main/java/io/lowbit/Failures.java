package io.lowbit;

import static java.util.Map.entry;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Message;
import com.google.protobuf.Parser;
import io.grpc.Metadata;
import io.grpc.Status;
import io.lowbit.Errors.*;
import io.lowbit.LowbitException.Failure;
import io.lowbit.status.v1.BadRequest;
import io.lowbit.status.v1.ErrorInfo;
import io.lowbit.status.v1.RetryInfo;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.function.Function;

/** Turns how a call ended into the exception to throw. */
final class Failures {
  private static final Metadata.Key<byte[]> DETAILS =
      Metadata.Key.of("grpc-status-details-bin", Metadata.BINARY_BYTE_MARSHALLER);

  private static final Map<String, Function<Failure, LowbitException>> BY_REASON =
      Map.ofEntries(
          entry("CONTEXT_LENGTH_EXCEEDED", ContextLengthException::new),
          entry("MODEL_NOT_FOUND", ModelNotFoundException::new),
          entry("JOB_NOT_FOUND", JobNotFoundException::new),
          entry("MODEL_NOT_LOADED", ModelNotLoadedException::new),
          entry("MODEL_LOADING", ModelLoadingException::new),
          entry("MODEL_IN_USE", ModelInUseException::new),
          entry("LOAD_FAILED", LoadFailedException::new),
          entry("CHECKPOINT_MISMATCH", CheckpointMismatchException::new),
          entry("JOB_NOT_RESUMABLE", JobNotResumableException::new),
          entry("QUEUE_FULL", QueueFullException::new),
          entry("CLIENT_STALLED", ClientStalledException::new),
          entry("INSUFFICIENT_DEVICE_MEMORY", InsufficientMemoryException::new),
          entry("SCHEME_UNAVAILABLE", SchemeUnavailableException::new),
          entry("QUALITY_GATE_FAILED", QualityGateException::new),
          entry("WORKER_LOST", WorkerLostException::new),
          entry("SOURCE_UNSUPPORTED", SourceRejectedException::new),
          entry("SOURCE_CORRUPT", SourceRejectedException::new));

  private static final Map<Status.Code, Function<Failure, LowbitException>> BY_CODE =
      Map.ofEntries(
          entry(Status.Code.INVALID_ARGUMENT, InvalidArgumentException::new),
          entry(Status.Code.OUT_OF_RANGE, InvalidArgumentException::new),
          entry(Status.Code.NOT_FOUND, NotFoundException::new),
          entry(Status.Code.ALREADY_EXISTS, AlreadyExistsException::new),
          entry(Status.Code.PERMISSION_DENIED, PermissionDeniedException::new),
          entry(Status.Code.UNAUTHENTICATED, UnauthenticatedException::new),
          entry(Status.Code.FAILED_PRECONDITION, FailedPreconditionException::new),
          entry(Status.Code.RESOURCE_EXHAUSTED, ResourceExhaustedException::new),
          entry(Status.Code.UNAVAILABLE, UnavailableException::new),
          entry(Status.Code.CANCELLED, CancelledException::new),
          entry(Status.Code.DEADLINE_EXCEEDED, DeadlineExceededException::new),
          entry(Status.Code.UNIMPLEMENTED, NotImplementedByServerException::new),
          entry(Status.Code.DATA_LOSS, DataLossException::new),
          entry(Status.Code.INTERNAL, InternalException::new));

  private Failures() {}

  /** Returns the exception for how a call ended; {@code request} may have an id. */
  static LowbitException from(Status status, Metadata trailers, Message request) {
    List<Any> details = details(trailers);
    ErrorInfo info = find(details, "ErrorInfo", ErrorInfo.parser()).orElse(ErrorInfo.getDefaultInstance());
    Duration retryAfter =
        find(details, "RetryInfo", RetryInfo.parser())
            .map(RetryInfo::getRetryDelay)
            .map(delay -> Duration.ofSeconds(delay.getSeconds(), delay.getNanos()))
            .orElse(null);
    String requestId = requestId(request);
    return make(
        new Failure(
            Optional.ofNullable(status.getDescription()).orElse("no message"),
            status.getCode(),
            info.getReason(),
            info.getMetadataMap(),
            find(details, "BadRequest", BadRequest.parser())
                .map(BadRequest::getFieldViolationsList)
                .orElse(List.of()),
            retryAfter,
            requestId.isEmpty() ? info.getMetadataOrDefault("request_id", "") : requestId,
            status.asRuntimeException(trailers)));
  }

  /** Returns the exception for a stream that its reader has cancelled. */
  static LowbitException cancelled(Message request) {
    Status status = Status.CANCELLED.withDescription("the call was cancelled by its caller");
    return from(status, null, request);
  }

  private static LowbitException make(Failure failure) {
    Function<Failure, LowbitException> byCode =
        BY_CODE.getOrDefault(failure.code(), LowbitException::new);
    return BY_REASON.getOrDefault(failure.reason(), byCode).apply(failure);
  }

  private static String requestId(Message request) {
    var field = request.getDescriptorForType().findFieldByName("request_id");
    return field == null ? "" : (String) request.getField(field);
  }

  private static List<Any> details(Metadata trailers) {
    byte[] bytes = trailers == null ? null : trailers.get(DETAILS);
    try {
      return bytes == null ? List.of() : io.lowbit.status.v1.Status.parseFrom(bytes).getDetailsList();
    } catch (InvalidProtocolBufferException unreadable) {
      return List.of();
    }
  }

  private static <M> Optional<M> find(List<Any> details, String name, Parser<M> parser) {
    for (Any detail : details) {
      if (detail.getTypeUrl().endsWith("." + name)) {
        try {
          return Optional.of(parser.parseFrom(detail.getValue()));
        } catch (InvalidProtocolBufferException unreadable) {
          return Optional.empty();
        }
      }
    }
    return Optional.empty();
  }
}
