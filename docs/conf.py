"""How the documentation site is built: `make docs`."""

import ast
import inspect
import os
import pathlib
import pydoc
import re
import textwrap

import jax
import numpy as np
import optax
from docutils import nodes
from sphinx.util.typing import stringify_annotation

import embax

project = "embax"
author = "the embax maintainers"
version = release = embax.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

# A page with a header of jupytext is run at each build, and an error in it is an error of the build.
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120  # seconds a cell
nb_merge_streams = True
nb_ipywidgets_js = {}  # pages load nothing from elsewhere
exclude_patterns = ["_jupyter"]
os.environ["JUPYTER_PATH"] = str(pathlib.Path(__file__).with_name("_jupyter"))  # not the reader's own kernels
os.environ["JAX_PLATFORMS"] = "cpu"

default_role = "py:obj"  # a single backtick in a docstring is code, and a link where it names something
add_module_names = False
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_type_aliases = {"ArrayLike": "ArrayLike"}  # of overloads, which _shorten does not see
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "sphinx_book_theme"
html_title = "embax"
html_theme_options = {"navbar_persistent": [], "use_download_button": False}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False

jax.Array.__name__ = jax.Array.__qualname__ = "Array"  # not jaxlib._jax.Array

# What a signature spells out, and the name that the source has for it.
_ALIASES = {
    stringify_annotation(np.typing.ArrayLike, "smart"): "ArrayLike",
    stringify_annotation(np.typing.DTypeLike, "smart"): "DTypeLike",
    stringify_annotation(jax.typing.DTypeLike, "smart"): "DTypeLike",
    stringify_annotation(optax.ScalarOrSchedule, "smart"): "ScalarOrSchedule",
}


def _shorten(app, what, name, obj, options, arguments, returns):
    """Sign a class as its `__init__` is written, where a metaclass or a default hides that; else use aliases."""
    if what == "class" and arguments and ("*args" in arguments or "<" in arguments):
        written = ast.parse(textwrap.dedent(inspect.getsource(obj.__init__))).body[0].args
        del written.args[0]
        return f"({ast.unparse(written)})", returns
    for long, short in _ALIASES.items():
        arguments = arguments and arguments.replace(long, short)
        returns = returns and returns.replace(long, short)
    return arguments, returns


def _describe_field(app, what, name, obj, options, lines):
    """Give a field of a NamedTuple the comment behind it."""
    if lines and lines[0].startswith("Alias for field number"):
        owner, _, field = name.rpartition(".")
        found = re.search(rf"^ +{field}: .*?  # (.+)$", inspect.getsource(pydoc.locate(owner)), re.MULTILINE)
        lines[:] = [found[1]] if found else []


def _describe_map(app, doctree, page):
    """Give the map of words its text on the first page, which takes the figure from another page."""
    if page == "index":
        for image in doctree.findall(nodes.image):
            image.setdefault("alt", "Words of Shakespeare as points, in four groups: ranks, weather, body and family.")


def setup(app):
    """Register the three above."""
    app.connect("autodoc-process-signature", _shorten)
    app.connect("autodoc-process-docstring", _describe_field)
    app.connect("doctree-resolved", _describe_map)
