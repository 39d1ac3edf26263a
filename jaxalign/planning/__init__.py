"""Plans of a run: its steps compiled for devices that need not exist, with memory and bounds."""
