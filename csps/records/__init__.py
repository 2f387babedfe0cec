"""What a run leaves behind, live or simulated, and what is made of it."""
