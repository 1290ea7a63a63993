"""Behind every door: files and the command line."""
