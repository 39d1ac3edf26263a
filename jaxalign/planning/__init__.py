"""A run's steps compiled for devices that need not be there: memory, work and bounds."""
