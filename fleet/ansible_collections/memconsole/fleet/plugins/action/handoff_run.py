"""The controller's part of handoff_run: begin the handoff on the host, wait over the jump, and say what came of it."""

from __future__ import annotations

import time
from typing import Any

from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.action import ActionBase

TRIES = 3
"""How often a host is asked to begin that cannot be reached."""
MODULE = "memconsole.fleet.handoff_run"
LONGER = 4
"""How many times as long as the last handoff the next one may take."""


class ActionModule(ActionBase):  # type: ignore[misc]  # Ansible's is untyped
    """Runs the module until the host is back."""

    TRANSFERS_FILES = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """The result of the task."""
        super().run(tmp, task_vars)
        arguments, variables = dict(self._task.args), task_vars or {}
        begun, wait = arguments.pop("begun", None), boolean(arguments.pop("wait", True))
        result = self._begun(arguments, variables) if begun is None else {**begun}
        result.pop("diff", None)
        job = result.get("job")
        if job is not None and (wait or begun is not None):
            del result["job"]
            result |= self._awaited(arguments, variables, job, self._deadline(result))
            if not result.get("failed") and (missed := self._missed(result)):
                result |= {"failed": True, "msg": missed}
            result["changed"] = True
            for name in ("looked", "answers", "jumped", "over", "ended", "said", "whole", "wrong"):
                result.pop(name, None)
        if self._task.diff and (begun is None or job is not None) and result.get("before") and result.get("after"):
            result["diff"] = {"before": result["before"], "after": result["after"]}
        return result

    def _begun(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """What the host says of a handoff that was begun, or why there is none; a job has the time of its beginning."""
        # One that was begun, and whose answer was lost, is found again: it is under way, or its kernel runs.
        for left in reversed(range(TRIES)):
            try:
                result: dict[str, Any] = self._execute_module(MODULE, arguments, task_vars=variables)
                break
            except AnsibleConnectionFailure as error:
                if not left:
                    return {"failed": True, "msg": f"it cannot be reached: {error}"}
                self._forget_connection()
                time.sleep(float(arguments.get("interval", 2)))
        if result.get("failed"):
            result.pop("job", None)
        elif result.get("job") is not None:
            result["job"] |= {"since_s": time.monotonic()}
            result["msg"] = "it was begun"
        return result

    def _deadline(self, begun: dict[str, Any]) -> float:
        """Seconds that a host has: as was said, else what the last handoff took, several times."""
        if (said := self._task.args.get("timeout")) is not None:
            return float(said)
        last = begun.get("report") or {"phases": []}
        took_ns = max((phase["end_ns"] or phase["start_ns"] for phase in last["phases"]), default=0)
        return max(float(self._task.args.get("least_timeout", 600)), LONGER * took_ns / 1e9)

    def _awaited(
        self, arguments: dict[str, Any], variables: dict[str, Any], job: dict[str, Any], within: float
    ) -> dict[str, Any]:
        """What the host says when the handoff has ended or is given up, and why it failed, if it did."""
        interval = float(arguments.get("interval", 2))
        while True:
            found = self._looked(arguments | {"job": job}, variables)
            waited = time.monotonic() - float(job["since_s"])
            why = self._ended_in(found)
            if not why and not found.get("over") and waited > within:
                why = f"the host is not back within {within:.0f} s: {found.get('msg') or 'the handoff goes on'}"
            if why or found.get("over"):
                told = (
                    {"failed": True, "msg": why} if why else {"msg": f"done, {len(found['report']['guests'])} guests"}
                )
                return found | told | {"deadline_s": within, "waited_s": round(waited, 3)}
            time.sleep(interval)

    def _looked(self, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """One look; a host that cannot be reached says nothing."""
        try:
            found: dict[str, Any] = self._execute_module(MODULE, arguments, task_vars=variables)
        except AnsibleConnectionFailure as error:
            found = {"msg": f"it cannot be reached: {error}"}
        except AnsibleError as error:
            found = {"msg": str(error)}
        if found.get("looked"):
            return found
        self._forget_connection()
        return {"msg": found.get("msg", "")}

    def _forget_connection(self) -> None:
        """Leave the connection, and the directory that was made over it: both may be of the kernel before."""
        self._connection._shell.tmpdir = None  # noqa: SLF001 - as ansible.builtin.reboot does
        if getattr(self._connection, "transport", "") == "ssh":
            self._connection.reset()

    def _ended_in(self, found: dict[str, Any]) -> str:
        """Why a handoff will not be over any more; empty where it may, or is."""
        report = found.get("report")
        if found.get("ended"):
            return f"exit code {found['ended']}: {found['said'].strip()}"
        if not found.get("answers"):
            return ""
        if report is not None and report["state"] == "failed":
            return f"it failed and was undone, guests run where they were: {report['why']}"
        if found["jumped"] and report is None:
            return "the host came back without a handoff: it booted anew, and what its guests had is lost"
        if found.get("ended") == 0 and not found["over"]:
            return "the command ended, and the host did not jump"
        return ""

    def _missed(self, result: dict[str, Any]) -> str:
        """What a handoff that is over lacks: the kernel that was to run, guests, memory, devices; empty: nothing."""
        rehearsed = boolean(self._task.args.get("rehearse", False))
        runs, wanted = result["after"]["kernel"], result["plan"]["to_kernel"]
        if not rehearsed and runs != wanted:
            return f"the host runs {runs}, not {wanted}"
        if not result["whole"]:
            lost = [guest["name"] for guest in result["report"]["guests"] if not guest["back"]]
            return f"not everything came back: {', '.join(lost) or result['report']['why'] or 'see the report'}"
        spoiled = [f"{name} counts {count} wrong bytes" for name, count in result["wrong"].items()]
        return f"memory of a canary is not what it was: {', '.join(spoiled)}" if spoiled else ""
