"""What jaxalign claims about speed and memory, each with the command that shows it."""
