"""Request traces: what comes when, how long it is, and what it shares with what came before."""
