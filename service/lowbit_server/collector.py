"""What the garbage collector of Python need not look at."""

from __future__ import annotations

import gc


def freeze() -> None:
    """Keep all objects that there are now out of later collections, for good.

    Those of imported modules live as long as the process. With them a full collection takes
    0.1 s and more, in which a front answers nobody and a worker makes no tokens.
    """
    gc.collect()
    gc.freeze()
