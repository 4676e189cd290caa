"""Hooks of the site (mkdocs.yml): pages from the repository's root, and links out of docs/."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# Pages of the site that are files of the repository's root, where GitHub looks for them.
PAGES = {"index.md": "README.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
PAGES |= {"CHANGELOG.md": "CHANGELOG.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#\s]*)(#[^)\s]*)?\)")


def on_files(files, config):
    """Adds the pages of the root."""
    for page, name in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as a page has them in the repository become links of the site."""
    source = PAGES.get(page.file.src_uri)
    folder = ROOT if source else (Path(config.docs_dir) / page.file.src_uri).parent
    return LINK.sub(lambda link: _of_site(link, folder, page.file.src_uri), markdown)


def _of_site(link, folder, page):
    mark, text, target, anchor = link.groups(default="")
    path = (folder / target).resolve()
    if not path.exists():
        return link.group()  # the strict build names it
    names = {ROOT / name: site for site, name in PAGES.items()}
    docs = ROOT / "docs"
    if path in names:
        uri = names[path]
    elif path.is_file() and path.is_relative_to(docs):
        uri = path.relative_to(docs).as_posix()
    else:
        # A file or folder of the repository that is no page: its name, without a link.
        return f"{text} (`{path.relative_to(ROOT)}`)" if f"`{text}`" != text else text
    up = "../" * page.count("/")
    return f"{mark}[{text}]({up}{uri}{anchor})"
