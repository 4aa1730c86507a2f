package lowbit

import (
	"context"
	"errors"
	"io"
	"iter"
	"math"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// Whether a call that may have reached the server can be made again.
const (
	once  = false
	again = true
)

// call makes a call with one answer.
func call[Q proto.Message, R any](
	ctx context.Context, c *Client, timeout time.Duration, again bool,
	rpc func(context.Context, Q, ...grpc.CallOption) (R, error), request Q,
) (R, error) {
	ctx, cancel := c.bind(ctx, timeout)
	defer cancel()
	for tries := (tries{client: c}); ; {
		var to peer.Peer
		response, err := rpc(c.outgoing(ctx), request, grpc.Peer(&to))
		if err == nil {
			tries.arrived()
			return response, nil
		}
		safe := again || to.Addr == nil // it reached no server
		if e := tries.next(ctx, failure(ctx, err, requestID(request)), safe); e != nil {
			return response, e
		}
	}
}

// stream makes a call with a stream of answers each time it is ranged over. The call is tried
// again until its first message. With resume, which makes the next request from the last message,
// it is made again after a broken connection too.
func stream[Q proto.Message, R any](
	ctx context.Context, c *Client, timeout time.Duration,
	open func(context.Context, Q, ...grpc.CallOption) (grpc.ServerStreamingClient[R], error),
	request Q, resume func(next Q, last *R),
) iter.Seq2[*R, error] {
	return func(yield func(*R, error) bool) {
		ctx, cancel := c.bind(ctx, timeout)
		defer cancel()
		request := request
		if resume != nil {
			request = proto.CloneOf(request) // the caller's stays as it is
		}
		for tries := (tries{client: c, resumes: resume != nil}); ; {
			messages, err := open(c.outgoing(ctx), request)
			for err == nil {
				var message *R
				if message, err = messages.Recv(); err != nil {
					break
				}
				tries.arrived()
				if resume != nil {
					resume(request, message)
				}
				if !yield(message, nil) {
					return
				}
				err = status.FromContextError(ctx.Err()).Err() // what came already is not read on
			}
			if errors.Is(err, io.EOF) {
				return
			}
			if e := tries.next(ctx, failure(ctx, err, requestID(request)), true); e != nil {
				yield(nil, e)
				return
			}
		}
	}
}

// bind returns a context that ends with the client too, and after timeout where neither it is
// 0 nor the context has a deadline.
func (c *Client) bind(ctx context.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	var cancel context.CancelFunc
	if _, ok := ctx.Deadline(); !ok && timeout > 0 {
		ctx, cancel = context.WithTimeout(ctx, timeout)
	} else {
		ctx, cancel = context.WithCancel(ctx)
	}
	stop := context.AfterFunc(c.closed, cancel)
	return ctx, func() { stop(); cancel() }
}

// outgoing adds the metadata of one try.
func (c *Client) outgoing(ctx context.Context) context.Context {
	if c.options.token != nil {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+*c.options.token)
	}
	if c.options.traceparent != nil {
		if value := c.options.traceparent(ctx); value != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, "traceparent", value)
		}
	}
	return ctx
}

func requestID(request proto.Message) string {
	if named, ok := request.(interface{ GetRequestId() string }); ok {
		return named.GetRequestId()
	}
	return ""
}

// tries are the tries of one call.
type tries struct {
	client  *Client
	resumes bool      // goes on after a broken connection
	started bool      // has had a message
	made    int       // failed ones; of a resumed stream, those since its last message
	giveUp  time.Time // of a broken stream
}

// arrived notes a message.
func (t *tries) arrived() {
	if !t.started {
		t.client.budget.refund()
	}
	t.started, t.giveUp = true, time.Time{}
}

// next waits before the next try, or returns the failure to give where there is to be none.
// A call that is not safe to make again is tried again only where the server asks for it.
func (t *tries) next(ctx context.Context, e *Error, safe bool) *Error {
	if t.started {
		return t.resume(ctx, e)
	}
	may := e.RetryAfter != nil || e.Code == codes.Unavailable && safe
	t.made++
	delay := t.delay(e)
	end, bounded := ctx.Deadline()
	if !may || t.made >= t.client.options.maxAttempts || bounded && time.Until(end) <= delay || !t.client.budget.spend() {
		return e
	}
	return sleep(ctx, delay, e)
}

// resume does the same for a stream that had messages and broke.
func (t *tries) resume(ctx context.Context, e *Error) *Error {
	broken := t.resumes && e.Code == codes.Unavailable && (e.Reason == "" || e.Reason == "SHUTTING_DOWN")
	if !broken && (t.giveUp.IsZero() || e.RetryAfter == nil) {
		return e
	}
	if t.giveUp.IsZero() {
		t.giveUp, t.made = time.Now().Add(t.client.options.resumeTimeout), 0
	}
	t.made++
	delay := t.delay(e)
	if time.Until(t.giveUp) <= delay {
		return e
	}
	return sleep(ctx, delay, e)
}

// delay is what the server asked for and up to a tenth more, or else a random part of the
// backoff, not below its half.
func (t *tries) delay(e *Error) time.Duration {
	if e.RetryAfter != nil {
		return time.Duration(float64(*e.RetryAfter) * (1 + 0.1*rand.Float64()))
	}
	bound := min(float64(t.client.options.firstBackoff)*math.Exp2(float64(t.made-1)), float64(t.client.options.maxBackoff))
	return time.Duration(bound * (0.5 + 0.5*rand.Float64()))
}

// sleep waits, or returns the failure of a context that ended meanwhile.
func sleep(ctx context.Context, delay time.Duration, e *Error) *Error {
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return failure(ctx, status.FromContextError(ctx.Err()).Err(), e.RequestID)
	}
}

// budget holds the retries that a client has left.
type budget struct {
	mutex      sync.Mutex
	size, left float64
}

func newBudget(size int) *budget { return &budget{size: float64(size), left: float64(size)} }

func (b *budget) spend() bool {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	if b.left < 1 {
		return false
	}
	b.left--
	return true
}

// refund gives back a tenth of a retry after a success.
func (b *budget) refund() {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	b.left = min(b.size, b.left+0.1)
}
