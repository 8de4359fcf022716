"""Using the model: the engine that is shipped. Never imports what makes the model."""
