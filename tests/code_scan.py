"""Finds calls in Python code that could run what a file of others says, write where it says, or show what it says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

PICKLES = {
    "pickle",
    "cPickle",
    "_pickle",
    "pickle5",
    "dill",
    "cloudpickle",
    "shelve",
    "marshal",
    "joblib",
    "jsonpickle",
}
HARMLESS_IN_PICKLE = {"UnpicklingError", "PicklingError", "PickleError", "dumps", "dump", "HIGHEST_PROTOCOL"}
BUILTINS = {"eval", "exec", "compile", "__import__", "execfile"}
ALWAYS = re.compile(
    r"importlib\.(import_module|__import__|reload|util\.(spec_from_\w+|module_from_spec)|machinery\.\w*Loader)"
    r"|runpy\.\w+|imp\.\w+|code\.\w+|builtins\.(eval|exec|compile|__import__)"
    r"|os\.(system|popen|exec\w+|spawn\w+|posix_spawnp?)|pty\.spawn|subprocess\.(getoutput|getstatusoutput)"
    r"|asyncio\.(\w+\.)*create_subprocess_shell"
    r"|torch\.(jit\.load|hub\.\w+|package\.\w+)|numpy\.lib\.format\.(read|open)\w+|pandas\.read_pickle"
    r"|yaml\.(?!safe_|Safe|CSafe)\w+|tempfile\.mktemp|jinja2\.Template|markupsafe\.Markup|jinja2\.Markup"
    r"|urllib\.request\.(urlopen|urlretrieve|build_opener|URLopener|FancyURLopener)|ssl\._create_unverified_context"
)
METHODS = {"exec_module", "load_module"}


def scan(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of everything suspicious in the text of a module."""
    tree = ast.parse(source)
    names = _imported(tree)
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                yield from _check_import(node)
            elif isinstance(node, (ast.Name, ast.Attribute)):
                name = _dotted(node, names)
                outer = _dotted(parent, names) if isinstance(parent, ast.Attribute) else None
                if name and _is_suspicious(name, outer, isinstance(node, ast.Attribute)):
                    yield node.lineno, name
            elif isinstance(node, ast.Call):
                yield from _check_call(node, names)


def _imported(tree: ast.AST) -> dict[str, str]:
    """Return what each imported name stands for, in full."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _dotted(node: ast.AST, names: dict[str, str]) -> str | None:
    """Return such as "numpy.load" for `np.load`; what was not imported gets a "~" before it."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id if node.id in BUILTINS else f"~{node.id}")
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names) or '~'}.{node.attr}"
    return None


def _check_import(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[int, str]]:
    for alias in node.names:
        module = alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}"
        package, _, member = module.partition(".")
        whole = not member and alias.asname is None
        harmless = package == "pickle" and (whole or member in HARMLESS_IN_PICKLE)
        suspicious = isinstance(node, ast.ImportFrom) and (alias.name == "*" or ALWAYS.fullmatch(module))
        if suspicious or (package in PICKLES and not harmless):
            yield node.lineno, module


def _is_suspicious(name: str, outer: str | None, is_attribute: bool) -> bool:
    package, _, member = name.partition(".")
    if package in PICKLES:
        # The module itself is fine as a part of `pickle.UnpicklingError`, and nowhere else.
        return member not in HARMLESS_IN_PICKLE and not (not member and outer is not None)
    if name in BUILTINS:
        return not is_attribute
    return bool(ALWAYS.fullmatch(name)) or (is_attribute and name.rpartition(".")[2] in METHODS)


def _check_call(node: ast.Call, names: dict[str, str]) -> Iterator[tuple[int, str]]:
    name = _dotted(node.func, names) or ""
    method = name.rpartition(".")[2]
    given = {keyword.arg: keyword.value for keyword in node.keywords}

    def is_(argument: str, value: object) -> bool:
        return isinstance(given.get(argument), ast.Constant) and given[argument].value is value  # type: ignore

    if name == "torch.load":
        good = is_("weights_only", True)
    elif name == "numpy.load" or ("allow_pickle" in given and not method.startswith(("save", "write"))):
        good = len(node.args) < 3 and None not in given and ("allow_pickle" not in given or is_("allow_pickle", False))
    elif name.startswith("subprocess.") or "shell" in given:
        good = None not in given and ("shell" not in given or is_("shell", False))
    elif method in ("extractall", "extract") or name == "shutil.unpack_archive":
        chosen = given.get("filter")
        good = isinstance(chosen, ast.Constant) and chosen.value == "data"
    elif name.startswith("jinja2.") and method.endswith("Environment"):
        good = is_("autoescape", True)
    else:
        good = not is_("verify", False)
    if not good:
        yield node.lineno, name
