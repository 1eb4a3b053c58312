"""The manual page and the shells' completion, made of the parser, and where they are installed below the prefix."""

from __future__ import annotations

import re
from typing import Any

COMPLETIONS = {
    "bash": "share/bash-completion/completions/memconsole",
    "zsh": "share/zsh/site-functions/_memconsole",
    "fish": "share/fish/vendor_completions.d/memconsole.fish",
}
"""Where each shell looks for the completion of a program, below the prefix."""
MAN = "share/man/man1/memconsole.1"


def man_page() -> str:
    """The manual page, in roff."""
    from argparse_manpage.manpage import Manpage

    from memconsole import __version__
    from memconsole.cli.parser import build

    parser: Any = build()
    parser._manpage = []  # noqa: SLF001 - argparse-manpage looks for further sections there
    parser.man_short_description = "guest memory that outlives the hypervisor's kernel"
    text = str(Manpage(parser))
    head = f'.TH MEMCONSOLE 1 "" "memconsole {__version__}" "User Commands"'
    text = re.sub(r"\A\.TH [^\n]*", lambda _: head, text)  # its date would make every build another
    return re.sub(r"^\.SH\n", ".SH ", text, flags=re.MULTILINE)


def completion(shell: str) -> str:
    """The script that has a shell (bash, zsh, fish) ask memconsole what may come next."""
    from argcomplete.shell_integration import shellcode

    script: str = shellcode(["memconsole"], shell=shell)
    return script
