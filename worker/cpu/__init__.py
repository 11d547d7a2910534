"""The CPU backend. Its NumPy ops define the ops of every other backend. Next: `runner.py`."""
