"""The import direction of docs/design.md, read from the sources."""

import ast
import graphlib
import pathlib
import subprocess
import sys

from tests.helpers import ROOT

PACKAGE = ROOT / "llama_jax"
ORDER = [
    {"errors", "version", "demo", "progress", "regular_file", "user_cache"},
    {"jax_settings", "strict_json"},
    {"config", "text"},
    {"nn"},
    {"decode", "weights"},
    {"provenance"},
    {"engine", "source"},
    {"drafters"},
    {"card", "llama"},
    {"receipt"},
    {"replay"},
    {"__init__", "server"},
    {"batch", "hosts"},
    {"ray"},
    {"cli"},
]
"""The modules and folders of llama_jax: each imports from those above it only."""

RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def imports_of(path: pathlib.Path) -> set[str]:
    """Return the dotted names a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def names_in_package(path: pathlib.Path) -> set[tuple[str, ...]]:
    """Return what a module imports of llama_jax: `nn.cache.write` as ("nn", "cache", "write")."""
    parts = [name.split(".") for name in imports_of(path)]
    return {tuple(p[1:]) for p in parts if p[0] == "llama_jax"}


def test_nothing_imports_upward_or_sideways():
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for top, *_ in names_in_package(path) - {()}:
            used = top if top in RANK else "__init__"  # a name of the package itself
            assert used == place or RANK[used] < RANK[place], f"{path} imports {used}"


def test_no_folder_has_a_circle():
    for folder in (path.parent for path in PACKAGE.rglob("__init__.py")):
        prefix = folder.relative_to(PACKAGE).parts
        modules = {path.stem: path for path in folder.glob("*.py")}
        uses = {
            name: {
                parts[len(prefix)]
                for parts in names_in_package(path)
                if parts[: len(prefix)] == prefix and len(parts) > len(prefix)
            }
            & modules.keys() - {name}
            for name, path in modules.items()
        }
        assert list(graphlib.TopologicalSorter(uses).static_order())


def test_every_module_and_folder_has_its_place_in_the_order():
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert files | {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(RANK)


def test_outside_dependencies_are_imported_in_their_modules_only():
    rooms = {
        "flax": {"transformer"},
        "orbax": {"chunks", "shards"},
        "tensorstore": {"chunks"},
        "sentencepiece": {"tokenizer"},
        "jsonschema": {"contract", "parameters", "reading"},
        "rfc8785": {"canonical"},
        "cryptography": {"keys"},
        "securesystemslib": {"keys"},
        "tqdm": {"progress", "serve"},
        "prompt_toolkit": {"reader"},
        "rich": {"console"},
        "fsspec": {"source"},
        "pyarrow": {"driver", "source", "worker"},
        "ray": {"cluster", "driver", "serving", "source", "worker"},
        "torch": set(),
        "transformers": set(),
        "convert": {"source"},  # in a function; see below
        "run": set(),
    }
    for path in PACKAGE.rglob("*.py"):
        tops = {name.split(".")[0] for name in imports_of(path)}
        for package, allowed in rooms.items():
            assert package not in tops or path.stem in allowed, f"{path.name} imports {package}"


def test_the_converters_are_imported_on_demand_only():
    """`Llama.load(convert=True)` needs what lies above the package; nothing else does."""
    tree = ast.parse((PACKAGE / "source.py").read_text(encoding="utf-8"))
    [user] = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(n, ast.ImportFrom) and n.module == "convert" for n in ast.walk(node))
    ]
    assert user.name == "_converted"
    code = (
        "import sys, llama_jax.cli.main;"
        "sys.exit(bool({'convert', 'prompt_toolkit'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_only_the_server_needs_what_serves():
    """`pip install llama_jax` without the extra is whole but for the server."""
    for path in [*PACKAGE.rglob("*.py"), ROOT / "run.py"]:
        tops = {name.split(".")[0] for name in imports_of(path)}
        in_server = bool({"server", "ray"} & set(path.parts))
        serving = tops & {"prometheus_client", "pydantic", "starlette", "uvicorn"}
        assert in_server or not serving, path
    code = "import sys, llama_jax; sys.exit('llama_jax.server' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_run_convert_and_tools_do_not_import_each_other():
    rooms = {"run": [ROOT / "run.py"]}
    rooms |= {name: list((ROOT / name).glob("*.py")) for name in ("benchmarks", "convert", "tools")}
    for room, paths in rooms.items():
        for path in paths:
            tops = {name.split(".")[0] for name in imports_of(path)}
            others = rooms.keys() - {room}
            if path.name == "checkpoints.py":  # measures conversion, and writes what to convert
                others -= {"convert"}
            assert not tops & others, path


def test_config_needs_the_standard_library_only():
    tops = {name.split(".")[0] for name in imports_of(ROOT / "llama_jax" / "config.py")}
    assert tops <= sys.stdlib_module_names | {"llama_jax"}


def test_no_private_names_of_jax():
    for folder in ("llama_jax", "benchmarks", "convert", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not any("._src" in name for name in imports_of(path)), path


def test_importing_has_no_effect():
    """No device is queried, no setting of JAX is changed and no flag of absl is defined."""
    code = (
        "import jax, flax, orbax.checkpoint; before = dict(jax.config.values);"
        "import sys, llama_jax; assert dict(jax.config.values) == before;"
        "assert 'llama_jax.cli' not in sys.modules;"
        "import jax._src.xla_bridge as bridge; assert not bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
