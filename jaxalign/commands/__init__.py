"""What each command of the door does: configs are read here and nowhere below."""
