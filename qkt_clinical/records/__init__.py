"""One typed model per JSON file, used by those who write it and those who read it."""
