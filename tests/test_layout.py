"""The import direction and the house rules, read from the source of every file; and proof that the
reader sees violations."""

from __future__ import annotations

import ast
import graphlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECKED = ("kafjax", "experiments", "launch")
ROWS = (
    ("core",),
    ("parallel", "ops", "corpus", "evaluation"),
    ("models", "lora"),
    ("hub",),
    ("training", "generation", "retrieval", "prompts"),
    ("methods",),
    ("experiments",),
    ("launch",),
    ("papers",),
    ("benchmarks", "scripts", "tests"),
)
ROW = {package: row for row, packages in enumerate(ROWS) for package in packages}
OUTSIDE_KAFJAX = {"experiments", "launch", "benchmarks", "scripts", "tests"}
ORACLES = {"accelerate", "peft", "sentence_transformers", "torch", "transformers"}
READS_TOKENIZERS = "kafjax.hub.auto_tokenizer"  # with transformers, which is no reference there
UNSAFE = {"cloudpickle", "dill", "marshal", "pickle", "shelve"}
MAX_LINES = 550


def problems(root: Path) -> list[str]:
    """One `file:line: what is wrong` for each broken rule in the tree at `root`; empty if all is
    well."""
    files = {
        _module(root, path): path for top in CHECKED for path in sorted((root / top).rglob("*.py"))
    }
    found: list[str] = []
    edges: dict[str, dict[str, int]] = {}
    for module, path in files.items():
        name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        tree = ast.parse(text, filename=name)
        imports = list(_imports(tree, module, is_package=path.name == "__init__.py"))
        lines = len(text.splitlines())
        if lines > MAX_LINES:
            found.append(
                f"{name}:{MAX_LINES + 1}: {lines} lines, over {MAX_LINES}: it hides two files"
            )
        package = _package(module)
        if package is None:
            found.append(f"{name}:1: '{module}' stands in no row of the layout")
            continue
        for line, imported in imports:
            if problem := _forbidden(package, module, imported):
                found.append(f"{name}:{line}: {module} imports {imported}: {problem}")
            if (target := _known(imported, files)) not in (None, module):
                edges.setdefault(module, {}).setdefault(target, line)
        found += [f"{name}:{line}: {what}" for line, what in _unsafe_calls(tree)]
    return found + _circle(
        edges, {module: path.relative_to(root).as_posix() for module, path in files.items()}
    )


def _module(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _package(module: str) -> str | None:
    """The layout's name for a module of ours: `kafjax.ops.linear` -> `ops`; `""` for `kafjax`
    itself; None for any other. `experiments.papers` runs sweeps, so it stands above `launch`."""
    top, _, rest = module.partition(".")
    if top == "experiments" and rest.partition(".")[0] == "papers":
        return "papers"
    if top in OUTSIDE_KAFJAX:
        return top
    if top != "kafjax":
        return None
    name = rest.partition(".")[0]
    return name if not name or (name in ROW and name not in OUTSIDE_KAFJAX) else None


def _imports(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of all imports, wherever they stand. `from a import b` gives
    `a.b`: b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") + ([""] if is_package else [])
                base = ".".join([*parents[: -node.level], *filter(None, [base])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            if (
                node.args
                and isinstance(node.args[0], ast.Constant)
                and isinstance(node.args[0].value, str)
            ):
                yield node.lineno, node.args[0].value


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _forbidden(package: str, module: str, imported: str) -> str | None:
    """Reason why a module of `package` may not import `imported`, or None if it may."""
    top = imported.split(".")[0]
    if top == "flax" and package != "models":
        return "only kafjax/models may import flax"
    if top in ORACLES and (top, module) != ("transformers", READS_TOKENIZERS):
        return "reference implementations are for tests and benchmarks only"
    if top in UNSAFE:
        return "loading such data can run code"
    other = _package(imported)
    if not other or other == package:
        return None
    if package == "":
        return "kafjax/__init__.py imports no part of kafjax, so that each part loads alone"
    if ROW[other] >= ROW[package]:
        return f"{other} stands {'beside' if ROW[other] == ROW[package] else 'below'} {package}"
    return None


def _unsafe_calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                yield node.lineno, f"calls {node.func.id}()"
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle" and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    yield node.lineno, "passes allow_pickle"


def _known(imported: str, files: dict[str, Path]) -> str | None:
    """The module of the tree that an imported name lies in: its longest prefix that is a file."""
    parts = imported.split(".")
    return next(
        (name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in files), None
    )


def _circle(edges: dict[str, dict[str, int]], names: dict[str, str]) -> list[str]:
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1][::-1]  # graphlib lists it from the imported to the importer
        line = edges[circle[0]][circle[1]]
        return [f"{names[circle[0]]}:{line}: imports run in a circle: {' -> '.join(circle)}"]
    return []


def test_project_keeps_the_layout():
    found = problems(ROOT)
    assert not found, "\n" + "\n".join(found)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        (
            "kafjax/ops/x.py",
            "\nimport kafjax.models",
            "kafjax/ops/x.py:2: kafjax.ops.x imports kafjax.models: models stands below ops",
        ),
        (
            "kafjax/ops/x.py",
            "from kafjax import hub",
            "kafjax/ops/x.py:1: kafjax.ops.x imports kafjax.hub: hub stands below ops",
        ),
        (
            "kafjax/ops/x.py",
            "from ..lora.spec import Spec",
            "kafjax.lora.spec.Spec: lora stands below ops",
        ),
        (
            "kafjax/ops/__init__.py",
            "from ..hub import load",
            "kafjax.ops imports kafjax.hub.load: hub stands below ops",
        ),
        (
            "kafjax/core/x.py",
            "def f():\n    import kafjax.ops.rope",
            "kafjax/core/x.py:2: kafjax.core.x imports kafjax.ops.rope",
        ),
        (
            "kafjax/lora/x.py",
            "if TYPE_CHECKING:\n    from kafjax.models import Decoder",
            "models stands beside lora",
        ),
        ("kafjax/ops/x.py", "from kafjax.corpus import facts", "corpus stands beside ops"),
        (
            "kafjax/retrieval/x.py",
            "import kafjax.generation as g",
            "generation stands beside retrieval",
        ),
        (
            "kafjax/methods/x.py",
            "from experiments import compare",
            "experiments stands below methods",
        ),
        ("experiments/x.py", "import launch.slurm", "launch stands below experiments"),
        (
            "kafjax/hub/x.py",
            "importlib.import_module('kafjax.training')",
            "training stands below hub",
        ),
        (
            "experiments/x.py",
            "from tests.test_layout import problems",
            "tests stands below experiments",
        ),
        (
            "kafjax/__init__.py",
            "from kafjax import hub",
            "kafjax/__init__.py:1: kafjax imports kafjax.hub",
        ),
        ("kafjax/news/x.py", "", "kafjax/news/x.py:1: 'kafjax.news.x' stands in no row"),
        ("kafjax/tests/x.py", "", "'kafjax.tests.x' stands in no row"),
        (
            "kafjax/lora/x.py",
            "from flax import nnx",
            "kafjax/lora/x.py:1: kafjax.lora.x imports flax.nnx: only kafjax/models",
        ),
        ("experiments/x.py", "import flax.nnx as nnx", "only kafjax/models may import flax"),
        (
            "kafjax/hub/x.py",
            "def f():\n    import torch",
            "kafjax/hub/x.py:2: kafjax.hub.x imports torch",
        ),
        (
            "kafjax/hub/x.py",
            "from transformers import AutoTokenizer",
            "kafjax/hub/x.py:1: kafjax.hub.x imports transformers",
        ),
        ("kafjax/hub/auto_tokenizer.py", "import torch", "reference implementations are for tests"),
        ("kafjax/core/x.py", "import pickle", "imports pickle"),
        ("kafjax/core/x.py", "\n\nx = eval('1')", "kafjax/core/x.py:3: calls eval()"),
        (
            "kafjax/core/x.py",
            "np.load(path, allow_pickle=True)",
            "kafjax/core/x.py:1: passes allow_pickle",
        ),
        ("kafjax/core/x.py", "x = 1\n" * 551, "kafjax/core/x.py:551: 551 lines"),
    ],
)
def test_violation_is_reported(tmp_path, file, source, expected):
    (problem,) = problems(write(tmp_path, {file: source}))
    assert expected in problem


def test_circle_is_reported_also_through_a_function(tmp_path):
    files = {
        "kafjax/ops/a.py": "\nfrom kafjax.ops import b",
        "kafjax/ops/b.py": "from .c import x",
        "kafjax/ops/c.py": "def f():\n    from kafjax.ops.a import y",
    }
    (problem,) = problems(write(tmp_path, files))
    circle = problem.partition("circle: ")[2].split(" -> ")
    assert sorted(circle[:-1]) == ["kafjax.ops.a", "kafjax.ops.b", "kafjax.ops.c"]
    imported_by = {
        "kafjax.ops.a": "kafjax.ops.b",
        "kafjax.ops.b": "kafjax.ops.c",
        "kafjax.ops.c": "kafjax.ops.a",
    }
    assert all(imported_by[a] == b for a, b in itertools.pairwise(circle))
    line = {"kafjax.ops.a": 2, "kafjax.ops.b": 1, "kafjax.ops.c": 2}[circle[0]]
    assert problem.startswith(f"{circle[0].replace('.', '/')}.py:{line}: ")


def test_allowed_imports_pass(tmp_path):
    files = {
        "kafjax/__init__.py": "import importlib.metadata",
        "kafjax/core/trees.py": "import numpy as np\nnp.load(path, allow_pickle=False)",
        "kafjax/models/__init__.py": "from kafjax.models.decoder import Decoder",
        "kafjax/models/decoder.py": "from flax import nnx\nfrom ..ops import linear\nfrom .cache import Cache\nmodel.eval()",
        "kafjax/models/cache.py": "import jax",
        "kafjax/hub/auto_tokenizer.py": "def f():\n    from transformers import AutoTokenizer",
        "kafjax/methods/rag.py": "from kafjax import hub, lora, retrieval\nfrom kafjax.core.trees import count",
        "experiments/compare.py": "import kafjax.methods\nfrom kafjax.evaluation import table",
        "launch/ray.py": "import ray\nfrom experiments import build\n" + "x = 1\n" * 448,
    }
    assert problems(write(tmp_path, files)) == []
