"""Memory, traffic and time of a step, before it runs."""
