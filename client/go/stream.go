package lowbit

import (
	"context"
	"errors"
	"io"
	"iter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "lowbit/gen/lowbitv1"
)

// Event is one event of a generation. Exactly one field is set.
type Event struct {
	// Started comes first: model revision, device and prompt tokens.
	Started *pb.Started
	// Chunk is new text.
	Chunk *Chunk
	// Finished says why an output ended, and at which stop.
	Finished *pb.OutputFinished
	// Completed comes last when all went well: usage and timings.
	Completed *pb.Completed
}

// Chunk is new text of one output.
type Chunk struct {
	// Text has whole characters and may be empty.
	Text string
	// TokenIDs are the chunk's tokens, where the request asked for them.
	TokenIDs []uint32
	// Tokens are the same with their log-probabilities, where the request asked for these.
	Tokens []*pb.Token
	// OutputIndex says which of several outputs this is.
	OutputIndex uint32
}

// Text returns the text of a Chunk; that of other events is empty.
func (e Event) Text() string {
	if e.Chunk == nil {
		return ""
	}
	return e.Chunk.Text
}

// ReadText reads a generation to its end and returns the text of its first output; after a
// failure with what came before it.
func ReadText(events iter.Seq2[Event, error]) (string, error) {
	texts, err := ReadTexts(events)
	if len(texts) == 0 {
		return "", err
	}
	return texts[0], err
}

// ReadTexts does what ReadText does and returns the texts of all outputs, by their index.
func ReadTexts(events iter.Seq2[Event, error]) ([]string, error) {
	var found [][]byte
	var failure error
	add := func(output uint32, text string) {
		for len(found) <= int(output) {
			found = append(found, nil)
		}
		found[output] = append(found[output], text...)
	}
	for event, err := range events {
		switch {
		case err != nil:
			failure = err
		case event.Chunk != nil:
			add(event.Chunk.OutputIndex, event.Chunk.Text)
		case event.Finished != nil:
			add(event.Finished.OutputIndex, "")
		}
	}
	texts := make([]string, len(found))
	for index, text := range found {
		texts[index] = string(text)
	}
	return texts, failure
}

// WaitLoad reads the progress of a load to its end and returns each replica's last message.
func WaitLoad(progress iter.Seq2[*pb.LoadResponse, error]) ([]*pb.LoadResponse, error) {
	var last []*pb.LoadResponse
	index := map[[2]string]int{}
	for message, err := range progress {
		if err != nil {
			return nil, err
		}
		replica := [2]string{message.Device, message.Worker}
		if at, ok := index[replica]; ok {
			last[at] = message
		} else {
			index[replica] = len(last)
			last = append(last, message)
		}
	}
	return last, nil
}

func events(messages iter.Seq2[*pb.GenerateResponse, error]) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		for message, err := range messages {
			var event Event
			switch e := message.GetEvent().(type) {
			case *pb.GenerateResponse_Started:
				event.Started = e.Started
			case *pb.GenerateResponse_Delta:
				event.Chunk = &Chunk{Text: e.Delta.Text, Tokens: e.Delta.Tokens, OutputIndex: e.Delta.OutputIndex}
				for _, token := range e.Delta.Tokens {
					event.Chunk.TokenIDs = append(event.Chunk.TokenIDs, token.Id)
				}
			case *pb.GenerateResponse_OutputFinished:
				event.Finished = e.OutputFinished
			case *pb.GenerateResponse_Completed:
				event.Completed = e.Completed
			default:
				if err == nil {
					continue // of a newer server
				}
			}
			if !yield(event, err) {
				return
			}
		}
	}
}

// stream makes a call with a stream of answers each time it is ranged over. The call is tried
// again until its first message. With resume, which is told each message, it is made again
// after a broken connection too.
func stream[Q proto.Message, R any](
	ctx context.Context, c *Client, timeout time.Duration,
	open func(context.Context, Q, ...grpc.CallOption) (grpc.ServerStreamingClient[R], error),
	request Q, resume func(*R),
) iter.Seq2[*R, error] {
	return func(yield func(*R, error) bool) {
		ctx, cancel := c.bind(ctx, timeout)
		defer cancel()
		tries := tries{client: c, again: true}
		for started := false; ; {
			var to peer.Peer
			messages, err := open(c.outgoing(ctx), request, grpc.Peer(&to))
			for err == nil {
				var message *R
				if message, err = messages.Recv(); err != nil {
					break
				}
				if !started {
					started = true
					c.budget.refund()
				}
				if resume != nil {
					tries.resumed()
					resume(message)
				}
				if !yield(message, nil) {
					return
				}
				err = status.FromContextError(ctx.Err()).Err() // what came already is not read on
			}
			if errors.Is(err, io.EOF) {
				return
			}
			e := failure(ctx, err, requestID(request))
			if started && resume == nil {
				yield(nil, e)
				return
			}
			if started {
				e = tries.resume(ctx, e)
			} else {
				e = tries.next(ctx, e, to.Addr != nil)
			}
			if e != nil {
				yield(nil, e)
				return
			}
		}
	}
}
