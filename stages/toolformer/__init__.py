"""Let the model find out itself where a call helps: Toolformer."""
