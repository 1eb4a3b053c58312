"""The command line of memconsole, asked for JSON: what the modules of this collection are made of."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DONE, FAILED, USAGE, REFUSED, FINDINGS, NO_CONTROL = 0, 1, 2, 3, 4, 5
"""Exit codes of memconsole, which say what a command came to."""
PLAN = ("action", "cli", "conditions", "effects", "refusals")
HANDOFF = (*PLAN, "from_kernel", "to_kernel")
SNAPSHOT = ("host", "guests", "regions", "findings", "handoff")
"""What modules read of an answer; one that lacks some is of a memconsole that is older than this collection."""

OPTIONS: dict[str, Any] = {"executable": {"type": "path", "default": "memconsole"}, "socket": {"type": "path"}}
KERNEL: dict[str, Any] = {"kernel": {"type": "str"}, "initrd": {"type": "str"}, "append": {"type": "str"}}


_UNKNOWN = re.compile(r"unrecognized arguments: .*|.*invalid choice: .*")
"""How a memconsole says that it does not know a command or an option."""


class Failed(Exception):
    """A command failed: what memconsole says of it, its exit code, and the error's parts where it gave them."""

    def __init__(self, message: str, code: int, error: dict[str, Any]) -> None:
        super().__init__(message)
        self.code = code
        self.error = error


class CommandLine:
    """The memconsole that a module's options name."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module

    def words(self, *words: str) -> list[str]:
        """A whole command."""
        socket = self.module.params["socket"]
        return [self.module.params["executable"], *(["--socket", socket] if socket else []), *words]

    def ask(self, *words: str, codes: tuple[int, ...] = (DONE,)) -> tuple[int, Any]:
        """Run a command; its exit code, which is one of ``codes``, and what it wrote as JSON.

        Raises:
            Failed: it ended with another code, or wrote no JSON; or it does not know the command (``TooOld``).
        """
        code, out, err = self.module.run_command(self.words(*words), handle_exceptions=False)
        try:
            value = json.loads(out)
        except ValueError:
            value = None
        error = value["error"] if isinstance(value, dict) and isinstance(value.get("error"), dict) else {}
        if code == USAGE and (said := _UNKNOWN.search(f"{error.get('what', '')}\n{err}")):
            raise self._too_old(said[0])
        if code not in codes or error or value is None:
            raise Failed(_sentence(error) or err.strip() or f"memconsole ended with exit code {code}", code, error)
        return code, value

    def answers(self) -> None:
        """Nothing, where the host's control process answers; a command that only looks does it itself where none does.

        Raises:
            Failed: none answers.
        """
        code, rows = self.ask("hosts", "--json", codes=(DONE, FAILED))
        if code != DONE:
            raise Failed(rows[0]["why"], NO_CONTROL, {"code": "NoControl"})

    def plan(self, *words: str) -> dict[str, Any]:
        """The plan of an action: its effects, or the refusals that it has.

        Raises:
            Failed: there is none.
        """
        plan = self.ask(*_with(words, "--dry-run", "--json"), codes=(DONE, REFUSED))[1]
        found = self._whole(plan, "plan", HANDOFF if words[0] == "handoff" else PLAN)
        if words[:2] == ("handoff", "run") and not found["refusals"] and not found["to_kernel"]:
            why = "its plan names no kernel: its service may be older than the command, or the image does not say"
            raise Failed(f"{why} (restart the service: systemctl restart memconsole)", FAILED, {"code": "NoKernel"})
        return found

    def _whole(self, value: Any, what: str, names: tuple[str, ...]) -> dict[str, Any]:
        """An answer that has everything that is read of it."""
        lacks = [name for name in names if not isinstance(value, dict) or name not in value]
        if lacks:
            raise self._too_old(f"its {what} says nothing of {', '.join(lacks)}")
        found: dict[str, Any] = value
        return found

    def _too_old(self, why: str) -> Failed:
        """The failure of a memconsole that knows less than this collection asks, by its version."""
        _, out, _ = self.module.run_command([self.module.params["executable"], "--version"], handle_exceptions=False)
        said = out.strip() or "memconsole of a version that it does not tell"
        what = f"{said} on this host is older than the collection memconsole.fleet: {why}"
        return Failed(f"{what} (upgrade it, and restart its service)", USAGE, {"code": "TooOld"})

    def snapshot(self) -> dict[str, Any]:
        """Everything that the host shows.

        Raises:
            Failed: it shows nothing.
        """
        return self._whole(self.ask("snapshot")[1], "snapshot", SNAPSHOT)

    def last_handoff(self, *, picture: bool) -> dict[str, Any]:
        """The last handoff: its report, whether all came back, what is found now, and its timeline if that is wanted.

        Raises:
            Failed: the host does not say.
        """
        words, drawn = ["handoff", "report", "--json"], ""
        with tempfile.NamedTemporaryFile("r", suffix=".svg", encoding="utf-8") as file:
            try:
                code, report = self.ask(*words, *(["--picture", file.name] if picture else []), codes=(DONE, FINDINGS))
            except Failed as failed:
                if failed.error.get("code") != "NotFound":
                    raise
                code, report = FAILED, None
            drawn = file.read()
        findings = self.ask("audit", "--json", codes=(DONE, FINDINGS))[1]
        found: dict[str, Any] = {"made": report is not None, "whole": code == DONE, "findings": findings}
        if report is not None:
            stood = {guest["name"]: guest["blackout_ns"] for guest in report["guests"]}
            found.update(report=report, blackouts=stood, **({"picture": drawn} if picture else {}))
        return found

    def act(self, *words: str) -> dict[str, Any]:
        """Do an action, or in check mode plan it, and end the module with what changed.

        Raises:
            Failed: it was refused, or failed.
        """
        if not self.module.check_mode:
            outcome: dict[str, Any] = self.ask(*_with(words, "--yes", "--json"))[1]
            return {"changed": True, "msg": outcome["text"], "outcome": outcome}
        plan = self.plan(*words)
        if plan["refusals"]:
            first = plan["refusals"][0]
            raise Failed(_sentence(first), REFUSED, first)
        return {"changed": True, "msg": f"would do: {plan['cli']}", "plan": plan}

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """End the module as failed where a command does, with what memconsole said, or where there is none."""
        try:
            yield
        except Failed as failed:
            self.module.fail_json(msg=str(failed), rc=failed.code, error=failed.error)
        except OSError as error:
            executable = self.module.params["executable"]
            self.module.fail_json(msg=f"{executable} cannot be run: {error.strerror}", rc=127, error={})


def _with(words: tuple[str, ...], *options: str) -> list[str]:
    """A command with more options; what follows ``--`` is the VMM's."""
    at = words.index("--") if "--" in words else len(words)
    return [*words[:at], *options, *words[at:]]


def kernel_words(params: dict[str, Any]) -> list[str]:
    """The options that name the next kernel."""
    return [word for name in KERNEL if params[name] for word in (f"--{name}", params[name])]


def runs_already(plan: dict[str, Any]) -> bool:
    """Whether the kernel that a handoff would boot is known to be the one that runs."""
    return bool(plan["from_kernel"]) and plan["from_kernel"] == plan["to_kernel"]


def refused_by(plan: dict[str, Any]) -> str:
    """The first refusal of a plan in a sentence, and how many more there are; empty where there is none."""
    refusals = plan["refusals"]
    more = f" ({len(refusals) - 1} more)" if len(refusals) > 1 else ""
    return f"{refusals[0]['code']}: {_sentence(refusals[0])}{more}" if refusals else ""


def shown(snapshot: dict[str, Any], kernel: str) -> dict[str, Any]:
    """What a handoff must not change of a host, beside the kernel that it does: for diff mode."""
    return {
        "kernel": kernel or snapshot["host"]["kernel"],
        "guests": {guest["name"]: f"{guest['kind']}, {guest['state']}" for guest in snapshot["guests"]},
        "regions": {region["name"]: f"{region['size']} bytes, {region['state']}" for region in snapshot["regions"]},
    }


def _sentence(error: dict[str, Any]) -> str:
    said = ": ".join(filter(None, (error.get("what", ""), error.get("why", ""))))
    return f"{said} ({error['remedy']})" if said and error.get("remedy") else said
