"""The structure of the code, as docs/architecture.md and CONTRIBUTING.md describe it."""

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "shardopt"
FLOORS = [
    {"slices", "distributed", "watchdog", "errors", "rows", "deprecated"},
    {"optim"},
    {"engines"},
    {"checkpoint"},
    {"pretrain"},
    {"cli", "commands", "integrations", "__main__"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules that a file imports, at its top or inside a function, but for type checking alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            if node.module == "shardopt":
                yield from (f"shardopt.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            yield from imported(node)


def floor_of(module: str) -> int | None:
    """The floor of one of our modules; None for a name that the package itself exports."""
    parts = module.split(".")
    return FLOOR.get(parts[1]) if parts[0] == "shardopt" and len(parts) > 1 else None


@pytest.mark.parametrize("source", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_the_floors(source: Path) -> None:
    here = FLOOR[source.relative_to(PACKAGE).parts[0].removesuffix(".py")]
    for module in imported(ast.parse(source.read_text())):
        there = floor_of(module)
        assert there is None or there <= here, f"{source.relative_to(ROOT)} imports {module}, which is above it"


# DTensor and AsyncCollectiveTensor, which are kinds of tensor that a gradient may be.
TENSOR_KINDS = ("torch.distributed.tensor", "torch.distributed._functional_collectives")


def test_optimizers_never_communicate() -> None:
    for source in (PACKAGE / "optim").rglob("*.py"):
        for module in imported(ast.parse(source.read_text())):
            assert not module.startswith("torch.distributed") or module.startswith(TENSOR_KINDS), (
                f"{source.relative_to(ROOT)} imports {module}"
            )


def test_no_file_outside_the_kernels_is_over_400_lines() -> None:
    lengths = {str(p.relative_to(PACKAGE)): len(p.read_text().splitlines()) for p in SOURCES}
    assert {p: n for p, n in lengths.items() if n > 400 and not p.startswith("optim/kernels/")} == {}


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md", "README.md"])
def test_pages_name_files_and_objects_that_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    code = "\n".join(p.read_text() for p in [*SOURCES, *PACKAGE.rglob("*.c")])
    folders = [ROOT, PACKAGE, PACKAGE / "engines", PACKAGE / "optim", PACKAGE / "optim/kernels"]
    named = set(re.findall(r"`([^`\n]+)`", text))
    for name in named:
        if re.fullmatch(r"[\w/.]+\.(py|c|sh|md)|[\w/]+/", name):
            assert any((folder / name).exists() for folder in folders), f"{page} names {name}"
        elif re.fullmatch(r"[A-Za-z_][\w.]*\.[A-Za-z_]\w*", name) and page != "README.md":
            last = name.split(".")[-1]
            assert re.search(rf"\b{last}\b", code), f"{page} names {name}"


def test_planted_faults_stand_in_the_code() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        plant_faults = importlib.import_module("plant_faults")
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    faults = plant_faults.read_faults(ROOT / "scripts" / "faults.yaml", "")
    counts = {f"{fault.file}: {fault.name}": (ROOT / fault.file).read_text().count(fault.old) for fault in faults}
    assert len(counts) >= 260
    assert {name: count for name, count in counts.items() if count != 1} == {}
