"""What share of a room's lines ran, from the figures of its modules."""

from __future__ import annotations

from measure_coverage import by_room, fallen, table


def figures(lines: int, ran: int) -> dict[str, dict[str, int]]:
    return {"summary": {"num_statements": lines, "covered_lines": ran}}


def test_modules_of_a_package_are_one_room_and_those_of_none_are_their_own() -> None:
    whole, ran = by_room(
        {
            "memconsole/units.py": figures(10, 5),
            "memconsole/views/app.py": figures(60, 0),
            "memconsole/views/view.py": figures(30, 30),
        }
    )
    assert whole == {"memconsole/units.py": 10, "memconsole/views": 90, "all rooms": 100}
    assert ran == {"memconsole/units.py": 5, "memconsole/views": 30, "all rooms": 35}


def test_each_measurement_is_a_column_and_the_sum_is_last() -> None:
    unit = by_room({"memconsole/units.py": figures(10, 5), "memconsole/native/__init__.py": figures(0, 0)})
    every = by_room({"memconsole/units.py": figures(10, 10)})
    rows = [line.split() for line in table({"unit": unit, "all": every}).splitlines()]
    assert rows == [
        ["room", "lines", "unit", "all"],
        ["memconsole/units.py", "10", "50.0%", "100.0%"],
        ["all", "rooms", "10", "50.0%", "100.0%"],
    ]


def test_a_room_below_its_floor_is_named() -> None:
    measured = by_room(
        {
            "memconsole/backend/verbs/grants.py": figures(100, 84),
            "memconsole/backend/adoption.py": figures(100, 85),
            "memconsole/backend/control.py": figures(100, 0),
        }
    )
    assert measured[0]["memconsole/backend/adoption.py"] == 100, "a module with a floor of its own is a room"
    (line,) = fallen(measured)
    assert line.startswith("the unit tier runs 84.0% of memconsole/backend/verbs, and 85% is the floor")
