"""The registry of keys: one key, one meaning; keymaps; an operator's own keys, and what is said of wrong ones."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from memconsole import actions, keys
from memconsole.cli import main
from memconsole.views import settings

TOP = Path(__file__).parents[2]


@pytest.mark.parametrize("name", keys.KEYMAPS)
def test_a_key_has_one_meaning_in_every_view(name: str) -> None:
    assert keys.shared(keys.keymap(name).keys) == []
    assert keys.keymap(name).complaints == ()


def test_two_meanings_of_a_key_are_found() -> None:
    held = dict(keys.keymap().keys)
    held["pfn.whole"] = "c"
    assert keys.shared(held) == ["c (console): columns, whole"]


def test_every_id_is_told_once_and_every_keymap_speaks_of_meanings() -> None:
    ids = [id for meaning in keys.MEANINGS for id in meaning.bindings]
    assert len(ids) == len(set(ids))
    assert len(keys.BY_ID) == len(keys.MEANINGS)
    for chosen in keys.KEYMAPS.values():
        assert chosen.keys() <= keys.BY_ID.keys()
    # an id that is both names one binding, and so must be the only one, or the first, of its meaning
    assert all(id in keys.BY_ID[id].bindings for id in keys.BY_ID.keys() & keys.OF_BINDING.keys())


def test_every_action_with_a_key_has_the_key_of_its_meaning() -> None:
    for id, cls in actions.REGISTRY.items():
        if cls.spec.key:
            assert keys.OF_BINDING[id].keys == cls.spec.key


def test_the_arrows_map_leaves_no_letter_to_moving() -> None:
    held = keys.keymap("arrows").keys
    moving = ["up", "down", "columns-left", "pfn.right", "first", "last"]
    assert all(len(key) > 1 for id in moving for key in keys.split(held[id]))


def test_own_keys_hold_for_a_binding_or_for_all_of_a_meaning() -> None:
    held = keys.keymap("", {"reserve": "K", "again": "f5, ctrl+r", "guest-stop": ","}).keys
    assert (held["reserve"], held["guest-start"]) == ("K", "n")
    assert held["refresh"] == held["pfn.rescan"] == "f5,ctrl+r"
    assert held["guest-stop"] == "S"  # the comma is the run of frames before
    assert keys.keymap("", {"refresh": "x", "again": "f5"}).keys["refresh"] == "x"


def test_a_key_is_not_taken_from_another_meaning_and_the_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "console.toml"
    path.write_text('keymap = "vimm"\n[keys]\n# mine\nreserv = "N"\npfn.whole = "c"\n"sort" = "x"\n  again = ""\n')
    found = settings.load([path])
    map = keys.keymap(found.keymap, found.keys, found.place)
    assert map.keys["pfn.whole"] == "z"
    assert map.keys["columns"] == "c"
    assert map.keys["sort"] == "x"
    said = sorted(map.complaints)
    assert said[0] == f"{path} line 1: there is no keymap 'vimm'; there are default, vim, arrows"
    assert said[1] == (f"{path} line 4: no key has the id 'reserv'; reserve is near (memconsole keys lists them)")
    assert said[2] == (
        f"{path} line 5: c cannot be pfn.whole, it is columns already (choose the columns);"
        " give columns another key, or pfn.whole"
    )
    assert said[3].startswith(f"{path} line 7: again has no key")
    assert len(said) == 4


def test_two_keys_can_change_places() -> None:
    held = keys.keymap("", {"sort": "c", "columns": "s"})
    assert held.complaints == ()
    assert (held.keys["sort"], held.keys["columns"]) == ("c", "s")


def test_of_two_wishes_for_one_key_one_is_refused() -> None:
    found = keys.keymap("", {"sort": "x", "columns": "x"})
    assert len(found.complaints) == 1
    assert keys.shared(found.keys) == []


def test_the_documents_have_the_cheat_sheet_of_the_registry() -> None:
    assert (TOP / "docs" / "keys.md").read_text() == keys.markdown()


def test_the_sample_is_a_settings_file_and_every_line_of_it_may_hold(tmp_path: Path) -> None:
    path = tmp_path / "console.toml"
    path.write_text(keys.sample())
    assert settings.load([path]).keys == {}
    told = "\n".join(line.removeprefix("# ") for line in keys.sample().splitlines() if '" = "' in line)
    all_of_them = tomllib.loads(f"[keys]\n{told}")["keys"]
    assert all_of_them.keys() == keys.BY_ID.keys() | keys.OF_BINDING.keys()
    path.write_text(f"[keys]\n{told}")
    assert main(["keys", "--check", str(path)]) == 0


def test_the_command_lists_checks_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys"]) == 0
    assert "r                  again          look again now" in capsys.readouterr().out
    assert main(["keys", "--map", "vim"]) == 0
    assert "pageup ctrl+u" in capsys.readouterr().out.lower()
    path = tmp_path / "console.toml"
    path.write_text('[keys]\nsort = "c"\n')
    assert main(["keys", "--check", str(path)]) == 4
    assert f"{path} line 2: c cannot be sort" in capsys.readouterr().out
    assert main(["keys", "--map", "emacs"]) == 2
    assert main(["keys", "--check", str(tmp_path / "none")]) == 1
