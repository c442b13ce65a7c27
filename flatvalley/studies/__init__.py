"""Studies: each asks one question, and leaves a run folder with a report that answers it."""
