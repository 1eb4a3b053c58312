"""What an operator may set: keys by their binding's id, and the theme.

Grammar of ``console.toml`` (in ``$XDG_CONFIG_HOME/memconsole``, else ``/etc/memconsole``)::

    theme = "ansi-dark"            any theme the palette lists

    [keys]                         a binding's id and its keys; ``?`` in the console lists the ids
    reserve = "N"
    refresh = "ctrl+r,f5"
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from memconsole.errors import BadFile
from memconsole.model import Value


class Settings(Value, frozen=True):
    """What ``console.toml`` says."""

    theme: str = ""
    keys: dict[str, str] = msgspec.field(default_factory=dict)


def settings_paths() -> tuple[Path, ...]:
    """Where ``console.toml`` is looked for; the first one counts."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return (home / "memconsole" / "console.toml", Path("/etc/memconsole/console.toml"))


def load(paths: Sequence[Path] | None = None) -> Settings:
    """The settings of the first file there is, else the defaults.

    Raises:
        BadFile: it cannot be read, is not TOML, or sets something unknown.
    """
    for path in settings_paths() if paths is None else paths:
        if not path.is_file():
            continue
        try:
            return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), type=Settings)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
            raise BadFile(f"{path} cannot be used", str(error), "correct it or move it away") from None
    return Settings()
