"""Quantize with GPTQ on text of your own: python examples/calibrate.py SOURCE TARGET FILE [FIELD].

FILE lies in an import root of the server: plain text, or JSON lines whose FIELD holds the text.
"""

import sys

from lowbit import Client, scheme
from lowbit.v1.quantization_pb2 import Calibration, TextFile, TextSource

source, target, path, *field = sys.argv[1:]
text = TextSource(file=TextFile(path=path, field="".join(field)))
calibration = Calibration(source=text, samples=64, sequence_tokens=256)
with Client() as client:
    job = client.quantize(
        source, target, scheme("gptq", bits=4, group_size=64), calibration=calibration
    )
    report = client.wait_job(job.id).quality
    print(
        f"{target}: perplexity {report.base_perplexity:.2f} -> {report.perplexity:.2f}, "
        f"KL {report.mean_kl:.4f} nats in the mean, {report.disk_bytes} bytes on disk"
    )
