"""Which part may know which: the table of the design, read from the imports."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxpeft
from jaxpeft.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jaxpeft"
FILES = sorted(PACKAGE.rglob("*.py"))
OURS = [*FILES, ROOT / "train.py", *sorted((ROOT / "benchmarks").rglob("*.py"))]

# A room → the rooms that it may import, besides itself. Every room is here. `adapters` and the others of the library half know no
# configuration, no console and no run.
LIBRARY = {
    "adapters",
    "data",
    "errors",
    "families",
    "inject",
    "merging",
    "models",
    "pruning",
    "quantization",
    "registry",
    "targets",
    "trees",
}
MAY_IMPORT = {
    "errors": set(),
    "registry": {"errors"},
    "trees": set(),
    "data": {"errors"},
    "quantization": {"errors", "registry", "trees"},
    "pruning": {"errors", "registry", "trees"},
    "adapters": {"errors", "quantization", "registry", "trees"},
    "families": {"errors", "registry"},
    "targets": {"adapters", "errors", "families"},
    "inject": {"adapters", "errors", "pruning", "quantization", "trees"},
    "merging": {"adapters", "errors", "pruning", "quantization", "trees"},
    "models": {"adapters", "errors", "families", "inject", "quantization", "registry", "trees"},
    "calibration": {"adapters", "errors", "inject", "models", "quantization", "trees"},
    "contextual": {
        "adapters",
        "calibration",
        "errors",
        "families",
        "inject",
        "models",
        "pruning",
        "quantization",
        "trees",
    },
    "tasks": {"data", "errors", "registry"},
    "training": {*LIBRARY, "contextual", "tasks"},
    "interop": LIBRARY,
    "config": {"adapters", "errors", "pruning", "quantization", "registry", "tasks"},
    "report": {*LIBRARY, "config", "tasks", "training"},
    "runs": {*LIBRARY, "calibration", "config", "contextual", "interop", "report", "tasks", "training"},
    "preflight": {*LIBRARY, "config", "report", "runs", "tasks", "training"},
    "comparison": {*LIBRARY, "config", "report", "runs", "tasks", "training"},
    "cli": {
        *LIBRARY,
        "comparison",
        "config",
        "contextual",
        "interop",
        "preflight",
        "report",
        "runs",
        "tasks",
        "training",
    },
    "__init__": {*LIBRARY, "calibration", "config", "interop", "report", "runs", "tasks", "training"},
    "__main__": {"cli"},
}

# A name → the only file that may use it. Names are matched whole.
ONLY_IN = {
    r"Flax\w+|FLAX_\w+": "models/heads.py",
    r"orbax(\..+)?": "training/checkpoint.py",
    r"make_mesh|Mesh|NamedSharding|PartitionSpec|AxisType": "training/sharding.py",
    r"intercept_methods": "inject.py",
    r"topologies|get_topology_desc": "preflight/child.py",
}


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


def imported(path):
    """Dotted names of all modules that a file imports, wherever in it; of `from a import b` both `a` and `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def names(path):
    """Imported modules and names, attributes and variables of a file, and what a registry names (`module:attribute`)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module, *(alias.name for alias in node.names))
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Constant) and (place := re.fullmatch(r"([\w.]+):(\w+)", str(node.value))):
            yield from place.groups()


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_arrows_point_one_way(room):
    files = [path for path in FILES if name_of(path).split("/")[0].removesuffix(".py") == room]
    assert files, f"there is no {room} any more"
    rooms = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()}
    wrong = {
        f"{name_of(path)} imports {module}"
        for path in files
        for module in imported(path)
        if module.startswith("jaxpeft.")
        and module.split(".")[1] in rooms
        and module.split(".")[1] not in MAY_IMPORT[room] | {room}
    }
    assert not wrong


def test_every_room_is_in_the_table_and_few_files_stand_at_the_top():
    rooms = {name_of(path).split("/")[0].removesuffix(".py") for path in FILES}
    assert rooms == set(MAY_IMPORT)
    top = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert len(top) <= 6, top


def test_the_arrows_make_no_circle():
    order, left = [], {room: set(others) for room, others in MAY_IMPORT.items()}
    while free := sorted(room for room, others in left.items() if not others - set(order)):
        order += free
        left = {room: others for room, others in left.items() if room not in order}
    assert not left, f"these rooms import each other: {sorted(left)}"


def test_a_type_checker_sees_the_public_names():
    """The block for type checkers, the table of `__getattr__` and `__all__` say the same."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        name.asname: node.module + (f":{name.name}" if name.name != name.asname else "")
        for node in block.body
        for name in node.names
    }
    assert seen == jaxpeft._PUBLIC
    assert sorted(seen) == jaxpeft.__all__


def annotations(path):
    """The annotation of every parameter and field of a file, as text, with its line."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield node.lineno, ast.unparse(node.annotation)


def test_few_signatures_take_a_whole_configuration():
    """Library functions take plain arguments; a run's configuration is read once, in `setup_run`."""
    whole = re.compile(r"\b(RunConfig|Any\[RunConfig\])\b")
    found = {f"{name_of(path)}:{line}" for path in FILES for line, text in annotations(path) if whole.search(text)}
    assert len(found) <= 15, sorted(found)
    assert {place.split("/")[0] for place in found} <= {"runs", "report", "comparison", "preflight"}


@pytest.mark.parametrize("pattern", ONLY_IN)
def test_what_only_one_file_may_use(pattern):
    users = {name_of(path) for path in FILES if any(re.fullmatch(pattern, name) for name in names(path))}
    assert users == {ONLY_IN[pattern]}


def test_only_tasks_know_their_names():
    """No other file compares a task with a string: it asks the task."""
    compared = [
        f"{path}:{node.lineno}"
        for path in FILES
        if path.parent.name != "tasks"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Compare | ast.MatchValue)
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and part.value in set(TASKS) - {"regression"}  # which is also a flag
    ]
    assert compared == []


def test_data_and_config_run_without_jax():
    """Workers that tokenise, and `--help`, must not start an accelerator."""
    for path in FILES:
        if name_of(path).startswith(("config/", "data/")):
            libraries = {module.split(".")[0] for module in imported(path)}
            assert not libraries & {"jax", "jaxlib", "flax", "optax", "chex"}, path
    code = (
        "import jaxpeft, jaxpeft.config, jaxpeft.data, sys; from jaxpeft.families import FAMILIES; [*FAMILIES.values()]"
    )
    code += "; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_files_stay_readable():
    long = {path.name: count for path in OURS if (count := len(path.read_text().splitlines())) > 400}
    assert not long, "a file of more than 400 lines is two ideas"
    assert not [path for path in OURS if path.name in ("utils.py", "util.py", "helpers.py", "common.py", "misc.py")]
    assert not [path for path in OURS if not ast.get_docstring(ast.parse(path.read_text())) and path.stat().st_size]


def test_tests_have_names_of_their_own():
    """pytest imports test files by their basename."""
    tests = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(tests) == sorted(set(tests))
