"""The one room that reaches into torch where torch has no public way.

Every name is a row of `names.toml`: what it is for, what happens without it, the versions it was seen in.  `names` says
which of them the torch that is installed has; the other files are by topic, and import no more of torch than their users
did before: what needs Inductor imports it when it is called.
"""

import torch

from mpcompile.torch_internals.names import warn_of_missing

# Before any other file of this room asks for a name.
warn_of_missing(torch.__version__)
