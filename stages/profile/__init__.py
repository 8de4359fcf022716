"""Which blocks of a teacher matter, and in which directions."""
