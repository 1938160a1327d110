"""What the documentation site is made of: a hook of mkdocs, and an extension of griffe, which reads the docstrings.

The site has the folders of the repository, so that a relative link leads to the same place in both. Its pages are the
README, CONTRIBUTING.md, the benchmarks' results and docs/*.md; what these link to, files and folders, shown as code;
and the reference, which is made of the docstrings. Nothing is imported: neither torch nor a build is needed.
"""

import ast
import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md"]
PAGES += [f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")]
MODULES = ["fastops", "fastops.functional", "fastops.nn", "fastops.light", "fastops.optim"]
MODULES += ["fastops.memory", "fastops.monitor", "fastops.lightning"]
LINK = re.compile(r"(?<=\]\()[^)#\s]+")
NAMED = "    options: {show_root_heading: true, show_root_toc_entry: true, show_root_full_path: false}\n"
LANGUAGES = {".py": "python", ".cpp": "cpp", ".sh": "sh"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for page in PAGES:
        files.append(File(page, str(ROOT), config.site_dir, config.use_directory_urls))
    linked = {shown_as_code(page, link) for page in PAGES for link in LINK.findall((ROOT / page).read_text())}
    written = {path: code(path) for path in linked - {None}} | {
        f"reference/{name}": reference(name) for name in MODULES
    }
    for path, text in written.items():
        files.append(File.generated(config, f"{path}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Links to what is shown as code lead to the page that shows it."""
    here = page.file.src_uri
    return LINK.sub(lambda link: f"{link[0]}.md" if shown_as_code(here, link[0]) else link[0], markdown)


def shown_as_code(page: str, link: str) -> str | None:
    """The path of the file or folder that a page links to, unless that is a page, too."""
    target = (ROOT / page).parent.joinpath(link).resolve()
    if not target.exists() or not target.is_relative_to(ROOT):
        return None
    path = target.relative_to(ROOT).as_posix()
    return None if path in PAGES else path


def code(path: str) -> str:
    """A page of a file, or of the files of a folder."""
    files = sorted((ROOT / path).iterdir()) if (ROOT / path).is_dir() else [ROOT / path]
    parts = [f"## {file.name}\n\n``` {LANGUAGES.get(file.suffix, 'text')}\n{file.read_text()}```\n" for file in files]
    return f"# {path}\n\n" + "\n".join(parts)


def reference(module: str) -> str:
    """A page of what a module makes public.

    Of a package that collects what its modules name, these follow in turn. What fastops imports has the name of the
    module that it is from more often than not, and is looked up there.
    """
    folder = ROOT / module.replace(".", "/")
    init = (folder / "__init__.py").read_text() if folder.is_dir() else ""
    if module == "fastops":
        found = [node for node in ast.parse(init).body if isinstance(node, ast.ImportFrom)]
        names = {name.name: f"{node.module}.{name.name}" for node in found for name in node.names}
        named = "".join(
            f"::: {path}\n{NAMED}\n" for name, path in sorted(names.items()) if path.count(".") == 2 and name[0] != "_"
        )
        return f"# fastops\n\n::: fastops\n    options: {{members: false}}\n\n{named}"
    parts = [f"# {module}\n\n::: {module}\n"]
    if "public(__name__)" in init:
        parts += [
            f"::: {module}.{path.stem}\n" for path in sorted(folder.glob("*.py")) if "__all__ = [" in path.read_text()
        ]
    return "\n".join(parts)


class Docstrings(griffe.Extension):
    """Docstrings are plain text: examples and tables become code, and nothing in the rest is a mark of Markdown's."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring and not obj.is_alias:
            paragraphs = re.split(r"\n{2,}", obj.docstring.value)
            obj.docstring.value = "\n\n".join(markdown(paragraph) for paragraph in paragraphs)


def markdown(paragraph: str) -> str:
    lines = paragraph.splitlines()
    if lines[0].startswith(">>> "):
        return f"```pycon\n{paragraph}\n```"
    if len(lines) > 1 and all(re.search(r"\S {2,}\S", line) for line in lines):
        return f"```text\n{paragraph}\n```"
    # Each of "Shape: ...", "Dtypes: ...", "Source: ..." is a paragraph.
    paragraph = re.sub(r"\n(?=[A-Z]\w+: )", "\n\n", paragraph)
    pieces = re.split(r"(`[^`]+`)", paragraph)
    return "".join(piece if piece.startswith("`") else re.sub(r"[*<\[]", r"\\\g<0>", piece) for piece in pieces)
