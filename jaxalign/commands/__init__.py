"""What each command does: configs are read here and nowhere below."""
