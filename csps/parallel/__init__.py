"""The mesh of ranks and the transfers between them: named, counted, timed."""
