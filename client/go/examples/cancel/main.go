// Cancel leaves a stream early, by leaving its loop and by its context; the slot is free at
// once: go run ./examples/cancel MODEL.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"

	"lowbit"
)

func main() {
	client, err := lowbit.New("")
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	request := lowbit.GenerateText(os.Args[1], "Once upon a time")

	chunks := 0
	for event, err := range client.Generate(context.Background(), request) {
		if err != nil {
			log.Fatal(err)
		}
		if event.Chunk != nil {
			fmt.Print(event.Text())
			chunks++
		}
		if chunks == 5 {
			break
		}
	}
	fmt.Println("\nleft early")

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	for event, err := range client.Generate(ctx, request) {
		if errors.Is(err, lowbit.ErrCancelled) {
			fmt.Println("cancelled")
		} else if err != nil {
			log.Fatal(err)
		}
		if event.Started != nil {
			cancel()
		}
	}
}
