"""How what was learnt is measured, and by what a stage decides whether to keep it."""
