"""Sphinx configuration: MyST pages, docstrings in Google style, warnings are errors."""

from __future__ import annotations

import inspect
import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import ringattn
from ringattn.geometry.masks import REGISTERED_MASKS

project = "ringattn"
author = "The ringattn authors"
copyright = "the ringattn authors"
release = version = ringattn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "examples", "hf_architectures.md"]
html_theme = "furo"
html_title = "ringattn"
html_show_sphinx = False

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

default_role = "literal"  # `name` in a docstring is code
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: name for name in ("Group", "Masks", "Ints")}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Communication", "Source"]

_ONE_LINE_SECTION = re.compile(r"^(Communication|Source): +(\S.*)$")
_COLON = "\ue000"  # stands for a colon while napoleon looks for types
_SECTION = re.compile(r"^(Args|Returns|Raises|Communication|Source):")


def _as_restructured_text(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Puts the docstrings of this package into the form that napoleon and docutils expect.

    A section may begin on the line of its name (`Source: a paper`), and sections stand close together. A drawing is
    a block set in by four, without a double colon before it. And a colon in what is returned, or in what a
    property is, does not follow a type.
    """
    if what == "property":
        lines[:1] = [line.replace(":", _COLON) for line in lines[:1]]
    found: list[str] = []
    in_sections = drawing = False
    for line in lines:
        if _SECTION.match(line):
            in_sections = True
            if found and found[-1]:
                found.append("")
        if one_line := _ONE_LINE_SECTION.match(line):
            found += [f"{one_line[1]}:", f"    {one_line[2]}"]
            continue
        if line == "Returns:":
            found.append(":returns:")
            continue
        indented = line.startswith("    ")
        if indented and not in_sections and not drawing and found and not found[-1]:
            found += ["::", ""]
            drawing = True
        elif line and not indented:
            drawing = False
        found.append(line)
    lines[:] = found


def _with_colons(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Puts back the colons that napoleon was not to see."""
    lines[:] = [line.replace(_COLON, ":") for line in lines]


class MaskTable(SphinxDirective):
    """A table of the registered masks: how each is made, and the first line of its docstring."""

    def run(self) -> list[nodes.Node]:
        """Returns the table."""
        rows = ["| mask | meaning |", "|---|---|"]
        for constructor in (ringattn.full, *(known.constructor for known in REGISTERED_MASKS.values())):
            parameters = inspect.signature(constructor).parameters.values()
            arguments = ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters)
            summary = inspect.getdoc(constructor).partition("\n")[0]
            rows.append(f"| `{constructor.__name__}({arguments})` | {summary} |")
        return self.parse_text_to_nodes("\n".join(rows))


def setup(app: Sphinx) -> None:
    """Registers the table of masks, and the conversions of docstrings before and after napoleon's own."""
    app.add_directive("mask-table", MaskTable)
    app.connect("autodoc-process-docstring", _as_restructured_text, priority=400)
    app.connect("autodoc-process-docstring", _with_colons, priority=600)
