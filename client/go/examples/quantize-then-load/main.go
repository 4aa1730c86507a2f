// Quantize-then-load makes a smaller copy, shows what it costs and loads it:
// go run ./examples/quantize-then-load SOURCE TARGET SCHEME.
package main

import (
	"context"
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
	if err := run(context.Background(), client, os.Args[1], os.Args[2], os.Args[3]); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, client *lowbit.Client, source, target, scheme string) error {
	job, err := client.Quantize(ctx, lowbit.QuantizeTo(source, target, scheme))
	if err != nil {
		return err
	}
	for event, err := range client.WatchJob(ctx, job.Id, 0) {
		if err != nil {
			return err
		}
		progress := event.Job.GetProgress()
		fmt.Printf("%s: %d of %d\n", progress.GetPhase(), progress.GetDone(), progress.GetTotal())
	}
	if _, err := client.WaitJob(ctx, job.Id); err != nil {
		return err
	}
	before, err := client.GetModel(ctx, source)
	if err != nil {
		return err
	}
	after, err := client.GetModel(ctx, target)
	if err != nil {
		return err
	}
	fmt.Printf("%d -> %d bytes\n", before.DiskBytes, after.DiskBytes)
	fmt.Printf("perplexity %.2f -> %.2f\n", after.GetQuality().GetBasePerplexity(), after.GetQuality().GetPerplexity())
	replicas, err := lowbit.WaitLoad(client.Load(ctx, lowbit.LoadModel(target)))
	for _, replica := range replicas {
		fmt.Printf("live on %s: %d bytes\n", replica.Worker, replica.LiveBytes)
	}
	return err
}
