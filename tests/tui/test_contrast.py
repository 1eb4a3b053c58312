"""What is written can be read: a contrast of 4.5:1 in every theme of the console's own, in every view and dialog."""

from __future__ import annotations

import pytest
from rich.color import Color as Shade
from rich.color import ColorSystem
from rich.style import Style
from support.console import SMALL, console, running, until
from textual.color import Color
from textual.pilot import Pilot
from textual.theme import BUILTIN_THEMES

from memconsole.views import themes
from memconsole.views.private import painted
from memconsole.views.screens.acting import Confirmation
from memconsole.views.settings import ConsoleSettings

# what a PC's console shows for the 16 colours; other terminals show them brighter
SIXTEEN = [
    "#000000",
    "#aa0000",
    "#00aa00",
    "#aa5500",
    "#0000aa",
    "#aa00aa",
    "#00aaaa",
    "#aaaaaa",
    "#555555",
    "#ff5555",
    "#55ff55",
    "#ffff55",
    "#5555ff",
    "#ff55ff",
    "#55ffff",
    "#ffffff",
]
DIALOGS = (("2", "m"), ("2", "X"), ("question_mark",), ("2", "s"), ("2", "slash", "w"), ("colon", "r"), ("ctrl+p",))


def seen(shade: Shade | None, own: str, system: ColorSystem) -> Color:
    """A colour as a terminal with so many shows it, whose own text or ground is ``own``."""
    if shade is None or shade.is_default:
        return Color.parse(own)
    if shade.triplet is None:
        assert shade.number is not None
        return Color.parse(SIXTEEN[shade.number])
    return Color(*shade.downgrade(system).get_truecolor())


def unread(style: Style, system: ColorSystem, *, dark: bool = True) -> str:
    """Why a text in this style cannot be read, or an empty string."""
    own = (SIXTEEN[7], SIXTEEN[0]) if dark else (SIXTEEN[0], SIXTEEN[15])
    found = themes.contrast(seen(style.color, own[0], system), seen(style.bgcolor, own[1], system))
    return f"{style}: {found:.1f}" if found < themes.CONTRAST else ""


async def look(pilot: Pilot[None]) -> set[str]:
    """What on the screen cannot be read, in terminals with all colours and with 256."""
    await pilot.pause()
    found = set()
    for segment in pilot.app.console.render(painted(pilot.app.screen) or ""):
        if segment.style is not None and any(sign.isalnum() for sign in segment.text):
            for system in (ColorSystem.TRUECOLOR, ColorSystem.EIGHT_BIT):
                if why := unread(segment.style, system, dark=pilot.app.current_theme.dark):
                    found.add(f"{why} ({system.name}): {segment.text.strip()[:30]!r}")
    return found


@pytest.mark.parametrize("theme", [theme.name for theme in themes.OWN])
async def test_text_can_be_read_in_every_view_and_dialog(theme: str) -> None:
    app = console(settings=ConsoleSettings(theme=theme))
    found: dict[str, set[str]] = {}
    async with running(app, SMALL) as pilot:
        for view in app.VIEWS:
            app.open_view(view.name)
            found[view.name] = await look(pilot)
        for kind, name in (("region", "web0-ram0"), ("guest", "web0"), ("pfn", "guest:web0"), ("reach", "web0")):
            app.open_view(kind, name)
            await until(pilot, lambda: all(worker.is_finished for worker in app.workers if worker.node is app.view))
            found[f"{kind} {name}"] = await look(pilot)
        for keys in DIALOGS:
            await pilot.press(*keys)
            if "X" in keys:
                await until(pilot, lambda: isinstance(app.screen, Confirmation) and app.screen._plan is not None)
            found[" ".join(keys)] = await look(pilot)
            await pilot.press("escape", "escape")
    assert {place: sorted(said) for place, said in found.items() if said} == {}


def test_what_cannot_be_read_is_found() -> None:
    grey = Style(color="#777777", bgcolor="#555555")
    assert unread(grey, ColorSystem.TRUECOLOR) == "#777777 on #555555: 1.7"
    assert unread(Style(color="blue"), ColorSystem.TRUECOLOR)
    assert unread(Style(color="bright_yellow"), ColorSystem.TRUECOLOR, dark=False)
    assert unread(Style(), ColorSystem.TRUECOLOR) == ""


@pytest.mark.parametrize("name", sorted(name for name, theme in BUILTIN_THEMES.items() if not theme.ansi))
def test_themes_of_the_library_are_made_readable(name: str) -> None:
    made = themes.readable(BUILTIN_THEMES[name]).to_color_system().generate()
    texts = ("foreground", "primary", "secondary", "accent", "warning", "error", "success")
    for text in (*texts, "text-muted", "text-disabled"):
        for ground in ("background", "surface", "panel", "block-cursor-background"):
            assert themes.contrast(Color.parse(made[text]), Color.parse(made[ground])) >= themes.CONTRAST, (
                text,
                ground,
            )


def test_no_ground_of_the_own_themes_turns_navy_in_256_colours() -> None:
    for theme in (themes.DARK, themes.LIGHT):
        for colour in (theme.background, theme.surface, theme.panel, theme.variables["block-cursor-background"]):
            assert colour is not None
            was, now = Color.parse(colour), seen(Shade.parse(colour), "#000000", ColorSystem.EIGHT_BIT)
            a_step = 10  # from one grey of the palette to the next
            assert max(abs(a - b) for a, b in zip(was.rgb, now.rgb, strict=True)) <= a_step, (theme.name, colour)
