"""Maps: vectors as points in a plane, drawn as a picture or as an interactive page."""

from ._maps import draw_html as draw_html
from ._maps import draw_png as draw_png
from ._maps import project as project
