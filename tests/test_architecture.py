"""The shape of the repository: who imports whom, how long a file may be, which words the prose does without.

Everything is read from the source text. Only configs.schema is imported and, to compare signatures, the
modules with a twin in fast/.
"""

import ast
import importlib
import inspect
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Physical lines. Raise one only with a reason in NOTES.md.
TOP_LEVEL_BUDGETS = {"train.py": 400, "model.py": 440, "grpo.py": 340, "reward.py": 270, "sample.py": 360,
                     "data.py": 480, "eval.py": 380}
ROOM_BUDGETS = {"configs": 300, "fast": 240, "runtime": 240, "converters": 200, "benchmarks": 450,
                "tools": 500}
SUMS = {("configs", "fast", "runtime", "top level"): 5000, ("converters",): 600, ("tools",): 4000}
LONGEST_FUNCTION = 60  # lines of a function of the seven files, its docstring included

TOP_LEVEL = sorted(TOP_LEVEL_BUDGETS)
ROOMS = {room: sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / room).glob("*.py"))
         for room in ROOM_BUDGETS}
PRODUCT = sorted([*TOP_LEVEL, *(name for room in ROOMS if room != "tools" for name in ROOMS[room])])
CHECKERS = ROOMS["benchmarks"]
TWINS = [name for name in ROOMS["fast"] if not name.endswith("__init__.py")]
PRESETS = sorted(f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml"))

# Imports go one way. A room is one key; "runtime.kernel" allows that module alone.
MAY_IMPORT = {
    "reward.py": set(),
    "model.py": {"runtime", "fast"},
    "grpo.py": {"runtime.kernel", "fast"},
    "sample.py": {"model", "runtime.kernel", "fast"},
    "data.py": {"reward", "converters", "runtime"},
    "eval.py": {"model", "data", "reward", "sample", "benchmarks", "runtime"},
    "train.py": {"model", "data", "reward", "sample", "grpo", "eval", "configs", "runtime"},
    "configs": {"reward"},
    "fast": set(),
    "runtime": {"runtime"},
    "converters": {"reward", "runtime", "converters"},
    "benchmarks": {"reward", "runtime.files", "benchmarks"},
}
# Lazy doors: the command line of sample.py, and --plan, which is no part of training.
MAIN_MAY_ALSO_IMPORT = {"sample.py": {"tools"}, "train.py": {"tools"}}
OWN_MODULES = {Path(name).stem for name in TOP_LEVEL} | set(ROOMS) | {"tests"}

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
        assert not imported.startswith("."), f"{name} imports {imported}: imports are absolute"
        if imported.split(".")[0] not in OWN_MODULES:
            continue
        allowed = set(MAY_IMPORT[name if "/" not in name else name.split("/")[0]])
        if inside[:1] == ("main",):
            allowed |= MAIN_MAY_ALSO_IMPORT.get(name, set())
        where = f"in {inside[0]}()" if inside else "at its top"
        assert is_or_within(imported, allowed), f"{name} imports {imported} {where}; it may {sorted(allowed)}"


def test_twins_are_imported_inside_functions_only():
    """So the product runs without the folder fast/ where the kernel is "reference"."""
    found = [(name, inside) for name in PRODUCT for imported, inside in imports(source(name))
             if imported.split(".")[0] == "fast"]
    assert {name for name, _ in found} == {"grpo.py", "model.py", "sample.py"}
    assert all(inside for _, inside in found), found


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name != "kernel"]


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_names_its_definition_and_takes_the_same_arguments(name):
    """Line 1 says which definition the file equals. The twin has that name, less "_reference". The choice of
    the kernel is the definition's alone."""
    match = re.match(r'"""Equals (\w+)\.([\w.]+)[ :]', source(name))
    assert match, f"{name}: line 1 does not begin with: Equals <module>.<definition>"
    if name == "fast/draw.py":
        pytest.importorskip("triton")
    definition = importlib.import_module(match[1])
    for part in match[2].split("."):
        definition = getattr(definition, part)
    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    last = match[2].split(".")[-1].removesuffix("_reference")
    classes = [value for value in vars(module).values() if inspect.isclass(value)]
    twin = next(getattr(owner, last) for owner in (module, *classes) if hasattr(owner, last))
    if not inspect.isclass(definition):
        assert parameters(twin) == parameters(definition)
        return
    methods = [{key: parameters(value) for key, value in inspect.getmembers(kind, inspect.isfunction)
                if not key.startswith("_") or key == "__init__"} for kind in (definition, twin)]
    assert methods[0].keys() <= methods[1].keys()
    assert methods[0] == {key: methods[1][key] for key in methods[0]}


def test_only_files_with_a_main_import_the_configuration():
    readers = [name for name in TOP_LEVEL + ROOMS["tools"] if "configs" in imported_packages(name)]
    assert [name for name in readers if not has_main(source(name))] == []
    assert "train.py" in readers


@pytest.mark.parametrize("name", PRODUCT)
def test_only_runtime_packages_are_imported_and_those_some_machines_lack_only_when_used(name):
    for imported, inside in imports(source(name)):
        package = imported.split(".")[0]
        if package in sys.stdlib_module_names or package in OWN_MODULES:
            continue
        if is_or_within(imported, INSIDE_FUNCTION_OR_TRY):
            assert inside or name in TWINS, f"{name} imports {imported} at its top; some machines lack it"
        else:
            assert package in ANYWHERE, f"{name} imports {package}, which is not a runtime dependency"


def test_reward_and_the_checkers_are_pure_python():
    assert imported_packages("reward.py") <= sys.stdlib_module_names
    assert imported_packages("runtime/files.py") <= sys.stdlib_module_names
    for name in CHECKERS:
        assert imported_packages(name) <= sys.stdlib_module_names | {"reward", "benchmarks", "runtime"}, name


def test_every_folder_with_code_is_a_room_under_these_rules():
    folders = {path.relative_to(ROOT).parts[0] for path in committed_files()
               if path.suffix == ".py" and path.parent != ROOT}
    assert folders == set(ROOMS) | {"tests"}
    assert sorted(pyproject()["tool"]["setuptools"]["packages"]) == sorted(ROOMS)


def test_the_runtime_packages_are_exactly_six():
    project = pyproject()["project"]
    assert {package_name(line) for line in project["dependencies"]} == SIX_PACKAGES
    assert sorted(project["optional-dependencies"]) == ["dev", "peers", "real", "track"]
    modules = pyproject()["tool"]["setuptools"]["py-modules"]
    assert sorted(f"{name}.py" for name in modules) == TOP_LEVEL


def test_the_lock_pins_every_package_but_triton_and_the_cuda_libraries():
    locked = [line for line in source("requirements.lock").splitlines() if line and not line.startswith("#")]
    assert "torch==2.13.0" in locked
    assert [package_name(line) for line in locked if "==" not in line.split(";")[0]] == ["triton"]
    assert not [line for line in locked if package_name(line).startswith(("nvidia-", "cuda-"))]
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["dev"] + extras["real"]
    assert {package_name(line) for line in wanted} <= {package_name(line) for line in locked}


@pytest.mark.parametrize("name", sorted({*PRODUCT, *ROOMS["tools"]}))
def test_a_file_stays_within_its_budget_of_lines(name):
    budget = TOP_LEVEL_BUDGETS.get(name) or ROOM_BUDGETS[name.split("/")[0]]
    budget = 600 if name == "tools/report.py" else budget
    assert source(name).count("\n") <= budget, f"{name} has {source(name).count(chr(10))} lines of {budget}"


@pytest.mark.parametrize("rooms", SUMS)
def test_rooms_together_stay_within_their_budget_of_lines(rooms):
    files = [name for room in rooms for name in (TOP_LEVEL if room == "top level" else ROOMS[room])]
    assert sum(source(name).count("\n") for name in files) <= SUMS[rooms]


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_no_function_of_the_seven_files_is_longer_than_a_screen(name):
    functions = [node for node in ast.walk(ast.parse(source(name))) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}


# Turns of phrase that plain technical English does without, and how many may be left in the whole project.
TURNS = re.compile(
    r"\b(told|alike|aside|goes on|go on from|gives way|comes to its end|of its own|anew|save for"
    r"|stands (at|in|for|beside|below|under|twice))\b")
TURNS_LEFT = 10


def prose(name):
    """(line number, text) of the comments and docstrings of a Python file, of all lines of another."""
    text = source(name)
    if not name.endswith(".py"):
        return list(enumerate(text.split("\n"), 1))
    found = [(token.start[0], token.string) for token in tokenize.generate_tokens(io.StringIO(text).readline)
             if token.type == tokenize.COMMENT]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            found += enumerate(ast.get_docstring(node).split("\n"), node.body[0].lineno)
    return found


def test_the_prose_is_plain():
    files = [*PRODUCT, *ROOMS["tools"], "README.md", "Makefile", "NOTES.md",
             *(relative(path) for path in (ROOT / "docs").glob("*.md")), *PRESETS]
    found = [f"{name}:{line}: {match[0]}" for name in files for line, text in prose(name)
             for match in TURNS.finditer(text)]
    assert len(found) <= TURNS_LEFT, "\n".join(found)


def test_no_line_of_python_is_longer_than_110_columns():
    files = PRODUCT + ROOMS["tools"] + [relative(path) for path in (ROOT / "tests").rglob("*.py")]
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
