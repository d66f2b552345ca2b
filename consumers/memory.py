"""Keep the daemon's memory that of its experts."""

import ctypes
import logging

logger = logging.getLogger(__name__)

_M_MMAP_THRESHOLD = -3  # from <malloc.h>
LARGE_BLOCK_BYTES = 256 * 1024


def return_large_blocks() -> None:
    """Have glibc give every large block back to the system when it is freed.

    By default it raises that threshold to 32 MiB as it goes; then parts and weights come from the heaps of a dozen
    threads, which fragment and never shrink: 510 instead of 364 MiB for three experts of 9.3 MiB. Another libc: no
    change.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES):
        logger.debug("this libc has no mallopt; memory may grow beyond what the experts need")
