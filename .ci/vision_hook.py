"""Lets `import torchvision` work in the environment that `make` builds, beside a CPU's torch that it was not built for.

`make` puts this file into that environment, where Python runs it at every start: so it loads nothing until torchvision
has been asked for. It is not part of the package: what others have installed is for them to mend.
"""

import sys


class _Descriptions:
    """Looks on while modules are imported: torchvision describes its operators after it has tried to load them."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision._meta_registrations":
            return
        try:
            from tdeconv.vision import declare_operators  # noqa: PLC0415  # it loads torch, which has been by now
        except ImportError:  # an older tdeconv, while one looks for the commit that broke something
            return
        declare_operators()


sys.meta_path.insert(0, _Descriptions)
