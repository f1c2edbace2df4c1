"""save and restore: tables and the state of their training as Orbax checkpoints that know nothing of devices."""

from ._restore import restore as restore
from ._save import save as save
