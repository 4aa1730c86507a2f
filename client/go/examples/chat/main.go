// Chat streams a chat answer: go run ./examples/chat MODEL "question".
package main

import (
	"context"
	"fmt"
	"log"
	"os"

	"google.golang.org/protobuf/proto"

	"lowbit"
	pb "lowbit/gen/lowbitv1"
)

func main() {
	client, err := lowbit.New("")
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()

	request := lowbit.GenerateChat(os.Args[1], lowbit.User(os.Args[2]))
	request.Stopping = &pb.Stopping{MaxTokens: proto.Uint32(200)}
	request.Sampling = &pb.Sampling{Temperature: proto.Float32(0.7), Seed: proto.Uint64(1)}
	for event, err := range client.Generate(context.Background(), request) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Print(event.Text())
		if event.Completed != nil {
			fmt.Printf("\n%d tokens\n", event.Completed.Usage.OutputTokens)
		}
	}
}
