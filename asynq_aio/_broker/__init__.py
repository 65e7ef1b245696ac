"""Redis: a module per stage of a task's life, a .lua per transition.

`store.py` is the one door; `connect.py`, `topology.py`, `lanes.py` and `waits.py` are what it is made of. The others
read in the order of a task's life: enqueue, dequeue, leases, finish, forward, recovery, retention; beside it: presence,
cancel, results.
"""
