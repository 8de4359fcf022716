"""Files through which two stages meet: the writer and the reader of each stand side by side."""
