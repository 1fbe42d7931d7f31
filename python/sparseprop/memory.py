"""Memory that a step frees, kept for the next one."""

import ctypes
import platform

__all__ = ["keep_freed_memory"]

# names of <malloc.h>, with glibc's numbers
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Keep what this process frees, from now on, rather than hand it back to the system.

    Torch frees every activation of a step and asks for it again in the next one. The C library hands blocks
    above 32 MB, and often smaller ones, back in between, and the system clears each page before it lends it
    again. Kernels that touch memory a few times only feel that most: a fused ResNet-50 step at 95 % sparsity,
    batch 32, takes 3.7 s on two cores without this call and 2.0 s with it (dense: 5.8 and 5.0 s).

    Call it once, before training. It holds for the whole process, which then stays as large as its largest
    moment (that ResNet-50: 5.6 GB rather than 4.3). The command line does it on its own.

    Returns:
        whether it took effect: glibc only. Another allocator put in its place, as jemalloc, has its own ways.

    >>> kept = keep_freed_memory()
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    options = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20))  # -1: never
    return all(mallopt(option, value) == 1 for option, value in options)
