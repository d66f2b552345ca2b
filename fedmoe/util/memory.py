"""What glibc keeps of freed memory, and what it gives back.

Fresh pages cost more than the work in them (an update of 9.3 MiB read into fresh memory takes 18 ms, into used memory
3), and kept ones count as the process's. By default glibc decides that as it goes: what it gives back depends on the
largest block freed so far, and every thread fragments a heap of its own.
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
    """Keep freed blocks below `blocks_mib` (at most 32) for the next use, up to `free_mib` at the end of each heap.

    Larger blocks, and what is free beyond that, go back to the system at once. All threads share so many `heaps`; 0
    leaves their number to glibc. Another libc: no change.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = (
        (_M_MMAP_THRESHOLD, blocks_mib * _MIB),
        (_M_TRIM_THRESHOLD, free_mib * _MIB),
        (_M_ARENA_MAX, heaps),
    )
    if mallopt is None or not all(mallopt(name, value) for name, value in settings):
        logger.debug("this libc has no mallopt; memory may grow beyond what is needed")
