"""A stand-in for a QEMU before 4.0, which Debian does not have any more: its monitor knows no x-ignore-shared."""

from __future__ import annotations

import json
import socket
import sys
from typing import Any

ANSWERS: dict[str, Any] = {
    "query-status": {"status": "running", "running": True},
    "query-migrate-capabilities": [{"capability": "xbzrle", "state": False}],
}


def main() -> None:
    """Answer one connection after another on the socket that ``-qmp`` names."""
    path = next(word for word in sys.argv if word.startswith("unix:")).removeprefix("unix:").partition(",")[0]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            connection, _ = listener.accept()
            with connection, connection.makefile("rw") as lines:
                version = {"qemu": {"major": 3, "minor": 1, "micro": 0}, "package": "stand-in"}
                print(json.dumps({"QMP": {"version": version, "capabilities": []}}), file=lines, flush=True)
                for line in lines:
                    asked = json.loads(line)
                    answer = {"return": ANSWERS.get(asked["execute"], {}), "id": asked.get("id")}
                    print(json.dumps(answer), file=lines, flush=True)


main()
