"""Keep what a teacher answers, so that it need not be there later."""
