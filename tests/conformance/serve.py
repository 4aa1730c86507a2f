"""A server for an SDK's own tests, until standard input ends.

    python -m tests.conformance.serve NAME=SCRIPT ...

Loads a scripted model NAME for each SCRIPT, which is JSON of `engine.scripted.Script`, and
prints HOST:PORT when all are live.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from lowbit import Client
from lowbit_server.testing import ServerProcess, scripted_model


def main() -> None:
    """Serve."""
    with (
        tempfile.TemporaryDirectory(prefix="lowbit-clients-") as folder,
        ServerProcess(Path(folder, "home"), environment={"LOWBIT_IMPORT_ROOTS": folder}) as server,
    ):
        with Client(server.address) as client:
            for argument in sys.argv[1:]:
                name, script = argument.split("=", 1)
                source = scripted_model(Path(folder, name), **json.loads(script))
                client.wait_job(client.import_model(name, path=str(source)).id)
                client.load(name).wait()
        print(server.address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
