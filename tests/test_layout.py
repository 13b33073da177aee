"""The rules of the layout: links, arrows, budgets, and what nothing may do."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("kernels", "patches")
PRODUCT = ("automodel_accel", *LINKED)
SCRIPTS = ("bench", "examples", "tests")
MAX_LINES, MAX_STATEMENTS, MAX_STATEMENTS_OF_A_TRITON_KERNEL, MAX_QUIRKS = 500, 60, 120, 20

# lowest first; a module imports from its own layer and from those before it
LAYERS = (
    {"kernels"},
    {"patches"},
    {"adapters", "config", "tables"},
    {"plan", "prove", "report"},
    {"parallel"},
    {"api", "demo"},
    {"building", "callback", "checkpoint", "data", "flops", "freezing", "meter", "models", "sharding", "trainer_meter"},
    {"evaluation", "scaling"},
    {"train"},
    {"recipes"},
    {"__init__"},
    {"cli", "__main__", "run"},
)
# what the lower layers know beside themselves and the standard library
KNOWN_TO = {"kernels": {"torch", "triton"}, "patches": {"torch", "transformers", "peft"}}
# an implementation by another package knows that one as well, and is imported only where it is chosen
IMPLEMENTED_BY = {
    "te.py": {"transformer_engine", "transformer_engine_torch"},
    "liger.py": {"liger_kernel"},
    "flash2.py": {"flash_attn"},
    "flash3.py": {"flash_attn_interface"},
    "flash4.py": {"flash_attn"},
}


def python_files(*folders: str) -> list[Path]:
    """Source files by their real paths, so not through the links."""
    links = {ROOT / "automodel_accel" / name for name in LINKED}
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in found if not links.intersection(path.parents))


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, those inside functions too; `from a import b` counts as a.b."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{'.' * node.level}{node.module}.{name.name}") for name in node.names)


def part_of(path: Path) -> str:
    """The part of the package that a file belongs to: "kernels", "api", "cli"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "automodel_accel" else parts[0]


def layer_of(part: str) -> int:
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    return (node for node in nodes(path) if isinstance(node, ast.FunctionDef))


def report(path: Path, line: int, what: str) -> str:
    return f"{path.relative_to(ROOT)}:{line} {what}"


@pytest.mark.parametrize("name", LINKED)
def test_folder_is_linked_and_no_package_of_its_own(name: str) -> None:
    link = ROOT / "automodel_accel" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert not (ROOT / name / "__init__.py").exists(), f"it would hide another package named {name}"


def test_every_module_has_a_layer() -> None:
    assert {part_of(path) for path in python_files(*PRODUCT)} == set.union(*LAYERS)


def test_imports_run_one_way() -> None:
    wrong = []
    parts = set.union(*LAYERS)
    for path in python_files(*PRODUCT):
        for line, name in imports(path):
            top, *rest = name.split(".")
            if top == "automodel_accel":
                other = rest[0] if rest and rest[0] in parts else "__init__"
                if layer_of(other) > layer_of(part_of(path)):
                    wrong.append(report(path, line, f"imports {name}, which is above it"))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", sorted(KNOWN_TO))
def test_lower_layers_know_few_packages(folder: str) -> None:
    allowed = KNOWN_TO[folder] | {"automodel_accel"} | sys.stdlib_module_names
    found = [(path, line, name) for path in python_files(folder) for line, name in imports(path)]
    wrong = [
        report(path, line, f"imports {name}")
        for path, line, name in found
        if name.split(".")[0] not in allowed | (IMPLEMENTED_BY.get(path.name, set()) if folder == "kernels" else set())
    ]
    assert not wrong, f"{folder}/ knows {sorted(KNOWN_TO[folder])} only:\n" + "\n".join(wrong)


def test_product_does_not_import_scripts_or_relatively() -> None:
    found = [(path, line, name) for path in python_files(*PRODUCT) for line, name in imports(path)]
    wrong = [
        report(path, line, f"imports {name}") for path, line, name in found if name.split(".")[0] in ("", *SCRIPTS)
    ]
    assert not wrong, "\n".join(wrong)


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files(*PRODUCT, *SCRIPTS)}
    long = [f"{path.relative_to(ROOT)}: {length} lines" for path, length in lengths.items() if length > MAX_LINES]
    assert not long, f"over {MAX_LINES} lines; split by what changes together: {long}"


def test_functions_are_short() -> None:
    long = []
    for path in python_files(*PRODUCT, *SCRIPTS):
        for function in functions(path):
            is_kernel = any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)
            statements = sum(isinstance(node, ast.stmt) for node in ast.walk(function)) - 1
            if statements > (MAX_STATEMENTS_OF_A_TRITON_KERNEL if is_kernel else MAX_STATEMENTS):
                long.append(report(path, function.lineno, f"{function.name}: {statements} statements"))
    assert not long, "\n".join(long)


def test_quirks_stay_few() -> None:
    tables = [node for node in nodes(ROOT / "patches" / "quirks.py") if isinstance(node, ast.Dict)]
    assert sum(len(table.keys) for table in tables) <= MAX_QUIRKS


def test_no_broad_handlers() -> None:
    wrong = []
    for path in python_files(*PRODUCT, *SCRIPTS):
        for node in nodes(path):
            if isinstance(node, ast.ExceptHandler):
                caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
                names = {ast.unparse(kind) if kind else "everything" for kind in caught}
                if names & {"everything", "Exception", "BaseException"}:
                    wrong.append(report(path, node.lineno, f"catches {sorted(names)}"))
    assert not wrong, "\n".join(wrong)


def test_no_code_from_text_and_no_reading_of_source() -> None:
    wrong = []
    for path in python_files(*PRODUCT, "bench", "examples"):
        for node in nodes(path):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("exec", "eval", "compile"):
                wrong.append(report(path, node.lineno, f"calls {ast.unparse(node.func)}"))
            if isinstance(node, ast.Attribute) and node.attr in ("getsource", "getsourcelines"):
                wrong.append(report(path, node.lineno, f"uses {node.attr}"))
    assert not wrong, "\n".join(wrong)


def test_only_facts_reads_the_environment() -> None:
    wrong = []
    for path in python_files(*PRODUCT, "examples"):
        for node in nodes(path):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv", "environb"):
                wrong.append(report(path, node.lineno, f"uses {ast.unparse(node)}"))
    assert {entry.split(":")[0] for entry in wrong} <= {"kernels/facts.py"}, "\n".join(wrong)


def test_names_say_something() -> None:
    paths = [path.relative_to(ROOT) for path in python_files(*PRODUCT, *SCRIPTS)]
    empty = {"util", "utils", "common", "helper", "helpers", "misc"}
    assert not [str(path) for path in paths if empty.intersection(path.with_suffix("").parts)]


def test_code_is_ascii() -> None:
    paths = python_files(*PRODUCT, *SCRIPTS)
    assert not [str(path.relative_to(ROOT)) for path in paths if not path.read_text(encoding="utf-8").isascii()]


def test_no_script_hides_a_package() -> None:
    dependencies = {
        "torch",
        "triton",
        "transformers",
        "peft",
        "accelerate",
        "safetensors",
        "typer",
        "rich",
        "tqdm",
        "yaml",
    }
    hidden = {*LINKED, *dependencies, "datasets", "wandb", "matplotlib", "numpy", *sys.stdlib_module_names} - {
        "__main__"
    }
    found = [path for folder in SCRIPTS for path in (ROOT / folder).iterdir() if path.stem in hidden]
    assert not found, f"Python puts a script's folder first on its path, so these names hide a package: {found}"


def test_texts_name_no_machine() -> None:
    """No path of somebody's machine and no host of a registry in anything that is, or would be, committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    machine = re.compile(r"(?<![\w.])/(?:work|root|home|tmp|Users|opt)/|pypi\.(?:org)|files\.pythonhosted")
    wrong = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_symlink() or not path.is_file() or path.suffix in (".png", ".gz"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if machine.search(line):
                wrong.append(report(path, number, line.strip()))
    assert not wrong, "\n".join(wrong)
