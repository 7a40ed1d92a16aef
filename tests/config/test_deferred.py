"""Composing needs no torch, and the two halves of an axis file are one module."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

from hdm.config.axes import discover
from hdm.config.lines import REPOSITORY


def python(code: str, **kwargs) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env={"PYTHONPATH": str(REPOSITORY)}, **kwargs
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_composing_every_variant_imports_no_torch():
    out = python("""
        import sys
        from hdm.config.axes import discover
        from hdm.config.compose import compose, flatten
        from hdm.config.identity import run_name
        compose([])
        for axis in discover().values():
            for name in axis.names():
                print(axis.name, name)
        heavy = {"torch", "transformers", "diffusers", "mlflow", "webdataset", "optuna"} & set(sys.modules)
        assert not heavy, heavy
    """)
    assert {tuple(line.split()) for line in out.splitlines()} == {(a.name, n) for a in discover().values() for n in a.names()}


def test_types_declared_without_torch_are_the_types_that_build():
    python("""
        import sys
        from hdm.config.compose import compose
        run = compose(["merge=add"])
        assert "torch" not in sys.modules
        from hdm.config.axes import MERGE
        import hdm.model.merge as module
        assert type(run.merge) is module.AddConfig
        cls = MERGE.of(run.merge).load()
        assert "torch" in sys.modules
        assert cls is module.Add or cls.__name__ in dir(module)
    """)


def test_tracebacks_keep_the_lines_of_the_files():
    """Functions of the deferred half report where they really stand."""
    out = python("""
        import importlib, inspect
        from hdm.config.axes import AXES, discover
        discover()
        for axis in AXES.values():
            for variant in axis.variants.values():
                cls = variant.load()
                init = vars(cls).get("__init__") or vars(cls).get("forward")
                if init is not None:
                    code = inspect.unwrap(init).__code__
                    print(variant.module, cls.__name__, code.co_filename, code.co_firstlineno)
    """)
    rows = [line.split() for line in out.splitlines()]
    files = {variant.module for axis in discover().values() for variant in axis.variants.values()}
    assert len(files & {module for module, *_ in rows}) > 15
    for _, name, path, number in rows:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
        node = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
        assert node.lineno <= int(number) <= node.end_lineno
