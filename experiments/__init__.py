"""The paper's tables and figures as data: which runs they need, how to run them, how to report them."""
