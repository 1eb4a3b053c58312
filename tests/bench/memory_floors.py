"""floor_memory.c as a library."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

from harness import BUILD


def memory_floors() -> ctypes.CDLL:
    """``floor_memcpy``, ``floor_empty``, ``floor_touch`` in ns, and a minimal handler of page faults."""
    BUILD.mkdir(exist_ok=True)
    strict = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-shared", "-fPIC"]
    target = BUILD / "floor_memory.so"
    subprocess.run(["cc", *strict, "-o", target, Path(__file__).parent / "floor_memory.c"], check=True)
    library = ctypes.CDLL(str(target))
    size, number = ctypes.c_uint64, ctypes.c_int
    library.floor_memcpy.argtypes = [size, ctypes.c_uint]
    library.floor_empty.argtypes = [size]
    library.floor_touch.argtypes = [size, size, size]
    library.floor_serve.argtypes = [number, size]
    for function in (library.floor_memcpy, library.floor_empty, library.floor_touch):
        function.restype = size
    return library
