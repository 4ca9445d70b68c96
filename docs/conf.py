"""Sphinx configuration: MyST pages and the API reference from docstrings; warnings are errors."""

import pathlib
import re
import shutil

import fxquant

HERE = pathlib.Path(__file__).parent
shutil.rmtree(HERE / "notebooks", ignore_errors=True)  # Sphinx reads below its own folder only
shutil.copytree(
    HERE.parent / "tutorials", HERE / "notebooks", ignore=lambda _, names: [n for n in names if n[-6:] != ".ipynb"]
)

project = "fxquant"
author = "the fxquant authors"
release = fxquant.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # `make tutorials` runs the notebooks
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["fxquant.css"]
html_show_copyright = False
html_title = f"fxquant {release}"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
autodoc_default_options = {"members": True, "show-inheritance": True}


def _as_written(app, what, name, obj, options, lines):  # noqa: ARG001 - Sphinx calls it so
    """Turn docstrings, which are plain text, into reStructuredText: code in backticks, arguments as a list.

    A line after a full stop that begins with names and a colon ("model: in eval mode; …"), and the lines up to the next
    such, are one item.
    """
    special, told = str.maketrans({character: f"\\{character}" for character in "*|_\\"}), []
    is_item = False
    for before, line in zip(["", *lines], lines, strict=False):
        parts = [part if i % 2 else part.translate(special) for i, part in enumerate(line.strip().split("`"))]
        text = "".join(f"``{part}``" if i % 2 else part for i, part in enumerate(parts))
        names = re.match(r"((?:[a-z]\w*, )*[a-z]\w*): ", line.strip())
        if names is not None and (not before or before.rstrip()[-1:] in ".;:"):
            marked = ", ".join(f"``{name}``" for name in names[1].split(", "))
            told += [] if is_item else [""]
            told.append(f"- {marked}: {text[len(names[0].translate(special)) :]}")
            is_item = True
        else:
            is_item = is_item and bool(text)
            told.append(f"  {text}" if is_item else text)
    lines[:] = [*told, ""]


def setup(app):
    """Register the hook."""
    app.connect("autodoc-process-docstring", _as_written)
