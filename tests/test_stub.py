"""The hand-kept stub of the extension says what the extension has."""

import ast
import inspect
import re
from pathlib import Path

import sparseprop
from sparseprop import _native

STUB = Path(sparseprop.__file__).parent / "_native.pyi"


def stub_parameters(tree: ast.Module) -> dict[str, list[str]]:
    """Parameter names by qualified name, of functions and methods."""
    found = {}
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for member in members:
            if isinstance(member, ast.FunctionDef):
                arguments = member.args
                names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
                found[prefix + member.name] = [name for name in names if name != "self"]
    return found


def native_parameters() -> dict[str, list[str]]:
    """The same from the signatures that pybind11 writes into docstrings."""
    found = {}
    for name, value in vars(_native).items():
        if name.startswith("_"):
            continue
        if inspect.isclass(value):
            found |= {f"{name}.{key}": parameters(item) for key, item in public_members(value)}
        elif callable(value):
            found[name] = parameters(value)
    return found


def public_members(cls: type) -> list[tuple[str, object]]:
    return [(key, item) for key, item in vars(cls).items() if key == "__init__" or not key.startswith("_")]


def parameters(value: object) -> list[str]:
    value = value.__func__ if isinstance(value, staticmethod) else value
    if isinstance(value, property):
        return []
    signature = (value.__doc__ or "").partition("\n")[0]
    return [name for name in re.findall(r"[(,] ?\*?\*?(\w+)(?=:)", signature) if name != "self"]


def test_stub_and_extension_have_the_same_functions_with_the_same_parameters():
    assert stub_parameters(ast.parse(STUB.read_text())) == native_parameters()
