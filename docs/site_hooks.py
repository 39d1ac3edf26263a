"""Hooks of the site: pages from the whole repository, and formulas as MathML."""

import ast
import html
import re
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "notebooks", "experiments", "benchmarks", "tpu", "gpu")
MATH_BLOCK = re.compile(r"^( *)\.\. math:: ?(.*(?:\n\1 +.*)*)", re.M)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Lay out the site as the repository is, so that relative links work in both."""
    pages = [file for file in files if file.src_dir != config.docs_dir]
    paths = [*ROOT.glob("*.md"), ROOT / "LICENSE", ROOT / "CITATION.cff"]
    for folder in FOLDERS:
        paths += sorted((ROOT / folder).rglob("*"))
    for path in paths:
        name = path.relative_to(ROOT)
        if path.is_file() and not any(part.startswith((".", "__py")) for part in name.parts):
            pages.append(File(str(name), str(ROOT), config.site_dir, use_directory_urls=True))
    return Files(pages)


def on_page_markdown(markdown: str, **_) -> str:
    """Drop the mark of examples that the tests do not run, which the site's Markdown rejects."""
    return markdown.replace("```python no-run", "```python")


def on_page_content(content: str, page: Page, **_) -> str:
    r"""Replace formulas, which arithmatex writes as \(...\) and \[...\], by MathML.

    Raises:
      PluginError: a formula has an unknown command, or an exported name is not on its page.
    """
    _check_exports(content, page.file.src_uri)

    def mathml(match: re.Match[str]) -> str:
        formula = html.unescape(match[2][2:-2]).replace(r"\arg", r"\operatorname{arg}")
        for side, sizes in (("left", r"\\[bB]igg?l\b"), ("right", r"\\[bB]igg?r\b")):
            formula = re.sub(sizes, rf"\\{side}", formula)
        result = convert(formula, "block" if match[2].startswith(r"\[") else "inline")
        if "\\" in result:
            raise PluginError(f"{page.file.src_uri}: unknown command in the formula {formula}")
        return result

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', mathml, content, flags=re.S)


def _check_exports(content: str, source: str) -> None:
    """See to it that the page of a package shows all that the package exports."""
    if source.startswith("docs/api/"):
        package = Path(source).stem
        path = ROOT / "jaxalign" / package / "__init__.py"
        for name in _exported(path) if path.exists() else ():
            if f'id="jaxalign.{package}.{name}"' not in content:
                raise PluginError(f"{source}: {name} is exported, but the page does not show it")


class Sources(griffe.Extension):
    """Formulas of docstrings as Markdown, and functions that have the name of their module."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        """Turn `.. math::` blocks and :math: roles into $$...$$ and $...$."""
        if obj.docstring:
            text = re.sub(r":math:`([^`]*)`", r"$\1$", obj.docstring.value)
            obj.docstring.value = MATH_BLOCK.sub(_markdown_block, text)

    def on_package(self, *, pkg: griffe.Module, **_) -> None:
        """Show the exported function `jaxalign.losses.ipo`, not the module of that name."""
        for package in pkg.modules.values():
            exported = [package.members[name] for name in _exported(Path(str(package.filepath)))]
            for member in exported:
                if isinstance(member, griffe.Alias):
                    member.resolve_target()
                    member.public = True
            for member in exported:
                if member.is_module:
                    alias = griffe.Alias(member.name, member.members[member.name], parent=package)
                    alias.public = True
                    package.members[member.name] = alias


def _exported(package: Path) -> list[str]:
    """The names in a package's `__all__`, or those that it imports as themselves."""
    names = []
    for node in ast.parse(package.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
        if isinstance(node, ast.ImportFrom):
            names += [one.name for one in node.names if one.name == one.asname]
    return names


def _markdown_block(match: re.Match[str]) -> str:
    indent, lines = match[1], match[2].strip().splitlines()
    return "\n".join(indent + line.strip() for line in ("$$", *lines, "$$"))
