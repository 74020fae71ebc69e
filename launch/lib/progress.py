"""Where the progress of a run is shown and written."""

import aquant_jax as aq
from aquant_jax.plan.network import Network
from aquant_jax.reconstruction.observer import default_observer
from launch.lib import hosts
from launch.lib.run_directory import RunDirectory


class DirectoryObserver(aq.Observer):
    """Writes the log of a run directory, which an accepted restart has taken over."""

    def __init__(self, directory: RunDirectory):
        self.directory = directory

    def on_start(self, net: Network) -> None:
        self.directory.begin()

    def on_block_end(self, report: aq.BlockReport) -> None:
        self.directory.log(report._asdict())


def observer(directory: RunDirectory) -> aq.Observer:
    """The observer of a run. Of several processes, the first shows and writes the progress."""
    if not hosts.is_first():
        return aq.Observer()
    return aq.Observers(default_observer(), DirectoryObserver(directory))
