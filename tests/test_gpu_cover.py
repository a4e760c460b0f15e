"""Every place in shardopt/ that asks for a GPU is listed in tests/gpu_cover.yaml, with what checks it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "shardopt"

# Attributes and arguments that only a GPU gives a meaning, and flags of ours that say that one is there.
NAMES = {"is_cuda", "pin_memory", "non_blocking", "record_stream", "wait_stream", "wait_event", "record_event", "cuda"}
NAMES |= {
    "capturable",
    "captured",
    "in_stream",
    "is_current_stream_capturing",
    "is_captured",
    "_capturing",
    "capturing",
}
DEVICES = re.compile(r"\b(cuda|nccl)\b", re.IGNORECASE)


WORDS = re.compile("|".join([*NAMES, "cuda", "nccl", "gpu", "\\Wcpu\\W"]), re.IGNORECASE)


def asks(node: ast.AST) -> bool:
    """Whether a node, by itself, is about a GPU: a name, an argument, or a comparison with a kind of device."""
    if isinstance(node, ast.Attribute):
        return node.attr in NAMES
    if isinstance(node, ast.keyword):
        return node.arg in NAMES
    if isinstance(node, ast.Name):
        return node.id in NAMES
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and node.value.lower() in ("cuda", "nccl", "cpu:gloo,cuda:nccl")
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        kinds = [s.value for s in sides if isinstance(s, ast.Constant)]
        return any(isinstance(k, str) and (k in ("cpu", "gpu") or DEVICES.search(k)) for k in kinds)
    return False


def branches(source: str) -> Iterator[tuple[str, str]]:
    """Function and text of each statement's part that is about a GPU: a condition, a call, an assigned value."""

    def visit(node: ast.AST, where: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from visit(child, f"{where}.{child.name}" if where else child.name)
            elif isinstance(child, ast.stmt):
                if any(map(asks, parts(child))):
                    yield where or "module", ast.unparse(child).splitlines()[0][:90]
                yield from visit(child, where)
            elif isinstance(child, HOLDERS):
                yield from visit(child, where)

    if WORDS.search(source):  # most files have nothing to do with it
        yield from visit(ast.parse(source), "")


HOLDERS = (ast.ExceptHandler, ast.match_case)  # of statements, inside a statement


def parts(statement: ast.stmt) -> Iterator[ast.AST]:
    """What belongs to the statement alone, not to statements inside it."""
    for child in ast.iter_child_nodes(statement):
        if not isinstance(child, (ast.stmt, *HOLDERS)):
            yield from ast.walk(child)


def listed() -> dict[tuple[str, str, str], list[str]]:
    """File, function and code of each place in the list, and what covers it."""
    entries = yaml.safe_load((ROOT / "tests" / "gpu_cover.yaml").read_text())
    return {(*e["place"].split(" "), code): e["by"] for e in entries for code in e["code"]}


def test_every_place_that_asks_for_a_gpu_is_covered() -> None:
    found = {
        (str(path.relative_to(ROOT)), where, text)
        for path in PACKAGE.rglob("*.py")
        for where, text in branches(path.read_text())
    }
    missing = sorted(found - listed().keys())
    assert not missing, f"write into tests/gpu_cover.yaml, with what checks it on a GPU or without: {missing}"
    assert sorted(listed().keys() - found) == [], "these are not in the code any more"


def test_what_covers_them_exists() -> None:
    """A test by its file and name, in one of four kinds, or a case of scripts/gpu_check.py."""
    cases = set(re.findall(r'^    Case\("(\w+)"', (ROOT / "scripts" / "gpu_check.py").read_text(), re.MULTILINE))
    assert len(cases) > 5
    for by in {b for each in listed().values() for b in each}:
        kind, what = by.split(": ")
        if kind == "gpu_check":
            assert what in cases, by
            continue
        assert kind in ("interpreter", "compiled", "fake device", "any device"), by
        file, name = what.split("::")
        assert f"def {name}(" in (ROOT / file).read_text(), by


def test_new_places_are_seen() -> None:
    """What a change might add: each of these lines is a place of its own."""
    lines = [
        "if tensor.is_cuda: pass",
        "if device.type == 'cuda': pass",
        "if device.type != 'cpu': pass",
        "torch.cuda.empty_cache()",
        "x = torch.empty(3, pin_memory=True)",
        "y = x.to(device, non_blocking=True)",
        "x.record_stream(stream)",
        "dist.init_process_group('nccl')",
        "while graph.is_current_stream_capturing(): pass",
    ]
    for line in lines:
        assert [where for where, _ in branches(f"class A:\n  def b(self):\n    {line}")] == ["A.b"], line
    assert list(branches("x = torch.empty(3)\nif x.type == 'meta': pass")) == []
