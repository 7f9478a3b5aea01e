"""Verdicts on speed: which blocks are independent, what they show for certain, and how often that is wrong."""
