package lowbit

import (
	"iter"
	"slices"

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
	for message, err := range progress {
		if err != nil {
			return nil, err
		}
		at := slices.IndexFunc(last, func(other *pb.LoadResponse) bool {
			return other.Device == message.Device && other.Worker == message.Worker
		})
		if at < 0 {
			last = append(last, message)
		} else {
			last[at] = message
		}
	}
	return last, nil
}

func events(messages iter.Seq2[*pb.GenerateResponse, error]) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		for message, err := range messages {
			event := eventOf(message)
			if event == (Event{}) && err == nil {
				continue // of a newer server
			}
			if !yield(event, err) {
				return
			}
		}
	}
}

func eventOf(message *pb.GenerateResponse) Event {
	event := Event{
		Started: message.GetStarted(), Finished: message.GetOutputFinished(), Completed: message.GetCompleted(),
	}
	if delta := message.GetDelta(); delta != nil {
		event.Chunk = &Chunk{Text: delta.Text, Tokens: delta.Tokens, OutputIndex: delta.OutputIndex}
		for _, token := range delta.Tokens {
			event.Chunk.TokenIDs = append(event.Chunk.TokenIDs, token.Id)
		}
	}
	return event
}
