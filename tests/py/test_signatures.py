"""What `inspect.signature` and `help` say of each native class, method and function is what the stub says."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
from conftest import ROOT
from pyvmm import EventSet, _pyvmm

STUB = ast.parse((ROOT / "python" / "pyvmm" / "_pyvmm.pyi").read_text())
# A name, its kind and whether it has a default.
Parameters = list[tuple[str, str, bool]]


def of_stub(function: ast.FunctionDef | ast.AsyncFunctionDef, is_bound: bool) -> Parameters:
    arguments = function.args
    plain = [*arguments.posonlyargs, *arguments.args]
    required = len(plain) - len(arguments.defaults)
    kinds = ["positional-only"] * len(arguments.posonlyargs) + ["positional or keyword"] * len(arguments.args)
    parameters = [(a.arg, kind, at >= required) for at, (a, kind) in enumerate(zip(plain, kinds, strict=True))]
    parameters = parameters[is_bound:]
    if arguments.vararg:
        parameters.append((arguments.vararg.arg, "variadic positional", False))
    keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    parameters += [(a.arg, "keyword-only", default is not None) for a, default in keywords]
    if arguments.kwarg:
        parameters.append((arguments.kwarg.arg, "variadic keyword", False))
    return parameters


def of_runtime(function: Callable[..., Any], drop_self: bool) -> Parameters:
    parameters = list(inspect.signature(function).parameters.values())[drop_self:]
    return [(p.name, p.kind.description, p.default is not p.empty) for p in parameters]


def decorators(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    return {ast.unparse(decorator) for decorator in function.decorator_list}


def functions(body: list[ast.stmt], owner: Any, path: str) -> Iterator[Any]:
    """Each public function of the stub, what it is at run time, and its parameters in both."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from functions(node.body, getattr(owner, node.name), f"{path}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            said = decorators(node)
            is_property = any(name == "property" or name.endswith(".setter") for name in said)
            if is_property or "overload" in said or (node.name.startswith("_") and node.name != "__new__"):
                continue
            is_static = "staticmethod" in said or not path
            found = owner if node.name == "__new__" else getattr(owner, node.name)
            drop_self = not is_static and node.name != "__new__" and "classmethod" not in said
            yield pytest.param(of_stub(node, not is_static), found, drop_self, id=path + node.name)


@pytest.mark.parametrize(("stub", "function", "drop_self"), list(functions(STUB.body, _pyvmm, "")))
def test_signature_is_that_of_the_stub(stub: Parameters, function: Callable[..., Any], drop_self: bool) -> None:
    assert of_runtime(function, drop_self) == stub


def test_every_default_is_said() -> None:
    functions_of_all = [case.values for case in functions(STUB.body, _pyvmm, "")]
    shown = {str(function): inspect.signature(function).parameters.values() for _, function, _ in functions_of_all}
    assert [name for name, parameters in shown.items() if any(p.default is ... for p in parameters)] == []
    assert inspect.signature(_pyvmm.Events).parameters["event_set"].default == EventSet.IN


def public(owner: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, value in vars(owner).items():
        if name.startswith("_"):
            continue
        yield path + name, getattr(owner, name)
        if isinstance(value, type) and value is not owner:
            yield from public(value, f"{path}{name}.")


def test_help_says_something_of_all_that_is_public() -> None:
    assert [name for name, value in public(_pyvmm, "") if not inspect.getdoc(value)] == []


IN_PYTHON = ["config", "exits", "fuzz", "hostcalls", "kvm", "registers", "snapshots", "stats"]
MODULES = [import_module(f"pyvmm.{name}") for name in IN_PYTHON]


def test_every_public_class_in_python_documents_its_properties() -> None:
    """In the property itself, or in the list of attributes of the class."""
    classes = [c for m in MODULES for c in vars(m).values() if isinstance(c, type) and c.__module__ == m.__name__]
    properties = [
        (owner, name, value)
        for owner in classes
        for name, value in vars(owner).items()
        if not owner.__name__.startswith("_") and not name.startswith("_") and inspect.isdatadescriptor(value)
    ]
    listed = {owner: re.findall(r"^ +(\w+): ", inspect.getdoc(owner) or "", re.MULTILINE) for owner in classes}
    assert len(properties) > 20
    assert [
        (o.__name__, name) for o, name, value in properties if not inspect.getdoc(value) and name not in listed[o]
    ] == []


def docstrings(body: list[ast.stmt], owner: Any, path: str) -> Iterator[tuple[str, str, str]]:
    """Each name of the stub that has a docstring: the name, that docstring, and the one at run time."""
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        found, name = getattr(owner, node.name), path + node.name
        if documentation := ast.get_docstring(node):
            yield name, documentation, inspect.getdoc(found) or ""
        if isinstance(node, ast.ClassDef):
            yield from docstrings(node.body, found, f"{name}.")


def unwrapped(text: str) -> list[str]:
    """The paragraphs and items of a docstring, each in one line."""
    text = re.sub(r"\n {8,}", " ", text)
    return re.sub(r"(?<=\S)\n(?=\S)", " ", text).splitlines()


def test_docstrings_are_those_of_the_stub() -> None:
    found = list(docstrings(STUB.body, _pyvmm, ""))
    assert len(found) > 200
    assert [name for name, stub, native in found if unwrapped(stub) != unwrapped(native)] == []
