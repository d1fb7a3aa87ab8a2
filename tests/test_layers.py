"""python -m pytest tests/test_layers.py

Proves that imports point down the levels of docs/architecture.md, that only integration/ imports colossalai and only
kernels/cuda imports triton, and that the package itself needs neither. Function-level imports count like all others.
"""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PACKAGE = "colossal_freqcache"
ROOT = Path(__file__).parents[1] / PACKAGE  # read, not imported: a circular import should be named, too

# Every module (a folder counts as one) and its level: it may import what is strictly below.
LEVELS = {
    "autograd_exit": 0,
    "config": 0,
    "device_slots": 0,
    "host_memory": 0,
    "memory": 0,
    "metrics": 0,
    "id_files": 0,
    "synthetic": 0,
    "frequency": 0,
    "row_order": 0,
    "row_layout": 0,
    "rounding": 0,
    "vectors": 0,
    "row_rules": 1,
    "slots": 1,
    "eviction": 1,
    "stores": 1,
    "kernels": 1,
    "transfers": 1,
    "ahead": 2,
    "cache": 2,
    "device_ahead": 2,
    "device_cache": 2,
    "device_replay": 2,
    "placement": 2,
    "block": 2,
    "step_hooks": 2,
    "lookahead": 3,
    "embedding": 3,
    "optim": 3,
    "parallel": 4,
    "checkpoint": 5,
    "integration": 6,
    "planner": 6,
    "simulate": 6,
    "report": 6,
    "cli": 6,
    "compat": 6,
    "": 7,  # the package's own __init__
    "__main__": 7,
}

# Steps within one level: the importer builds on the imported one, and never the other way round.
SAME_LEVEL = {
    ("row_order", "vectors"),  # looks rows up
    ("row_order", "memory"),  # in pages of its own
    ("host_memory", "memory"),
    ("row_layout", "memory"),  # where records lie
    ("frequency", "id_files"),  # counts what the readers yield
    ("cache", "ahead"),  # asks it what is held for the batches to come
    ("device_cache", "cache"),  # is one, on a device
    ("device_cache", "device_ahead"),
    ("device_cache", "device_replay"),
    ("lookahead", "embedding"),  # tells its modules what comes
    ("placement", "cache"),  # which part of the tables a cache holds
    ("block", "placement"),
    ("block", "cache"),  # the Parameter around the cache's slots
    ("step_hooks", "block"),  # lets foreign optimizers step a block
    ("cli", "simulate"),  # prints what the simulation found
}

# Who may import what is not always installed.
ONLY = {"colossalai": "integration", "triton": "kernels.cuda", "matplotlib": "simulate"}


def modules() -> dict[str, Path]:
    """{dotted name below the package: file}; "" is the package itself, a folder is its __init__.py."""
    files = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


MODULES = modules()


def imported_names(source: str, module: str, is_package: bool) -> set[str]:
    """Absolute dotted names that `source` imports, in functions too; `from a import b` gives "a.b"."""
    names = set()
    here = f"{PACKAGE}.{module}".rstrip(".").split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # One dot is the package that the module is in; a package's __init__ is in itself.
            up = node.level - 1 if is_package else node.level
            base = here[: len(here) - up] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            names |= {".".join([*base, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Call):  # importlib.import_module("..."), __import__("...")
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                names.add(str(node.args[0].value))
    return names


def imports_of(module: str) -> set[str]:
    path = MODULES[module]
    return imported_names(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")


def unit_of(dotted: str) -> str:
    """The file or folder of the package that an absolute dotted name lies in; "" for a name of the package itself."""
    first = dotted.split(".")[1] if "." in dotted else ""
    return first if first in LEVELS or first in MODULES else ""


def units_imported_by(module: str) -> set[str]:
    return {unit_of(name) for name in imports_of(module) if name.split(".")[0] == PACKAGE}


def test_every_module_has_a_level():
    units = {name.split(".")[0] for name in MODULES}
    assert units <= set(LEVELS), f"give {sorted(units - set(LEVELS))} a level in this file and in docs/architecture.md"
    assert {"config", "frequency", "slots", "cache", "embedding"} <= units, "the package's files were not found"


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_point_down(module):
    unit = module.split(".")[0]
    for imported in units_imported_by(module) - {unit}:
        assert LEVELS[imported] < LEVELS[unit] or (unit, imported) in SAME_LEVEL, (
            f"{module} (level {LEVELS[unit]}) imports {imported or 'the package itself'} (level {LEVELS[imported]})"
        )


def test_steps_within_a_level_are_used_and_have_one_direction():
    used = {(name.split(".")[0], imported) for name in MODULES for imported in units_imported_by(name)}
    assert used >= SAME_LEVEL, f"no longer needed: {SAME_LEVEL - used}"
    assert all(LEVELS[a] == LEVELS[b] and (b, a) not in used for a, b in SAME_LEVEL)


@pytest.mark.parametrize("library", ONLY)
def test_optional_library_is_imported_in_one_place_only(library):
    importers = {m for m in MODULES if any(name.split(".")[0] == library for name in imports_of(m))}
    allowed = ONLY[library]
    assert all(m == allowed or m.startswith(allowed + ".") for m in importers), importers


@pytest.mark.parametrize(
    ("source", "module", "is_package", "expected"),
    [
        ("from .slots import SlotTable", "cache", False, f"{PACKAGE}.slots.SlotTable"),
        ("from . import optim", "", True, f"{PACKAGE}.optim"),
        ("from . import BatchPlan", "kernels.cpu", False, f"{PACKAGE}.kernels.BatchPlan"),
        ("from .cpu import CpuKernels", "kernels", True, f"{PACKAGE}.kernels.cpu.CpuKernels"),
        ("from ..row_layout import RowLayout", "stores.ram", False, f"{PACKAGE}.row_layout.RowLayout"),
        ("def f():\n    import triton.language as tl", "slots", False, "triton.language"),
        ("import importlib\nimportlib.import_module('colossalai.booster')", "slots", False, "colossalai.booster"),
    ],
)
def test_the_parser_resolves(source, module, is_package, expected):
    """The rules above hold only as far as each form of import is seen."""
    assert expected in imported_names(source, module, is_package)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_neither_colossalai_nor_triton():
    """torch may import triton for itself: what counts is who asked."""
    out = run_python(
        """
        import builtins, sys
        asked, real = set(), builtins.__import__

        def watching(name, globals=None, locals=None, fromlist=(), level=0):
            importer = (globals or {}).get("__name__", "")
            optional = level == 0 and name.split(".")[0] in ("colossalai", "triton")
            if optional and importer.startswith("colossal_freqcache"):
                asked.add((importer, name))
            return real(name, globals, locals, fromlist, level)

        builtins.__import__ = watching
        import colossal_freqcache
        print(sorted(asked), "colossalai" in sys.modules)
        """
    )
    assert out.split("\n")[-2] == "[] False"


def test_the_package_imports_where_neither_is_installed():
    """In the full environment both are installed: here they are made unimportable."""
    code = """
        import sys
        sys.modules["colossalai"] = sys.modules["triton"] = None
        import colossal_freqcache
        print(colossal_freqcache.FreqAwareEmbeddingBag.__name__)
        """
    assert run_python(code).strip().endswith("FreqAwareEmbeddingBag")
