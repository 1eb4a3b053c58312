"""What a record says of a value that changed: a delta, from which the new value is made again."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from memconsole.backend.history import json_delta

FLOATS = st.floats(allow_nan=False).map(lambda number: number + 0.0)  # no -0.0: it equals 0.0, and need not be kept
LEAVES = st.none() | st.booleans() | st.integers(-(1 << 63), 1 << 64) | FLOATS | st.text(max_size=4)
ENTITIES = st.lists(
    st.fixed_dictionaries({"id": st.integers(0, 5), "size": st.integers(0, 3), "note": LEAVES}), max_size=5
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abc+#-"), inner, max_size=3) | ENTITIES
    ),
    max_leaves=12,
)


def exact(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


@given(VALUES, VALUES)
def test_a_delta_makes_the_new_value_of_the_old_one(old: Any, new: Any) -> None:
    before = exact(old)
    delta = json.loads(json.dumps(json_delta.between(old, new)))
    assert exact(json_delta.apply(old, delta)) == exact(new)
    assert exact(old) == before


@given(ENTITIES, ENTITIES)
def test_a_delta_of_entities_makes_the_new_ones_of_the_old_ones(old: Any, new: Any) -> None:
    assert exact(json_delta.apply(old, json_delta.between(old, new))) == exact(new)


def test_a_changed_leaf_costs_a_leaf() -> None:
    old = [{"id": f"g{n}", "size": n, "seen": {"rss": 4096 * n}} for n in range(100)]
    new = [dict(item) for item in old[1:]] + [{"id": "new", "size": 1, "seen": {"rss": 0}}]
    new[4]["seen"] = {"rss": 4096 * 7}
    assert json_delta.between(old, new) == {
        "-": [0],
        "#": {"4": {"seen": {"rss": 2 * 4096}}},
        "+": [{"id": "new", "size": 1, "seen": {"rss": 0}}],
    }
