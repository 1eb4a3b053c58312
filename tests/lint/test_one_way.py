"""What is done in one way alone: foreign bytes are decoded, threads are begun and keys are bound in one place each."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from support import sources

from memconsole import actions, keys

# --- decoding ----------------------------------------------------------------------------------------------------

ELSEWHERE = {
    "decoding.py",
    "backend/handoff/image.py",  # a kernel image: bounded there, by what it unpacks
}
DECODERS = {"loads", "load", "Decoder", "decompress", "decompressobj", "raw_decode", "convert"}
FORMATS = {"json", "tomllib", "msgspec", "zlib", "lzma", "pickle", "marshal", "toml", "yaml", "msgpack", "bz2", "gzip"}


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _calls() -> Iterator[tuple[str, ast.Call]]:
    for name, node in sources.package(ast.Call):
        if name not in ELSEWHERE:
            yield f"{name}:{node.lineno}", node


def test_no_format_is_decoded_but_by_the_module_that_bounds_it() -> None:
    found = []
    for where, call in _calls():
        *rooms, last = _dotted(call.func).split(".")
        direct = last in DECODERS and set(rooms) & FORMATS
        if direct or (last == "decode" and rooms[:1] == ["msgspec"]):
            found.append(f"{where}: {_dotted(call.func)}")
    assert not found, "use memconsole.decoding"


def test_no_text_is_decoded_in_a_way_that_may_fail() -> None:
    """``bytes.decode`` and ``read_text`` say what becomes of bytes that are no UTF-8; what is installed with us is."""
    found = []
    for where, call in _calls():
        if not isinstance(call.func, ast.Attribute) or call.func.attr not in {"decode", "read_text"}:
            continue
        of = ast.unparse(call.func.value)
        ours = of.startswith("msgspec.json.") or any(word in of for word in ("__file__", "NATIVE", "Decoder("))
        tolerant = len(call.args) > 1 or any(word.arg == "errors" for word in call.keywords)
        if not ours and not tolerant and of not in {"action_input", "bootplan", "records", "state"}:
            found.append(f"{where}: {ast.unparse(call)}")
    assert not found, "use decoding.text"


# --- threads and keys


def test_every_thread_of_the_project_is_begun_where_its_end_is_told() -> None:
    ours = {"unforeseen.py", "agent.py"}  # the agent's module is of the standard library alone, for other processes
    found = []
    for path in sorted(sources.PACKAGE.rglob("*.py")):
        name = str(path.relative_to(sources.PACKAGE))
        calls = [ast.unparse(node.func) for node in sources.nodes(path) if isinstance(node, ast.Call)]
        if name not in ours:
            found += [f"{name}: {call}" for call in calls if call in {"threading.Thread", "Thread", "threading.Timer"}]
        if "asyncio.new_event_loop" in calls and "unforeseen.watch_tasks" not in calls:
            found.append(f"{name}: a loop whose tasks are not watched")
    assert not found, "use unforeseen.thread and unforeseen.watch_tasks"


def test_views_bind_keys_through_the_registry_alone() -> None:
    bound, raw = set(), []
    for path, node in sources.package(ast.Call):
        name = getattr(node.func, "id", "")
        if path.startswith("views/") and name in {"Binding", "bound"}:
            if name == "Binding" and path != "views/bound.py":
                raw.append(f"{path}:{node.lineno}: bind it by its id in memconsole/keys.py, with views.bound")
            if name == "bound" and isinstance(node.args[0], ast.Constant):
                bound.add(node.args[0].value)
    assert raw == []
    views = {f"view-{name}" for name in keys.VIEWS}
    idle = keys.OF_BINDING.keys() - bound - views - actions.REGISTRY.keys()
    assert sorted(idle) == []
