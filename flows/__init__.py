"""When things run: knows stages by name only; never imports torch."""
