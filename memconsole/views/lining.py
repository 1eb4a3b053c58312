"""The app's tongue: command lines run on what is shown, what they said, what was done and how it is undone."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Sequence
from functools import partial

from textual import work
from textual.message import Message

from memconsole import actions, bulk, command, commandlog, macros, undoing, unforeseen
from memconsole.actions import Action
from memconsole.command import CommandForm, CommandLine, CommandResult
from memconsole.commandlog import CommandLog
from memconsole.errors import MemconsoleError, UsageError
from memconsole.model import Outcome, Plan
from memconsole.views.screens.dialogs import AskName
from memconsole.views.screens.output import Output, Said
from memconsole.views.traveling import Traveling
from memconsole.views.widgets.assist import Assist
from memconsole.views.widgets.prompt import Prompt

PREVIEW_S = 0.2
"""How long a line stands before its plan is asked for."""


class CommandRan(Message):
    """A command has come to its end."""

    def __init__(self, line: str, result: CommandResult) -> None:
        super().__init__()
        self.line = line
        self.result = result


class Previewed(Message):
    """The plan of the action that stands on the line was made."""

    def __init__(self, line: str, plan: Plan) -> None:
        super().__init__()
        self.line = line
        self.plan = plan


class Lining(Traveling):
    """An App that runs command lines, and knows which were done."""

    command_line: CommandLine | None = None
    said: CommandLog
    _previewing = False

    @functools.cached_property
    def forms(self) -> Sequence[CommandForm]:
        """The commands that the line understands."""
        if self.command_line is not None:
            return self.command_line.forms
        parser = command.Parser(prog="memconsole", add_help=False)
        command.add_actions(parser.add_subparsers())
        return command.forms(parser)

    # --- running ------------------------------------------------------------------------------------------------------

    def run_command(self, words: Sequence[str]) -> None:
        """Run a command of the command line on what is shown, in a thread; what it says is shown.

        Raises:
            UsageError: there is no command line here.
        """
        if self.command_line is None:
            raise UsageError(f"there is no command {words[0]!r} here", "", "type it in a shell")
        line = shlex.join(words)
        self.busy.append(line)
        self.show_state()
        self._run_command(self.command_line, line, words)

    @work(thread=True, group="command", description="run a command")
    def _run_command(self, commands: CommandLine, line: str, words: Sequence[str]) -> None:
        found = unforeseen.attempt(line, "console", partial(commands.run, words, self.source))
        if isinstance(found, MemconsoleError):
            found = CommandResult(int(found.exit_code), f"{found}\n")
        self.post_message(CommandRan(line, found))

    def on_command_ran(self, event: CommandRan) -> None:
        """Show what it said."""
        self.busy.remove(event.line)
        self._note_line(f"memconsole {event.line}", event.result.code)
        self.show_state()
        self.push_screen(Output(event.line, event.result.text, event.result.code))

    # --- the plan while it is typed -----------------------------------------------------------------------------------

    def on_prompt_helped(self, event: Prompt.Helped) -> None:
        """Show what may stand on the line; its plan once it stands for a moment."""
        assist = self.screen_stack[0].query_one(Assist)
        if event.found is None:
            assist.close()
            return
        assist.show_words(event.found, event.at)
        prompt = self.screen_stack[0].query_one(Prompt)
        if self._action_on(prompt) is None:
            assist.show_plan(None)
        self.set_timer(PREVIEW_S, partial(self._preview_if, prompt.value))

    def _action_on(self, prompt: Prompt) -> Action | None:
        """The action that stands on the line, whole."""
        if prompt.table is not None or not prompt.display:
            return None
        try:
            return command.parse(shlex.split(prompt.value))
        except (MemconsoleError, ValueError):
            return None

    def _preview_if(self, line: str) -> None:
        if not self.screen_stack:  # the console has ended meanwhile
            return
        prompt = self.screen_stack[0].query_one(Prompt)
        action = self._action_on(prompt)
        if action is not None and prompt.value == line and not self._previewing:
            self._previewing = True
            self._preview(line, action)

    @work(thread=True, group="preview", description="preview")
    def _preview(self, line: str, action: Action) -> None:
        self.post_message(Previewed(line, bulk.plan_one(self.source, action)))

    def on_previewed(self, event: Previewed) -> None:
        """Show the plan if its line still stands there, else ask for that of what does."""
        self._previewing = False
        prompt = self.screen_stack[0].query_one(Prompt)
        if not prompt.display:
            return
        if prompt.value == event.line:
            self.screen_stack[0].query_one(Assist).show_plan(event.plan)
        else:
            self._preview_if(prompt.value)

    # --- what was done ------------------------------------------------------------------------------------------------

    def note_done(self, action: Action, outcome: Outcome) -> None:
        """Write down what was done."""
        super().note_done(action, outcome)
        self._note_line(actions.cli_form(action))

    def _note_line(self, line: str, code: int = 0) -> None:
        before = self.said.trouble
        self.said.add(self.clock(), line, code)
        if self.said.trouble and not before:
            self.notify(self.said.trouble, title="Command lines are not kept", severity="warning", markup=False)

    def action_undo(self) -> None:
        """Plan what undoes the last action."""
        undone = [undoing.inverse(*done) for done in self.last_done]
        why = next((each for each in undone if isinstance(each, str)), "" if undone else "nothing was done here yet")
        many = [each for each in undone if isinstance(each, Action)]
        if why or len({type(each) for each in many}) > 1:
            self.notify(why or "several actions were under way at once", title="Nothing to undo", markup=False)
        elif len(many) == 1:
            self.propose(many[0])
        else:
            self.propose_all(list(reversed(many)))

    def action_said(self) -> None:
        """Show the command lines that were done."""

        def chosen(answer: tuple[str, Sequence[commandlog.CommandLine]] | None) -> None:
            if answer is None:
                return
            what, lines = answer
            if what == "line":
                self.screen_stack[0].query_one(Prompt).ask(None, lines[0].line.removeprefix("memconsole "))
                return
            directory = macros.macro_paths()[0]
            help = f"a macro of {len(lines)} lines; its name; the file is saved in {directory}"
            self.push_screen(AskName("Make a macro", help), partial(self._make_macro, lines))

        self.push_screen(Said(self.said.lines, self.said.session), chosen)

    def _make_macro(self, lines: Sequence[commandlog.CommandLine], name: str | None) -> None:
        if name is not None:
            macro = commandlog.macro_of(name, lines)
            self.save_macro(macro, macros.macro_paths()[0] / f"{name}.toml")
