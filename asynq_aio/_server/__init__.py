"""A task is worked on.

Read `server.py` (what is wired to what), `duties/processor.py` (tasks come in), `execution.py` (one task), `outcome.py`
(what becomes of it), `duties/syncer.py` (it is written), then the other duties.
"""
