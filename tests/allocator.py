"""What torch's allocator gives out, for laws of bytes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def allocated(work: Callable[[], Any]) -> tuple[int, Any]:
    """Returns the bytes that torch's allocator gave out and did not take back, and the result."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        result = work()
        gc.collect()
    return sum(event.self_cpu_memory_usage for event in watched.key_averages()), result
