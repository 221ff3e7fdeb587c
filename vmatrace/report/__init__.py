"""Makes text of what was found: pure functions from values to lines; opens no file, prints nothing."""
