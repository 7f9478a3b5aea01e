"""Everything that needs a GPU, as a list of steps that one command runs.

steps     the list, as data
work      one step: its commands, each in a process of its own, and their rows
record    the profile of the machine, and rows as they are kept
overflow  the checkpoint whose fp16 overflow a localization has to find
ablate    decode with one thing changed at a time
"""
