"""Imports point down: a module knows what lies below it and nothing above."""

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PACKAGES = ["pallas_kernels", "dsv4_jax", "scripts"]  # from the bottom up

# Modules of dsv4_jax from the bottom up. Those of one level leave each other alone, except within a folder.
LEVELS = [
    ["errors", "compiles"],
    ["weight_files", "distributed"],
    ["config", "programs"],
    ["numerics", "sharding"],
    ["parallel"],
    ["cache", "vocabulary"],
    ["nn.*"],
    ["model"],
    ["mtp"],
    ["checkpoint.*"],
    ["sampling"],
    ["penalties", "speculative"],
    ["decode"],
    ["generate", "prefix", "slots"],
    ["engine"],
    ["tokenizer"],
    ["chat.*", "stops"],
    ["train.*"],
    ["answers", "prompts"],
    ["llm"],
    ["batch", "plan", "selftest"],
    ["evaluation.*"],
    ["cli.*"],
    ["__main__"],
]
FRONT_DOOR = "dsv4_jax"  # its __init__.py: imports from every level, and is for users alone

VENDORS = ("cuda", "rocm")  # words that belong to pallas_kernels

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
MODEL_MODULES = [module for module in MODULES if module.startswith("dsv4_jax.")]


def package(module: str) -> str:
    return module.partition(".")[0]


def folder(module: str) -> str:
    """ "nn" of "dsv4_jax.nn.rope" and of "dsv4_jax.nn"; of a module outside of folders its own name."""
    return module.split(".")[1]


def level(module: str) -> int:
    """The place in LEVELS of a module of dsv4_jax."""
    name = module.removeprefix("dsv4_jax.")
    for number, names in enumerate(LEVELS):
        if name in names or f"{folder(module)}.*" in names:
            return number
    raise AssertionError(f"{module} has no place in LEVELS: decide what it may import")


def imports(module: str) -> Iterator[str]:
    """Every module of ours that a module imports, anywhere in its code."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports by a relative path"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]  # perhaps modules themselves
            names = [name if name in MODULES else str(node.module) for name in whole]
        yield from (name for name in names if package(name) in PACKAGES)


def words(module: str) -> Iterator[tuple[int, str]]:
    """Line and text of every name and string in a module's code; comments are left out."""
    kept = (tokenize.NAME, tokenize.STRING, tokenize.FSTRING_MIDDLE)
    source = io.StringIO(MODULES[module].read_text())
    yield from (
        (each.start[0], each.string)
        for each in tokenize.generate_tokens(source.readline)
        if each.type in kept
    )


@pytest.mark.parametrize("module", MODULES)
def test_no_package_imports_one_above_it(module):
    for imported in imports(module):
        assert PACKAGES.index(package(imported)) <= PACKAGES.index(package(module)), f"imports {imported}"


@pytest.mark.parametrize("module", MODEL_MODULES)
def test_imports_inside_the_model_package_point_down(module):
    for imported in imports(module):
        assert imported != FRONT_DOOR, "what users import is not for use inside"
        if package(imported) == "dsv4_jax" and folder(imported) != folder(module):
            assert level(imported) < level(module), f"imports {imported}"


@pytest.mark.parametrize("module", [each for each in MODEL_MODULES if folder(each) == "nn"])
def test_layers_know_neither_checkpoints_nor_generation(module):
    assert not {"checkpoint", "generate"} & {folder(each) for each in imports(module) if "dsv4_jax." in each}


@pytest.mark.parametrize("module", [FRONT_DOOR, *MODEL_MODULES])
def test_the_model_package_names_no_vendor(module):
    found = [(line, word) for line, word in words(module) if any(each in word.lower() for each in VENDORS)]

    assert found == []


def test_every_level_names_modules_that_exist():
    names = {each.removeprefix("dsv4_jax.") for each in MODEL_MODULES}

    for name in (name for names_of_level in LEVELS for name in names_of_level):
        assert name.removesuffix(".*") in names
