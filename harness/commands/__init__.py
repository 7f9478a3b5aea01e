"""What each command of the entry point does: asks the harness, and shows the answer."""
