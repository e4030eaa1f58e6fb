"""The shape of the code: who may import whom, one home for each library, short files."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hbxt_compress"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "_bundled" not in path.parts)
MOST_LINES = 400
MEDIAN_LINES = 160

# Lower rows know nothing of higher ones; names in one row do not know each other, but for SIDEWAYS.
ROWS = (
    {"errors"},
    {"disk", "heap", "json_text"},
    {
        "strict",
        "yaml_text",
        "machine",
        "ranks",
        "store",
        "publish",
        "journal",
        "library",
        "torchvision_ops",
        "external_data",
        "geometry",
        "licences",
    },
    {
        "layers",
        "sampler",
        "source",
        "weights",
        "prompts",
        "stats",
        "quantized",
        "clips",
        "footage",
        "artifact",
        "file_records",
        "manifest",
        "released",
        "tile",
        "report",
        "baseline",
        "trajectories",
        "lessons",
        "views",
        "chain",
        "checkpoint",
        "lora",
        "tensor_file",
        "allocation",
    },
    {"formats", "algorithms", "models", "metrics", "graph", "render", "runtime", "signing"},
    {"reference"},
    {"suite", "profile", "verify"},
    {"recipe"},
    {"plan", "lightened"},
    {"stages", "fit"},
    {"costs"},
    {"pipeline", "release", "explain"},
    {"smoke", "hub", "evaluation", "comparing"},
    {"bisection"},
    {"show", "progress", "stopping", "doctor"},
    {"show_fit", "show_quality", "show_release", "show_training"},
    {"ending", "film", "cli_import", "cli_quality", "cli_recipes", "cli_release"},
    {"cli", "__init__"},
    {"__main__"},
)
SIDEWAYS = {
    ("library", "strict"): "suggestions for misspelt names",
    ("strict", "yaml_text"): "two halves of one job, each short",
    ("store", "machine"): "a machine is an argument that no key holds",
    ("store", "ranks"): "they build a result together",
    ("publish", "store"): "what is copied is an entry",
    ("store", "journal"): "a result being built has one",
    ("manifest", "sampler"): "a manifest carries its sampler",
    ("artifact", "manifest"): "a folder has one",
    ("artifact", "file_records"): "whose files it compares",
    ("artifact", "released"): "it may lie in a release, beside that one's files",
    ("file_records", "manifest"): "the record of a file",
    ("released", "file_records"): "it compares a folder's files, too",
    ("released", "manifest"): "the record of a file",
    ("manifest", "tile"): "a clip size may have one",
    ("quantized", "layers"): "keyed by layer name",
    ("weights", "source"): "which file holds a tensor stands in the headers",
    ("chain", "weights"): "a skeleton reads the weights of the block that runs",
    ("checkpoint", "weights"): "safetensors files are read as a component's are",
    ("tensor_file", "weights"): "names of dtypes",
    ("lora", "checkpoint"): "it is one",
    ("formats", "graph"): "a format emits its own nodes with graph.builder",
    ("graph", "formats"): "export asks each weight's format for its nodes",
    ("models", "graph"): "a family describes its graphs with graph.builder",
    ("baseline", "report"): "a baseline is taken from one",
    ("show", "doctor"): "what it found is shown",
    ("algorithms", "formats"): "a rounder is given a format: the contract's type",
}
RUNTIME_MAY_USE = {
    "artifact", "file_records", "json_text", "manifest", "released", "tile", "geometry", "sampler",
    "clips", "errors", "heap",
}  # fmt: skip

# library -> the only places that may import it
HOMES = {
    "click": {"cli", "cli_import", "cli_quality", "cli_recipes", "cli_release", "ending"},
    "rich": {"show", "show_quality", "progress"},
    "pydantic": {"strict", "recipe", "profile", "suite", "prompts", "algorithms", "store", "graph"},
    "pydantic_core": {"strict"},
    "yaml": {"yaml_text"},
    "filelock": {"store"},
    "onnxruntime": {"runtime", "graph", "doctor"},
    "tokenizers": {"runtime", "reference"},
    "onnx": {"graph", "formats"},
    "onnx_ir": {"fit", "graph", "formats", "models"},
    "onnxscript": {"graph", "formats"},
    "optimum": {"graph", "models"},
    "diffusers": {"models", "reference"},
    "transformers": {"models", "reference"},
    "huggingface_hub": {"models", "source", "hub"},
    "model_signing": {"signing"},
    "datasets": {"prompts", "reference"},
    "pyarrow": {"prompts"},
    "av": {"clips", "footage"},
    "lpips": {"metrics"},
    "imageio_ffmpeg": {"metrics"},
    "pycvvdp": {"metrics"},
    "vbench": {"metrics"},
    "scipy": {"metrics"},
    "jinja2": {"render"},
    "markupsafe": {"render"},
    "matplotlib": {"render"},
    "PIL": {"render", "clips"},
    "torch": {
        "algorithms", "chain", "checkpoint", "costs", "fit", "formats", "graph", "lessons",
        "lightened", "lora", "metrics", "models", "quantized", "ranks", "reference", "stages",
        "stats", "tensor_file", "torchvision_ops", "trajectories", "views", "weights",
    },
}  # fmt: skip

NOT_IMPORTED = {
    "onnxscript": "torch exports to ONNX through it",
    "pyopenssl": "model-signing imports it and does not declare it",
}
NOT_DECLARED = {
    "vbench": "runs in a Python of its own, for it wants another numpy",
}


def _place(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _for_types(tree: ast.Module) -> set[ast.AST]:
    """What stands under `if TYPE_CHECKING`: seen by mypy, never run."""
    blocks = [
        n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)
    ]
    return {below for block in blocks for below in ast.walk(block)}


def _imports(path: Path, *, typed: bool = True) -> Iterator[str]:
    """Dotted names that a file imports, lazily or not; `typed` includes those for types only."""
    skipped = set() if typed else _for_types(_tree(path))
    for node in ast.walk(_tree(path)):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _row(place: str) -> int:
    rows = [i for i, row in enumerate(ROWS) if place in row]
    assert rows, f"{place}: not in the diagram of tests/test_architecture.py"
    return rows[0]


def test_imports_only_go_down() -> None:
    wrong = []
    for path in FILES:
        here = _place(path)
        for name in _imports(path):
            if not name.startswith("hbxt_compress."):
                continue
            there = name.split(".")[1]
            there = there if any(there in row for row in ROWS) else "__init__"
            if here == there or _row(there) < _row(here) or (here, there) in SIDEWAYS:
                continue
            wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_sideways_imports_are_still_needed() -> None:
    used = {
        (_place(path), name.split(".")[1])
        for path in FILES
        for name in _imports(path)
        if "." in name
    }
    assert not set(SIDEWAYS) - used


def test_the_runtime_knows_only_the_artifact() -> None:
    paths = [
        path for path in FILES if _place(path) in RUNTIME_MAY_USE | {"runtime", "external_data"}
    ]
    own = RUNTIME_MAY_USE | {"runtime", "external_data"}
    outside = set(sys.stdlib_module_names)
    outside |= {"numpy", "onnxruntime", "tokenizers", "av", "ftfy", "PIL", "safetensors"}
    for path in paths:
        for name in _imports(path):
            top, *rest = name.split(".")
            assert rest[0] in own if top == "hbxt_compress" else top in outside, f"{path}: {name}"


def test_no_file_imports_itself_through_others() -> None:
    modules = {_module(path): path for path in FILES}
    graph = {}
    for module, path in modules.items():
        named = {n for n in _imports(path, typed=False) if n.startswith("hbxt_compress.")}
        found = {n if n in modules else n.rpartition(".")[0] for n in named}
        graph[module] = {n for n in found if n in modules and n != module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a cycle: {' -> '.join(error.args[1])}")


def test_every_library_has_one_home() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in FILES
        for name in _imports(path, typed=False)
        if name.split(".")[0] in HOMES and _place(path) not in HOMES[name.split(".")[0]]
    ]
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_what_is_imported_is_declared_and_what_is_declared_is_used() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["sign"], *extras["slow"]]
    declared = {re.split("[=<>!~ ]", one)[0] for one in wanted}
    names = {
        "yaml": "pyyaml", "PIL": "pillow", "pydantic_core": "pydantic", "pycvvdp": "cvvdp",
    }  # fmt: skip
    imported = {name.split(".")[0] for path in FILES for name in _imports(path)}
    imported -= sys.stdlib_module_names | {"hbxt_compress"} | NOT_DECLARED.keys()
    needed = {names.get(name, name.replace("_", "-")) for name in imported}
    assert needed <= declared, f"imported but not declared: {needed - declared}"
    assert declared <= needed | NOT_IMPORTED.keys(), f"not used: {declared - needed}"


def test_files_are_short() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    long = [f"{path.relative_to(PACKAGE)}: {n}" for path, n in lines.items() if n > MOST_LINES]
    assert not long, long
    assert statistics.median(lines.values()) <= MEDIAN_LINES


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_says_why_it_exists_and_what_is_public(path: Path) -> None:
    tree = _tree(path)
    if not tree.body:
        return
    assert ast.get_docstring(tree), "needs a docstring"
    if len(tree.body) == 1:
        return
    assert "__future__.annotations" in set(_imports(path))
    prints = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "print"]
    assert not prints or _place(path) == "reference", f"print in lines {prints}"
    declared, bound = _declared(tree), _bound_names(tree)
    assert len(declared) == len(set(declared))
    assert set(declared) <= bound, f"in __all__ but not there: {set(declared) - bound}"
    kinds = ast.FunctionDef | ast.ClassDef
    public = {n.name for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")}
    assert public <= set(declared), f"public but not in __all__: {public - set(declared)}"
    if path.name != "__init__.py":
        borrowed = {name.rpartition(".")[2] for name in _imports(path)} & set(declared)
        assert not borrowed, f"in __all__ but at home elsewhere: {borrowed}"


def _bound_names(tree: ast.Module) -> set[str]:
    """Every name that a module's top level binds, imports and types included."""
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    bound |= {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
    return bound


def _declared(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def _loaded_by(statement: str) -> set[str]:
    """Top-level modules in memory after a statement, in a fresh interpreter without torch."""
    code = f"import sys; sys.modules['torch'] = None; {statement}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return {name.split(".")[0] for name in run.stdout.split()}


def test_the_package_and_its_command_line_load_nothing_heavy() -> None:
    loaded = _loaded_by("import hbxt_compress.cli, hbxt_compress.__main__")
    heavy = {"numpy", "pydantic", "yaml", "rich", "onnxruntime", "transformers", "diffusers"}
    assert not loaded & heavy


def test_the_runtime_works_where_torch_is_not_installed() -> None:
    loaded = _loaded_by(
        "import hbxt_compress.runtime.generate, hbxt_compress.show_release, hbxt_compress.verify"
    )
    assert not loaded & {"pydantic", "yaml", "transformers", "diffusers", "onnx", "onnx_ir"}
    assert "onnxruntime" in loaded or "numpy" in loaded
