// Errors shows that what goes wrong has a kind and a reason: go run ./examples/errors.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"

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
	ctx := context.Background()

	request := lowbit.GenerateText("no-such-model", "hello")
	_, err = lowbit.ReadText(client.Generate(ctx, request))
	if errors.Is(err, lowbit.ErrModelNotFound) {
		fmt.Println(err)
	}

	request.Sampling = &pb.Sampling{Temperature: proto.Float32(-1), TopP: proto.Float32(2)}
	_, err = lowbit.ReadText(client.Generate(ctx, request))
	var failed *lowbit.Error
	if errors.As(err, &failed) {
		for _, violation := range failed.Violations {
			fmt.Printf("%s: %s\n", violation.Field, violation.Description)
		}
	}

	_, err = lowbit.WaitLoad(client.Load(ctx, lowbit.LoadModel("no-such-model")))
	if errors.As(err, &failed) {
		fmt.Printf("%s: %s\n", failed.Code, failed.Reason)
	}
}
