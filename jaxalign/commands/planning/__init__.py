"""What a stage of a config would take on devices that nobody has to own."""
