"""Sphinx configuration: MyST pages and the API reference from docstrings; warnings are errors."""

import pathlib
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
html_title = f"fxquant {release}"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}


def _as_written(app, what, name, obj, options, lines):  # noqa: ARG001 - Sphinx calls it so
    """Show docstrings as they are written: plain text, line by line, not reStructuredText."""
    special = str.maketrans({character: f"\\{character}" for character in "*|`_\\"})
    lines[:] = [f"| {line.strip().translate(special)}" if line.strip() else "" for line in lines] + [""]


def setup(app):
    """Register the hook."""
    app.connect("autodoc-process-docstring", _as_written)
