package lowbit_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"lowbit"
	pb "lowbit/gen/lowbitv1"
)

const root = "../.."

var background = context.Background()

// server is the address of a real server with the scripted models smollm2 and slow.
var server string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	python, err := filepath.Abs(root + "/.venv/bin/python")
	if err != nil {
		panic(err)
	}
	command := exec.Command(python, "-m", "tests.conformance.serve", `smollm2={"step_ms":1}`, `slow={"step_ms":5}`)
	command.Dir, command.Stderr = root, os.Stderr
	input, _ := command.StdinPipe()
	output, _ := command.StdoutPipe()
	if err := command.Start(); err != nil {
		panic(err)
	}
	defer command.Wait()
	defer input.Close() // ends it
	line, err := bufio.NewReader(output).ReadString('\n')
	if err != nil {
		panic("the server did not start")
	}
	server = strings.TrimSpace(line)
	os.Setenv("LOWBIT_ADDRESS", server)
	return m.Run()
}

// connect makes a client, and checks after the test that nothing of it is left.
func connect(t *testing.T, address string, options ...lowbit.Option) *lowbit.Client {
	t.Helper()
	before := goleak.IgnoreCurrent()
	client, err := lowbit.New(address, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		client.Close()
		goleak.VerifyNone(t, before)
	})
	return client
}

func ask(model, prompt string, tokens uint32) *pb.GenerateRequest {
	request := lowbit.GenerateText(model, prompt)
	request.Stopping = &pb.Stopping{MaxTokens: proto.Uint32(tokens), IgnoreEos: proto.Bool(true)}
	return request
}

func TestEventsComeInOrder(t *testing.T) {
	client := connect(t, server)
	request := ask("smollm2", "hé", 6)
	request.Output = &pb.OutputOptions{TokenIds: proto.Bool(true)}
	var order, text string
	var ids []uint32
	for event, err := range client.Generate(background, request) {
		switch {
		case err != nil:
			t.Fatal(err)
		case event.Started != nil:
			order += "s"
			if event.Started.PromptTokens != 3 {
				t.Error(event.Started)
			}
		case event.Chunk != nil:
			text += event.Text()
			ids = append(ids, event.Chunk.TokenIDs...)
		case event.Finished != nil:
			order += "f"
			if event.Finished.Reason != pb.FinishReason_FINISH_REASON_MAX_TOKENS {
				t.Error(event.Finished)
			}
		case event.Completed != nil:
			order += "c"
			if event.Completed.Usage.OutputTokens != 6 {
				t.Error(event.Completed)
			}
		}
	}
	if order != "sfc" || text != "héhé" || len(ids) != 6 {
		t.Error(order, text, ids)
	}
}

func TestEachOutputHasItsText(t *testing.T) {
	client := connect(t, server)
	request := ask("smollm2", "abc", 3)
	request.Sampling = &pb.Sampling{N: proto.Uint32(2)}
	texts, err := lowbit.ReadTexts(client.Generate(background, request))
	if err != nil || !slices.Equal(texts, []string{"abc", "bca"}) {
		t.Error(texts, err)
	}
	if text, err := lowbit.ReadText(client.Generate(background, request)); err != nil || text != "abc" {
		t.Error(text, err)
	}
}

// idle waits until no request runs on the server, and returns how long that took.
func idle(t *testing.T, client *lowbit.Client) time.Duration {
	t.Helper()
	began := time.Now()
	request := &pb.WatchRuntimeRequest{Interval: durationpb.New(100 * time.Millisecond)}
	for snapshot, err := range client.WatchRuntime(background, request) {
		if err != nil {
			t.Fatal(err)
		}
		if snapshot.AdmittedRequests == 0 {
			break
		}
	}
	return time.Since(began)
}

func TestLeavingTheLoopCancelsOnTheServer(t *testing.T) {
	client := connect(t, server)
	if _, err := client.Info(background); err != nil { // connects
		t.Fatal(err)
	}
	before := goleak.IgnoreCurrent()
	for event, err := range client.Generate(background, ask("slow", "x", 4000)) { // 20 s
		if err != nil {
			t.Fatal(err)
		}
		if event.Chunk != nil {
			break
		}
	}
	goleak.VerifyNone(t, before)
	if took := idle(t, client); took > 5*time.Second {
		t.Error("the slot was freed after", took)
	}
}

func TestCancellingTheContextEndsTheStreamOnce(t *testing.T) {
	client := connect(t, server)
	ctx, cancel := context.WithCancel(background)
	defer cancel()
	var failures []error
	for event, err := range client.Generate(ctx, ask("slow", "x", 4000)) {
		if err != nil {
			failures = append(failures, err)
		}
		if event.Chunk != nil {
			cancel()
		}
	}
	if len(failures) != 1 || !errors.Is(failures[0], lowbit.ErrCancelled) || !errors.Is(failures[0], context.Canceled) {
		t.Error(failures)
	}
	idle(t, client)
}

func TestClosingTheClientEndsItsStreams(t *testing.T) {
	client, err := lowbit.New(server)
	if err != nil {
		t.Fatal(err)
	}
	before := goleak.IgnoreCurrent()
	for event, err := range client.Generate(background, ask("slow", "x", 4000)) {
		if event.Started != nil {
			client.Close()
		} else if err != nil && !errors.Is(err, lowbit.ErrCancelled) {
			t.Error(err)
		}
	}
	goleak.VerifyNone(t, before)
}

func TestDeadlineOfTheContext(t *testing.T) {
	client := connect(t, server)
	ctx, cancel := context.WithTimeout(background, 200*time.Millisecond)
	defer cancel()
	text, err := lowbit.ReadText(client.Generate(ctx, ask("slow", "x", 4000)))
	if !errors.Is(err, lowbit.ErrDeadlineExceeded) || !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if !strings.HasPrefix(text, "xx") {
		t.Errorf("what came before is lost: %q", text)
	}
}

func TestErrorsHaveKindReasonAndDetails(t *testing.T) {
	client := connect(t, server)
	_, err := client.GetModel(background, "nothing")
	var failed *lowbit.Error
	if !errors.As(err, &failed) {
		t.Fatal(err)
	}
	for _, target := range []error{lowbit.ErrModelNotFound, lowbit.ErrNotFound, lowbit.ErrLowbit, lowbit.Reason("MODEL_NOT_FOUND")} {
		if !errors.Is(fmt.Errorf("wrapped: %w", err), target) {
			t.Error("is not", target)
		}
	}
	for _, target := range []error{lowbit.ErrJobNotFound, lowbit.ErrInvalidArgument, lowbit.Reason("JOB_NOT_FOUND"), context.Canceled} {
		if errors.Is(err, target) {
			t.Error("is", target)
		}
	}
	if failed.Code != codes.NotFound || status.Code(err) != codes.NotFound || failed.RequestID == "" {
		t.Errorf("%+v", failed)
	}
	request := ask("smollm2", "a secret prompt", 1)
	request.Sampling = &pb.Sampling{Temperature: proto.Float32(-1), TopP: proto.Float32(2)}
	_, err = lowbit.ReadText(client.Generate(background, request))
	if !errors.As(err, &failed) || failed.Kind != lowbit.ErrInvalidArgument || len(failed.Violations) != 2 {
		t.Fatal(err)
	}
	if failed.Violations[0].Field != "sampling.temperature" || strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "\n") {
		t.Error(err)
	}
	request = ask("smollm2", "a", 1)
	request.Constraint = &pb.OutputConstraint{Kind: &pb.OutputConstraint_Regex{Regex: "a+"}}
	_, err = lowbit.ReadText(client.Generate(background, request))
	if !errors.Is(err, lowbit.ErrNotImplementedByServer) {
		t.Error(err)
	}
}

func TestVerbs(t *testing.T) {
	client := connect(t, server)
	ctx := background
	tokens, err := client.Tokenize(ctx, lowbit.TokenizeText("smollm2", "héllo"))
	if err != nil {
		t.Fatal(err)
	}
	text, err := client.Detokenize(ctx, &pb.DetokenizeRequest{Model: "smollm2", TokenIds: tokens.TokenIds})
	if err != nil || text != "héllo" {
		t.Error(text, err)
	}
	scored, err := client.Score(ctx, &pb.ScoreRequest{
		Model: "smollm2", Prompt: &pb.ScoreRequest_Text{Text: "a"},
		Continuations: []*pb.TokenIds{{Ids: []uint32{1, 2}}},
	})
	if err != nil || len(scored.Scores[0].TokenLogprobs) != 2 {
		t.Error(scored, err)
	}
	var names []string
	for model, err := range client.Models(ctx, &pb.ListModelsRequest{PageSize: proto.Uint32(1)}) {
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, model.Name)
	}
	if strings.Join(names, " ") != "slow smollm2" {
		t.Error(names)
	}
	if err := client.SetAlias(ctx, "small", "smollm2"); err != nil {
		t.Error(err)
	}
	if model, err := client.GetModel(ctx, "small"); err != nil || model.Name != "smollm2" {
		t.Error(model, err)
	}
	devices, err := client.Devices(ctx)
	if err != nil || len(devices) != 1 || devices[0].Name != "cpu" {
		t.Error(devices, err)
	}
	if info, err := client.Info(ctx); err != nil || len(info.ImportRoots) != 1 {
		t.Error(info, err)
	}
	for job, err := range client.Jobs(ctx, nil) {
		if err != nil {
			t.Fatal(err)
		}
		if ended, err := client.WaitJob(ctx, job.Id); err != nil || ended.State != pb.JobState_JOB_STATE_SUCCEEDED || len(ended.RequestId) != 32 {
			t.Error(ended, err)
		}
	}
	replicas, err := lowbit.WaitLoad(client.Load(ctx, lowbit.LoadModel("smollm2")))
	if err != nil || len(replicas) != 1 || replicas[0].Phase != pb.LoadPhase_LOAD_PHASE_LIVE {
		t.Error(replicas, err)
	}
	if schemes, err := client.ListSchemes(ctx); err != nil || len(schemes) == 0 {
		t.Error(schemes, err)
	}
}

// printed runs a program of this module and returns what it printed.
func printed(t *testing.T, arguments ...string) string {
	t.Helper()
	output, err := exec.Command("go", append([]string{"run"}, arguments...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, output)
	}
	return string(output)
}

func TestQuickStartRunsAsPrinted(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	program := regexp.MustCompile("(?s)```go\n(package main.*?)```").FindSubmatch(readme)[1]
	file := filepath.Join(t.TempDir(), "main.go")
	if err := os.WriteFile(file, program, 0o600); err != nil {
		t.Fatal(err)
	}
	if out := printed(t, file); !strings.HasPrefix(out, "Once upon a timeOnce upon") {
		t.Errorf("%.100s", out)
	}
}

func TestExamples(t *testing.T) {
	if out := printed(t, "./examples/chat", "smollm2", "hello"); !strings.HasPrefix(out, "<user>hello") || !strings.HasSuffix(out, "\n200 tokens\n") {
		t.Error(out)
	}
	if out := printed(t, "./examples/cancel", "slow"); out != "Once \nleft early\ncancelled\n" {
		t.Error(out)
	}
	out := printed(t, "./examples/errors")
	if strings.Count(out, "MODEL_NOT_FOUND") != 2 || !strings.Contains(out, "sampling.temperature: ") || !strings.Contains(out, "sampling.top_p: ") {
		t.Error(out)
	}
	if out := printed(t, "./throughput", server, "smollm2", "4", "50"); !strings.HasPrefix(out, `{"tokens": 200, "seconds": `) {
		t.Error(out)
	}
}

func TestVersionIsThatOfThePythonClient(t *testing.T) {
	project, err := os.ReadFile(root + "/client/python/pyproject.toml")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(project), `version = "`+lowbit.Version+`"`) {
		t.Error("they differ")
	}
}
