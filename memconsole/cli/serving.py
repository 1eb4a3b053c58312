"""``memconsole serve``: from its options to the control process."""

from __future__ import annotations

import argparse
from pathlib import Path

from memconsole import paths
from memconsole.cli.connect import socket_of
from memconsole.cli.reserved import add_raw


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``memconsole serve``; ``--socket`` is the command line's own."""
    parser.add_argument("--state-dir", metavar="DIR", help="directory of the audit trail and the history")
    parser.add_argument(
        "--mount",
        metavar="DIR",
        nargs="?",
        const="",
        help="show grants as files in DIR/guests and DIR/regions (the runtime directory)",
    )
    parser.add_argument(
        "--foreground", action="store_true", help="stay in the foreground and log to stderr (under systemd: always)"
    )
    parser.add_argument(
        "--custody",
        choices=("auto", "keeper", "systemd"),
        default="auto",
        help="the program that has custody of memory",
    )
    parser.add_argument("--operators", metavar="GROUP", help="group whose members may act (memconsole)")
    parser.add_argument("--viewers", metavar="GROUP", help="group whose members may look (memconsole-view)")
    parser.add_argument(
        "--record",
        metavar="SECONDS",
        type=_seconds,
        default=1.0,
        help="seconds between recorded snapshots (1); 0 records none",
    )
    add_raw(parser, "let regions live in the range of memmap=nn$ss that begins there, through /dev/mem; repeatable")
    parser.add_argument("--metrics-textfile", metavar="FILE", help="also write metrics to this file, for node_exporter")


def _seconds(text: str) -> float:
    value = float(text)
    if value != 0 and not 0.25 <= value <= 86_400:
        raise argparse.ArgumentTypeError("snapshots are recorded every 0.25 to 86400 seconds, or not at all (0)")
    return value


def serve(options: argparse.Namespace) -> int:
    """The control process, in the background once it is ready, or with ``--foreground`` until it is stopped."""
    from memconsole.backend.serve import ServeSettings
    from memconsole.backend.serve import serve as run

    path = socket_of(options).absolute()
    mountpoint = None
    if options.mount is not None:
        mountpoint = Path(options.mount).absolute() if options.mount else path.parent
    return run(
        ServeSettings(
            socket=path,
            state_dir=Path(options.state_dir).absolute() if options.state_dir else paths.state_dir(),
            foreground=options.foreground,
            custody=options.custody,
            operators=options.operators,
            viewers=options.viewers,
            record_s=options.record,
            metrics_textfile=Path(options.metrics_textfile).absolute() if options.metrics_textfile else None,
            mountpoint=mountpoint,
            raw=tuple(options.raw),
        )
    )
