"""Has a wheel install the manual page and the shells' completion (:mod:`.shelldocs`) next to the package.

Loaded by setuptools by its path (pyproject.toml, ``tool.setuptools.cmdclass``), and by nothing else; an editable
install has none of them (``memconsole completion SHELL`` prints the completion).
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """``build_py`` that also makes what is installed next to the package."""

    def run(self) -> None:
        """Build, and add the documents to what a wheel has."""
        super().run()
        if self.editable_mode:
            return
        sys.path.insert(0, str(Path.cwd()))
        from memconsole.cli.shelldocs import COMPLETIONS, MAN, completion, man_page

        directory = Path(self.build_lib).parent / "documents"
        texts = {MAN: man_page(), **{path: completion(shell) for shell, path in COMPLETIONS.items()}}
        files = list(self.distribution.data_files or ())
        for path, text in texts.items():
            made = directory / path
            made.parent.mkdir(parents=True, exist_ok=True)
            made.write_text(text, encoding="utf-8")
            files.append((str(Path(path).parent), [str(made)]))
        self.distribution.data_files = files
