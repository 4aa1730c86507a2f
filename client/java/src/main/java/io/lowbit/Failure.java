package io.lowbit;

import com.google.protobuf.Any;
import com.google.protobuf.ByteString;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Message;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.protobuf.ProtoUtils;
import io.lowbit.status.v1.BadRequest;
import io.lowbit.status.v1.BadRequest.FieldViolation;
import io.lowbit.status.v1.ErrorInfo;
import io.lowbit.status.v1.RetryInfo;
import io.lowbit.v1.Job;
import java.time.Duration;
import java.util.List;
import java.util.Locale;

/** What is known about how a call or a job failed. */
final class Failure {
  private static final Metadata.Key<io.lowbit.status.v1.Status> DETAILS =
      Metadata.Key.of(
          "grpc-status-details-bin",
          ProtoUtils.metadataMarshaller(io.lowbit.status.v1.Status.getDefaultInstance()));

  final Status status;
  Throwable cause;
  Job job;
  ErrorInfo info = ErrorInfo.getDefaultInstance();
  List<FieldViolation> violations = List.of();
  Duration retryAfter;
  String requestId;

  /** Takes how a call ended; {@code request} may have an id. */
  Failure(Status status, Metadata trailers, Message request) {
    this.status = status;
    cause = status.asRuntimeException(trailers);
    try {
      var details = trailers.get(DETAILS);
      for (Any detail : details == null ? List.<Any>of() : details.getDetailsList()) {
        ByteString data = detail.getValue();
        switch (detail.getTypeUrl().replaceFirst(".*[./]", "")) {
          case "ErrorInfo" -> info = ErrorInfo.parseFrom(data);
          case "RetryInfo" -> {
            var delay = RetryInfo.parseFrom(data).getRetryDelay();
            retryAfter = Duration.ofSeconds(delay.getSeconds(), delay.getNanos());
          }
          case "BadRequest" -> violations = BadRequest.parseFrom(data).getFieldViolationsList();
          default -> { /* a detail of a newer server */ }
        }
      }
    } catch (IllegalArgumentException | InvalidProtocolBufferException unreadable) {
      // the status and what was read before still say something
    }
    var field = request.getDescriptorForType().findFieldByName("request_id");
    String given = field == null ? "" : (String) request.getField(field);
    requestId = given.isEmpty() ? info.getMetadataOrDefault("request_id", "") : given;
  }

  /** Takes a job that did not succeed. */
  Failure(Job job) {
    String state = job.getState().name().replace("JOB_STATE_", "");
    String reason = job.getError().getReason().name().replace("ERROR_REASON_", "");
    String told = job.getError().getMessage();
    String message = "job " + job.getId() + " " + state.toLowerCase(Locale.ROOT);
    status = Status.ABORTED.withDescription(told.isEmpty() ? message : message + ": " + told);
    this.job = job;
    info = ErrorInfo.newBuilder().setReason(reason.equals("UNSPECIFIED") ? state : reason).build();
    requestId = job.getRequestId();
  }
}
