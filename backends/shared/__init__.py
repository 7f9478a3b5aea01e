"""What several adapters share. No runtime is imported when one of these modules is; only inside its functions."""
