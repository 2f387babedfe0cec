"""One rank's process: joins the coordinator, runs the two lanes."""
