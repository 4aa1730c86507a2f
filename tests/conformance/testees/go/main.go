// The testee of the Go SDK; ../../README.md has its protocol.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"iter"
	"log"
	"os"
	"sync"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"lowbit"
	pb "lowbit/gen/lowbitv1"
)

// line is a line of the runner.
type line struct {
	ID          int             `json:"id"`
	Cancel      bool            `json:"cancel"`
	Target      string          `json:"target"`
	Verb        string          `json:"verb"`
	Request     json.RawMessage `json:"request"`
	Options     options         `json:"options"`
	TimeoutS    float64         `json:"timeout_s"`
	CancelAfter int             `json:"cancel_after"`
	DropAfter   int             `json:"drop_after"`
}

type options struct {
	CallTimeoutS       *float64 `json:"call_timeout_s"`
	SlowCallTimeoutS   *float64 `json:"slow_call_timeout_s"`
	StreamTimeoutS     *float64 `json:"stream_timeout_s"`
	ResumeTimeoutS     *float64 `json:"resume_timeout_s"`
	MaxMessageBytes    *int     `json:"max_message_bytes"`
	KeepaliveIntervalS *float64 `json:"keepalive_interval_s"`
	KeepaliveTimeoutS  *float64 `json:"keepalive_timeout_s"`
	MaxAttempts        *int     `json:"max_attempts"`
	FirstBackoffS      *float64 `json:"first_backoff_s"`
	MaxBackoffS        *float64 `json:"max_backoff_s"`
	RetryBudget        *int     `json:"retry_budget"`
	Token              *string  `json:"token"`
	Traceparent        string   `json:"traceparent"`
	TLS                *struct {
		CAFile          string `json:"ca_file"`
		CertificateFile string `json:"certificate_file"`
		KeyFile         string `json:"key_file"`
		ServerName      string `json:"server_name"`
	} `json:"tls"`
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// made returns the SDK's options.
func (o *options) made() (made []lowbit.Option) {
	duration := func(s *float64, option func(time.Duration) lowbit.Option) {
		if s != nil {
			made = append(made, option(seconds(*s)))
		}
	}
	number := func(n *int, option func(int) lowbit.Option) {
		if n != nil {
			made = append(made, option(*n))
		}
	}
	pair := func(a, b *float64, defaultA, defaultB float64, option func(a, b time.Duration) lowbit.Option) {
		if a != nil {
			defaultA = *a
		}
		if b != nil {
			defaultB = *b
		}
		made = append(made, option(seconds(defaultA), seconds(defaultB)))
	}
	duration(o.CallTimeoutS, lowbit.WithCallTimeout)
	duration(o.SlowCallTimeoutS, lowbit.WithSlowCallTimeout)
	duration(o.StreamTimeoutS, lowbit.WithStreamTimeout)
	duration(o.ResumeTimeoutS, lowbit.WithResumeTimeout)
	number(o.MaxMessageBytes, lowbit.WithMaxMessageBytes)
	number(o.MaxAttempts, lowbit.WithMaxAttempts)
	number(o.RetryBudget, lowbit.WithRetryBudget)
	pair(o.KeepaliveIntervalS, o.KeepaliveTimeoutS, 30, 10, lowbit.WithKeepalive)
	pair(o.FirstBackoffS, o.MaxBackoffS, 0.1, 2, lowbit.WithBackoff)
	if o.Token != nil {
		made = append(made, lowbit.WithToken(*o.Token))
	}
	if o.Traceparent != "" {
		made = append(made, lowbit.WithTraceparent(func(context.Context) string { return o.Traceparent }))
	}
	if t := o.TLS; t != nil {
		made = append(made, lowbit.WithTLS(lowbit.TLS{
			CA: content(t.CAFile), Certificate: content(t.CertificateFile), Key: content(t.KeyFile), ServerName: t.ServerName,
		}))
	}
	return made
}

func content(file string) []byte {
	if file == "" {
		return nil
	}
	data, err := os.ReadFile(file)
	if err != nil {
		log.Fatal(err)
	}
	return data
}

// verb makes a call and gives what comes to give, until that returns false.
type verb func(ctx context.Context, c *lowbit.Client, request json.RawMessage, give func(any) bool) error

// message is a pointer to a message.
type message[Q any] interface {
	*Q
	proto.Message
}

func parsed[Q any, P message[Q]](request json.RawMessage) P {
	parsed := P(new(Q))
	if len(request) > 0 {
		if err := protojson.Unmarshal(request, parsed); err != nil {
			log.Fatal(err)
		}
	}
	return parsed
}

// one is a verb with one answer, nothing one without, list one with several, stream a stream.
func one[Q any, P message[Q], R any](f func(*lowbit.Client, context.Context, P) (R, error)) verb {
	return func(ctx context.Context, c *lowbit.Client, request json.RawMessage, give func(any) bool) error {
		answer, err := f(c, ctx, parsed[Q, P](request))
		if err == nil {
			give(answer)
		}
		return err
	}
}

func nothing[Q any, P message[Q]](f func(*lowbit.Client, context.Context, P) error) verb {
	return func(ctx context.Context, c *lowbit.Client, request json.RawMessage, _ func(any) bool) error {
		return f(c, ctx, parsed[Q, P](request))
	}
}

func list[R any](f func(*lowbit.Client, context.Context) ([]R, error)) verb {
	return func(ctx context.Context, c *lowbit.Client, _ json.RawMessage, give func(any) bool) error {
		answers, err := f(c, ctx)
		for _, answer := range answers {
			give(answer)
		}
		return err
	}
}

func stream[Q any, P message[Q], R any](f func(*lowbit.Client, context.Context, P) iter.Seq2[R, error]) verb {
	return func(ctx context.Context, c *lowbit.Client, request json.RawMessage, give func(any) bool) (failed error) {
		for item, err := range f(c, ctx, parsed[Q, P](request)) {
			if err != nil {
				failed = err // and read on: the stream has to end
			} else if !give(item) {
				break
			}
		}
		return failed
	}
}

type (
	client = lowbit.Client
	c      = context.Context
)

var verbs = map[string]verb{
	"generate":     stream((*client).Generate),
	"tokenize":     one((*client).Tokenize),
	"detokenize":   one((*client).Detokenize),
	"score":        one((*client).Score),
	"import_model": one((*client).ImportModel),
	"quantize":     one((*client).Quantize),
	"evaluate":     one((*client).Evaluate),
	"models":       stream((*client).Models),
	"jobs":         stream((*client).Jobs),
	"get_model":    one(func(l *client, ctx c, q *pb.GetModelRequest) (*pb.Model, error) { return l.GetModel(ctx, q.Model) }),
	"delete_model": nothing(func(l *client, ctx c, q *pb.DeleteModelRequest) error { return l.DeleteModel(ctx, q.Model) }),
	"verify_model": one(func(l *client, ctx c, q *pb.VerifyModelRequest) (*pb.VerifyModelResponse, error) {
		return l.VerifyModel(ctx, q.Model)
	}),
	"estimate_load": one(func(l *client, ctx c, q *pb.EstimateLoadRequest) (*pb.EstimateLoadResponse, error) {
		return l.EstimateLoad(ctx, q.Model)
	}),
	"set_alias": nothing(func(l *client, ctx c, q *pb.SetAliasRequest) error { return l.SetAlias(ctx, q.Alias, q.Model) }),
	"load":      stream((*client).Load),
	"unload":    one((*client).Unload),
	"watch_model": stream(func(l *client, ctx c, q *pb.WatchModelRequest) iter.Seq2[*pb.WatchModelResponse, error] {
		return l.WatchModel(ctx, q.Model)
	}),
	"watch_runtime":         stream((*client).WatchRuntime),
	"list_schemes":          list((*client).ListSchemes),
	"estimate_quantization": one((*client).EstimateQuantization),
	"get_job":               one(func(l *client, ctx c, q *pb.GetJobRequest) (*pb.Job, error) { return l.GetJob(ctx, q.Id) }),
	"cancel_job":            one(func(l *client, ctx c, q *pb.CancelJobRequest) (*pb.Job, error) { return l.CancelJob(ctx, q.Id) }),
	"resume_job":            one(func(l *client, ctx c, q *pb.ResumeJobRequest) (*pb.Job, error) { return l.ResumeJob(ctx, q.Id) }),
	"delete_job":            nothing(func(l *client, ctx c, q *pb.DeleteJobRequest) error { return l.DeleteJob(ctx, q.Id) }),
	"watch_job": stream(func(l *client, ctx c, q *pb.WatchJobRequest) iter.Seq2[*pb.WatchJobResponse, error] {
		return l.WatchJob(ctx, q.Id, q.AfterSequence)
	}),
	"wait_job": one(func(l *client, ctx c, q *pb.WatchJobRequest) (*pb.Job, error) { return l.WaitJob(ctx, q.Id) }),
	"devices":  list((*client).Devices),
	"info": one(func(l *client, ctx c, _ *pb.GetServerInfoRequest) (*pb.GetServerInfoResponse, error) {
		return l.Info(ctx)
	}),
}

// object is the keys of an event.
type object map[string]any

var writing sync.Mutex

func write(id int, event string, keys object) {
	keys["id"], keys["event"] = id, event
	text, err := json.Marshal(keys)
	if err != nil {
		log.Fatal(err)
	}
	writing.Lock()
	defer writing.Unlock()
	os.Stdout.Write(append(text, '\n'))
}

func asJSON(m proto.Message) json.RawMessage {
	text, err := protojson.Marshal(m)
	if err != nil {
		log.Fatal(err)
	}
	return text
}

// tell writes what the caller was given, and returns whether it counts as a chunk or message.
func tell(id int, item any) bool {
	event, ok := item.(lowbit.Event)
	switch {
	case !ok:
		if text, ok := item.(string); ok {
			item = &pb.DetokenizeResponse{Text: text}
		}
		write(id, "message", object{"message": asJSON(item.(proto.Message))})
		return true
	case event.Chunk != nil:
		ids, logprobs := append([]uint32{}, event.Chunk.TokenIDs...), []float32{}
		for _, token := range event.Chunk.Tokens {
			if token.Logprob != nil {
				logprobs = append(logprobs, *token.Logprob)
			}
		}
		told := object{"text": event.Text(), "output_index": event.Chunk.OutputIndex}
		told["token_ids"], told["logprobs"] = ids, logprobs
		write(id, "delta", told)
		return true
	case event.Started != nil:
		write(id, "started", object{"message": asJSON(event.Started)})
	case event.Finished != nil:
		write(id, "finished", object{"message": asJSON(event.Finished)})
	case event.Completed != nil:
		write(id, "completed", object{"message": asJSON(event.Completed)})
	}
	return false
}

func run(ctx context.Context, cancel context.CancelFunc, l line) {
	defer cancel()
	refused := object{
		"class": "ValueError", "code": "", "reason": "", "message": "", "metadata": object{}, "violations": []object{},
		"retry_after_s": nil, "request_id": "", "partial_text": "",
	}
	client, err := lowbit.New(l.Target, l.Options.made()...)
	if err != nil {
		refused["message"] = err.Error()
		write(l.ID, "error", refused)
		return
	}
	if l.TimeoutS > 0 {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(ctx, seconds(l.TimeoutS))
		defer stop()
	}
	count, dropped, partial := 0, false, ""
	err = verbs[l.Verb](ctx, client, l.Request, func(item any) bool {
		if event, ok := item.(lowbit.Event); ok && event.Chunk != nil && event.Chunk.OutputIndex == 0 {
			partial += event.Text()
		}
		if tell(l.ID, item) {
			count++
			if count == l.CancelAfter {
				cancel()
			}
			dropped = count == l.DropAfter
		}
		return !dropped
	})
	if dropped { // the client stays: closing it would do what leaving the loop has to do
		write(l.ID, "dropped", object{})
		return
	}
	defer client.Close()
	var e *lowbit.Error
	switch {
	case err == nil:
		write(l.ID, "end", object{})
	case errors.As(err, &e):
		violations := []object{}
		for _, v := range e.Violations {
			violations = append(violations, object{"field": v.Field, "description": v.Description})
		}
		failed := object{
			"class": e.Kind, "code": code.Code(e.Code).String(), "reason": e.Reason, "message": e.Message, "metadata": object{},
			"violations": violations, "retry_after_s": nil, "request_id": e.RequestID, "partial_text": partial,
		}
		if e.Metadata != nil {
			failed["metadata"] = e.Metadata
		}
		if e.RetryAfter != nil {
			failed["retry_after_s"] = e.RetryAfter.Seconds()
		}
		write(l.ID, "error", failed)
	default:
		log.Fatal("not an *Error: ", err)
	}
}

func main() {
	cancels := map[int]context.CancelFunc{}
	for input := bufio.NewReader(os.Stdin); ; {
		text, err := input.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return
		}
		var l line
		decoder := json.NewDecoder(bytes.NewReader(text))
		decoder.DisallowUnknownFields()
		if err := decoder.Decode(&l); err != nil {
			log.Fatal(err)
		}
		if l.Cancel {
			cancels[l.ID]()
			continue
		}
		if verbs[l.Verb] == nil {
			log.Fatal("unknown verb ", l.Verb)
		}
		var ctx context.Context
		ctx, cancels[l.ID] = context.WithCancel(context.Background())
		go run(ctx, cancels[l.ID], l)
	}
}
