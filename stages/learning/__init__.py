"""How weights are trained, whatever a stage trains: data in, optimizer, and what goes wrong."""
