"""Workers of pytest-xdist share the cores of the machine, and so do the processes that their tests start."""
import os

if workers := os.environ.get('PYTEST_XDIST_WORKER_COUNT'): # before torch is imported
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1)//int(workers))))
