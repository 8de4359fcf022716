"""Using the model: the engine that is shipped. Never imports what makes the model."""
"""Using the model: tools, retrieval and the engine that is shipped. Nothing here trains."""
