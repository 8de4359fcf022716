"""The networks: torch modules and how to open them."""
