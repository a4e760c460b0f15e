"""Write docs/api.md: every public name with its signature, which a release may change only as semantic versioning says.

PYTHONPATH=. python scripts/list_api.py
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
# None: all of the module's `__all__`.
PUBLIC: dict[str, list[str] | None] = {
    "shardopt": None,
    "shardopt.checkpoint": None,
    "shardopt.distributed": ["Ranks"],
    "shardopt.engines.gradient_hooks": None,
    "shardopt.engines.state": ["ModuleState"],
    "shardopt.engines.zero": ["ZeroState"],
    "shardopt.errors": ["InputError", "MissingExtraError", "StorageError"],
    "shardopt.integrations.accelerate": ["sharded_ademamix", "sharded_state"],
    "shardopt.integrations.lightning": ["ZeroDDPStrategy", "zero_ademamix"],
    "shardopt.integrations.torchtitan": ["AdEMAMixContainer", "ademamix", "build_optimizers"],
    "shardopt.integrations.transformers": ["AdEMAMixArguments", "AdEMAMixTrainer", "shardopt_optimizer"],
    "shardopt.optim.registry": ["register"],
}
# Read and not imported: they need frameworks that only tests have, and take seconds.
_READ = {"shardopt.integrations.lightning", "shardopt.integrations.torchtitan"}
_TEXT = """# Public names

These names, their arguments and what they do, the keys of a config, the commands and their options, and the format of
checkpoints are public: once 1.0.0 is out, a release that breaks one has a new first number, and the one before warns
([versions.md](versions.md)). Until then a change needs a line in CHANGELOG.md. Everything else may change in any
release. Made by `python scripts/list_api.py`; a test holds the page against the code.
"""


def _lines(name: str, value: Any) -> list[str]:
    """A function, a class with its public methods, or a value."""
    if not callable(value):
        return [name]
    lines = [f"{name}{_signature(value)}"]
    if inspect.isclass(value):
        own = [n for cls in value.__mro__ if cls.__module__.startswith("shardopt") for n in vars(cls)]
        for method in sorted({n for n in own if not n.startswith("_")}):
            member = inspect.getattr_static(value, method)
            if isinstance(member, classmethod | staticmethod):
                member = member.__func__
            lines.append(f"    .{method}{_signature(member) if inspect.isfunction(member) else ''}")
    return lines


def _signature(value: Any) -> str:
    try:
        signature = inspect.signature(value)
    except ValueError:  # an exception's, which C code takes
        return "(...)"
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name not in ("self", "cls")]
    return re.sub(r"<function .*? at 0x\w+>", "...", str(inspect.Signature(bare)))


def _read_lines(module: str, names: list[str]) -> list[str]:
    """As `_lines` of each name, of a file that defines functions and classes at its top or in an `if`."""
    tree = ast.parse((PAGE.parents[1] / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    found = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    lines = []
    for name in sorted(names):
        node = found[name]
        if isinstance(node, ast.ClassDef):
            own = [d for d in node.body if isinstance(d, ast.FunctionDef | ast.ClassDef) and not d.name.startswith("_")]
            lines += [name, *(f"    .{d.name}" for d in sorted(own, key=lambda d: d.name))]
            continue
        for arg in ast.walk(node.args):
            if isinstance(arg, ast.arg):
                arg.annotation = None
        lines.append(f"{name}({ast.unparse(node.args)})")
    return lines


def page() -> str:
    """The whole page as it must be."""
    text = _TEXT
    for module_name, names in PUBLIC.items():
        text += f"\n## {module_name}\n\n```python\n"
        if module_name in _READ:
            text += "\n".join(_read_lines(module_name, names or [])) + "\n```\n"
            continue
        module = importlib.import_module(module_name)
        for name in sorted(names or module.__all__):
            text += "\n".join(_lines(name, getattr(module, name))) + "\n"
        text += "```\n"
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
