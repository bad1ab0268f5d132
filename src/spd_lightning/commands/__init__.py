"""One module per command. Their help is light: torch and friends are imported when a command really runs."""
