"""Network deconvolution (Ye et al., ICLR 2020) for PyTorch: convolutions over whitened patches, fast."""

import os as _os
from importlib.metadata import PackageNotFoundError as _NotInstalled
from importlib.metadata import version as _version

from tdeconv.backends import BackendUnavailable, use_backend
from tdeconv.calibrate import calibrate_deconv
from tdeconv.channel_deconv import ChannelDeconv
from tdeconv.checkpoint import checkpoint_contexts
from tdeconv.conversion_report import ConversionReport
from tdeconv.convert import convert_deconv
from tdeconv.distributed import convert_sync_deconv
from tdeconv.explain import explain
from tdeconv.functional import delinear, fast_deconv, fold_deconv, inverse_sqrt, patch_moments
from tdeconv.fuse import fuse_deconv_eval
from tdeconv.layers import Delinear, FastDeconv, FastDeconv1d, FastDeconv3d
from tdeconv.update_stats import update_stats

# In a source tree the subpackages `bench` and `kernels` lie beside this folder, in a wheel within it. Here a source
# tree takes its own. Otherwise it would need an installation to find them, and where another checkout is installed it
# would get that one's: two source trees mixed, without a word.
if not _os.path.isdir(_os.path.join(__path__[0], "kernels")):
    __path__.append(_os.path.dirname(__path__[0]))

try:
    __version__ = _version("tdeconv")
except _NotInstalled:  # the source tree on sys.path, not installed
    __version__ = "0+source"

__all__ = [
    "BackendUnavailable",
    "ChannelDeconv",
    "ConversionReport",
    "Delinear",
    "FastDeconv",
    "FastDeconv1d",
    "FastDeconv3d",
    "calibrate_deconv",
    "checkpoint_contexts",
    "convert_deconv",
    "convert_sync_deconv",
    "delinear",
    "explain",
    "fast_deconv",
    "fold_deconv",
    "fuse_deconv_eval",
    "inverse_sqrt",
    "patch_moments",
    "update_stats",
    "use_backend",
]
