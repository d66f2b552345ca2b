"""Tunes how much freed memory glibc keeps, and how much it returns to the system.

Fresh pages cost more than the work on them (reading an update of 9.3 MiB takes 18 ms into fresh memory, 3 ms into used
memory), but kept pages count as memory of the process. By default glibc adapts its limit to the largest block freed so
far, and each thread has its own fragmented heap.
"""

import ctypes
import logging

logger = logging.getLogger(__name__)

# From <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_MIB = 1024 * 1024


def keep_freed(*, blocks_mib: int, free_mib: int, heaps: int = 0) -> None:
    """Keep freed blocks below `blocks_mib` (at most 32) for reuse, and up to `free_mib` at the end of each heap.

    Larger blocks, and more free memory at a heap's end, are returned to the system at once. All threads share `heaps`
    heaps; 0 leaves the number to glibc. With another libc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = (
        (_M_MMAP_THRESHOLD, blocks_mib * _MIB),
        (_M_TRIM_THRESHOLD, free_mib * _MIB),
        (_M_ARENA_MAX, heaps),
    )
    if mallopt is None or not all(mallopt(name, value) for name, value in settings):
        logger.debug("mallopt is missing or refused a setting; memory may grow beyond what is needed")
