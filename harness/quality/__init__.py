"""How far a system's logits are from those of the fp32 weights, on a text.

passage     which token ids, in segments spread over a text
baseline    the reference's log-probabilities there, streamed and cached
scores      per position: surprise, divergence, agreement
asked       on what, with which cells, about how long
paired      two cells position by position
intervals   of a mean over segments, and of a fraction
lambada     the last words of LAMBADA's passages
work        one loaded session -> its rows
"""
