"""Lets gloo's worker threads finish before the interpreter exits.

A gloo worker releases the tensors of a collective after the caller has learned that it is complete, and takes the GIL
to do so. Python ends a thread that asks for the GIL during interpreter shutdown by unwinding its stack. In the middle
of C++ code this calls std::terminate: the process aborts with "terminate called without an active exception".
Destroying the groups does not help: torch's caches for DTensor keep the groups alive, and their threads too.

So an exit handler waits, with the GIL released, until every gloo worker is idle.
"""

from __future__ import annotations

import atexit
import sys
import time
from pathlib import Path

_WORKER = "pt_gloo_runloop"
_INTERVAL_S = 0.005
_TIMEOUT_S = 5.0


def wait_for_workers(timeout_s: float = _TIMEOUT_S) -> bool:
    """Waits, with the GIL released, until every gloo worker of this process has been idle for 5 ms.

    A worker that waits for the GIL or for a core is not idle: the GIL is free, so the worker runs within the 5 ms, and
    its count of context switches changes.

    Args:
        timeout_s: the longest wait, in seconds.
    Returns:
        Whether all workers became idle in time.
    """
    if sys.platform != "linux":
        time.sleep(20 * _INTERVAL_S)
        return True
    deadline_s = time.monotonic() + timeout_s
    previous = _worker_states()
    while time.monotonic() < deadline_s:
        time.sleep(_INTERVAL_S)
        current = _worker_states()
        if current == previous and all(state.startswith("S") for state, _ in current.values()):
            return True
        previous = current
    return False


def _worker_states() -> dict[str, tuple[str, str]]:
    """Returns (state, number of voluntary context switches) of each gloo worker thread."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            fields = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
        except OSError:  # the thread has ended
            continue
        if fields.get("Name") == _WORKER:
            found[task.name] = fields["State"], fields["voluntary_ctxt_switches"]
    return found


# Exit handlers run in reverse order of registration. This one is registered on import, so it runs after the handlers
# of the program.
atexit.register(wait_for_workers)
