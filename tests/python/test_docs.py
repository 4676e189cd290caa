"""The documentation: its links and names exist, its figures are drawn, its log has an index."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lemo.settings.base import fields_of
from lemo.settings.finetune import NOT_COMPARED, FinetuneConfig
from source_tree import ROOT, modules, sources, tracked_files

# Text.
pytestmark = pytest.mark.cpu_only

FIGURES = ROOT / "docs/figures"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
# Entries of the log and the table of what was renamed name what there was.
CURRENT = [page for page in PAGES if page.name not in ("LOG.md", "CHANGELOG.md")]
SOURCES = (".py", ".h", ".cpp", ".cu", ".sh", ".md")


FILES = [str(path.relative_to(ROOT)) for path in tracked_files()]
FOLDERS = {str(parent) for name in FILES for parent in Path(name).parents}
TOP = {name.split("/")[0] for name in FILES if "/" in name}


def text_of(page):
    return page.read_text(encoding="utf-8")


def without_code(text):
    """Prose and tables, without fenced and indented code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?:^    .*\n)+", "", text, flags=re.MULTILINE)


def slug(heading):
    """The anchor of a heading, as GitHub and the site make it."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "").lower()).strip())


def headings(text):
    return re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)


def names_of(text):
    """The words that stand in backticks."""
    quoted = re.findall(r"(?<!`)`([^`]+)`(?!`)", without_code(text))
    return {word for words in quoted for word in words.split()}


def is_path(name):
    """Whether a name means a file or folder of the repository; <stem> and the like are patterns."""
    if re.search(r"[<>*{}()=\"']|://", name):
        return False
    return (name.split("/")[0] in TOP and "/" in name) or name.endswith(SOURCES)


def exists(path):
    """A path from the root; or the end of one, for a file that its folder's page names."""
    path = path.rstrip("/")
    if path in FILES or path in FOLDERS or (ROOT / path).exists():
        return True
    return path.endswith(SOURCES) and any(name.endswith(f"/{path}") for name in FILES)


def resolves(name):
    """Whether a dotted name of lemo is there: modules, then attributes."""
    if name.startswith("torch.ops.lemo."):
        importlib.import_module("lemo.ops")
        return hasattr(torch.ops.lemo, name.removeprefix("torch.ops.lemo."))
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            fields = getattr(found, "model_fields", getattr(found, "__annotations__", {}))
            if not hasattr(found, part) and part not in fields:
                return False
            found = getattr(found, part, None)
        return True
    return False


def test_every_page_is_one_of_the_sites():
    def pages(entries):
        for entry in entries:
            value = next(iter(entry.values())) if isinstance(entry, dict) else entry
            yield from pages(value) if isinstance(value, list) else [value]

    site = yaml.safe_load(text_of(ROOT / "mkdocs.yml"))
    listed = set(pages(site["nav"]))
    # Pages that the site takes from the root; see docs/site_pages.py.
    rooted = {"index.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    here = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert listed == here | rooted


def test_the_reference_has_every_public_name():
    """Functions of lemo.ops have the names of their modules, so the page lists them one by one."""
    import lemo
    import lemo.ops

    for module, page in ((lemo, "index"), (lemo.ops, "ops")):
        shown = re.findall(r"^::: (\S+)$", text_of(ROOT / f"docs/api/{page}.md"), re.MULTILINE)
        assert all(resolves(name) for name in shown)
        assert {name.split(".")[-1] for name in shown} == set(module.__all__) - {"__version__"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(
        r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", without_code(text_of(page))
    ):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), f"{page.name} links {target}"
        if anchor:
            anchors = {slug(heading) for heading in headings(text_of(linked))}
            assert anchor in anchors, f"{page.name} links {target}#{anchor}"


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    missing = [name for name in names_of(text_of(page)) if is_path(name) and not exists(name)]
    assert not missing, f"{page.name} names {sorted(missing)}"


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_names_of_lemo_that_a_page_names_exist(page):
    names = [
        name.split("(")[0]
        for name in names_of(text_of(page))
        if re.match(r"(torch\.ops\.)?lemo(\.\w+)+(\(|$)", name)
    ]
    missing = [name for name in names if not resolves(name)]
    assert not missing, f"{page.name} names {sorted(missing)}"


@pytest.mark.parametrize("package", ["models", "selection"])
def test_the_table_of_a_package_has_every_module_of_it(package):
    """Its page lists them, one or several in a row of the first column, or a whole package."""
    rows = re.findall(
        r"^\| (`lemo\..*?) \|", text_of(ROOT / f"docs/design/{package}.md"), re.MULTILINE
    )
    listed = {name for row in rows for name in re.findall(r"`(lemo[\w.]+)`", row)}
    inside = [name for name in modules() if name.startswith(f"lemo.{package}.")]
    packages = {name.rpartition(".")[0] for name in inside}
    there = {
        next((above for above in packages & listed if name.startswith(f"{above}.")), name)
        for name in inside
        if name not in packages or name in listed
    }
    assert {name for name in listed if name.startswith(f"lemo.{package}.")} == there


def test_the_page_of_runs_has_every_setting_that_may_differ():
    text = text_of(ROOT / "docs/design/runs.md").partition("\n## Resuming\n")[2]
    settings = {path for path, _ in fields_of(FinetuneConfig)}
    named = names_of(text.partition("\n## ")[0]) & settings
    # Compared in another way, with the number of processes.
    assert named == {*NOT_COMPARED, "gradient_accumulation"}


def test_words_of_the_code_that_a_page_names_are_in_the_code():
    """Classes, functions and settings in backticks occur somewhere in the sources."""
    code = (*SOURCES, ".toml", ".yaml", ".txt", "Makefile")
    words = set()
    for name in FILES:
        if name.endswith(code) and not name.endswith(("test_docs.py", ".md")):
            words |= set(re.findall(r"\w+", text_of(ROOT / name)))
    for page in CURRENT:
        for name in names_of(text_of(page)):
            # Names of code: CamelCase, or with an underscore inside.
            if not re.fullmatch(r"[A-Za-z_][\w.]*(\(.*\))?", name) or is_path(name):
                continue
            for part in re.findall(r"\w+", name.split("(")[0]):
                if re.search(r"\w_\w|[a-z][A-Z]", part):
                    assert part in words, f"{page.relative_to(ROOT)} names `{name}`"


def test_benchmarks_have_the_options_that_pages_give_them():
    commands = []
    for page in CURRENT:
        text = text_of(page).replace("\\\n", " ")
        commands += re.findall(r"python (benchmarks/\w+\.py)([^`\n]*)", text)
    assert commands
    for script in sorted({script for script, _ in commands}):
        given = " ".join(options for name, options in commands if name == script)
        wanted = set(re.findall(r"--[a-z-]+", given))
        command = [sys.executable, str(ROOT / script), "--help"]
        text = subprocess.run(command, capture_output=True, text=True).stdout if wanted else ""
        assert wanted <= set(re.findall(r"--[a-z-]+", text)), f"{script}: {wanted}"


def test_every_benchmark_that_is_run_is_on_the_page_of_testing():
    text = text_of(ROOT / "docs/design/testing.md")
    scripts = [
        path
        for path in sources("benchmarks")
        if path.parent.name == "benchmarks" and "__main__" in path.read_text()
    ]
    assert len(scripts) > 10
    missing = [path.name for path in scripts if f"benchmarks/{path.name}" not in text]
    assert not missing


def test_the_checks_of_names_can_fail():
    assert is_path("python/lemo/absent.py")
    assert not exists("python/lemo/absent.py")
    assert exists("python/lemo/files.py")
    assert exists("models/enable.py")
    assert resolves("lemo.packing.blocks.BlockLayout.block_starts")
    assert not resolves("lemo.packing.blocks.Absent")
    assert not resolves("lemo.absent.thing")
    assert not resolves("torch.ops.lemo.absent")


def test_the_log_is_newest_first_and_its_index_has_every_entry():
    text = text_of(ROOT / "docs/LOG.md")
    index, _, _ = text.partition("\n## 2")
    entries = re.findall(r"^## (\d{4}-\d\d-\d\d: .+)$", text, re.MULTILINE)
    assert len(entries) >= 45
    dates = [entry[:10] for entry in entries]
    assert dates == sorted(dates, reverse=True)
    assert re.findall(r"^- \[.+\]\(#(.+)\)$", index, re.MULTILINE) == list(map(slug, entries))
    titles = re.findall(r"^- \[(.+)\]\(#", index, re.MULTILINE)
    assert [title.lower() for title in titles] == [entry[12:].lower() for entry in entries]


def test_figures_are_what_their_script_draws(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(FIGURES), *sys.path])
    draw = importlib.import_module("draw")
    for name, figure in draw.FIGURES.items():
        assert text_of(FIGURES / name) == figure(), f"run docs/figures/draw.py for {name}"


def test_figures_name_what_is_in_the_code():
    names = set()
    for path in FIGURES.glob("*.svg"):
        names |= set(re.findall(r"\blemo(?:\.\w+)+", text_of(path)))
    assert len(names) >= 10
    assert not [name for name in names if not resolves(name)]
