"""Write docs/api.md: every public name with its signature, which a release may change only as semantic versioning says.

PYTHONPATH=. python scripts/list_api.py
"""

from __future__ import annotations

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
    "shardopt.errors": ["InputError", "MissingExtraError", "StorageError"],
    "shardopt.integrations.accelerate": ["sharded_ademamix", "sharded_state"],
    "shardopt.integrations.transformers": ["AdEMAMixArguments", "AdEMAMixTrainer", "shardopt_optimizer"],
    "shardopt.optim.registry": ["register"],
}
_TEXT = """# Public names

These names, their arguments and what they do, the keys of a config, the commands and their options, and the format of
checkpoints are public: once 1.0.0 is out, a release that breaks one has a new first number, and the one before warns
(`typing_extensions.deprecated`). Until then a change needs a line in CHANGELOG.md. Everything else may change in any
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


def page() -> str:
    """The whole page as it must be."""
    text = _TEXT
    for module_name, names in PUBLIC.items():
        module = importlib.import_module(module_name)
        text += f"\n## {module_name}\n\n```python\n"
        for name in sorted(names or module.__all__):
            text += "\n".join(_lines(name, getattr(module, name))) + "\n"
        text += "```\n"
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
