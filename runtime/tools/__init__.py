"""Tools that a model may call: a calculator, a small Python and a few shell commands, fenced in."""
