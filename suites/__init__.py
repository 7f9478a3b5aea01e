"""pytest front ends over the harness."""
