"""Control processes beside a libvirtd of a test, where its own files are, with a keeper that outlives them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from memconsole import action_input
from memconsole import actions as do
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.backend.steps import FAULT_VARIABLE
from support.libvirts import Libvirt

CONTROL = f"""
import json, os, sys
from pathlib import Path
import msgspec
from memconsole import action_input
from memconsole.backend.control import Control
from memconsole.backend.custody.holder import KeeperCustody
from memconsole.errors import MemconsoleError
control = Control(Path(sys.argv[1]), KeeperCustody(Path(sys.argv[2])))
os.environ["{FAULT_VARIABLE}"] = sys.argv[3]
codes = []
for each in json.loads(sys.argv[4]):
    action = action_input.decode(each)
    codes += [refusal.code for refusal in control.plan(action).refusals]
    try:
        control.apply(action)
    except MemconsoleError as error:
        print(error, file=sys.stderr)
print(json.dumps({{"codes": codes, "snapshot": msgspec.to_builtins(control.snapshot())}}))
control.close()
"""


class World(NamedTuple):
    """A libvirtd with domains, a keeper, and a runtime directory; control processes come and go."""

    manager: Libvirt
    runtime: Path
    keeper: Path

    def command(self, actions: tuple[do.Action, ...], fault: str = "") -> list[str]:
        places = (str(self.runtime), str(self.keeper))
        told = json.dumps([action_input.encode(each) for each in actions])
        return [sys.executable, "-c", CONTROL, *places, fault, told]

    def control(self, *actions: do.Action) -> tuple[list[str], dict[str, Any]]:
        """What a control process refused of these actions, and its Snapshot after those it did."""
        said = json.loads(self.manager.run(*self.command(actions)).splitlines()[-1])
        return said["codes"], said["snapshot"]

    def dies(self, action: do.Action, fault: str) -> None:
        """A control process that kills itself at a fault point of an action."""
        done = subprocess.run(self.manager.inside(*self.command((action,), fault)), check=False, capture_output=True)
        assert done.returncode == -signal.SIGKILL, (fault, done.stderr)

    def in_custody(self) -> list[str]:
        """What custody holds of regions."""
        custody = KeeperCustody(self.keeper)
        try:
            return sorted(name for name in custody.names() if name.startswith("region:"))
        finally:
            custody.close()
