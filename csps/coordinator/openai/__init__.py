"""An HTTP endpoint that speaks OpenAI's protocol: chat completions, completions, models."""
