package lowbit

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"lowbit/gen/lowbitv1"
)

// Kind is a class of failures: errors.Is(err, ErrNotFound) tells whether err is of that kind
// or of one below it, such as ErrModelNotFound.
type Kind string

// Error returns the kind's name.
func (k Kind) Error() string { return string(k) }

// Reason is the name of an ErrorReason without its prefix, such as "DISK_FULL":
// errors.Is(err, Reason("DISK_FULL")) tells whether err has it.
type Reason string

// Error returns the reason.
func (r Reason) Error() string { return string(r) }

// The kinds of failures. Indented ones are also of the kind above them.
const (
	ErrLowbit                 Kind = "LowbitError"          // every failure
	ErrInvalidArgument        Kind = "InvalidArgumentError" // the request is wrong and stays wrong
	ErrContextLength          Kind = "ContextLengthError"   //   the prompt is longer than the context
	ErrSourceRejected         Kind = "SourceRejectedError"  //   the source is unsafe, damaged or unknown
	ErrNotFound               Kind = "NotFoundError"        // no such model, job, device or source
	ErrModelNotFound          Kind = "ModelNotFoundError"   //   no model or alias has this name
	ErrJobNotFound            Kind = "JobNotFoundError"     //   no job has this id
	ErrAlreadyExists          Kind = "AlreadyExistsError"   // the name or the request id is taken
	ErrPermissionDenied       Kind = "PermissionDeniedError"
	ErrUnauthenticated        Kind = "UnauthenticatedError"        // the server does not know who calls
	ErrFailedPrecondition     Kind = "FailedPreconditionError"     // the server's state does not allow this
	ErrModelNotLoaded         Kind = "ModelNotLoadedError"         //   the model is stored, not loaded
	ErrModelInUse             Kind = "ModelInUseError"             //   it is loaded, or a job reads it
	ErrLoadFailed             Kind = "LoadFailedError"             //   no worker could make it live
	ErrCheckpointMismatch     Kind = "CheckpointMismatchError"     //   the checkpoint has other inputs
	ErrJobNotResumable        Kind = "JobNotResumableError"        //   the job cannot go on
	ErrSchemeUnavailable      Kind = "SchemeUnavailableError"      //   the message says what to install
	ErrQualityGate            Kind = "QualityGateError"            //   quality is outside its limits
	ErrResourceExhausted      Kind = "ResourceExhaustedError"      // memory, disk, a queue or a size limit
	ErrQueueFull              Kind = "QueueFullError"              //   RetryAfter says when to ask again
	ErrClientStalled          Kind = "ClientStalledError"          //   the stream was read too slowly
	ErrInsufficientMemory     Kind = "InsufficientMemoryError"     //   Metadata has needed and free bytes
	ErrUnavailable            Kind = "UnavailableError"            // no server, or it takes no calls now
	ErrModelLoading           Kind = "ModelLoadingError"           //   RetryAfter says when to ask again
	ErrWorkerLost             Kind = "WorkerLostError"             // the worker process died
	ErrCancelled              Kind = "CancelledError"              // also context.Canceled
	ErrDeadlineExceeded       Kind = "DeadlineExceededError"       // also context.DeadlineExceeded
	ErrNotImplementedByServer Kind = "NotImplementedByServerError" // the server does not offer this
	ErrDataLoss               Kind = "DataLossError"               // a stored file is damaged
	ErrInternal               Kind = "InternalError"               // the log has the cause under RequestID
	ErrJobFailed              Kind = "JobFailedError"              // Job is the job's last state
)

var kindOfCode = map[codes.Code]Kind{
	codes.InvalidArgument: ErrInvalidArgument, codes.OutOfRange: ErrInvalidArgument,
	codes.NotFound: ErrNotFound, codes.AlreadyExists: ErrAlreadyExists,
	codes.PermissionDenied: ErrPermissionDenied, codes.Unauthenticated: ErrUnauthenticated,
	codes.FailedPrecondition: ErrFailedPrecondition, codes.ResourceExhausted: ErrResourceExhausted,
	codes.Unavailable: ErrUnavailable, codes.Canceled: ErrCancelled,
	codes.DeadlineExceeded: ErrDeadlineExceeded, codes.Unimplemented: ErrNotImplementedByServer,
	codes.DataLoss: ErrDataLoss, codes.Internal: ErrInternal,
}

// Reasons with a kind of their own, and the kind above it. The others have that of their code.
var kindOfReason = map[Reason][2]Kind{
	"CONTEXT_LENGTH_EXCEEDED":    {ErrContextLength, ErrInvalidArgument},
	"SOURCE_UNSUPPORTED":         {ErrSourceRejected, ErrInvalidArgument},
	"SOURCE_CORRUPT":             {ErrSourceRejected, ErrInvalidArgument},
	"MODEL_NOT_FOUND":            {ErrModelNotFound, ErrNotFound},
	"JOB_NOT_FOUND":              {ErrJobNotFound, ErrNotFound},
	"MODEL_NOT_LOADED":           {ErrModelNotLoaded, ErrFailedPrecondition},
	"MODEL_IN_USE":               {ErrModelInUse, ErrFailedPrecondition},
	"LOAD_FAILED":                {ErrLoadFailed, ErrFailedPrecondition},
	"CHECKPOINT_MISMATCH":        {ErrCheckpointMismatch, ErrFailedPrecondition},
	"JOB_NOT_RESUMABLE":          {ErrJobNotResumable, ErrFailedPrecondition},
	"SCHEME_UNAVAILABLE":         {ErrSchemeUnavailable, ErrFailedPrecondition},
	"QUALITY_GATE_FAILED":        {ErrQualityGate, ErrFailedPrecondition},
	"QUEUE_FULL":                 {ErrQueueFull, ErrResourceExhausted},
	"CLIENT_STALLED":             {ErrClientStalled, ErrResourceExhausted},
	"INSUFFICIENT_DEVICE_MEMORY": {ErrInsufficientMemory, ErrResourceExhausted},
	"MODEL_LOADING":              {ErrModelLoading, ErrUnavailable},
	"WORKER_LOST":                {ErrWorkerLost},
}

// Violation is one bad field of a request.
type Violation struct {
	// Field is the path of the field.
	Field string
	// Description says what is wrong and what is allowed.
	Description string
}

// Error is what every verb and stream fails with. Get it with errors.As, or ask for its kind
// or reason with errors.Is.
type Error struct {
	// Kind is the class of the failure.
	Kind Kind
	// Code is the gRPC status.
	Code codes.Code
	// Reason is the server's ErrorReason; empty where it gave none.
	Reason Reason
	// Message is for a person; it never holds text of prompts or outputs.
	Message string
	// Metadata has values that belong to the reason, such as needed and free bytes.
	Metadata map[string]string
	// Violations are all bad fields of the request.
	Violations []Violation
	// RetryAfter is how long to wait before the next try; nil where the server named nothing.
	RetryAfter *time.Duration
	// RequestID is the request's name in the server's log; empty where it is not known.
	RequestID string
	// Job is the last state of the job, for ErrJobFailed.
	Job *lowbitv1.Job
}

// Error returns one line: reason or code, message and violations.
func (e *Error) Error() string {
	line := string(e.Reason)
	if line == "" {
		line = code.Code(e.Code).String()
	}
	line += ": " + e.Message
	for _, v := range e.Violations {
		if told := v.Field + ": " + v.Description; !strings.Contains(e.Message, told) {
			line += " (" + told + ")"
		}
	}
	return strings.Join(strings.Fields(line), " ")
}

// Is tells whether target is this error's Kind, the kind above it, its Reason, or the error
// of the context package that it stands for.
func (e *Error) Is(target error) bool {
	switch target := target.(type) {
	case Kind:
		return target == ErrLowbit || target == e.Kind ||
			e.Kind != ErrJobFailed && target == kindOfReason[e.Reason][1]
	case Reason:
		return target == e.Reason && target != ""
	}
	return target == context.Canceled && e.Code == codes.Canceled ||
		target == context.DeadlineExceeded && e.Code == codes.DeadlineExceeded
}

// GRPCStatus lets status.Code and status.FromError read the error.
func (e *Error) GRPCStatus() *status.Status { return status.New(e.Code, e.Message) }

// failure turns what gRPC returned for a call into an Error.
func failure(ctx context.Context, err error, requestID string) *Error {
	s := status.Convert(err)
	e := &Error{Code: s.Code(), Message: s.Message(), RequestID: requestID}
	if cause := ctx.Err(); cause != nil && (e.Code == codes.Canceled || e.Code == codes.DeadlineExceeded) {
		s = status.FromContextError(cause) // without what the server may have said of it
		e.Code, e.Message = s.Code(), "the caller cancelled, or its time is over"
	}
	for _, detail := range s.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			e.Reason, e.Metadata = Reason(detail.Reason), detail.Metadata
		case *errdetails.RetryInfo:
			delay := detail.RetryDelay.AsDuration()
			e.RetryAfter = &delay
		case *errdetails.BadRequest:
			for _, v := range detail.FieldViolations {
				e.Violations = append(e.Violations, Violation{v.Field, v.Description})
			}
		}
	}
	e.RequestID = cmp.Or(e.RequestID, e.Metadata["request_id"])
	e.Kind = cmp.Or(kindOfReason[e.Reason][0], kindOfCode[e.Code], ErrLowbit)
	return e
}

func jobFailure(job *lowbitv1.Job) *Error {
	state := strings.TrimPrefix(job.State.String(), "JOB_STATE_")
	e := &Error{Kind: ErrJobFailed, Code: codes.Aborted, Reason: Reason(state), RequestID: job.RequestId, Job: job}
	if r := job.GetError().GetReason(); r != lowbitv1.ErrorReason_ERROR_REASON_UNSPECIFIED {
		e.Reason = Reason(strings.TrimPrefix(r.String(), "ERROR_REASON_"))
	}
	e.Message = strings.TrimSuffix(fmt.Sprintf("job %s %s: %s", job.Id, strings.ToLower(state), job.GetError().GetMessage()), ": ")
	return e
}
