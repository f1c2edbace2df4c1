"""save and restore: Orbax checkpoints of tables and their training, independent of devices and layouts."""

from ._restore import restore as restore
from ._save import save as save
