# Types of the names that `__init__.py` imports on first use.
from worker.jobs.client import Client as Client
from worker.jobs.client import SyncClient as SyncClient
from worker.jobs.protocol import Job as Job

__version__: str
__all__ = ["Client", "Job", "SyncClient", "__version__"]
