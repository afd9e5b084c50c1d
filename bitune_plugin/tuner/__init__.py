"""The method as a PEFT method. Importing this package registers it with PEFT, as PEFT's own methods do."""

import peft  # first: while it is imported, `bitune_autoload` asks for this package, which then has to be under way

from ..plugins import plugin_manager
from . import host  # noqa: F401  # before the rest: it refuses a PEFT that is too old for it
from .config import BituneConfig
from .full import FullConfig
from .model import BituneModel

__all__ = ["BituneConfig", "BituneModel", "FullConfig"]

plugin_manager().hook.bitune_register(host=peft.__name__)
