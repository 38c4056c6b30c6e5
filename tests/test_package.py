"""The plan of the house: who may import whom, what is private, and what stands at the door."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils._device import _device_constructors

import hessfn as hf

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "hessfn"
SOURCES = sorted(HOUSE.rglob("*.py"))
EVERYBODY = {
    "core", "engine", "estimators", "landscape", "losses", "parallel", "plotting", "products", "quantization",
    "storage", "training", "transforms",
}  # fmt: skip
MAY_IMPORT = {
    "core": set(),
    "engine": {"core"},
    "estimators": {"core"},
    "transforms": {"core"},
    "storage": {"core"},
    "parallel": {"core"},
    "plotting": {"core"},
    "losses": {"core", "parallel"},
    "products": {"core", "engine", "losses"},
    "landscape": {"core", "losses"},
    "quantization": {"core", "losses", "products", "transforms", "estimators"},
    "training": {"core", "losses", "products", "transforms", "estimators"},
    "reporting": EVERYBODY,
    "problems": EVERYBODY,
    "__init__": EVERYBODY | {"reporting"},
    "__main__": {"reporting"},
}


def name_of(source: Path) -> str:
    return str(source.relative_to(HOUSE).with_suffix(""))


def district(source: Path) -> str:
    return source.relative_to(HOUSE).parts[0].removesuffix(".py")


def imports(source: Path) -> Iterator[tuple[str, str]]:
    """Module and name of every import of a file, also inside functions."""
    for node in ast.walk(ast.parse(source.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{source}: a relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)


def own_imports(source: Path) -> Iterator[tuple[str, str]]:
    """District and name of what a file imports from the library."""
    for module, name in imports(source):
        if module.split(".")[0] == "hessfn":
            parts = [*module.split(".")[1:], name]
            yield parts[0], name


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_a_district_imports_only_those_it_may_see(source: Path) -> None:
    own = district(source)
    for other, name in own_imports(source):
        assert other, f"{source} imports the whole of hessfn"
        assert other == own or other in MAY_IMPORT[own], f"{name_of(source)} imports {name} from {other}"


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_no_private_name_crosses_a_district(source: Path) -> None:
    own = district(source)
    tree = ast.parse(source.read_text("utf-8"))
    foreign = {name for other, name in own_imports(source) if other != own}
    assert not {name for name in foreign if re.match(r"_[^_]", name)}
    modules = {name for name in foreign if list(HOUSE.rglob(f"{name}.py"))}
    reached = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules
        if re.match(r"_[^_]", node.attr)
    }
    assert not reached


def test_districts_are_at_most_eight_floors_high() -> None:
    used = {own: set() for own in MAY_IMPORT}
    for source in SOURCES:
        used[district(source)] |= {other for other, _ in own_imports(source)} - {district(source)}

    def floor(own: str) -> int:
        return 1 + max(map(floor, used[own]), default=0)

    assert max(map(floor, used)) <= 8


def test_torch_is_asked_for_private_names_in_one_file() -> None:
    private = re.compile(r"torch(\.\w+)*\._[a-z]|from torch\S* import (\w+, )*_[a-z]|\bnn\.modules\.\w+\._|\b_pytree\b")
    for source in SOURCES:
        if name_of(source) != "core/torch_private":
            found = [line for line in source.read_text("utf-8").splitlines() if private.search(line)]
            assert not found, name_of(source)


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_all_errors_are_of_one_class(source: Path) -> None:
    for node in ast.walk(ast.parse(source.read_text("utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            kind = node.exc.func.id
            internal = kind in ("Unsupported", "AttributeError") or not kind[0].isupper()  # a function words it
            error = getattr(__import__("hessfn.core.errors", fromlist=[kind]), kind, None)
            assert internal or (error is not None and issubclass(error, hf.HessfnError)), (
                f"{source}:{node.lineno} {kind}"
            )


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_what_is_made_of_numbers_says_on_which_device(source: Path) -> None:
    # torch.set_default_device is the user's: what is left to it mixes devices, or transfers.
    makers = {f"torch.{function.__name__}" for function in _device_constructors()}
    for node in ast.walk(ast.parse(source.read_text("utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in makers:
            named = {keyword.arg for keyword in node.keywords}
            assert named & {"device", None}, f"{source}:{node.lineno}"  # None: keywords that are handed on


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_no_file_is_two_ideas(source: Path) -> None:
    assert len(source.read_text("utf-8").splitlines()) <= 280


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_the_core_dependencies_are_enough_to_import(source: Path) -> None:
    core = {"hessfn", "torch", "numpy", "scipy", "matplotlib", "tqdm", "filelock", "typing_extensions"}
    found: set[str] = set()
    for node in ast.parse(source.read_text("utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    assert {name.split(".")[0] for name in found} <= core | set(sys.stdlib_module_names)


def test_the_door_shows_the_public_names_and_nothing_else() -> None:
    assert dir(hf) == sorted([*hf.__all__, "__version__"])
    assert {"report", "compare", "show_config", "HessfnError"} <= set(dir(hf))
    for name in dir(hf):
        assert getattr(hf, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'hessian'"):
        hf.hessian  # noqa: B018


@pytest.mark.slow
def test_no_function_hides_a_module() -> None:
    everything = "import pkgutil, importlib, hessfn\n" + (
        "names = [m.name for m in pkgutil.walk_packages(hessfn.__path__, 'hessfn.')]\n"
        "names = [name for name in names if not name.endswith('__main__')]\n"
        "for name in names: importlib.import_module(name)\n"
        "import sys\n"
        "for name in names:\n"
        "    above, _, last = name.rpartition('.')\n"
        "    assert getattr(sys.modules[above], last) is sys.modules[name], name\n"
        "assert callable(hessfn.report) and callable(hessfn.compare)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", everything], check=True)


def test_the_main_job_is_loaded_when_it_is_used() -> None:
    code = (
        "import sys, hessfn\n"
        "assert not any(name.startswith('hessfn.reporting') for name in sys.modules)\n"
        "hessfn.report\n"
        "assert 'hessfn.reporting.run' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_version_is_that_of_the_package_and_of_the_changelog() -> None:
    version = importlib.metadata.version("hessfn")
    assert hf.__version__ == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_types_and_templates_come_with_the_package() -> None:
    assert (HOUSE / "py.typed").is_file()
    assert (HOUSE / "reporting" / "templates" / "report.html.j2").is_file()


def test_tests_look_at_public_names_alone() -> None:
    for test in sorted((ROOT / "tests").rglob("*.py")):
        text = test.read_text("utf-8")
        assert "__" + "closure__" not in text
        modules = {name for module, name in imports(test) if module.startswith("hessfn")}
        private = [
            f"{node.value.id}.{node.attr}"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules
            if re.match(r"_[^_]", node.attr) and node.attr not in ("_replace", "_asdict", "_fields")
        ]
        assert not private, f"{test.name}: {private}"
