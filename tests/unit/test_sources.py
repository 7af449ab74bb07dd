"""The source files of a stage: everything that it imports, however it imports it, and the data beside it."""

import re
from pathlib import Path

import pytest

from tunemap import sources as module
from tunemap.sources import PACKAGE_ROOT, planned_digest, sources


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of its own in place of tunemap, written file by file."""
    root = tmp_path / "tunemap"

    def write(**files: str) -> Path:
        for name, text in {"__init__": "", **files}.items():
            path = root / f"{name.replace('__slash__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return root

    monkeypatch.setattr(module, "PACKAGE_ROOT", root)
    return write


def found(folder: Path, text: str) -> list[str]:
    script = folder / "script.py"
    module._imported_files.cache_clear()
    script.write_text(text)
    first, *rest = sources(script)
    assert first == script
    return [str(path.relative_to(folder / "tunemap")) for path in rest]


@pytest.mark.parametrize(
    "text",
    [
        "import tunemap.a",
        "import tunemap.a as x",
        "from tunemap import a",
        "from tunemap.a import thing",
        "def f():\n    from tunemap.a import thing",
        "class C:\n    def f(self):\n        import tunemap.a",
        "if True:\n    import os, tunemap.a",
        "try:\n    import tunemap.a\nexcept ImportError:\n    pass",
        "try:\n    pass\nexcept ImportError:\n    import tunemap.a",
        "try:\n    pass\nfinally:\n    import tunemap.a",
        "for x in y:\n    pass\nelse:\n    import tunemap.a",
        "match x:\n    case 1:\n        import tunemap.a",
        "async def f():\n    async with x:\n        import tunemap.a",
        "command = ['python', '-m', 'tunemap.a']",
        "import importlib\nimportlib.import_module('tunemap.a')",
    ],
)
def test_each_way_to_import_counts(package, tmp_path, text):
    package(a="", b="")
    assert found(tmp_path, text) == ["__init__.py", "a.py"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "import os",
        "import tunemapper.a",
        "from os import path",
        "x = 'see tunemap.a'",
        "x = 'tunemap'",
        "# import tunemap.a",
    ],
)
def test_what_is_no_import_of_the_package(package, tmp_path, text):
    package(a="")
    assert found(tmp_path, text) == []


def test_long_texts_that_begin_like_a_module_are_no_modules(package, tmp_path):
    package(a="")
    assert found(tmp_path, f"'''tunemap.a {'x' * 5000}'''\ny = 'tunemap.a/../../b'\nz = 'tunemap.a\\0'") == []


def test_the_closure_goes_through_packages_and_relative_imports(package, tmp_path):
    package(
        a="from tunemap.p import b",
        p__slash____init__="from .e import x",
        p__slash__b="from .c import x\nfrom . import d\nfrom ..top import y",
        p__slash__c="",
        p__slash__d="",
        p__slash__e="",
        p__slash__unused="",
        top="def f():\n    import tunemap.late",
        late="import tunemap.a",
        unused="",
    )
    assert found(tmp_path, "import tunemap.a") == [
        "__init__.py", "a.py", "late.py", "p/__init__.py", "p/b.py", "p/c.py", "p/d.py", "p/e.py", "top.py"
    ]  # fmt: skip


def test_data_files_belong_to_the_modules_of_their_folder(package, tmp_path):
    root = package(a="", p__slash____init__="", p__slash__b="", q__slash____init__="")
    for name in ("p/table.yaml", "p/style.css", "p/page.html.j2", "p/notes.md", "q/other.yaml"):
        (root / name).write_text("x")
    assert found(tmp_path, "import tunemap.p.b") == [
        "__init__.py", "p/__init__.py", "p/b.py", "p/page.html.j2", "p/style.css", "p/table.yaml"
    ]  # fmt: skip


def test_names_inside_a_module_lead_to_the_module(package, tmp_path):
    package(a="class Thing: ...")
    assert found(tmp_path, "from tunemap.a import Thing") == ["__init__.py", "a.py"]
    assert found(tmp_path, "x = 'tunemap.a.Thing'") == ["__init__.py", "a.py"]


def test_the_digest_changes_with_what_is_used_and_with_nothing_else(package, tmp_path):
    root = package(a="x = 1", b="x = 1")
    script = tmp_path / "script.py"
    script.write_text("import tunemap.a")

    def now() -> str:
        module._imported_files.cache_clear()
        module._digest_of.cache_clear()
        return module.digest(script)

    first = now()
    (root / "b.py").write_text("x = 2")
    (root / "a.py").touch()
    assert now() == first
    (root / "a.py").write_text("x = 2")
    edited = now()
    script.write_text("import tunemap.b")
    assert len({first, edited, now()}) == 3


def test_jobs_are_told_what_their_workflow_found(package, tmp_path, monkeypatch):
    package(a="")
    scripts = [tmp_path / name for name in ("train.py", "evaluate.py")]
    for script in scripts:
        script.write_text("import tunemap.a")
    environment: dict[str, str] = {}
    planned = [planned_digest(script, environment) for script in scripts]
    assert planned == [module.digest(script) for script in scripts]
    in_a_job = dict(environment)
    monkeypatch.setattr(module, "sources", lambda script: pytest.fail("read again"))
    assert [planned_digest(script, in_a_job) for script in scripts] == planned


# --- the package itself -----------------------------------------------------------------------------------


def names(repository: Path, stage: str) -> set[str]:
    script = repository / "workflow/scripts" / f"{stage}.py"
    return {str(path.relative_to(PACKAGE_ROOT)) for path in sources(script)[1:]}


def test_the_order_is_fixed(repository):
    script = repository / "workflow/scripts/train_run.py"
    first = sources(script)
    module._imported_files.cache_clear()
    assert sources(script) == first
    assert len(set(first)) == len(first)
    assert all(path.is_file() for path in first)


def test_every_file_leads_to_what_a_look_at_all_of_its_text_leads_to(monkeypatch):
    files = [path for path in sorted(PACKAGE_ROOT.rglob("*.py")) if path.name != "__init__.py"]
    module._imported_files.cache_clear()
    quick = [set(module._imported_files(path, module._module_of(path))) for path in files]
    module._imported_files.cache_clear()
    monkeypatch.setattr(module, "MAY_START_A_MODULE", re.compile(""))
    assert [set(module._imported_files(path, module._module_of(path))) for path in files] == quick
    assert sum(map(len, quick)) > len(files)


def test_the_trainer_is_found_though_it_is_started_by_name(repository):
    assert {"training/worker.py", "training/loop.py", "methods/apply.py"} <= names(repository, "train_run")


def test_no_stage_depends_on_a_later_one(repository):
    assert not {name for name in names(repository, "train_run") if name.startswith("report/")}
    assert not {name for name in names(repository, "make_report") if name.startswith(("training/", "models/"))}
    assert not {name for name in names(repository, "prepare_dataset") if name.startswith(("training/", "report/"))}
    assert "report/style.css" in names(repository, "make_report")
