"""Lets gloo's worker threads finish before the interpreter does.

A gloo worker drops the tensors of a collective after the caller has been told that it is complete. For that it takes
the GIL. Python ends a thread that asks for the GIL while the interpreter shuts down, by unwinding its stack; C++ calls
std::terminate in the middle of it: "terminate called without an active exception", and the process aborts. Destroying
the groups does not help: torch's caches of DTensor keep them alive, and their threads with them.

So an exit handler waits, with the GIL free, until every gloo worker sleeps.
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
    """Waits until no gloo worker of this process has run for 5 ms, with the GIL free; returns whether that came true.

    A worker that waits for the GIL or for a core is not asleep: the GIL is free, so it runs, and its counter of context
    switches changes.
    """
    if sys.platform != "linux":
        time.sleep(20 * _INTERVAL_S)
        return True
    deadline_s = time.monotonic() + timeout_s
    before = _workers()
    while time.monotonic() < deadline_s:
        time.sleep(_INTERVAL_S)
        now = _workers()
        if now == before and all(state.startswith("S") for state, _ in now.values()):
            return True
        before = now
    return False


def _workers() -> dict[str, tuple[str, str]]:
    """Returns the state and the number of voluntary context switches of each gloo worker thread."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            fields = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
        except OSError:  # the thread has ended
            continue
        if fields.get("Name") == _WORKER:
            found[task.name] = fields["State"], fields["voluntary_ctxt_switches"]
    return found


# Handlers run last in, first out: registered on import, this one runs after those of the program.
atexit.register(wait_for_workers)
