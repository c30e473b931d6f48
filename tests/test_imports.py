"""The import direction of docs/design.md, read from the sources."""

import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = [
    {"card", "errors", "version"},
    {"compile_cache", "draft", "files", "kernels", "result", "stop"},
    {"config", "manifest", "ops", "projection", "sampling", "shards", "tokenizer"},
    {"cache", "chat"},
    {"attention", "decode_state"},
    {"model"},
    {"checkpoint", "decode", "plan"},
    {"executor", "request"},
    {"contract", "demo", "fingerprint", "generation"},
    {"slots"},
    {"engine"},
    {"stream"},
    {"llama"},
    {"__init__", "batch", "server"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


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


def package_modules(names: set[str]) -> set[str]:
    """Return the modules of llama_jax among dotted names (`llama_jax.cache.write` -> `cache`)."""
    parts = [name.split(".") for name in names if name.split(".")[0] == "llama_jax"]
    return {p[1] if len(p) > 1 and p[1] in RANK else "__init__" for p in parts}


def test_nothing_imports_upward_or_sideways():
    for path in (ROOT / "llama_jax").glob("*.py"):
        for used in package_modules(imports_of(path)):
            assert RANK[used] < RANK[path.stem], f"{path.name} imports {used}"


def test_every_module_has_a_layer():
    files = {path.stem for path in (ROOT / "llama_jax").glob("*.py")}
    folders = {path.parent.name for path in (ROOT / "llama_jax").glob("*/__init__.py")}
    assert files | folders == set(RANK)


def test_outside_dependencies_stay_in_their_rooms():
    rooms = {
        "flax": {"model"},
        "orbax": {"shards"},
        "sentencepiece": {"tokenizer"},
        "jsonschema": {"contract", "request"},
        "torch": set(),
        "transformers": set(),
        "convert": set(),
        "run": set(),
    }
    for path in (ROOT / "llama_jax").rglob("*.py"):
        tops = {name.split(".")[0] for name in imports_of(path)}
        for package, allowed in rooms.items():
            assert package not in tops or path.stem in allowed, f"{path.name} imports {package}"


def test_only_the_server_needs_what_serves():
    """`pip install llama_jax` without the extra is whole but for the server."""
    for path in [*(ROOT / "llama_jax").rglob("*.py"), ROOT / "run.py"]:
        tops = {name.split(".")[0] for name in imports_of(path)}
        in_server = path.parent.name == "server"
        assert in_server or not tops & {"starlette", "uvicorn", "prometheus_client"}, path
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
    """No device is queried and no setting of JAX is changed."""
    code = (
        "import jax, flax, orbax.checkpoint; before = dict(jax.config.values);"
        "import llama_jax; assert dict(jax.config.values) == before;"
        "import jax._src.xla_bridge as bridge; assert not bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
