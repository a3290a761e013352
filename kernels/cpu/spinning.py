"""How long threads spin that wait for each other, which is decided when torch is loaded.

They wait at the end of every parallel loop, some 150 times a pass, and libgomp lets them spin there
for milliseconds. Where another process has the core of the thread waited for, that spins its time
away: beside two busy loops two cores made 1 token/s of 75. Bounded at about 25 microseconds, and
asleep after that, they keep a good part of the speed (bench/busy.py).

torch and numba share the libgomp that torch brings, which reads its settings once, as it is loaded.
A libgomp of numba's own would be told later, but its threads then fight with torch's for the cores:
a pass over 6 rows took 32 ms in place of 20.
"""

from __future__ import annotations

import os
import sys

SPIN_VARIABLE, SPIN_COUNT = "GOMP_SPINCOUNT", "1000"


def load_torch() -> None:
    """Import torch with the bound. Nothing to do where it is loaded, or the user has set his own.

    The environment is left as it was: children inherit nothing.
    """
    if "torch" in sys.modules or SPIN_VARIABLE in os.environ or "OMP_WAIT_POLICY" in os.environ:
        return
    os.environ[SPIN_VARIABLE] = SPIN_COUNT
    try:
        import torch  # noqa: F401
    finally:
        del os.environ[SPIN_VARIABLE]
