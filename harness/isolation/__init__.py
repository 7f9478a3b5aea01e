"""A backend in a process of its own: frames, the worker on the far side, the session on this one."""
