"""Check the layout: what imports what, private names, relative imports, and sizes of files."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "fastadapt": "fastadapt",
    "fastadapt.kernels": "kernels",
    "fastadapt.export": "export",
    "fastadapt.bench": "bench",
}
# From the lowest to the highest; the first prefix that fits a module, longest first, is its layer.
LAYERS = (
    ("fastadapt.kernels",),
    ("fastadapt",),
    ("fastadapt.train", "fastadapt.gdpl"),
    ("fastadapt.export",),
    ("fastadapt.bench",),
    ("fastadapt.cli", "fastadapt.demo", "fastadapt.__main__", "fastadapt.bench.__main__"),
)
LINES = 500

# What cannot be had otherwise: in its threads Triton 3.6 changes the process's filters of warnings.
EXCEPTIONS = {"planted": {"kernels/common/compile_ahead.py sets code_generator.warnings"}}


@dataclass(frozen=True)
class Import:
    """Name one imported module, and the object taken from it, if any."""

    module: str
    name: str | None
    lazy: bool
    relative: bool


@dataclass
class Module:
    """Hold one source file: its tree, its imports, and the private names it defines."""

    name: str
    path: Path
    tree: ast.Module
    imports: list[Import] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)

    @property
    def file(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


def is_private(name: str) -> bool:
    tuples = ("_asdict", "_fields", "_make", "_replace")  # NamedTuple's own, public by its docs
    return name.startswith("_") and not name.startswith("__") and name not in tuples


def lazy_nodes(tree: ast.Module) -> set[ast.AST]:
    """Return the nodes that importing the module does not run."""
    lazy: set[ast.AST] = set()
    for node in ast.walk(tree):
        deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        if deferred:
            lazy.update(inner for inner in ast.walk(node) if inner is not node)
    return lazy


def read_module(name: str, path: Path) -> Module:
    module = Module(name, path, ast.parse(path.read_text()))
    lazy = lazy_nodes(module.tree)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module.imports.append(Import(alias.name, None, node in lazy, False))
                target = alias.name if alias.asname else alias.name.partition(".")[0]
                module.aliases[alias.asname or target] = target
        elif isinstance(node, ast.ImportFrom):
            target = node.module or ""
            if node.level:
                parts = module.package.split(".")
                base = parts[: len(parts) - node.level + 1]
                target = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                found = Import(target, alias.name, node in lazy, bool(node.level))
                module.imports.append(found)
                module.aliases[alias.asname or alias.name] = f"{target}.{alias.name}"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            module.private.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            module.private.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and own(node):
            module.private.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "self.register_buffer",
            "self.register_parameter",
        ):
            module.private.update(a.value for a in node.args if isinstance(a, ast.Constant))
    module.private = {name for name in module.private if is_private(str(name))}
    return module


def own(node: ast.Attribute) -> bool:
    """Return whether the attribute belongs to the object whose method this is."""
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


@cache
def modules() -> dict[str, Module]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [*package.split("."), *path.relative_to(ROOT / folder).with_suffix("").parts]
            name = ".".join(part for part in parts if part != "__init__")
            found[name] = read_module(name, path)
    return found


def imported(module: Module) -> Iterator[tuple[Import, str]]:
    """Yield every import of a module of ours, with the file that it names."""
    for each in module.imports:
        whole = f"{each.module}.{each.name}"
        if whole in modules():
            yield each, whole
        elif each.module in modules():
            yield each, each.module


def layer(name: str) -> int:
    prefixes = {prefix: rank for rank, row in enumerate(LAYERS) for prefix in row}
    fits = [prefix for prefix in prefixes if name == prefix or name.startswith(prefix + ".")]
    return prefixes[max(fits, key=len)]


def expect(check: str, found: set[str]) -> None:
    new = sorted(found - EXCEPTIONS.get(check, set()))
    assert not new, "\n".join(["", *new])


def test_every_module_was_found():
    assert len(modules()) > 100
    assert {layer(name) for name in modules()} == set(range(len(LAYERS)))


def test_imports_point_downwards():
    """Kernels import no other layer, and so on upwards; only lazy names in `fastadapt` do."""
    found = set()
    for module in modules().values():
        for each, target in imported(module):
            lazy_name = module.name == "fastadapt" and each.lazy
            if layer(target) > layer(module.name) and not lazy_name:
                found.add(f"{module.file} imports {target}")
    expect("layers", found)


def test_kernels_import_torch_and_triton_only():
    import sys

    found = {
        f"{module.file} imports {each.module}"
        for module in modules().values()
        for each in module.imports
        if module.name.startswith("fastadapt.kernels")
        and each.module.partition(".")[0]
        not in {"torch", "triton", "fastadapt", *sys.stdlib_module_names}
    }
    expect("kernels", found)


def test_no_cycle_between_files():
    """Two files that need each other, be it in a function, are one file, or three."""
    edges = {
        name: {
            target
            for each, target in imported(module)
            if target != name and not (each.lazy and name == "fastadapt")
        }
        for name, module in modules().items()
    }
    found = set()

    def visit(name: str, path: tuple[str, ...], done: set[str]) -> None:
        if name in path:
            cycle = path[path.index(name) :]
            first = cycle.index(min(cycle))
            found.add(" → ".join([*cycle[first:], *cycle[:first], cycle[first]]))
        elif name not in done:
            for target in sorted(edges[name]):
                visit(target, (*path, name), done)
            done.add(name)

    done: set[str] = set()
    for name in sorted(edges):
        visit(name, (), done)
    expect("cycles", found)


def test_imports_are_relative_in_mapped_folders_only():
    """Tools that know nothing of the mapping can then follow them."""
    found = set()
    for module in modules().values():
        top = next(p for p in reversed(PACKAGES) if (module.name + ".").startswith(p + "."))
        for each in module.imports:
            inside = (each.module + ".").startswith(top + ".")
            if top == "fastadapt" and each.relative:
                found.add(f"{module.file} imports {each.module} relatively")
            if top != "fastadapt" and each.relative != inside:
                found.add(f"{module.file} imports {each.module} {'' if inside else 'relatively'}")
    expect("relative", found)


def test_no_module_reads_anothers_private_names():
    """Neither by import nor as an attribute, nor does one plant attributes on others' objects."""
    everywhere = set().union(*(module.private for module in modules().values()))
    found = set()
    for module in modules().values():
        foreign = everywhere - module.private
        for each, target in imported(module):
            if each.name and is_private(each.name) and f"{each.module}.{each.name}" != target:
                found.add(f"{module.file} imports {each.module}.{each.name}")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr) and not own(node):
                stored = not isinstance(node.ctx, ast.Load)
                base = module.aliases.get(ast.unparse(node.value), "") in modules()
                if base or node.attr in foreign or (stored and node.attr not in module.private):
                    found.add(f"{module.file} uses {ast.unparse(node)}")
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("attr"):
                names = [a.value for a in node.args if isinstance(a, ast.Constant)]
                for name in names:
                    if isinstance(name, str) and is_private(name) and name in foreign:
                        found.add(f"{module.file} uses {ast.unparse(node)}")
    expect("private", found)


def test_no_attribute_is_planted_on_modules():
    found = set()
    for module in modules().values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                target = module.aliases.get(ast.unparse(node.value).partition(".")[0])
                name = ast.unparse(node)
                # PyTorch's settings and Python's hooks are there to be set.
                if target and ".config" not in name and name != "sys.unraisablehook":
                    found.add(f"{module.file} sets {name}")
    expect("planted", found)


@pytest.mark.parametrize("folder", [*PACKAGES.values(), "tests", "tools", "examples"])
def test_no_file_is_longer_than_a_reader_can_hold(folder):
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        count = len(path.read_text().splitlines())
        if count > LINES:
            found.add(f"{path.relative_to(ROOT)} is longer than {LINES} lines")
    expect("lines", found)
