#!/usr/bin/python
"""See DOCUMENTATION; it runs on the controller alone, as the action of the same name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: roll_record
short_description: Write down where a host of a roll is, and the report over all of them
description:
  - Keeps a file for each host in a directory of the controller, and makes a report of them, as JSON and as a page.
  - The report is whole at any moment. A host of which nothing was written down yet is V(waiting), also where the roll
    was cut. What a roll of another title wrote down is no part of it.
  - The report has a row for each host. What is long of it (its report, its timeline) is in files in C(hosts).
options:
  directory:
    description: The directory on the controller; it is made where it is not there.
    type: path
    required: true
  hosts:
    description: All hosts of the roll, in order, which the report is over.
    type: list
    elements: str
    required: true
  state:
    description: Where this host is now; nothing is written down of it if left out.
    type: str
    choices: [waiting, refused, begun, done, unchanged, failed]
  why:
    description: Why it is there.
    type: str
    default: ""
  facts:
    description: What is known of it besides.
    type: dict
    default: {}
  title:
    description: What the report is called.
    type: str
    default: Roll
author:
  - the memconsole developers (!UNKNOWN)
attributes:
  check_mode:
    description: Nothing is written down, since every host stays where it is.
    support: full
"""

EXAMPLES = r"""
- name: It is about to jump
  memconsole.fleet.roll_record:
    directory: roll-report
    state: begun
    hosts: "{{ groups.memconsole }}"
"""

RETURN = r"""
states:
  description: How many hosts are in each state.
  returned: unless in check mode
  type: dict
"""
