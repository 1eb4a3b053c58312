"""Make the pictures of README.md and docs/tour.md, of a host where something happens, by the program itself.

Usage: tour_pictures.py [--check] (``make tour-pictures``)

A service of its own has two guests, a region that one of them maps, one that is free, and a rehearsal behind it.
``docs/tour/made-of.json`` says what determined the pictures; ``--check`` says which of that is
another by now (exit code 1), and makes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.services import Service, services
from support.sitting import guests_of, note_guests

from memconsole.backend.wire.client import Client
from memconsole.backend.wire.remote import Remote
from memconsole.fleet import Fleet, Member
from memconsole.views import headless

ROOT = Path(__file__).resolve().parent.parent
MADE_OF = ROOT / "docs" / "tour" / "made-of.json"
SIZE = "120x34"
PICTURES = {
    "docs/console.svg": ("overview", ""),
    "docs/pfnmap.svg": ("pfn", "region:extra"),
    "docs/tour/guests.svg": ("guests", ""),
    "docs/tour/guest.svg": ("guests", "guest:canary-a"),
    "docs/tour/handoff.svg": ("handoff", ""),
    "docs/tour/events.svg": ("events", ""),
}
"""Each picture, and the view and subject that it is of."""
HOSTS = "docs/hosts.svg"
"""The picture of many hosts: three services, and one that no name resolves to."""
HOSTS_SIZE = (172, 14)
SOURCES = (
    "memconsole/views",
    "memconsole/fields.py",
    "memconsole/device_fields.py",
    "memconsole/guest_fields.py",
    "memconsole/field.py",
    "tools/tour_pictures.py",
)
"""What determines how the pictures look."""


def digests() -> dict[str, str]:
    """A digest of each file that determines the pictures."""
    files = (path for source in SOURCES for path in _files(ROOT / source))
    return {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files}


def _files(path: Path) -> Iterator[Path]:
    return iter(sorted(path.rglob("*.py"))) if path.is_dir() else iter([path])


def check() -> int:
    """Say what the pictures were made of and is another by now."""
    made = json.loads(MADE_OF.read_text()) if MADE_OF.exists() else {}
    here = digests()
    stale = sorted(name for name in made.keys() | here.keys() if made.get(name) != here.get(name))
    for name in stale:
        print(f"{name} is another than the one that the pictures were made of")
    if stale:
        print("make tour-pictures makes them anew")
    return 1 if stale else 0


def _run(service: Service, *words: str) -> None:
    ended = subprocess.run(service.command(*words), capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{words}: {ended.stdout}{ended.stderr}")


def _draw_hosts(first: Service) -> None:
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(services()) for _ in range(2)]
        for other in others:
            other.start()
        _run(others[0], "guest", "start", "cache", "--memory", "64M")
        _run(others[1], "reserve", "spare", "256M")
        members = [Member(f"hv{number}", each.client) for number, each in enumerate((first, *others), 1)]
        members.append(Member("hv4", lambda: Client(Remote("hv4.invalid"))))
        fleet = stack.enter_context(contextlib.closing(Fleet(members)))
        fleet.start()
        fleet.wait(60.0)
        (ROOT / HOSTS).write_text(headless.render(fleet, "hosts", "svg", HOSTS_SIZE), encoding="utf-8")
        print(HOSTS)
        for other in others:
            note_guests(other)


def make() -> int:
    """Bring the host about and draw it."""
    MADE_OF.parent.mkdir(exist_ok=True)
    with services() as service:
        guests_of(service)
        _run(service, "reserve", "extra", "64M", "--prefault")
        _run(service, "map", "extra", "canary-a", "--gpa", "1G")
        _run(service, "reserve", "spare", "128M")
        _run(service, "handoff", "rehearse", "--yes")
        note_guests(service)
        _draw_hosts(service)
        for file, (view, subject) in PICTURES.items():
            words = ["snapshot", "--format", "svg", "--view", view, "--size", SIZE, "-o", str(ROOT / file)]
            _run(service, *words, *(["--subject", subject] if subject else []))
            print(file)
    MADE_OF.write_text(json.dumps(digests(), indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(check() if "--check" in sys.argv[1:] else make())
