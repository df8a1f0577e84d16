"""matplotlib for figures in files: without pyplot, and so without a backend. Import matplotlib from here."""

import os
import sys
from contextlib import suppress

if "matplotlib" in sys.modules or "MPLBACKEND" not in os.environ:
    import matplotlib
else:  # a notebook's MPLBACKEND, inherited here, may not be installed
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
