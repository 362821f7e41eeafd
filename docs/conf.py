"""Sphinx configuration: `make docs` builds docs/_build/index.html."""

from __future__ import annotations

import sys
from pathlib import Path

import moe_ext

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

project = "moe_ext"
copyright = "the moe_ext authors"
version = release = moe_ext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "dispatch_bytes.md"]

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "separated"
autodoc_default_options = {"exclude-members": "__new__"}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"moe_ext {version}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
