"""No op without all its pieces: walks the registered schemas and the sections of csrc/schemas.cpp."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import moe_ext
from moe_ext import reference

ROOT = Path(__file__).resolve().parent.parent


def read_families() -> dict[str, str]:
    """Op name -> family, as the sections of schemas.cpp have it."""
    families, family = {}, ""
    for line in (ROOT / "csrc/schemas.cpp").read_text().splitlines():
        if section := re.match(r"\s*// ---- (\w+):", line):
            family = section[1]
        for name in re.findall(r'"(\w+)\(', line):
            families[name] = family
    return families


FAMILIES = read_families()
REGISTERED = {
    schema.name.removeprefix("moe_ext::")
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith("moe_ext::")
}


def is_backward(name: str) -> bool:
    return name.endswith("_backward")


def is_public(name: str) -> bool:
    """An op `name_general` is the way that the public function `name` takes for its rarer arguments."""
    return not is_backward(name) and not name.endswith("_general")


def has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"moe_ext::{name}", key)


def test_schemas_file_is_what_is_registered():
    assert set(FAMILIES) == REGISTERED and len(REGISTERED) >= 20


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_kernels_fake_and_autograd(name):
    assert has_kernel(name, "CPU"), f"{name}: no CPU kernel"
    if moe_ext.build_info()["cuda"] and torch.version.cuda:
        assert has_kernel(name, "CUDA"), f"{name}: no CUDA kernel"
    entry = torch._library.simple_registry.singleton.find(f"moe_ext::{name}")
    assert entry.fake_impl.kernel is not None, f"{name}: no fake"
    module = importlib.import_module(f"moe_ext.ops.{FAMILIES[name]}")
    declared = f"moe_ext::{name}" in getattr(module, "NOT_DIFFERENTIABLE", ())
    formula = has_kernel(name, "Autograd") or has_kernel(name, "AutogradCPU")
    assert formula != declared, f"{name}: an autograd formula, or an entry in NOT_DIFFERENTIABLE, and not both"


@pytest.mark.parametrize("name", sorted(name for name in REGISTERED if is_public(name)))
def test_twin_has_the_public_signature(name):
    """A backward op's twin is autograd through the twin of its forward."""
    public, twin = getattr(moe_ext, name), getattr(reference, name)
    assert name in moe_ext.__all__
    assert public.__module__ == f"moe_ext.ops.{FAMILIES[name]}"
    assert twin.__module__ == f"moe_ext.reference.{FAMILIES[name]}"
    assert public is not twin and public.__doc__ and "Raises" in public.__doc__
    ours, theirs = inspect.signature(public).parameters, inspect.signature(twin).parameters
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]
    assert [p.kind for p in ours.values()] == [p.kind for p in theirs.values()]


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_sources_lie_where_they_should(name):
    folder, base = ROOT / "csrc" / FAMILIES[name], name.removesuffix("_backward").removesuffix("_general")
    base = base if (folder / f"{base}.h").exists() else name
    for file in (f"{base}.h", f"{base}_cpu.cpp", f"{base}_cuda.cu"):
        assert (folder / file).exists(), f"{name}: no {folder / file}"
        if not file.endswith(".h"):
            assert f'm.impl("{name}"' in (folder / file).read_text(), f"{name} is not registered in {file}"


def opchecked(path: Path) -> set[str]:
    """Names of the ops `torch.ops.moe_ext.<name>` (or `ops.<name>.default`) in a file that calls opcheck."""
    tree = ast.parse(path.read_text())
    names = {
        node.value.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "default" and isinstance(node.value, ast.Attribute)
    }
    calls = any(isinstance(node, ast.Attribute) and node.attr == "opcheck" for node in ast.walk(tree))
    return names if calls else set()


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_opcheck_and_bench_entry(name):
    family = FAMILIES[name]
    assert name in opchecked(ROOT / f"tests/test_{family}.py"), f"{name}: no opcheck in tests/test_{family}.py"
    assert (ROOT / f"tests/gpu/test_gpu_{family}.py").exists()
    bench = importlib.import_module(f"bench.bench_{family}")
    assert name in bench.OPS, f"{name}: no entry in bench/bench_{family}.py"


@pytest.mark.parametrize("name", sorted(name for name in REGISTERED if is_public(name)))
def test_readme_lists_the_op(name):
    assert f"`{name}`" in (ROOT / "README.md").read_text()
