// Throughput reads streams at the same time and prints how many tokens came in how many
// seconds, as a line of JSON: throughput ADDRESS MODEL STREAMS TOKENS.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"strconv"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"lowbit"
	pb "lowbit/gen/lowbitv1"
)

func main() {
	address, model := os.Args[1], os.Args[2]
	streams, _ := strconv.Atoi(os.Args[3])
	tokens, _ := strconv.Atoi(os.Args[4])
	client, err := lowbit.New(address)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	read(client, model, 1) // connects
	began := time.Now()
	counts := make([]uint32, streams)
	var all sync.WaitGroup
	for i := range counts {
		all.Add(1)
		go func() {
			defer all.Done()
			counts[i] = read(client, model, tokens)
		}()
	}
	all.Wait()
	seconds := time.Since(began).Seconds()
	var sum uint32
	for _, count := range counts {
		sum += count
	}
	fmt.Printf("{\"tokens\": %d, \"seconds\": %f}\n", sum, seconds)
}

func read(client *lowbit.Client, model string, tokens int) (count uint32) {
	request := lowbit.GenerateText(model, "measure")
	request.Stopping = &pb.Stopping{MaxTokens: proto.Uint32(uint32(tokens)), IgnoreEos: proto.Bool(true)}
	for event, err := range client.Generate(context.Background(), request) {
		if err != nil {
			log.Fatal(err)
		}
		if event.Completed != nil {
			count = event.Completed.Usage.OutputTokens
		}
	}
	return count
}
