"""What torch's allocator gives out, for laws of bytes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from torch.autograd.profiler_util import MEMORY_EVENT_NAME
from torch.profiler import ProfilerActivity, profile


def allocated(work: Callable[[], Any]) -> tuple[int, Any]:
    """Returns the bytes that torch's allocator gave out and did not take back, and the result.

    They are summed up from the raw events of memory, those of which bytes are given back being
    negative: to sort events by the operations that caused them takes ten times as long.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        result = work()
        gc.collect()
    events = watched.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == MEMORY_EVENT_NAME), result
