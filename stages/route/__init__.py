"""Learn which skill a query wants, and when none of them does."""
