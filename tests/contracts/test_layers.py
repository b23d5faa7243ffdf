"""Arrows point down: which room of the package may use which, and who alone may use a heavy dependency.

Every import counts, also those inside functions and those for type checkers.
"""

import ast
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "aquatint"
LEVELS = {
    "cli": 5, "__main__": 5, "dashboard": 5,
    "training": 4, "demo": 4,
    "planning": 3,
    "data": 2, "models": 2, "tracking": 2, "distributed": 2,
    "config": 1, "diffusion": 1, "optim": 1, "storage": 1, "tensor_file": 1,
    "errors": 0, "utils": 0,
}  # fmt: skip
SAME_LEVEL = {("demo", "training"), ("__main__", "cli"), ("tensor_file", "storage")}  # the only arrows that go sideways
OWNERS = {  # dependency -> the modules that may import it
    "PIL": ("aquatint.data.image", "aquatint.data.contact_sheet", "aquatint.data.focus"),
    "diffusers": ("aquatint.models.sdxl",),
    "transformers": ("aquatint.models.sdxl", "aquatint.models.judges"),
    "matplotlib": ("aquatint.tracking.curves", "aquatint.tracking.plots", "aquatint.data.bucket_plot"),
    "pyarrow": ("aquatint.data.index", "aquatint.data.manifest", "aquatint.data.indexing", "aquatint.data.cells", "aquatint.data.sources"),
    "xxhash": ("aquatint.data",),
    "fsspec": ("aquatint.data.downloads",),
    "ray": ("aquatint.data.engines",),
    "smartcrop": ("aquatint.data.focus",),
    "triton": (
        "aquatint.optim.kernels",
        "aquatint.optim.adafactor_kernels",
        "aquatint.models.kernels.group_norm_triton",
        "aquatint.models.kernels.geglu_triton",
    ),
    "wandb": ("aquatint.tracking.wandb",),
    "tensorboard": ("aquatint.tracking.tensorboard",),
    "torch.utils.tensorboard": ("aquatint.tracking.tensorboard",),
    "pydantic": ("aquatint.config",),
    "ruamel": ("aquatint.config.parse",),
    "tomllib": ("aquatint.config",),
    "typer": ("aquatint.cli",),
    "rich": ("aquatint.utils",),
    "pickle": (),
    "safetensors": (),
}
VERSIONS_ONLY = ("aquatint.training.build", "environment")  # names the versions of all in the run's environment.json
CONFIG_ENTERS = (
    "aquatint.config", "aquatint.cli", "aquatint.planning", "aquatint.demo.run",
    *(
        f"aquatint.training.{name}"
        for name in (
            "adapting", "announce", "batch_search", "build", "build_parts", "build_tasks", "caching",
            "dry_step", "evaluation", "exports", "find", "focus_points", "layout",
            "objectives", "plot_words", "plotting", "preflight", "prepare", "preview", "process", "results", "vae_build",
        )
    ),
)  # fmt: skip


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules():
    return {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def imports_in(tree):
    """The dotted names that a piece of code imports, as precise as they can be."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports in full"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in modules() or not node.module.startswith("aquatint") else node.module


@cache
def imports_of(name):
    return Counter(imports_in(modules()[name]))


def own_imports(name):
    return {other for other in imports_of(name) if other.split(".")[0] == "aquatint"}


@cache
def used_by(name):
    """What a module imports, but not to name its version."""
    functions = (node for node in ast.walk(modules()[name]) if isinstance(node, ast.FunctionDef) and (name, node.name) == VERSIONS_ONLY)
    return imports_of(name) - Counter(other for function in functions for other in imports_in(function))


def room(name):
    return name.split(".")[1] if "." in name else "aquatint"


def within(name, places):
    return any(name == place or name.startswith(f"{place}.") for place in places)


def test_every_room_has_a_level():
    assert {room(name) for name in modules()} - {"aquatint"} <= set(LEVELS)


@pytest.mark.parametrize("name", [name for name in modules() if room(name) != "aquatint"])
def test_a_module_uses_only_rooms_below_its_own(name):
    here = room(name)
    for other in own_imports(name):
        there = room(other)
        if there in (here, "aquatint"):
            continue
        assert LEVELS[there] < LEVELS[here] or (here, there) in SAME_LEVEL, f"{name} imports {other}"


def test_the_package_itself_uses_nothing_when_it_is_imported():
    at_once = [node for node in modules()["aquatint"].body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {name for node in at_once for name in imports_in(ast.Module([node], []))} <= {
        "__future__.annotations",
        "typing.TYPE_CHECKING",
        "typing.Any",
    }


def test_no_module_needs_itself():
    graph = {name: own_imports(name) - {"aquatint"} for name in modules() if name != "aquatint"}
    try:
        order = tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")
    assert len(order) >= len(graph)


@pytest.mark.parametrize("dependency", OWNERS)
def test_a_heavy_dependency_has_one_owner(dependency):
    for name in modules():
        users = [other for other in used_by(name) if within(other, (dependency,))]
        assert not users or within(name, OWNERS[dependency]), f"{name} imports {users}"


def test_a_config_enters_only_where_runs_are_put_together():
    doors = ("aquatint.config.schema", "aquatint.config.sections", "aquatint.config.load")
    users = [name for name in modules() if any(within(other, doors) for other in own_imports(name))]
    assert [name for name in users if not within(name, CONFIG_ENTERS)] == []


WRITERS = {"aquatint.storage", "aquatint.tensor_file"}


def writes_in(tree):
    """Calls that write a file past `storage`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        if function in ("open", "io.open") or function.endswith(".open"):
            modes = [
                argument for argument in (*node.args, *(keyword.value for keyword in node.keywords)) if isinstance(argument, ast.Constant)
            ]
            if any(isinstance(mode.value, str) and set(mode.value) <= set("rwxabt+") and set(mode.value) & set("wxa+") for mode in modes):
                yield f"{function} in line {node.lineno}"
        elif function in ("torch.save", "np.save", "numpy.save", "save_file", "json.dump", "os.rename", "os.replace", "shutil.move") or (
            function.endswith((".write_text", ".write_bytes", ".save_pretrained")) and not function.startswith("storage.")
        ):
            yield f"{function} in line {node.lineno}"


@pytest.mark.parametrize("name", [name for name in modules() if name not in WRITERS])
def test_files_are_written_by_storage_alone(name):
    assert list(writes_in(modules()[name])) == []


def test_the_search_for_writes_finds_them():
    code = "open(p, 'w')\np.open('ab')\nopen(p)\nopen(p, 'rb')\np.write_text(t)\nstorage.write_text(p, t)\ntorch.save(x, p)\nimage.open(p)"
    assert [int(found.rpartition(" ")[2]) for found in writes_in(ast.parse(code))] == [1, 2, 5, 7]
