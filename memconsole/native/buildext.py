"""Builds the native part: the cffi extension ``_core`` from core.cdef and the C sources, and the C programs beside it.

Loaded by setuptools by its path (pyproject.toml, ``tool.setuptools.cmdclass``), so it imports nothing of memconsole.
The programs are static, without Python, and land in ``bin/`` of this package: in the tree for an editable install, in
the wheel otherwise.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

NATIVE = Path("memconsole/native")
CFLAGS = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-pthread"]
PROGRAMS = {
    "memconsole-canary": ["canary.c"],
    "memconsole-fuse": [
        "fuse.c",
        "fuse_checks.c",
        "fuse_control.c",
        "fuse_entries.c",
        "fuse_mount.c",
        "fuse_names.c",
        "fuse_open.c",
        "fuse_pages.c",
        "fuse_requests.c",
        "fuse_tree.c",
    ],
    "memconsole-guard": ["guard.c"],
    "memconsole-keeper": ["keeper.c"],
    "memconsole-resume": [
        "resume.c",
        "resume_arena.c",
        "resume_cargo.c",
        "resume_custody.c",
        "extents.c",
        "pagescan.c",
        "runs.c",
        "query.c",
    ],
}
WITH_CORE = {"memconsole-fuse"}
"""Programs that the extension's own C sources are linked into: they know nothing of Python."""


def _declarations() -> list[str]:
    return sorted(str(path) for pattern in ("**/*.h", "**/*.cdef") for path in NATIVE.glob(pattern))


class BuildExt(build_ext):
    """``build_ext`` that makes the cffi glue first and the programs afterwards."""

    def finalize_options(self) -> None:
        """Every header and declaration file is a dependency: it goes into the sdist, and its change rebuilds."""
        super().finalize_options()
        for extension in self.extensions:
            extension.depends = [*extension.depends, *_declarations()]

    def build_extensions(self) -> None:
        """Without the library path of the Python that builds it, which is no host's."""
        linker = self.compiler.linker_so
        self.compiler.linker_so = [word for word in linker if not word.startswith(("-Wl,-rpath", "-Wl,-R"))]
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        """Emits the glue for core.cdef into the build directory and compiles it with the C sources."""
        from cffi import FFI

        glue = Path(self.build_temp) / "_core.c"
        glue.parent.mkdir(parents=True, exist_ok=True)
        ffi = FFI()
        ffi.cdef((NATIVE / "core.cdef").read_text())
        ffi.set_source(ext.name, '#include "core.h"')
        ffi.emit_c_code(str(glue))
        ext.sources = [str(glue), *ext.sources]
        super().build_extension(ext)

    def run(self) -> None:
        """The extension, then the programs."""
        super().run()
        for name, path in self._programs().items():
            path.parent.mkdir(parents=True, exist_ok=True)
            # a running program cannot be written over, but its name can be given to another file
            fresh = path.absolute().with_name(f".{name}.new")
            sources = [*PROGRAMS[name], *(self._core() if name in WITH_CORE else [])]
            subprocess.run(["cc", *CFLAGS, "-static", "-o", fresh, *sources], cwd=NATIVE, check=True)
            fresh.replace(path)

    def get_source_files(self) -> list[str]:
        """Also the programs' sources and the vendored files' notices, for the sdist."""
        programs = [str(NATIVE / source) for sources in PROGRAMS.values() for source in sources]
        return [*super().get_source_files(), *programs, str(NATIVE / "third_party/README")]

    def get_outputs(self) -> list[str]:
        """Also the programs, for the wheel."""
        return [*super().get_outputs(), *(str(path) for path in self._programs().values())]

    def _core(self) -> list[str]:
        sources = [Path(source) for extension in self.extensions for source in extension.sources]
        return [source.name for source in sources if source.parent == NATIVE]

    def _programs(self) -> dict[str, Path]:
        root = Path() if self.inplace or self.editable_mode else Path(self.build_lib)
        return {name: root / NATIVE / "bin" / name for name in PROGRAMS}
