"""How the house is built: rooms that only look down, one place for each name, files and functions that fit on a screen.

Imports inside functions count like all others. CONTRIBUTING.md says what the rooms are.
"""

import ast
import graphlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_lpr"
# from low to high: a module imports from its own room and from those before it
ROOMS = (
    "errors signals files platform reporting families recipe data checkpoint losses model evaluation conversion "
    "training planning api"
).split()
DOORS = ("commands", "cli")  # may import everything; the front door, megatron_lpr/__init__.py, imports lazily
LONGEST_FILE, LONGEST_FUNCTION = 300, 70
CODE = {".py", ".h", ".cpp", ".yaml", ".sbatch"}
FOLDERS = (PACKAGE, "csrc", "tools", "tests", "benchmarks", "examples")


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; a package's is that of its folder."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in python_files(PACKAGE)
    }


@cache
def imported_names(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every import of the package in a file; the name is empty where a module itself is imported."""
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names if alias.name.split(".")[0] == PACKAGE]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            if (node.module or "").split(".")[0] == PACKAGE:
                for alias in node.names:
                    module = f"{node.module}.{alias.name}"
                    found.append((module, "") if module in modules() else (node.module, alias.name))
    return found


def imported_modules(path: Path) -> set[str]:
    return {module for module, _ in imported_names(path)}


@cache
def graph() -> dict[str, set[str]]:
    """What each module imports. The front door is left out: it knows everybody, and has nothing but the version."""
    return {name: imported_modules(path) - {PACKAGE} for name, path in modules().items() if name != PACKAGE}


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_module_lies_in_a_room():
    known = {*ROOMS, *DOORS, "testing"}
    assert {room(module) for module in graph()} <= known


def test_imports_name_modules_that_exist():
    compiled = f"{PACKAGE}._replay_sampler"
    for path in python_files(PACKAGE, "tools", "tests", "benchmarks", "examples"):
        assert imported_modules(path) <= {*modules(), compiled}, path


def test_no_import_looks_up():
    height = {name: number for number, name in enumerate(ROOMS)}
    height |= {"testing": height["api"] - 1, "_replay_sampler": height["data"]}
    upward = [
        f"{module} imports {target}"
        for module, targets in graph().items()
        for target in targets
        if height.get(room(target), len(ROOMS)) > height.get(room(module), len(ROOMS))
    ]
    assert not upward


def test_nothing_but_tests_and_benchmarks_imports_testing():
    for path in python_files(PACKAGE, "tools", "examples"):
        if (ROOT / PACKAGE / "testing") not in path.parents:
            assert not [m for m in imported_modules(path) if m.startswith(f"{PACKAGE}.testing")], path


def test_no_circles():
    graphlib.TopologicalSorter(graph()).prepare()  # a CycleError names one


def test_no_module_is_an_orphan():
    users = {path: imported_modules(path) for path in python_files(PACKAGE, "tools", "examples", "benchmarks")}
    of_tests = set().union(*(imported_modules(path) for path in python_files("tests")))
    started = {f"{PACKAGE}.cli"}  # by the entry point in pyproject.toml
    front_door = modules()[PACKAGE].read_text(encoding="utf-8")
    for module, path in modules().items():
        if path.name == "__init__.py" and not defined(module) and not passed_on(module):
            continue
        used = any(module in imports for user, imports in users.items() if user != path)
        used |= f"{module}.".startswith(f"{PACKAGE}.commands.") and "COMMAND" in defined(
            module
        )  # the command line looks through the folder
        used |= f"{module}.".startswith(f"{PACKAGE}.testing.") and module in of_tests
        assert used or module in started or module.removeprefix(f"{PACKAGE}.") in front_door, (
            f"nothing imports {module}"
        )


@cache
def defined(module: str) -> set[str]:
    """Names that a module makes itself, at its top."""
    names = set()
    for node in ast.walk(tree_of(modules()[module])):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


@cache
def passed_on(module: str) -> dict[str, str]:
    """Names that a module has imported from another of the package, and from which."""
    return {name: source for source, name in imported_names(modules()[module]) if name and name not in defined(module)}


def test_one_import_path_for_each_name():
    """A room's __init__ may be its door; then everybody outside uses the door. Nothing else passes names on."""
    wrong = []
    doors = {
        (source, name): module
        for module, path in modules().items()
        if path.name == "__init__.py" and module != PACKAGE
        for name, source in passed_on(module).items()
    }
    for path in python_files(PACKAGE, "tools", "tests", "benchmarks", "examples"):
        for module, name in imported_names(path):
            if module not in modules() or module == PACKAGE or not name:
                continue
            if name in passed_on(module) and doors.get((passed_on(module)[name], name)) != module:
                wrong.append(f"{path}: {name} comes from {passed_on(module)[name]}, not {module}")
            door = doors.get((module, name))
            if door and modules()[door].parent not in path.parents:
                wrong.append(f"{path}: {name} is imported from {module}, not from {door}")
    assert not wrong, "\n".join(wrong)


def test_no_file_is_longer_than_300_lines():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in CODE]
    lines = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {str(path): count for path, count in lines.items() if count > LONGEST_FILE}


def test_no_function_is_longer_than_70_lines():
    long = [
        f"{path.relative_to(ROOT)}: {node.name}, {node.end_lineno - node.lineno + 1}"
        for path in python_files(PACKAGE, "tools", "tests", "benchmarks", "examples")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    ]
    assert not long


def test_unit_tests_mirror_the_rooms():
    unit = ROOT / "tests/unit"
    folders = {path.parent.relative_to(unit) for path in python_files("tests/unit")}
    others = {"benchmarks", "docs", "examples"}
    assert not {str(folder) for folder in folders if not (ROOT / PACKAGE / folder).is_dir()} - others


def test_no_merge_was_left_half_done():
    files = [
        path for folder in (*FOLDERS, "docs") for path in (ROOT / folder).rglob("*") if path.suffix in {*CODE, ".md"}
    ]
    marked = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in [*files, *ROOT.glob("*.md")]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if line.startswith(("<" * 7 + " ", ">" * 7 + " "))
    ]
    assert not marked
