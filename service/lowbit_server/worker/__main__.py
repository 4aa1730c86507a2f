"""`python -m lowbit_server.worker`: the process."""

from __future__ import annotations

import os
import signal
import sys
import threading

import structlog

from lowbit_server import logs
from lowbit_server.worker.allocator import keep_freed_memory
from lowbit_server.worker.device import find_device
from lowbit_server.worker.inbox import Inbox
from lowbit_server.worker.loader import Loader
from lowbit_server.worker.loop import StepLoop
from lowbit_server.worker.service import serve
from lowbit_server.worker.settings import parse


def main() -> None:
    """Serve until standard input ends or SIGTERM comes.

    SIGTERM keeps its default action, which needs nothing of a busy interpreter: there is
    nothing to save. An interrupt of the terminal reaches the whole process group; it is
    for the front, which lets running requests end first.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = parse(sys.argv[1:])
    # Read by torch and by the Hugging Face libraries when they are imported.
    # Large pages: reading all weights for each token, the processor would look up many small.
    os.environ.update(
        OMP_NUM_THREADS=str(settings.threads), HF_HUB_OFFLINE="1", THP_MEM_ALLOC_ENABLE="1"
    )
    keep_freed_memory()
    threading.Thread(target=_end_with_stdin, name="stdin", daemon=True).start()
    logs.configure("info")
    inbox = Inbox()
    device = find_device(settings.device)
    loop = StepLoop(inbox, Loader(settings, device, inbox), device)
    server = serve(settings.socket, inbox)
    structlog.get_logger().info("serving", device=settings.device, threads=settings.threads)
    try:
        loop.run()
    except BaseException:  # noqa: BLE001  (it ends here in any case)
        structlog.get_logger().exception("the step loop broke")
        # Not sys.exit: other threads would keep a process that cannot make tokens.
        os._exit(1)
    finally:
        del server


def _end_with_stdin() -> None:
    """End the process when the launcher's end of the pipe is gone, however that came."""
    while os.read(0, 4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
