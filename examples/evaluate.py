"""Measure a model against another: python examples/evaluate.py MODEL AGAINST."""

import sys

from lowbit import Client

model, against = sys.argv[1:]
with Client() as client:
    job = client.evaluate(model, against=against)
    report = client.wait_job(job.id).quality
    print(
        f"{model} against {against}: perplexity {report.base_perplexity:.2f} -> "
        f"{report.perplexity:.2f}, KL {report.mean_kl:.4f} nats in the mean, "
        f"{report.p99_kl:.4f} at the 99th percentile, top-1 {report.top1_agreement:.1%}"
    )
    print(
        f"{report.base_live_bytes} -> {report.live_bytes} bytes live, decode "
        f"{report.base_decode_tokens_per_second:.1f} -> {report.decode_tokens_per_second:.1f} "
        "tokens/s"
    )
