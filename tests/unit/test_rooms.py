"""Which room of the package may import which: the one place where it is written."""

import ast
import graphlib
import itertools
import re

import pytest
from paths import ROOT

GROUND = "errors files config"
NETWORKS = f"{GROUND} metrics models optim parallel"
# By room, that is a module at the top or a folder: what its modules may import beside each other. Imports inside
# functions count, those for type checkers do not. "data.types" is that module only.
ROOMS = {
    "errors": "",
    "files": "errors",
    "config": "errors files",
    "recipes": "config",
    "detection": "",
    "models": "errors config detection",
    "metrics": "errors config",
    "optim": "errors config",
    "parallel": "errors config",
    "data": f"{GROUND} parallel",
    "run": f"{GROUND} metrics models parallel data.types",
    "detection_metrics": "metrics data detection",
    "detection_stages": "config models",
    "detection_steps": f"{NETWORKS} data detection detection_metrics gradients",
    "inference": f"{NETWORKS} data run detection_metrics detection_stages detection_steps",
    "vectors": "",
    "gradients": f"{NETWORKS} data",
    "steps": f"{NETWORKS} data gradients vectors",
    "trainer": f"{NETWORKS} data steps",
    "detection_trainer": f"{NETWORKS} data detection_metrics detection_stages detection_steps gradients"
    " inference steps",
    "training": f"{NETWORKS} data run inference steps trainer detection_trainer",
    "evaluate": f"{NETWORKS} data run inference steps",
    "evaluate_detection": f"{NETWORKS} data detection_metrics inference",
    "convert": f"{NETWORKS} data run inference steps",
    "paper": f"{NETWORKS} recipes detection data run inference steps evaluate evaluate_detection resnet_jax",
    "cli": f"{NETWORKS} recipes data run inference steps evaluate evaluate_detection training convert paper",
    "resnet_jax": "models inference convert",  # the package itself: what users find at its top
    "__main__": "cli",
}
PARSERS = {"argparse", "tyro"}  # of arguments
SETS_AN_OPTION_FOR_A_MOMENT = {"convert.programs"}  # and puts back what was there


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts).removeprefix("resnet_jax.")


MODULES = {name_of(path): ast.parse(path.read_text()) for path in sorted((ROOT / "resnet_jax").rglob("*.py"))}


def nodes(tree):
    """Walk over a module without what only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from nodes(node)


def imports(tree):
    """Return the names of imported modules; what is imported from a package may be one, too."""
    names = set()
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the whole path"
            assert node.module
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_modules(tree):
    """Return the modules of this package that a module imports, by the names in MODULES."""
    found = set()
    for name in imports(tree):
        package, _, rest = name.partition(".")
        if package == "resnet_jax":
            inside = [rest, rest.rpartition(".")[0], "resnet_jax"]
            found.add(next(candidate for candidate in inside if candidate in MODULES))
    return found


GRAPH = {name: imported_modules(tree) for name, tree in MODULES.items()}


def room_of(name):
    return name.partition(".")[0]


@pytest.mark.parametrize("room", sorted(set(map(room_of, MODULES))))
def test_room_imports_only_what_it_may(room):
    allowed = {room, *ROOMS[room].split()}
    forbidden = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if room_of(name) == room and not allowed & {room_of(other), other}
    ]
    assert not forbidden


def test_rooms_have_an_order():
    """So that no arrow between rooms leads back up."""
    order = {room: {room_of(name) for name in allowed.split()} for room, allowed in ROOMS.items()}
    assert len(list(graphlib.TopologicalSorter(order).static_order())) == len(ROOMS)


def test_no_modules_import_each_other_in_a_circle():
    assert set(graphlib.TopologicalSorter(GRAPH).static_order()) == set(MODULES)


def test_only_the_command_line_parses_arguments():
    """A configuration says how its fields look there; nothing else of tyro is used."""
    parsing = {name for name, tree in MODULES.items() if {room_of(other) for other in imports(tree)} & PARSERS}
    assert {room_of(name) for name in parsing} <= {"cli", "config"}
    of_tyro = {
        node.attr
        for node in ast.walk(MODULES["config"])
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tyro"
    }
    assert of_tyro <= {"conf"}


def test_only_commands_change_the_configuration_of_jax():
    changing = {
        name
        for name, tree in MODULES.items()
        for node in nodes(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("jax.config.update", "configure", "devices.configure")
    }
    assert {room_of(name) for name in changing - SETS_AN_OPTION_FOR_A_MOMENT} <= {"cli", "parallel"}


def test_this_test_sees_imports():
    """A module that it overlooks would be free to import anything."""
    tree = ast.parse(
        "import jax\ndef f():\n    from resnet_jax.run import lock\nif TYPE_CHECKING:\n    import resnet_jax"
    )
    assert imports(tree) == {"jax", "resnet_jax.run.lock"}
    assert imported_modules(tree) == {"run.lock"}
    assert {"data.inputs", "inference.load", "run.checkpoint", "steps"} <= GRAPH["training"]
    assert len(list(itertools.chain(*GRAPH.values()))) > 150


def test_the_map_of_the_documentation_is_true():
    """Each row names a file, and what stands in it or in the __init__.py beside it."""
    text = (ROOT / "docs" / "development.md").read_text().split("## ")[1]
    rows = [
        line.split("|")[2] for line in text.splitlines() if line.startswith(("| the", "| where", "| what a", "| a"))
    ]
    assert len(rows) == 11
    for row in rows:
        quoted = re.findall(r"`([^`]+)`", row)
        paths = [ROOT / name for name in quoted if name.startswith("resnet_jax/")]
        files = [path / "__init__.py" if path.is_dir() else path for path in paths]
        content = "".join(path.read_text() for path in files)
        names = [name.split(".")[-1] for name in quoted if not name.startswith("resnet_jax/") and name != "__init__.py"]
        assert paths
        assert all(re.search(rf"\b{name}\b", content) for name in names), row
