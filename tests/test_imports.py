"""The direction of imports, read from the source of every file, and what a process really loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {
    "app",
    "benchmarks",
    "ddpm",
    "ddpm_client",
    "diffusion",
    "jobs",
    "tests",
    "training",
    "worker",
}

# What each package may import of ours, besides itself.
ALLOWED: dict[str, set[str]] = {
    "app": {"jobs"},
    "diffusion": set(),
    "jobs": set(),
    "training": {"diffusion"},
    "worker": {"diffusion", "jobs"},
}
# Single modules of another package that one may import: pictures are decoded and marked in one
# place, which loads neither Redis nor torch (below).
ALLOWED_MODULES: dict[str, set[str]] = {
    "training": {"jobs.decoding", "jobs.errors", "jobs.marking"}
}
# Third parties that a package, or one of its files, must do without.
WEB = {"fastapi", "starlette", "uvicorn"}
LEARNING = {"accelerate", "datasets", "diffusers", "safetensors", "torch"}
FORBIDDEN: dict[str, set[str]] = {
    "app": LEARNING,
    "ddpm.py": LEARNING | WEB | {"redis", "rq"},
    "jobs": LEARNING | WEB,
    "training": WEB | {"redis", "rq"},
    "worker": WEB | {"accelerate", "datasets", "diffusers"},
}

# What a folder must do without: modules of ours with all below them, and third parties.
WITHOUT: dict[str, set[str]] = {
    "app/up": {"app.routes", "fastapi"},
    "diffusion/diffusers": {"diffusion.sampling", "diffusion.theory"},
    "jobs/kinds": {"jobs.store", "redis", "rq"},
    "jobs/store": {"jobs.uploads"},
    "training": {"diffusion.theory"},
    "worker": {"diffusion.theory"},
    "worker/engine": {"jobs", "redis", "rq", "worker.kinds", "worker.models", "worker.runtime"},
    "worker/kinds": {"redis", "rq", "worker.runtime", "worker.rq"},
    "worker/rq": {"torch", "worker.kinds"},
    "worker/network": {
        "jobs.store",
        "redis",
        "rq",
        "worker.engine",
        "worker.kinds",
        "worker.models",
    },
}


def modules(source: str) -> set[str]:
    """Modules that absolute imports name, wherever in the file they are."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return names


def imported(source: str, besides: frozenset[str] = frozenset()) -> set[str]:
    """Their top-level names, but for the modules `besides`."""
    return {name.partition(".")[0] for name in modules(source) - besides}


def files_of(place: str) -> list[Path]:
    """The Python files of a package, or the one file."""
    path = ROOT / place
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert files, f"{place} holds no Python file"
    return files


def importers(
    place: str, names: set[str], besides: frozenset[str] = frozenset()
) -> dict[str, list[str]]:
    """file → the packages among `names` that it imports, for the files that import any."""
    sources = {str(p.relative_to(ROOT)): p.read_text("utf-8") for p in files_of(place)}
    found = {file: imported(source, besides) & names for file, source in sources.items()}
    return {file: sorted(packages) for file, packages in found.items() if packages}


def named(path: Path) -> set[str]:
    """Dotted names of what a file imports at its top level, each name of a `from` its own."""
    names: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_graph() -> dict[str, set[str]]:
    """Module of ours → the modules of ours that it imports when it is loaded."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in ALLOWED
        for path in files_of(package)
    }

    def module_of(name: str) -> str:
        return name if name in paths else name.rpartition(".")[0]

    return {
        module: {module_of(name) for name in named(path)} & (paths.keys() - {module})
        for module, path in paths.items()
    }


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """Modules that import each other in a ring, or None."""
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> list[str] | None:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return None
        for following in sorted(graph[module]):
            if found := visit(following, [*way, module]):
                return found
        done.add(module)
        return None

    return next((found for module in sorted(graph) if (found := visit(module, []))), None)


def run_python(code: str) -> str:
    """What a fresh interpreter prints, started in the repository."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
"""
PRINT_LOADED = """
print("loaded:", *sorted({{{names}}} & set(sys.modules)))
"""


def loaded_by(code: str, names: set[str]) -> list[str]:
    """The modules among `names` that are loaded once a fresh interpreter has run `code`."""
    report = PRINT_LOADED.format(names=", ".join(map(repr, sorted(names))))
    return run_python(code + report).rpartition("loaded:")[2].split()


def test_imported_sees_every_form() -> None:
    source = "import a.b, c\nfrom d.e import f\nfrom . import g\ndef h():\n    import i as j\n"
    assert imported(source) == {"a", "c", "d", "i"}


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_direction_of_imports(package: str) -> None:
    besides = frozenset(ALLOWED_MODULES.get(package, ()))
    assert importers(package, OURS - ALLOWED[package] - {package}, besides) == {}


LOAD_MODEL = 'import sys, diffusion\ndiffusion.load("models/mnist")'


@pytest.mark.parametrize("start", [LOAD_MODEL, "import sys, worker.run"])
def test_no_start_waits_for_the_compiler(start: str) -> None:
    """Its modules take a second to load."""
    assert loaded_by(start, {"torch._dynamo", "torch._inductor"}) == []


@pytest.mark.parametrize("place", sorted(FORBIDDEN))
def test_what_each_part_does_without(place: str) -> None:
    assert importers(place, FORBIDDEN[place]) == {}


@pytest.mark.parametrize("folder", sorted(WITHOUT))
def test_what_each_folder_does_without(folder: str) -> None:
    barred = {
        str(path.relative_to(ROOT)): sorted(
            name
            for name in named(path)
            if any(name == bar or name.startswith(f"{bar}.") for bar in WITHOUT[folder])
        )
        for path in files_of(folder)
    }
    assert {file: names for file, names in barred.items() if names} == {}


def test_there_is_no_circle() -> None:
    graph = module_graph()
    assert len(graph) > 150 and graph["worker.runtime"] >= {"worker.flights", "jobs.settings"}
    assert circle(graph) is None


def test_a_circle_would_be_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "a"]


def test_diffusion_needs_torch_numpy_and_safetensors_alone() -> None:
    for path in files_of("diffusion"):
        others = imported(path.read_text("utf-8")) - set(sys.stdlib_module_names)
        late = {"PIL"} if path.name == "pictures.py" else set()  # when a picture is made
        assert others <= {"diffusion", "numpy", "safetensors", "torch"} | late, path.name
    assert loaded_by("import sys, diffusion", {"PIL"}) == []


def test_the_probe_would_notice_torch() -> None:
    assert loaded_by("import sys, torch", {"fastapi", "torch"}) == ["torch"]


@pytest.mark.parametrize(("package", "names"), [("app", LEARNING), ("jobs", LEARNING | WEB)])
def test_importing_all_of_a_package_never_loads(package: str, names: set[str]) -> None:
    assert loaded_by(LOAD_ALL.format(package=package), names) == []


def test_the_decoder_that_training_shares_loads_pillow_and_numpy_alone() -> None:
    assert [*ALLOWED_MODULES] == ["training"]
    others = LEARNING | WEB | {"pydantic", "redis", "rq"}
    names = ", ".join(sorted(ALLOWED_MODULES["training"]))
    assert loaded_by(f"import sys, {names}", others) == []


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["up", "--help"], ["api", "--help"]]
)
def test_the_command_line_never_loads_torch(arguments: list[str]) -> None:
    code = f"import sys, ddpm\nddpm.main({arguments!r}, standalone_mode=False)\n"
    assert loaded_by(code, LEARNING) == []
