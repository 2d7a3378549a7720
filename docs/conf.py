"""Sphinx settings: Markdown pages and the docstrings of the public names."""

project = "torchlathe"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "alabaster"
exclude_patterns = ["_build"]
autodoc_typehints = "description"
