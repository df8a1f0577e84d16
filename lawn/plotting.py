"""matplotlib for figures that go to files, imported from here: without pyplot, and so without a backend."""

import os
import sys
from contextlib import suppress

if "matplotlib" in sys.modules or "MPLBACKEND" not in os.environ:
    import matplotlib
else:  # a notebook leaves it to what it starts, where that backend may not be installed: the import would fail
    _backend = os.environ.pop("MPLBACKEND")
    import matplotlib

    os.environ["MPLBACKEND"] = _backend
    with suppress(ValueError):
        matplotlib.rcParams["backend"] = _backend

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

rc_context = matplotlib.rc_context
__all__ = ["Axes", "Figure", "Line2D", "rc_context"]
