"""Using the model: tools, retrieval and the engine that is shipped. Nothing here trains."""
