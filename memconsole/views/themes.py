"""The console's own themes: a dark and a light one, and one of each for terminals that have 16 colours.

Their colours are colours of the palette of 256 that terminals share, so that nothing turns navy where there are no
others; themes of 16 leave the ground to the terminal. Text on every background of a theme has a contrast of at least
4.5:1, also as :func:`readable` makes those of Textual; what is no text (frames, bars' empty parts) may have less.
"""

from __future__ import annotations

from textual.color import Color
from textual.theme import Theme

CONTRAST = 4.5
"""Of text against what is behind it (WCAG 2, level AA)."""

DARK = Theme(
    name="memconsole",
    primary="#5fafff",
    secondary="#87afd7",
    accent="#ffaf5f",
    warning="#ffd75f",
    error="#ff8787",
    success="#87d75f",
    foreground="#d0d0d0",
    background="#121212",
    surface="#1c1c1c",
    panel="#262626",
    boost="#262626",
    dark=True,
    variables={
        "border": "#585858",
        "border-blurred": "#585858",
        "block-cursor-background": "#3a3a3a",
        "block-cursor-foreground": "#eeeeee",
        "text-muted": "#b2b2b2",
        "text-disabled": "#a8a8a8",
        "foreground-muted": "#b2b2b2",
        "foreground-disabled": "#a8a8a8",
        "input-selection-background": "#005f87",
        "button-color-foreground": "#121212",
    },
)
LIGHT = Theme(
    name="memconsole-light",
    primary="#005faf",
    secondary="#005f5f",
    accent="#87005f",
    warning="#5f5f00",
    error="#af0000",
    success="#005f00",
    foreground="#262626",
    background="#eeeeee",
    surface="#ffffff",
    panel="#e4e4e4",
    boost="#e4e4e4",
    dark=False,
    variables={
        "border": "#949494",
        "border-blurred": "#949494",
        "block-cursor-background": "#d7d7ff",
        "block-cursor-foreground": "#121212",
        "text-muted": "#4e4e4e",
        "text-disabled": "#585858",
        "foreground-muted": "#4e4e4e",
        "foreground-disabled": "#585858",
        "input-selection-background": "#afd7ff",
        "button-color-foreground": "#ffffff",
    },
)


def _sixteen(name: str, *, dark: bool, colours: dict[str, str], cursor: tuple[str, str]) -> Theme:
    ground, text, muted = "ansi_default", "ansi_default", "ansi_white" if dark else "ansi_black"
    black, white = ("ansi_black", "ansi_white") if dark else ("ansi_white", "ansi_black")
    return Theme(
        name=name,
        ansi=True,
        dark=dark,
        foreground=text,
        background=ground,
        surface=ground,
        panel=ground,
        boost=ground,
        primary=colours["primary"],
        secondary=colours["secondary"],
        accent=colours["accent"],
        warning=colours["warning"],
        error=colours["error"],
        success=colours["success"],
        variables={
            "ansi-background": black,
            "ansi-foreground": white,
            "border": muted,
            "border-blurred": muted,
            "text-muted": muted,
            "text-disabled": muted,
            "foreground-muted": muted,
            "foreground-disabled": muted,
            "block-cursor-background": cursor[0],
            "block-cursor-foreground": cursor[1],
            "input-cursor-background": white,
            "input-cursor-foreground": black,
            "input-selection-background": cursor[0],
            "input-selection-foreground": cursor[1],
            "screen-selection-background": cursor[0],
            "screen-selection-foreground": cursor[1],
        },
    )


SIXTEEN = _sixteen(
    "memconsole-16",
    dark=True,
    colours={
        "primary": "ansi_bright_cyan",
        "secondary": "ansi_cyan",
        "accent": "ansi_bright_magenta",
        "warning": "ansi_bright_yellow",
        "error": "ansi_bright_red",
        "success": "ansi_bright_green",
    },
    cursor=("ansi_white", "ansi_black"),
)
SIXTEEN_LIGHT = _sixteen(
    "memconsole-16-light",
    dark=False,
    colours={
        "primary": "ansi_blue",
        "secondary": "ansi_blue",
        "accent": "ansi_magenta",
        "warning": "ansi_magenta",
        "error": "ansi_red",
        "success": "ansi_blue",
    },
    cursor=("ansi_blue", "ansi_bright_white"),
)
OWN = (DARK, LIGHT, SIXTEEN, SIXTEEN_LIGHT)


def contrast(one: Color, other: Color) -> float:
    """The ratio of two colours' luminances, from 1 to 21, as WCAG 2 has it."""
    darker, lighter = sorted((_luminance(one), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: Color) -> float:
    parts = [part / 255 for part in colour.rgb]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


_MADE: dict[str, Theme] = {}


def readable(theme: Theme) -> Theme:
    """A theme whose colours of text can be read on each of its backgrounds; those that can already are left alone."""
    if theme.ansi or theme in OWN:
        return theme
    if theme.name not in _MADE:
        _MADE[theme.name] = _made_readable(theme)
    return _MADE[theme.name]


def _made_readable(theme: Theme) -> Theme:
    made = theme.to_color_system().generate()
    grounds = [Color.parse(made[name]) for name in ("background", "surface", "panel")]
    names = ("primary", "secondary", "accent", "warning", "error", "success", "foreground")
    found = {name: _lifted(Color.parse(made[name]), grounds, dark=theme.dark) for name in names}
    muted = _lifted(grounds[-1].blend(Color.parse(found["foreground"]), 0.6), grounds, dark=theme.dark)
    ground = made["panel"]
    variables = {
        **theme.variables,
        "text-muted": muted,
        "text-disabled": muted,
        "foreground-muted": muted,
        "foreground-disabled": muted,
        "block-cursor-background": ground,
        "block-cursor-foreground": found["foreground"],
    }
    return Theme(
        name=theme.name,
        dark=theme.dark,
        variables=variables,
        boost=ground,
        background=made["background"],
        surface=made["surface"],
        panel=ground,
        primary=found["primary"],
        secondary=found["secondary"],
        accent=found["accent"],
        warning=found["warning"],
        error=found["error"],
        success=found["success"],
        foreground=found["foreground"],
    )


def _lifted(colour: Color, grounds: list[Color], *, dark: bool) -> str:
    """A colour moved to white, or to black, until it can be read on every background."""
    end = Color(255, 255, 255) if dark else Color(0, 0, 0)
    for step in range(21):
        moved = colour.blend(end, step / 20)
        if all(contrast(moved, ground) >= CONTRAST + 0.1 for ground in grounds):
            return moved.hex
    return end.hex
