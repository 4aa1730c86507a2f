"""Make a smaller copy, see what it costs, load it: python ... SOURCE TARGET SCHEME."""

import sys

from lowbit import Client

source, target, scheme = sys.argv[1:]
with Client() as client:
    job = client.quantize(source, target, scheme)
    for event in client.watch_job(job.id):
        progress = event.job.progress
        print(f"phase {progress.phase}: {progress.done} of {progress.total}")
    client.wait_job(job.id)
    before, after = client.get_model(source), client.get_model(target)
    print(f"{before.disk_bytes} -> {after.disk_bytes} bytes")
    print(f"perplexity {after.quality.base_perplexity:.2f} -> {after.quality.perplexity:.2f}")
    for replica in client.load(target).wait():
        print(f"live on {replica.worker}: {replica.live_bytes} bytes")
