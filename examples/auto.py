"""Let the server choose the scheme: python examples/auto.py SOURCE TARGET BUDGET_BYTES MAX_KL."""

import sys

from lowbit import Client, JobFailedError, scheme
from lowbit.v1.quantization_pb2 import QualityGate

source, target, budget, max_kl = sys.argv[1:]
with Client() as client:
    wanted = scheme("auto", max_live_bytes=int(budget))
    gate = QualityGate(max_mean_kl=float(max_kl))
    job = client.quantize(source, target, wanted, gate=gate)
    try:
        job = client.wait_job(job.id)
    except JobFailedError as error:
        job = error.job
    for trial in job.trials:
        print(f"{trial.scheme}: {trial.live_bytes} bytes live, {trial.verdict}")
