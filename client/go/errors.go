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

// Is tells whether target is this error's Kind, one above it, its Reason, or the error of the
// context package that it stands for.
func (e *Error) Is(target error) bool {
	switch target := target.(type) {
	case Kind:
		kind := e.Kind
		for kind != target && kind != ErrLowbit {
			kind = kind.wider()
		}
		return kind == target
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
	e.Kind = kindOf(e.Reason, e.Code)
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
