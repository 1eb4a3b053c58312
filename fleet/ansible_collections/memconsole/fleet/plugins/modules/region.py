#!/usr/bin/python
"""See DOCUMENTATION."""

from __future__ import annotations

DOCUMENTATION = r"""
module: region
short_description: Reserve or release a region of guest memory
description:
  - A region is memory set aside under a name, which guests are granted, and which outlives the kernel in a handoff.
  - A region is never resized. One that is there with another size is a failure, and so is one that is to be released
    while guests have grants of it.
options:
  name:
    description: The name of the region.
    type: str
    required: true
  state:
    description: V(present) reserves it where it is not there, V(absent) releases it, contents and all.
    type: str
    choices: [present, absent]
    default: present
  size:
    description: Its size, such as V(64M); wanted where it is not there yet.
    type: str
  page_size:
    description: The size of its pages, such as V(2M) for hugetlb pages, which no handoff carries.
    type: str
  node:
    description: The NUMA node that its memory is taken from.
    type: int
  prefault:
    description: Put every page in place at once.
    type: bool
    default: false
  path:
    description:
      - Show it as this file below C(files) on the mount of the host's service, to a user of the host.
      - A region that is there and is another file, or none, is a failure.
    type: str
  owner:
    description: The user whose file it is, as V(memcache) or V(memcache:cache); root, if left out.
    type: str
  mode:
    description: The permissions of the file, in octal, quoted; V(0600), if left out.
    type: str
  quota:
    description: The most that the owner may have in files from now on, such as V(4G).
    type: str
extends_documentation_fragment:
  - memconsole.fleet.cli
attributes:
  check_mode:
    description: The plan of the action is returned as RV(plan), and nothing is changed.
    support: full
"""

EXAMPLES = r"""
- name: Memory for a database
  memconsole.fleet.region:
    name: web
    size: 64M
    prefault: true

- name: The file of a cache
  memconsole.fleet.region:
    name: cache
    size: 1G
    path: mc/cache
    owner: memcache

- name: No more
  memconsole.fleet.region:
    name: web
    state: absent
"""

RETURN = r"""
region:
  description: The region as it was found, if it was there.
  returned: when it was there
  type: dict
outcome:
  description: What was done.
  returned: when something was
  type: dict
plan:
  description: What would be done.
  returned: in check mode
  type: dict
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.common.text.formatters import human_to_bytes
from ansible_collections.memconsole.fleet.plugins.module_utils import cli


def wanted(params: dict[str, Any]) -> list[str]:
    """The command that reserves it."""
    words = ["reserve", params["name"], params["size"]]
    for name in ("page_size", "node", "path", "owner", "mode", "quota"):
        if params[name] is not None:
            words += [f"--{name.replace('_', '-')}", str(params[name])]
    return [*words, *(["--prefault"] if params["prefault"] else [])]


def differing(params: dict[str, Any], region: dict[str, Any]) -> str:
    """In what a region is another one than is wanted, in a sentence; empty where it is not."""
    for name, unit in (("size", "bytes"), ("page_size", "bytes")):
        if params[name] is not None and human_to_bytes(params[name]) != region[name]:
            return (
                f"region {region['name']} has a {name.replace('_', ' ')} of {region[name]} {unit}, not {params[name]}"
            )
    if params["node"] is not None and params["node"] != region["node"]:
        return f"region {region['name']} is of node {region['node']}, not {params['node']}"
    file = region.get("file") or {"path": "none", "mode": 0}
    if params["path"] is not None and params["path"] != file["path"]:
        return f"region {region['name']} is file {file['path']}, not {params['path']}"
    if params["path"] is not None and int(params["mode"] or "0600", 8) != file["mode"]:
        return f"region {region['name']} has permissions {file['mode']:04o}, not {params['mode'] or '0600'}"
    return ""


def bring(command: cli.CommandLine) -> dict[str, Any]:
    """Do what is not so yet; what it came to.

    Raises:
        cli.Failed: it was refused, or failed, or there is another region of this name.
    """
    params = command.module.params
    listed = command.ask("regions", "--json")[1]
    region = next((each for each in listed if each["name"] == params["name"]), None)
    if params["state"] == "absent":
        return {"changed": False} if region is None else command.act("release", params["name"]) | {"region": region}
    if region is None:
        if params["size"] is None:
            raise cli.Failed(f"there is no region {params['name']}, and no size to reserve one of", cli.FAILED, {})
        return command.act(*wanted(params))
    if other := differing(params, region):
        raise cli.Failed(f"{other}; a region is never resized: release it first", cli.FAILED, {})
    return {"changed": False, "region": region}


def main() -> None:
    """Bring the region about."""
    spec = {
        **cli.OPTIONS,
        "name": {"type": "str", "required": True},
        "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        "size": {"type": "str"},
        "page_size": {"type": "str"},
        "node": {"type": "int"},
        "prefault": {"type": "bool", "default": False},
        **{name: {"type": "str"} for name in ("path", "owner", "mode", "quota")},
    }
    module = AnsibleModule(argument_spec=spec, supports_check_mode=True)
    command = cli.CommandLine(module)
    with command.failing():
        done = bring(command)
    module.exit_json(**done)


if __name__ == "__main__":
    main()
