#!/usr/bin/python
"""See DOCUMENTATION."""

from __future__ import annotations

DOCUMENTATION = r"""
module: memory_info
short_description: Take a snapshot of a host's guest memory
description:
  - Returns what C(memconsole snapshot) has of the host, its regions, guests, grants and findings.
options:
  subset:
    description: Only these fields of the snapshot, by their names; all of it if left out.
    type: list
    elements: str
    default: []
  usage:
    description: With the CPU time, threads and I/O of host and guests.
    type: bool
    default: false
  redact:
    description: With pseudonyms for the names of hosts, guests, regions, processes, users and files.
    type: bool
    default: false
extends_documentation_fragment:
  - memconsole.fleet.cli
attributes:
  check_mode:
    description: It changes nothing in either mode.
    support: full
"""

EXAMPLES = r"""
- name: What guests there are, and what is wrong
  memconsole.fleet.memory_info:
    subset: [guests, findings]
  register: memory
"""

RETURN = r"""
snapshot:
  description: The snapshot; docs/snapshot.schema.json of memconsole describes it.
  returned: always
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.memconsole.fleet.plugins.module_utils import cli


def main() -> None:
    """Look, and say."""
    spec = {
        **cli.OPTIONS,
        "subset": {"type": "list", "elements": "str", "default": []},
        "usage": {"type": "bool", "default": False},
        "redact": {"type": "bool", "default": False},
    }
    module = AnsibleModule(argument_spec=spec, supports_check_mode=True)
    command = cli.CommandLine(module)
    subset = module.params["subset"]
    with command.failing():
        options = [f"--{name}" for name in ("usage", "redact") if module.params[name]]
        snapshot = command.ask("snapshot", *options)[1]
    if unknown := sorted(set(subset) - snapshot.keys()):
        module.fail_json(msg=f"a snapshot has no field {unknown[0]!r}; its fields are {', '.join(sorted(snapshot))}")
    module.exit_json(changed=False, snapshot={name: snapshot[name] for name in subset or snapshot})


if __name__ == "__main__":
    main()
