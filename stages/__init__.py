"""Making the model: one folder a stage, plus the contract that all stages share."""
