"""Scan files: what every structural block of a model did on every token of some texts."""
