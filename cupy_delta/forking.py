"""What must not be half done when the process forks.

A child gets the forking thread alone, and every lock as another thread held it. So whatever takes
a lock that a child will want (an import, a library's setting) is done under `whole_at_fork`, and a
fork in another thread waits for its end. Short work only: computing goes on while others fork.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401
import os
import threading

# Whoever else has something to do before and after a fork (logging, the threads' pool) is imported
# by now: hooks that are added while a fork waits here would be called after it, but not before.

# Re-entrant: a signal's handler may fork in the thread that holds it.
whole_at_fork = threading.RLock()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=whole_at_fork.acquire,
        after_in_parent=whole_at_fork.release,
        after_in_child=whole_at_fork.release,
    )
