package lowbit_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"lowbit"
	pb "lowbit/gen/lowbitv1"
)

// fake answers what a real server says only rarely.
type fake struct {
	pb.UnimplementedGenerationServiceServer
	pb.UnimplementedJobServiceServer
	pb.UnimplementedRuntimeServiceServer
	pb.UnimplementedModelServiceServer
	calls  atomic.Int32
	answer func(call int32) error // what the call fails with, after one message of a stream
	before bool                   // fails before the first message instead
	seen   metadata.MD
}

func (f *fake) Generate(_ *pb.GenerateRequest, stream grpc.ServerStreamingServer[pb.GenerateResponse]) error {
	err := f.answer(f.calls.Add(1))
	if !f.before || err == nil {
		stream.Send(&pb.GenerateResponse{Event: &pb.GenerateResponse_Delta{Delta: &pb.Delta{Text: "a"}}})
	}
	return err
}

func (f *fake) GetServerInfo(ctx context.Context, _ *pb.GetServerInfoRequest) (*pb.GetServerInfoResponse, error) {
	f.seen, _ = metadata.FromIncomingContext(ctx)
	return &pb.GetServerInfoResponse{}, f.answer(f.calls.Add(1))
}

func (f *fake) DeleteModel(context.Context, *pb.DeleteModelRequest) (*pb.DeleteModelResponse, error) {
	return &pb.DeleteModelResponse{}, f.answer(f.calls.Add(1))
}

// WatchJob sends two events at a time of a job of five.
func (f *fake) WatchJob(request *pb.WatchJobRequest, stream grpc.ServerStreamingServer[pb.WatchJobResponse]) error {
	if err := f.answer(f.calls.Add(1)); err != nil {
		return err
	}
	for sequence := request.AfterSequence + 1; sequence <= 5; sequence++ {
		if sequence == request.AfterSequence+3 {
			return status.Error(codes.Unavailable, "the connection broke")
		}
		stream.Send(&pb.WatchJobResponse{Sequence: sequence, Job: &pb.Job{Id: request.Id, State: pb.JobState_JOB_STATE_RUNNING}})
	}
	return nil
}

func (f *fake) serve(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	pb.RegisterGenerationServiceServer(s, f)
	pb.RegisterJobServiceServer(s, f)
	pb.RegisterRuntimeServiceServer(s, f)
	pb.RegisterModelServiceServer(s, f)
	go s.Serve(listener)
	t.Cleanup(s.Stop)
	return listener.Addr().String()
}

func refusal(reason string, delay time.Duration) error {
	s, err := status.New(codes.ResourceExhausted, "refused").WithDetails(
		&errdetails.ErrorInfo{Reason: reason, Domain: "lowbit", Metadata: map[string]string{"request_id": "a1"}},
		&errdetails.RetryInfo{RetryDelay: durationpb.New(delay)},
	)
	if err != nil {
		panic(err)
	}
	return s.Err()
}

func unavailable(int32) error { return status.Error(codes.Unavailable, "down") }

func TestARefusalWithADelayIsTriedAgainAfterIt(t *testing.T) {
	f := &fake{before: true, answer: func(call int32) error {
		if call < 3 {
			return refusal("QUEUE_FULL", 50*time.Millisecond)
		}
		return nil
	}}
	client := connect(t, f.serve(t))
	began := time.Now()
	text, err := lowbit.ReadText(client.Generate(background, lowbit.GenerateText("m", "p")))
	if err != nil || text != "a" || f.calls.Load() != 3 {
		t.Error(text, err, f.calls.Load())
	}
	if took := time.Since(began); took < 100*time.Millisecond {
		t.Error("it was tried before its time:", took)
	}
}

func TestNoTryAfterTheFirstMessageOrPastTheDeadline(t *testing.T) {
	f := &fake{answer: unavailable}
	client := connect(t, f.serve(t))
	text, err := lowbit.ReadText(client.Generate(background, lowbit.GenerateText("m", "p")))
	if !errors.Is(err, lowbit.ErrUnavailable) || text != "a" || f.calls.Load() != 1 {
		t.Error(text, err, f.calls.Load())
	}
	f.answer = func(int32) error { return refusal("QUEUE_FULL", time.Hour) }
	_, err = client.Info(background)
	var failed *lowbit.Error
	if !errors.As(err, &failed) || failed.Kind != lowbit.ErrQueueFull || *failed.RetryAfter != time.Hour || failed.RequestID != "a1" {
		t.Error(err)
	}
}

func TestOnlyWhatMayBeRepeatedIsTriedAgain(t *testing.T) {
	f := &fake{answer: unavailable}
	client := connect(t, f.serve(t), lowbit.WithBackoff(time.Millisecond, time.Millisecond), lowbit.WithRetryBudget(5))
	if _, err := client.Info(background); !errors.Is(err, lowbit.ErrUnavailable) || f.calls.Load() != 4 {
		t.Error(err, f.calls.Load())
	}
	if err := client.DeleteModel(background, "m"); !errors.Is(err, lowbit.ErrUnavailable) || f.calls.Load() != 5 {
		t.Error(err, f.calls.Load())
	}
	if _, err := client.Info(background); err == nil || f.calls.Load() != 8 { // the budget had two left
		t.Error(err, f.calls.Load())
	}
}

func TestWhatReachedNoServerIsTriedAgain(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	listener.Close()
	client := connect(t, address, lowbit.WithBackoff(50*time.Millisecond, 50*time.Millisecond))
	began := time.Now()
	if err := client.DeleteModel(background, "m"); !errors.Is(err, lowbit.ErrUnavailable) {
		t.Error(err)
	}
	if took := time.Since(began); took < 75*time.Millisecond { // three waits of half the bound or more
		t.Error("it was not tried again:", took)
	}
}

func TestAWatcherGoesOnWithoutGapOrRepeat(t *testing.T) {
	f := &fake{answer: func(call int32) error {
		if call == 2 {
			return status.Error(codes.Unavailable, "not yet")
		}
		return nil
	}}
	client := connect(t, f.serve(t), lowbit.WithMaxAttempts(1), lowbit.WithBackoff(time.Millisecond, time.Millisecond))
	var sequences []uint64
	for event, err := range client.WatchJob(background, "j", 0) {
		if err != nil {
			t.Fatal(err)
		}
		sequences = append(sequences, event.Sequence)
	}
	if len(sequences) != 5 || sequences[0] != 1 || sequences[4] != 5 || f.calls.Load() != 4 {
		t.Error(sequences, f.calls.Load())
	}
}

func TestAWatcherGivesUpAfterItsTimeAndHearsCancellation(t *testing.T) {
	f := &fake{answer: func(call int32) error {
		if call > 1 {
			return status.Error(codes.Unavailable, "gone")
		}
		return nil
	}}
	address := f.serve(t)
	client := connect(t, address, lowbit.WithResumeTimeout(300*time.Millisecond))
	if _, err := client.WaitJob(background, "j"); !errors.Is(err, lowbit.ErrUnavailable) || f.calls.Load() < 3 {
		t.Error(err, f.calls.Load())
	}
	f.calls.Store(0)
	client = connect(t, address, lowbit.WithBackoff(time.Hour, time.Hour), lowbit.WithResumeTimeout(2*time.Hour))
	ctx, cancel := context.WithTimeout(background, 200*time.Millisecond)
	defer cancel()
	if _, err := client.WaitJob(ctx, "j"); !errors.Is(err, lowbit.ErrDeadlineExceeded) {
		t.Error(err)
	}
}

func TestMetadataOfEachCall(t *testing.T) {
	f := &fake{answer: func(int32) error { return nil }}
	trace := func(context.Context) string { return "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01" }
	client := connect(t, f.serve(t), lowbit.WithToken("secret"), lowbit.WithTraceparent(trace))
	if _, err := client.Info(background); err != nil {
		t.Fatal(err)
	}
	for key, value := range map[string]string{
		"authorization": "Bearer secret", "traceparent": trace(nil), "user-agent": "lowbit-go/" + lowbit.Version + " grpc-go/" + grpc.Version,
	} {
		if got := strings.Join(f.seen[key], ", "); got != value {
			t.Error(key, got)
		}
	}
}

func TestOptionsThatMakeNoSenseAreRefused(t *testing.T) {
	for name, option := range map[string]lowbit.Option{
		"call_timeout":                lowbit.WithCallTimeout(0),
		"resume_timeout":              lowbit.WithResumeTimeout(-time.Second),
		"max_message_bytes":           lowbit.WithMaxMessageBytes(0),
		"max_attempts":                lowbit.WithMaxAttempts(0),
		"retry_budget":                lowbit.WithRetryBudget(-1),
		"keepalive_timeout":           lowbit.WithKeepalive(time.Second, 0),
		"token":                       lowbit.WithToken("secret"),
		"tls.ca":                      lowbit.WithTLS(lowbit.TLS{CA: []byte("nothing")}),
		"tls.certificate and tls.key": lowbit.WithTLS(lowbit.TLS{Key: []byte("nothing")}),
	} {
		if _, err := lowbit.New("lowbit.example:1", option); err == nil || !strings.Contains(err.Error(), name+" ") && !strings.Contains(err.Error(), name+":") {
			t.Error(name, err)
		}
	}
	for _, token := range []string{"", "two words", "line\n", "é"} {
		if _, err := lowbit.New("127.0.0.1:1", lowbit.WithToken(token)); err == nil {
			t.Errorf("%q is taken", token)
		}
	}
	for address, allowed := range map[string]bool{
		"127.0.0.1:1": true, "127.9.9.9:1": true, "localhost:1": true, "[::1]:1": true, "unix:/x": true,
		"127.evil.example:1": false, "localhost.example:1": false, "10.0.0.1:1": false, "dns:///127.0.0.1:1": false,
	} {
		client, err := lowbit.New(address, lowbit.WithToken("secret"))
		if (err == nil) != allowed {
			t.Error(address, err)
		}
		if err == nil {
			client.Close()
		}
	}
}
