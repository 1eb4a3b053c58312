"""A stand-in for a QEMU before 4.0, which Debian does not have any more: its monitor knows no x-ignore-shared."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
from collections.abc import Iterator
from typing import Any

ANSWERS: dict[str, Any] = {
    "query-status": {"status": "running", "running": True},
    "query-migrate-capabilities": [{"capability": "xbzrle", "state": False}],
}


def commands(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """What comes over a connection, one object after the other, with or without white space between them."""
    text = ""
    while raw := connection.recv(65536):
        text += raw.decode()
        with contextlib.suppress(json.JSONDecodeError):  # the rest of it comes
            while text := text.lstrip():
                command, end = json.JSONDecoder().raw_decode(text)
                text = text[end:]
                yield command


def serve(connection: socket.socket) -> None:
    """Greet, and answer until the other side goes."""

    def say(value: dict[str, Any]) -> None:
        connection.sendall(json.dumps(value).encode() + b"\r\n")

    version = {"qemu": {"major": 3, "minor": 1, "micro": 0}, "package": "stand-in"}
    say({"QMP": {"version": version, "capabilities": []}})
    for command in commands(connection):
        id = {"id": command["id"]} if "id" in command else {}
        say({"return": ANSWERS.get(command["execute"], {}), **id})
        if command["execute"] == "quit":
            sys.exit()


def main() -> None:
    """Answer one connection after another on the socket that ``-qmp`` names."""
    path = next(word for word in sys.argv if word.startswith("unix:")).removeprefix("unix:").partition(",")[0]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                serve(connection)


main()
