"""One rank's engine: KV pool, plan to tensors, model step, sampling."""
