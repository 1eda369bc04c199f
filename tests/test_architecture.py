"""The shape of the repository: who imports whom, how long a file may be, what the README says of it.

Everything is read from the source text; no module of the project is imported except configs.schema.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Physical lines. Raise one only with a reason in NOTES.md.
BUDGETS = {
    "model.py": 500,
    "data.py": 660,
    "sample.py": 700,
    "reward.py": 250,
    "grpo.py": 450,
    "eval.py": 550,
    "train.py": 965,
    "configs/schema.py": 255,
    "benchmarks/__init__.py": 20,
    "benchmarks/acebench.py": 450,
    "benchmarks/api_bank.py": 450,
    "benchmarks/bfcl.py": 450,
    "benchmarks/bfcl_languages.py": 450,
}
CHECKERS = sorted(name for name in BUDGETS if name.startswith("benchmarks/"))
PRODUCT = sorted(BUDGETS)
TOP_LEVEL = sorted(name for name in BUDGETS if "/" not in name)
PRESETS = sorted(f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml"))

# Imports go one way.
MAY_IMPORT = {
    "model.py": set(),
    "reward.py": set(),
    "grpo.py": set(),
    "data.py": {"reward"},
    "sample.py": {"model"},
    "eval.py": {"model", "data", "reward", "sample", "benchmarks"},
    "train.py": {"model", "data", "reward", "sample", "grpo", "eval"},
    "configs/schema.py": set(),
    **dict.fromkeys(CHECKERS, {"reward", "benchmarks"}),
}
# The command line of sample.py, not generate(); --plan, which is no part of training.
MAIN_MAY_ALSO_IMPORT = {"sample.py": {"data", "reward"}, "train.py": {"tools"}}
OWN_MODULES = {Path(name).stem for name in TOP_LEVEL} | {"benchmarks", "configs", "tests", "tools"}

SIX_PACKAGES = {"torch", "safetensors", "tokenizers", "numpy", "triton", "pyyaml"}
# What can be imported on every platform: triton has wheels for Linux only; tokenizers brings the last two.
ANYWHERE = {"torch", "safetensors", "tokenizers", "numpy", "yaml", "huggingface_hub", "tqdm"}
INSIDE_FUNCTION_OR_TRY = {"triton", "tensorboard", "wandb", "torch.utils.tensorboard"}
HIDDEN_IMPORTS = ("__import__", "import_module")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def source(name: str) -> str:
    path = ROOT / name
    assert path.is_file(), f"{name} is missing"
    return path.read_text(encoding="utf-8")


def imports(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """(dotted name, what encloses it) for each import; `from a import b` counts as a.b. Functions enclose, by
    their names, and so does a `try` that catches ImportError, as "try"."""
    found = []

    def visit(node: ast.AST, inside: tuple[str, ...]) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            found.extend((f"{start}.{alias.name}", inside) for alias in node.names)
        elif isinstance(node, ast.Name | ast.Attribute):
            called = node.id if isinstance(node, ast.Name) else node.attr
            assert called not in HIDDEN_IMPORTS, f"line {node.lineno}: {called} hides an import"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inside = (*inside, getattr(node, "name", "<lambda>"))
        if isinstance(node, ast.Try) and "except ImportError" in ast.unparse(node):
            inside = (*inside, "try")
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(text), ())
    return found


def imported_packages(name: str) -> set[str]:
    return {imported.split(".")[0] for imported, _ in imports(source(name))}


def is_or_within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def has_main(text: str) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(text).body)


def committed_files() -> list[Path]:
    """Tracked files and those that `git add -A` would track."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files are committed is unknown")
    command = "git -c safe.directory=* ls-files -z --cached --others --exclude-standard".split()
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout.decode()
    files = [ROOT / name for name in sorted(set(listed.split("\0"))) if name]
    assert files, "git lists no file"
    return [path for path in files if path.is_file()]


def pyproject() -> dict:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # pytest brings it where Python has none
    return tomllib.loads(source("pyproject.toml"))


def package_name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")


def test_the_reader_of_imports_sees_every_form():
    text = (
        "import a.b as c, d\nfrom e import f\nfrom . import g\nfrom .h import i\n"
        "try:\n    import j\nexcept ImportError:\n    pass\n"
        "class K:\n    import l\n    def m(self):\n        def n():\n            import o\n"
    )
    assert imports(text) == [
        ("a.b", ()),
        ("d", ()),
        ("e.f", ()),
        ("..g", ()),
        (".h.i", ()),
        ("j", ("try",)),
        ("l", ()),
        ("o", ("m", "n")),
    ]
    with pytest.raises(AssertionError, match="line 2: import_module hides"):
        imports("import importlib\nimportlib.import_module('grpo')")


def test_no_other_python_file_at_the_top_level():
    assert sorted(path.name for path in ROOT.glob("*.py")) == TOP_LEVEL


@pytest.mark.parametrize("name", PRODUCT)
def test_imports_go_one_way(name):
    for imported, inside in imports(source(name)):
        assert not imported.startswith("."), f"{name} imports {imported}: the layout is flat"
        package = imported.split(".")[0]
        if package not in OWN_MODULES - {"configs"}:
            continue
        allowed = set(MAY_IMPORT[name])
        if inside[:1] == ("main",):
            allowed |= MAIN_MAY_ALSO_IMPORT.get(name, set())
        where = f"in {inside[0]}()" if inside else "at its top"
        assert package in allowed, f"{name} imports {package} {where}, where it may only {sorted(allowed)}"


def test_only_files_with_a_main_import_the_configuration():
    files = TOP_LEVEL + sorted(relative(path) for path in (ROOT / "tools").glob("*.py"))
    readers = [name for name in files if "configs" in imported_packages(name)]
    assert [name for name in readers if not has_main(source(name))] == []
    assert "train.py" in readers
    assert "configs" not in imported_packages("configs/schema.py")


@pytest.mark.parametrize("name", PRODUCT)
def test_only_runtime_packages_are_imported_and_those_some_machines_lack_only_when_used(name):
    for imported, inside in imports(source(name)):
        package = imported.split(".")[0]
        if package in sys.stdlib_module_names or package in OWN_MODULES:
            continue
        if is_or_within(imported, INSIDE_FUNCTION_OR_TRY):
            assert inside, f"{name} imports {imported} at its top; some machines lack it"
        else:
            assert package in ANYWHERE, f"{name} imports {package}, which is not a runtime dependency"


def test_reward_and_the_checkers_are_pure_python():
    assert imported_packages("reward.py") <= sys.stdlib_module_names
    for name in CHECKERS:
        assert imported_packages(name) <= sys.stdlib_module_names | {"reward", "benchmarks"}, name


def test_every_benchmark_module_is_under_these_rules():
    assert CHECKERS == sorted(relative(path) for path in (ROOT / "benchmarks").rglob("*.py"))


def test_the_runtime_packages_are_exactly_six():
    project = pyproject()["project"]
    assert {package_name(line) for line in project["dependencies"]} == SIX_PACKAGES
    assert sorted(project["optional-dependencies"]) == ["dev", "peers", "track"]
    modules = pyproject()["tool"]["setuptools"]["py-modules"]
    assert sorted(f"{name}.py" for name in modules) == TOP_LEVEL


def test_the_lock_pins_every_package_but_triton_and_the_cuda_libraries():
    locked = [line for line in source("requirements.lock").splitlines() if line and not line.startswith("#")]
    assert "torch==2.13.0" in locked
    assert [package_name(line) for line in locked if "==" not in line.split(";")[0]] == ["triton"]
    assert not [line for line in locked if package_name(line).startswith(("nvidia-", "cuda-"))]
    project = pyproject()["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    assert {package_name(line) for line in wanted} <= {package_name(line) for line in locked}


@pytest.mark.parametrize("name", PRODUCT)
def test_a_file_stays_within_its_budget_of_lines(name):
    lines = source(name).count("\n")
    assert lines <= BUDGETS[name], f"{name} has {lines} lines, {BUDGETS[name]} are its budget"


def test_no_line_of_python_is_longer_than_110_columns():
    files = PRODUCT + [relative(path) for part in ("tests", "tools") for path in (ROOT / part).rglob("*.py")]
    assert [
        f"{name}:{number} has {len(line)} columns"
        for name in files
        for number, line in enumerate(source(name).split("\n"), start=1)
        if len(line) > 110
    ] == []


def test_the_readme_names_every_file_with_its_length():
    # A row of its table of files: | `train.py` | 512 | ... |, the name a link or not.
    row = r"^\|\s*\[?`([\w./-]+\.py)`(?:\]\([^)]*\))?\s*\|\s*(\d+)\s*\|"
    said = [(name, int(lines)) for name, lines in re.findall(row, source("README.md"), flags=re.MULTILINE)]
    assert set(TOP_LEVEL) - {name for name, _ in said} == set(), "missing in the README's table of files"
    for name, lines in said:
        true = source(name).count("\n")
        assert abs(lines - true) <= 0.1 * true, f"README.md gives {name} {lines} lines; it has {true}"


def test_the_presets_are_there():
    names = ("demo", "demo_control", "tool_n1_7b", "tool_n1_14b")
    assert {f"configs/{name}.yaml" for name in names} <= set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_loads(preset, monkeypatch):
    from configs.schema import load_config

    monkeypatch.chdir(ROOT)
    load_config([preset])


def test_no_committed_text_names_a_path_of_the_machine_it_was_written_on():
    # Not after a letter, a dot or the like, as in a web address or a relative path.
    needle = re.compile(rb"(?<![\w.~-])/(?:work|root)/")
    naming = []
    for path in committed_files():
        content = path.read_bytes()
        if b"\0" not in content and needle.search(content):
            naming.append(relative(path))
    assert naming == []


def test_no_committed_file_is_larger_than_ten_megabytes():
    assert [relative(path) for path in committed_files() if path.stat().st_size > 10_000_000] == []
