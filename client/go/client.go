// Package lowbit is the client of the Lowbit service, which quantizes and serves language
// models. The messages of requests and answers are those of the API, in gen/lowbitv1, and
// their comments are the reference. Every failure is an *Error.
package lowbit

import (
	"cmp"
	"context"
	"iter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	pb "lowbit/gen/lowbitv1"
)

// Client is a connection to one server. Any number of goroutines may use it.
//
// Each verb takes the context's deadline, or where it has none the timeout of the options.
// A stream begins its call when it is ranged over, and cancels it when the loop is left.
type Client struct {
	options    *options
	conn       *grpc.ClientConn
	closed     context.Context
	close      context.CancelFunc
	budget     budget
	generation pb.GenerationServiceClient
	store      pb.ModelServiceClient
	quantizing pb.QuantizationServiceClient
	work       pb.JobServiceClient
	runtime    pb.RuntimeServiceClient
}

// New makes a client of the server at HOST:PORT; without an address of LOWBIT_ADDRESS, or else
// of 127.0.0.1:50151. It connects with its first call. It fails when an option makes no sense.
func New(address string, changes ...Option) (*Client, error) {
	address = cmp.Or(address, defaultAddress())
	o, err := newOptions(address, changes)
	if err != nil {
		return nil, err
	}
	dial, err := o.dial(address)
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient(address, dial...)
	if err != nil {
		return nil, err
	}
	c := &Client{
		options: o, conn: conn, budget: budget{size: float64(o.retryBudget), left: float64(o.retryBudget)},
		generation: pb.NewGenerationServiceClient(conn), store: pb.NewModelServiceClient(conn),
		quantizing: pb.NewQuantizationServiceClient(conn), work: pb.NewJobServiceClient(conn),
		runtime: pb.NewRuntimeServiceClient(conn),
	}
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
	return events(stream(ctx, c, c.options.streamTimeout, c.generation.Generate, request, nil))
}

// Tokenize returns the token ids of text or of a chat, as Generate would make them.
func (c *Client) Tokenize(ctx context.Context, request *pb.TokenizeRequest) (*pb.TokenizeResponse, error) {
	return call(ctx, c, again, c.generation.Tokenize, request)
}

// Detokenize returns the text of token ids.
func (c *Client) Detokenize(ctx context.Context, request *pb.DetokenizeRequest) (string, error) {
	response, err := call(ctx, c, again, c.generation.Detokenize, request)
	return response.GetText(), err
}

// Score returns the log-probabilities (natural) of continuations of a prompt.
func (c *Client) Score(ctx context.Context, request *pb.ScoreRequest) (*pb.ScoreResponse, error) {
	return callFor(ctx, c, c.options.slowCallTimeout, again, c.generation.Score, request)
}

// ImportModel starts a job that brings a model into the store. A request without a
// request_id gets one, here and in Quantize and Evaluate, so that a second try is the same job.
func (c *Client) ImportModel(ctx context.Context, request *pb.ImportModelRequest) (*pb.Job, error) {
	response, err := call(ctx, c, again, c.store.ImportModel, named(request))
	return response.GetJob(), err
}

// Models gives all models by name, page after page; request may be nil.
func (c *Client) Models(ctx context.Context, request *pb.ListModelsRequest) iter.Seq2[*pb.Model, error] {
	return pages(request.GetPageToken(), func(token string) ([]*pb.Model, string, error) {
		page := &pb.ListModelsRequest{}
		proto.Merge(page, request)
		page.PageToken = token
		response, err := call(ctx, c, again, c.store.ListModels, page)
		return response.GetModels(), response.GetNextPageToken(), err
	})
}

// GetModel returns a model by name or alias.
func (c *Client) GetModel(ctx context.Context, model string) (*pb.Model, error) {
	response, err := call(ctx, c, again, c.store.GetModel, &pb.GetModelRequest{Model: model})
	return response.GetModel(), err
}

// DeleteModel removes a model and its aliases from the store.
func (c *Client) DeleteModel(ctx context.Context, model string) error {
	_, err := call(ctx, c, once, c.store.DeleteModel, &pb.DeleteModelRequest{Model: model})
	return err
}

// VerifyModel hashes a model's files again; a difference is ErrDataLoss.
func (c *Client) VerifyModel(ctx context.Context, model string) (*pb.VerifyModelResponse, error) {
	request := &pb.VerifyModelRequest{Model: model}
	return callFor(ctx, c, c.options.slowCallTimeout, again, c.store.VerifyModel, request)
}

// EstimateLoad returns what a model would take on each device, from headers only.
func (c *Client) EstimateLoad(ctx context.Context, model string) (*pb.EstimateLoadResponse, error) {
	return call(ctx, c, again, c.store.EstimateLoad, &pb.EstimateLoadRequest{Model: model})
}

// SetAlias lets a second name point at a model; an empty model removes the alias.
func (c *Client) SetAlias(ctx context.Context, alias, model string) error {
	_, err := call(ctx, c, again, c.store.SetAlias, &pb.SetAliasRequest{Alias: alias, Model: model})
	return err
}

// Load streams the progress of a load, and goes on by itself after a broken connection.
// Leaving the loop before its end cancels the load, unless others wait for it too.
func (c *Client) Load(ctx context.Context, request *pb.LoadRequest) iter.Seq2[*pb.LoadResponse, error] {
	return stream(ctx, c, c.options.streamTimeout, c.store.Load, request, func(*pb.LoadResponse) {})
}

// Unload takes a model off its devices once its streams have ended.
func (c *Client) Unload(ctx context.Context, request *pb.UnloadRequest) (*pb.UnloadResponse, error) {
	drain := 30 * time.Second // the server's default
	if request.DrainTimeout != nil {
		drain = request.DrainTimeout.AsDuration()
	}
	return callFor(ctx, c, drain+c.options.callTimeout, once, c.store.Unload, request)
}

// WatchModel streams a model, now and after each change, until the loop is left.
func (c *Client) WatchModel(ctx context.Context, model string) iter.Seq2[*pb.WatchModelResponse, error] {
	return stream(ctx, c, 0, c.store.WatchModel, &pb.WatchModelRequest{Model: model}, nil)
}

// Quantize starts a job that makes a smaller copy of a model.
func (c *Client) Quantize(ctx context.Context, request *pb.QuantizeRequest) (*pb.Job, error) {
	response, err := call(ctx, c, again, c.quantizing.Quantize, named(request))
	return response.GetJob(), err
}

// ListSchemes returns all schemes and, per device, whether they can be used and if not why.
func (c *Client) ListSchemes(ctx context.Context) ([]*pb.SchemeInfo, error) {
	response, err := call(ctx, c, again, c.quantizing.ListSchemes, &pb.ListSchemesRequest{})
	return response.GetSchemes(), err
}

// EstimateQuantization returns bytes and time before any work, from headers only.
func (c *Client) EstimateQuantization(ctx context.Context, request *pb.EstimateQuantizationRequest) (*pb.EstimateQuantizationResponse, error) {
	return call(ctx, c, again, c.quantizing.EstimateQuantization, request)
}

// Evaluate starts a job that measures a model against another on held-out text.
func (c *Client) Evaluate(ctx context.Context, request *pb.EvaluateRequest) (*pb.Job, error) {
	response, err := call(ctx, c, again, c.quantizing.Evaluate, named(request))
	return response.GetJob(), err
}

// Jobs gives all jobs, newest first, page after page; request may be nil.
func (c *Client) Jobs(ctx context.Context, request *pb.ListJobsRequest) iter.Seq2[*pb.Job, error] {
	return pages(request.GetPageToken(), func(token string) ([]*pb.Job, string, error) {
		page := &pb.ListJobsRequest{}
		proto.Merge(page, request)
		page.PageToken = token
		response, err := call(ctx, c, again, c.work.ListJobs, page)
		return response.GetJobs(), response.GetNextPageToken(), err
	})
}

// GetJob returns a job.
func (c *Client) GetJob(ctx context.Context, id string) (*pb.Job, error) {
	response, err := call(ctx, c, again, c.work.GetJob, &pb.GetJobRequest{Id: id})
	return response.GetJob(), err
}

// CancelJob asks a job to stop and returns it. A job that has ended stays as it is.
func (c *Client) CancelJob(ctx context.Context, id string) (*pb.Job, error) {
	response, err := call(ctx, c, again, c.work.CancelJob, &pb.CancelJobRequest{Id: id})
	return response.GetJob(), err
}

// ResumeJob goes on with a job that was cancelled or interrupted, and returns it.
func (c *Client) ResumeJob(ctx context.Context, id string) (*pb.Job, error) {
	response, err := call(ctx, c, once, c.work.ResumeJob, &pb.ResumeJobRequest{Id: id})
	return response.GetJob(), err
}

// DeleteJob removes the record of an ended job; what it made stays.
func (c *Client) DeleteJob(ctx context.Context, id string) error {
	_, err := call(ctx, c, once, c.work.DeleteJob, &pb.DeleteJobRequest{Id: id})
	return err
}

// WatchJob streams a job's events after a sequence number (0: all), past ones first, until it
// ends. It goes on by itself after a broken connection, without gap or repeat.
func (c *Client) WatchJob(ctx context.Context, id string, after uint64) iter.Seq2[*pb.WatchJobResponse, error] {
	return func(yield func(*pb.WatchJobResponse, error) bool) {
		request := &pb.WatchJobRequest{Id: id, AfterSequence: after}
		read := func(event *pb.WatchJobResponse) { request.AfterSequence = event.Sequence }
		stream(ctx, c, 0, c.work.WatchJob, request, read)(yield)
	}
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

// Devices returns the devices with their memory, workers and live models.
func (c *Client) Devices(ctx context.Context) ([]*pb.Device, error) {
	response, err := call(ctx, c, again, c.runtime.ListDevices, &pb.ListDevicesRequest{})
	return response.GetDevices(), err
}

// Info returns the server's versions, limits and import roots.
func (c *Client) Info(ctx context.Context) (*pb.GetServerInfoResponse, error) {
	return call(ctx, c, again, c.runtime.GetServerInfo, &pb.GetServerInfoRequest{})
}

// WatchRuntime streams snapshots of memory, queues and throughput, until the loop is left.
func (c *Client) WatchRuntime(ctx context.Context, request *pb.WatchRuntimeRequest) iter.Seq2[*pb.WatchRuntimeResponse, error] {
	return stream(ctx, c, 0, c.runtime.WatchRuntime, request, nil)
}

// pages gives the items of all pages; fetch returns those of a token and the next token.
func pages[T any](token string, fetch func(token string) ([]T, string, error)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for {
			items, next, err := fetch(token)
			if err != nil {
				yield(*new(T), err)
				return
			}
			for _, item := range items {
				if !yield(item, nil) {
					return
				}
			}
			if token = next; token == "" {
				return
			}
		}
	}
}
