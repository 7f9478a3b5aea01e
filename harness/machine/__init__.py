"""The machine: what it is, how fast its memory and its matrix units are, what it draws.

    cpu, gpu, limits   what the system tells, each parsed from files or from a tool's output
    facts              all of it, as the flat ``hardware_detail`` of a row
    known              profiles of hardware by short name, from data sheets (known.json)
    work, probe        read bandwidth and matrix rate, measured by a short probe; kept per machine
    energy             counters of energy, where the machine has any

Nothing is asked at import. Needs only the standard library and numpy, and Python 3.9, because foreign interpreters
run it.
"""
