// Package lowbit is the client of the Lowbit service, which quantizes and serves language
// models. The messages of requests and answers are those of the API, in gen/lowbitv1, and
// their comments are the reference. Every failure is an *Error.
package lowbit

import (
	"cmp"
	"context"
	"iter"
	"os"
	"time"

	"google.golang.org/grpc"

	pb "lowbit/gen/lowbitv1"
)

// Client is a connection to one server. Any number of goroutines may use it.
//
// Each verb takes the context's deadline, or where it has none the timeout of the options.
// A stream begins its call when it is ranged over, and cancels it when the loop is left.
type Client struct {
	options *options
	conn    *grpc.ClientConn
	closed  context.Context
	close   context.CancelFunc
	budget  *budget
}

// New makes a client of the server at HOST:PORT; without an address of LOWBIT_ADDRESS, or else
// of 127.0.0.1:50151. It connects with its first call. It fails when an option makes no sense.
func New(address string, changes ...Option) (*Client, error) {
	address = cmp.Or(address, os.Getenv("LOWBIT_ADDRESS"), "127.0.0.1:50151")
	o, err := newOptions(address, changes)
	if err != nil {
		return nil, err
	}
	conn, err := o.connect(address)
	if err != nil {
		return nil, err
	}
	c := &Client{options: o, conn: conn, budget: newBudget(o.retryBudget)}
	c.closed, c.close = context.WithCancel(context.Background())
	return c, nil
}

// Close cancels what still runs and closes the connection.
func (c *Client) Close() error {
	c.close()
	return c.conn.Close()
}

// Generate streams what a model says to a prompt, event after event as they come.
func (c *Client) Generate(ctx context.Context, request *pb.GenerateRequest) iter.Seq2[Event, error] {
	open := pb.NewGenerationServiceClient(c.conn).Generate
	return events(stream(ctx, c, c.options.streamTimeout, open, request, nil))
}

// Unload takes a model off its devices once its streams have ended.
func (c *Client) Unload(ctx context.Context, request *pb.UnloadRequest) (*pb.UnloadResponse, error) {
	drain := 30 * time.Second // the server's default
	if request.DrainTimeout != nil {
		drain = request.DrainTimeout.AsDuration()
	}
	return call(ctx, c, drain+c.options.callTimeout, once, pb.NewModelServiceClient(c.conn).Unload, request)
}

// WaitJob waits until a job ends and returns it, with ErrJobFailed when it did not end well.
func (c *Client) WaitJob(ctx context.Context, id string) (job *pb.Job, err error) {
	for event, err := range c.WatchJob(ctx, id, 0) {
		if err != nil {
			return job, err
		}
		job = event.Job
	}
	if job == nil {
		if job, err = c.GetJob(ctx, id); err != nil {
			return nil, err
		}
	}
	if job.State != pb.JobState_JOB_STATE_SUCCEEDED {
		return job, jobFailure(job)
	}
	return job, nil
}
