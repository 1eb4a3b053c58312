"""A service that has a file in the service manager's fd store, and does nothing else."""

from __future__ import annotations

import os
import signal
import socket

with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
    manager.connect(os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))
    socket.send_fds(manager, [b"FDSTORE=1\nFDNAME=kept"], [os.memfd_create("kept")])
    manager.send(b"READY=1")
signal.pause()
